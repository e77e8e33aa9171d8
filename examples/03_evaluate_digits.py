"""How good is a run on scikit-learn's digits? A classifier trained on the real ones judges 1,000 samples of it.

    python examples/03_evaluate_digits.py runs/latest --sampler heun --steps 20 --out results.json

- accuracy: how often the classifier (an SVM, over 98 % right on held-out digits) sees the class that was asked for;
- Fréchet distance in its space of class scores, to the held-out digits (Heusel et al. 2017, eq. 6, on ten features);
- precision and recall of the pixels, k = 3 (Kynkäänniemi et al. 2019, eq. 1), to the held-out digits.

Each beside the same number for real training digits, which is what a perfect model would get. For these the training
set is cut to as many digits, class by class, as there are held out; so are the samples, ten times over.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.svm import SVC

from genkit import __version__
from genkit.core import Draw
from genkit.data import DATA
from genkit.training.run import Run, load_run


def real(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels ``[N, 64]`` in 0..16, as scikit-learn has them, and classes ``[N]``."""
    import torch

    data = DATA["digits"]().load(split)
    batch = data.batch(torch.arange(len(data)), Draw((0,), 0, len(data)))
    return batch.x.flatten(1).numpy() * (16 / 255), batch.cond["label"].numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``."""
    ca, cb = np.cov(a.T), np.cov(b.T)
    root = np.sqrt(np.linalg.eigvals(ca @ cb).real.clip(0)).sum()  # the trace of (C_a C_b)^(1/2)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb) - 2 * root)


def coverage(a: np.ndarray, b: np.ndarray, k: int = 3) -> float:
    """The share of ``b`` inside the union of balls around ``a`` that reach to each one's k-th neighbour."""
    within = np.sort(cdist(a, a), axis=1)[:, k]
    return float((cdist(b, a) <= within).any(1).mean())


def compare(x: np.ndarray, y: np.ndarray, classifier: SVC, size: int = 359) -> dict[str, float]:
    """Distances of samples ``x`` to held-out ``y``, mean over ten random parts of ``size``."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(10):
        part = x[rng.permutation(len(x))[:size]]
        distance = frechet(classifier.decision_function(part), classifier.decision_function(y))
        rows.append((distance, coverage(y, part), coverage(part, y)))
    values = np.array(rows)
    names = ("frechet", "precision", "recall")
    return {n: round(float(v), 4) for n, v in zip(names, values.mean(0), strict=True)} | {
        "frechet_sd": round(float(values[:, 0].std()), 4)
    }


def judge(run: Run, n: int = 1000, seed: int = 0, **how: object) -> dict[str, object]:
    x, y = real("train")
    test_x, test_y = real("test")
    classifier = SVC(gamma=0.001).fit(x, y)  # pyright: ignore[reportArgumentType]  # scikit-learn takes floats
    drawn, cond = run.sample(n, seed=seed, **how)  # type: ignore[arg-type]
    samples = drawn.flatten(1).numpy() * (16 / 255)
    return {
        "accuracy": float((classifier.predict(samples) == cond["label"].numpy()).mean()),
        "accuracy_real_held_out": round(classifier.score(test_x, test_y), 4),
        "samples": compare(samples, test_x, classifier),
        "real_train": compare(x, test_x, classifier),
        "settings": {"run": run.directory.name, "weights": run.weights, "n": n, "seed": seed, **how},
        "genkit": __version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("run", help="a run directory, such as runs/latest")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--sampler", help="None: the objective's usual one")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    run = load_run(args.run)
    if run.spec.shape != (1, 8, 8):
        parser.error(f"this script judges 8x8 digits; {args.run} has samples of shape {run.spec.shape}")
    how = {"sampler": args.sampler, "steps": args.steps, "guidance": args.guidance}
    result = judge(run, args.n, args.seed, **how)
    text = json.dumps(result, indent=1)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
