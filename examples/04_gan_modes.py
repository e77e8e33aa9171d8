"""Do GANs find all of eight Gaussians? Several GAN losses from several seeds, with the same networks.

    python examples/04_gan_modes.py [--losses minimax "relativistic, R1 and R2"] [--seeds 0 1 2]
        [--picture docs/images/gan_8gaussians.png] [--out docs/results/gan-8gaussians.json]

A mode is found if at least 2 % of the samples lie within three standard deviations of it (each has 12.5 % of the data);
`near` is the share of samples within three standard deviations of any mode (98.9 % of the data). The last losses have
`narrow` modes, a fifth as wide, and five discriminator steps for each generator step: there the discriminator is nearly
always right, and the losses differ in the gradient that reaches the generator (`gradient`: its norm, the mean of each
tenth of the training).
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from genkit import __version__, config
from genkit.cli.scripts import ScriptParser, run_script
from genkit.data import Stream
from genkit.training.loop import fit, initial_state
from genkit.training.settings import TrainSettings

SIGMA = 0.1  # standard deviation of a mode
NARROW = 0.02
WIDE = {"noise": SIGMA, "steps": 4000}
HARD = {"noise": NARROW, "steps": 800}  # about as many passes of the networks as WIDE
# weaker penalties than for images: the modes are much narrower than the data
BOTH = {"r1": 0.02, "r2": 0.02, "penalty_every": 2}
LOSSES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {  # settings of the loss, and of data and length
    "minimax": ({"name": "minimax"}, WIDE),
    "non-saturating, R1": ({"name": "non-saturating", "r1": 0.04, "penalty_every": 2}, WIDE),
    "non-saturating, R1 and R2": ({"name": "non-saturating", **BOTH}, WIDE),
    "relativistic, R1 and R2": ({"name": "relativistic", "r1": 0.01, "r2": 0.01, "penalty_every": 2}, WIDE),
    "minimax, narrow": ({"name": "minimax", "discriminator_steps": 5}, HARD),
    "non-saturating, narrow": ({"name": "non-saturating", "r1": 0.0, "discriminator_steps": 5}, HARD),
}


def count_modes(x: Tensor, sigma: float = SIGMA) -> dict[str, Any]:
    """How many of the eight modes samples ``[N, 2]`` find, and the share of samples that is near one."""
    angle = torch.arange(8) * math.pi / 4
    centers = math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1)
    distance, nearest = torch.cdist(x, centers).min(1)
    near = distance < 3 * sigma
    shares = torch.bincount(nearest[near], minlength=8) / len(x)
    return {
        "modes": int((shares >= 0.02).sum()),
        "near": round(float(near.float().mean()), 4),
        "shares": [round(float(share), 3) for share in shares],
    }


def train(name: str, seed: int, **changes: Any) -> tuple[Tensor, dict[str, Any]]:
    """5,000 samples of a generator trained on the unlabelled modes, and its measurements.

    ``changes`` override the settings of the loss in ``LOSSES``.
    """
    loss, task = LOSSES[name]
    steps, sigma = task["steps"], task["noise"]
    settings = {
        "objective": {"name": "gan", "latent": [8], "gan_loss": {**loss, **changes}},
        "backbone": {"name": "mlp", "width": 64, "depth": 2},
        "data": {"name": "8gaussians", "noise": sigma, "labels": False},
        "steps": steps,
        "batch": 128,
        "lr": 2e-3,
        "seed": seed,
        "precision": "fp32",
        "log_every": steps // 10,
    }
    cfg = config.from_dict(TrainSettings, settings)
    torch.manual_seed(seed)
    data, objective = cfg.data.load("train"), cfg.objective
    log: list[Any] = []
    start = time.process_time()
    state = initial_state(objective, objective.networks(cfg.backbone, data.spec), cfg)
    fit(objective, state, Stream(data, cfg.batch, seed), data.codec, cfg, Accelerator(cpu=True), log=log.append)
    seconds = time.process_time() - start

    z = torch.randn(5000, *objective.noise_shape(data.spec), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = objective.generator(state.emas[cfg.ema[0]])(z, {})
    return x, {
        **count_modes(x, sigma),
        **{key: round(log[-1][f"discriminator/{key}"], 3) for key in ("accuracy", "diversity")},
        "gradient": [float(f"{record['generator/grad_norm']:.3g}") for record in log],
        "warning": objective.warning(log[-1]),
        "cpu_seconds": round(seconds, 1),
    }


def draw(samples: Mapping[tuple[str, int], Tensor], results: Mapping[str, Mapping[int, Any]], path: Path) -> None:
    """One column for each loss, one row for each seed."""
    seeds = sorted({seed for _, seed in samples})
    figure = Figure(figsize=(2.2 * len(results), 2.9 * len(seeds)), dpi=100, layout="constrained")
    axes = figure.subplots(len(seeds), len(results), squeeze=False)
    for column, name in enumerate(results):
        loss, _, details = name.partition(", ")
        if "R1" not in details:
            details = ", ".join(filter(None, ["no penalty", details]))
        for row, seed in enumerate(seeds):
            x, result, panel = samples[name, seed], results[name][seed], axes[row][column]
            panel.scatter(x[:, 0], x[:, 1], s=1, alpha=0.3)
            panel.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal", xticks=[], yticks=[])
            panel.set_title(f"{loss}\n{details}\n{result['modes']} of 8, {100 * result['near']:.0f} % near", size=9)
            panel.set_xlabel(f"generator's gradient: {result['gradient'][-1]:.2g}", size=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--picture", type=Path, default=Path("gan_8gaussians.png"))
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    samples: dict[tuple[str, int], Tensor] = {}
    results: dict[str, dict[int, Any]] = {name: {} for name in args.losses}
    for seed in args.seeds:
        for name in args.losses:
            samples[name, seed], results[name][seed] = train(name, seed)
            print(name, seed, json.dumps(results[name][seed]), flush=True)
        # after each seed, so that a run that is cut short leaves what it has
        draw(samples, results, args.picture)
        if args.out:
            losses = {name: {**LOSSES[name][0], **LOSSES[name][1]} for name in args.losses}
            record = {"losses": losses, "results": results, "genkit": __version__}
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"picture  {args.picture}")


if __name__ == "__main__":
    run_script(main)
