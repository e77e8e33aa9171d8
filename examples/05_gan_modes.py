"""Do GANs find all of eight Gaussians? Each game from some seeds, with the same networks and steps, side by side.

    python examples/05_gan_modes.py [--games minimax non-saturating relativistic] [--seeds 0 1 2] [--steps 4000]
        [--picture docs/gan_8gaussians.png] [--out docs/results/gan-8gaussians.json]

A mode is found where at least 2 % of the samples lie within three deviations of it (each has 12.5 % of the data);
`near` is the share of samples within three deviations of any mode (98.9 % of the data).
"""

import argparse
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
from genkit.data import Stream
from genkit.train import fit, start

SIGMA = 0.1  # of the data
# a penalty for numbers of order one with modes of 0.1 is weaker than one for pictures
GAMES: Mapping[str, dict[str, Any]] = {
    "minimax": {},
    "non-saturating": {"r1": 0.04, "every": 2},
    "relativistic": {"r1": 0.005, "r2": 0.005, "every": 4},
}


def modes(x: Tensor) -> dict[str, Any]:
    """How many of the eight modes samples ``[N, 2]`` find, and the share of them that is near one."""
    angle = torch.arange(8) * math.pi / 4
    distance, which = torch.cdist(x, math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1)).min(1)
    near = distance < 3 * SIGMA
    shares = torch.bincount(which[near], minlength=8) / len(x)
    return {"modes": int((shares >= 0.02).sum()), "near": round(float(near.float().mean()), 4),
            "shares": [round(float(v), 3) for v in shares]}  # fmt: skip


def train(game: str, seed: int, steps: int) -> tuple[Tensor, dict[str, Any]]:
    """5,000 samples of a generator trained on the unlabelled modes, and what is to say of it."""
    cfg = config.from_dict(
        config.Train,
        {
            "objective": {"name": "gan", "latent": [8], "game": {"name": game, **GAMES[game]}},
            "backbone": {"name": "mlp", "width": 64, "depth": 2},
            "data": {"name": "8gaussians", "noise": SIGMA, "labels": False},
            "steps": steps, "batch": 128, "lr": 2e-3, "seed": seed, "precision": "fp32", "log_every": steps // 10,
        },
    )  # fmt: skip
    torch.manual_seed(seed)
    data, log, began = cfg.data.load("train"), [], time.process_time()
    state = start(cfg.objective, cfg.objective.networks(cfg.backbone, data.spec), cfg)
    fit(cfg.objective, state, Stream(data, cfg.batch, seed), data.codec, cfg, Accelerator(cpu=True), log=log.append)
    seconds = time.process_time() - began
    z = torch.randn(5000, *cfg.objective.noise_shape(data.spec), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = cfg.objective.generator(state.emas[cfg.ema[0]])(z, {})
    told = {k: round(log[-1][f"discriminator/{k}"], 3) for k in ("accuracy", "diversity")}
    return x, {**modes(x), **told, "said": cfg.objective.remark(log[-1]), "cpu_seconds": round(seconds, 1)}


def draw(samples: Mapping[tuple[str, int], Tensor], found: Mapping[str, Mapping[int, Any]], path: Path) -> None:
    """One row a game, one column a seed."""
    seeds = sorted({seed for _, seed in samples})
    figure = Figure(figsize=(2.6 * len(seeds), 2.8 * len(found)), dpi=100, layout="constrained")
    axes = figure.subplots(len(found), len(seeds), squeeze=False)
    for row, game in zip(axes, found, strict=True):
        for place, seed in zip(row, seeds, strict=True):
            x, told = samples[game, seed], found[game][seed]
            place.scatter(x[:, 0], x[:, 1], s=1, alpha=0.3)
            place.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal", xticks=[], yticks=[])
            place.set_title(f"{game}, seed {seed}\n{told['modes']} of 8 modes, {100 * told['near']:.0f} % near", size=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--games", nargs="+", choices=list(GAMES), default=list(GAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--picture", type=Path, default=Path("gan_8gaussians.png"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    samples, found = {}, {game: {} for game in args.games}
    for seed in args.seeds:
        for game in args.games:
            samples[game, seed], found[game][seed] = train(game, seed, args.steps)
            print(game, seed, json.dumps(found[game][seed]), flush=True)
        draw(samples, found, args.picture)  # after each seed: a run that is cut short leaves what it has
        if args.out:
            games = {game: GAMES[game] for game in args.games}
            told = {"games": games, "steps": args.steps, "found": found, "genkit": __version__}
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(told, indent=1) + "\n")
    print(f"picture  {args.picture}")


if __name__ == "__main__":
    main()
