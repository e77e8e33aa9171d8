"""Score a run on scikit-learn's digits: a classifier trained on the real digits looks at 1,000 samples.

    python examples/03_evaluate_digits.py runs/latest --sampler heun --steps 20 --out results.json

- accuracy: how often the classifier (an SVM, over 98 % right on held-out digits) predicts the requested class;
- Fréchet distance to the held-out digits in its ten class scores (Heusel et al. 2017, eq. 6);
- precision and recall of the pixels to the held-out digits, k = 3 (Kynkäänniemi et al. 2019, eq. 1).

The same numbers for real training digits are printed beside them: a perfect model would have these. Both the samples
and the training digits are cut to as many as there are held-out digits, ten times over, and averaged.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.spatial.distance import cdist
from sklearn.svm import SVC

import genkit
from genkit.cli.scripts import ScriptParser, run_script
from genkit.core import Draw
from genkit.data import DATA


def load_digits(split: Literal["train", "test"]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels ``[N, 64]`` in 0..16, as scikit-learn has them, and classes ``[N]``."""
    data = DATA["digits"]().load(split)
    batch = data.batch(torch.arange(len(data)), Draw((0,), 0, len(data)))
    return batch.x.flatten(1).numpy() * (16 / 255), batch.cond["label"].numpy()


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`` of two sets ``[N, D]``."""
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    trace_of_root = np.sqrt(np.linalg.eigvals(cov_a @ cov_b).real.clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * trace_of_root)


def coverage(a: np.ndarray, b: np.ndarray, k: int = 3) -> float:
    """The share of ``b`` inside the union of balls around ``a`` that reach to each one's k-th neighbour."""
    radius = np.sort(cdist(a, a), axis=1)[:, k]
    return float((cdist(b, a) <= radius).any(1).mean())


def compare(x: np.ndarray, y: np.ndarray, classifier: SVC, size: int = 359) -> dict[str, float]:
    """Distances of samples ``x`` to held-out ``y``: the mean over ten random subsets of ``size``."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(10):
        subset = x[rng.permutation(len(x))[:size]]
        distance = frechet_distance(classifier.decision_function(subset), classifier.decision_function(y))
        rows.append((distance, coverage(y, subset), coverage(subset, y)))
    values = np.array(rows)
    means = [round(float(mean), 4) for mean in values.mean(0)]
    spread = round(float(values[:, 0].std()), 4)
    return {"frechet": means[0], "precision": means[1], "recall": means[2], "frechet_sd": spread}


def evaluate(run: genkit.Run, n: int = 1000, seed: int = 0, **sampling: Any) -> dict[str, Any]:
    """Accuracy, distances and settings of ``n`` samples, ready for JSON."""
    x, y = load_digits("train")
    test_x, test_y = load_digits("test")
    classifier = SVC(gamma=0.001).fit(x, y)  # pyright: ignore[reportArgumentType]  # scikit-learn takes floats
    samples, cond = run.sample(n, seed=seed, **sampling)
    pixels = samples.flatten(1).numpy() * (16 / 255)
    return {
        "accuracy": float((classifier.predict(pixels) == cond["label"].numpy()).mean()),
        "accuracy_real_held_out": round(classifier.score(test_x, test_y), 4),
        "samples": compare(pixels, test_x, classifier),
        "real_train": compare(x, test_x, classifier),
        "settings": {"run": run.directory.name, "weights": run.weights, "n": n, "seed": seed, **sampling},
        "genkit": genkit.__version__,
    }


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("run", help="a run directory, such as runs/latest")
    parser.add_argument("--n", type=int, default=1000, help="number of samples")
    parser.add_argument("--sampler", help="default: the objective's usual one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    run = genkit.load(args.run)
    if run.spec.shape != (1, 8, 8):
        parser.error(f"this script scores 8x8 digits; {args.run} has samples of shape {run.spec.shape}")
    sampling = {"sampler": args.sampler, "steps": args.steps, "guidance": args.guidance}
    text = json.dumps(evaluate(run, args.n, args.seed, **sampling), indent=1)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    run_script(main)
