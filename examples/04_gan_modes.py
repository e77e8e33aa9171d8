"""Do GANs find all of eight Gaussians? Each game from some seeds, with the same network, side by side.

    python examples/04_gan_modes.py [--games minimax "relativistic, R1 and R2"] [--seeds 0 1 2]
        [--picture docs/images/gan_8gaussians.png] [--out docs/results/gan-8gaussians.json]

A mode is found where at least 2 % of the samples lie within three deviations of it (each has 12.5 % of the data);
`near` is the share of samples within three deviations of any mode (98.9 % of the data). The last games have `narrow`
modes, of a fifth of the width, and five steps of the discriminator for one of the generator: there the discriminator
is nearly always right, and the gradient that it leaves the generator (`gradient`: its norm, the mean of each tenth)
is what the games differ in.
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
from genkit.training.loop import fit, initial_state
from genkit.training.settings import TrainSettings

SIGMA, NARROW = 0.1, 0.02  # of the data
WIDE = {"noise": SIGMA, "steps": 4000}
HARD = {"noise": NARROW, "steps": 800}  # as many passes of the networks as WIDE, but for a tenth
# a penalty for numbers of order one with modes of 0.1 is weaker than one for pictures
BOTH = {"r1": 0.02, "r2": 0.02, "every": 2}
GAMES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {  # the game; the data, and how long
    "minimax": ({"name": "minimax"}, WIDE),
    "non-saturating, R1": ({"name": "non-saturating", "r1": 0.04, "every": 2}, WIDE),
    "non-saturating, R1 and R2": ({"name": "non-saturating", **BOTH}, WIDE),
    "relativistic, R1 and R2": ({"name": "relativistic", "r1": 0.01, "r2": 0.01, "every": 2}, WIDE),
    "minimax, narrow": ({"name": "minimax", "critic_steps": 5}, HARD),
    "non-saturating, narrow": ({"name": "non-saturating", "r1": 0.0, "critic_steps": 5}, HARD),
}


def modes(x: Tensor, sigma: float = SIGMA) -> dict[str, Any]:
    """How many of the eight modes samples ``[N, 2]`` find, and the share of them that is near one."""
    angle = torch.arange(8) * math.pi / 4
    distance, which = torch.cdist(x, math.sqrt(2) * torch.stack([angle.cos(), angle.sin()], 1)).min(1)
    near = distance < 3 * sigma
    shares = torch.bincount(which[near], minlength=8) / len(x)
    return {"modes": int((shares >= 0.02).sum()), "near": round(float(near.float().mean()), 4),
            "shares": [round(float(v), 3) for v in shares]}  # fmt: skip


def train(name: str, seed: int, **changed: Any) -> tuple[Tensor, dict[str, Any]]:
    """5,000 samples of a generator trained on the unlabelled modes, and what is to say of it.

    ``changed`` are other settings of the game than in ``GAMES``.
    """
    game, how = GAMES[name]
    steps, sigma = how["steps"], how["noise"]
    cfg = config.from_dict(
        TrainSettings,
        {
            "objective": {"name": "gan", "latent": [8], "game": {**game, **changed}},
            "backbone": {"name": "mlp", "width": 64, "depth": 2},
            "data": {"name": "8gaussians", "noise": sigma, "labels": False},
            "steps": steps, "batch": 128, "lr": 2e-3, "seed": seed, "precision": "fp32", "log_every": steps // 10,
        },
    )  # fmt: skip
    torch.manual_seed(seed)
    data, log, began = cfg.data.load("train"), [], time.process_time()
    state = initial_state(cfg.objective, cfg.objective.networks(cfg.backbone, data.spec), cfg)
    fit(cfg.objective, state, Stream(data, cfg.batch, seed), data.codec, cfg, Accelerator(cpu=True), log=log.append)
    seconds = time.process_time() - began
    z = torch.randn(5000, *cfg.objective.noise_shape(data.spec), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = cfg.objective.generator(state.emas[cfg.ema[0]])(z, {})
    told = {k: round(log[-1][f"discriminator/{k}"], 3) for k in ("accuracy", "diversity")}
    told["gradient"] = [float(f"{line['generator/grad_norm']:.3g}") for line in log]
    return x, {**modes(x, sigma), **told, "said": cfg.objective.remark(log[-1]), "cpu_seconds": round(seconds, 1)}


def draw(samples: Mapping[tuple[str, int], Tensor], found: Mapping[str, Mapping[int, Any]], path: Path) -> None:
    """One column a game, one row a seed."""
    seeds = sorted({seed for _, seed in samples})
    figure = Figure(figsize=(2.2 * len(found), 2.9 * len(seeds)), dpi=100, layout="constrained")
    axes = figure.subplots(len(seeds), len(found), squeeze=False)
    for column, name in enumerate(found):
        for row, seed in enumerate(seeds):
            x, told, place = samples[name, seed], found[name][seed], axes[row][column]
            place.scatter(x[:, 0], x[:, 1], s=1, alpha=0.3)
            place.set(xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal", xticks=[], yticks=[])
            game, _, more = name.partition(", ")
            head = f"{game}\n{more if 'R1' in more else ', '.join(filter(None, ['no penalty', more]))}"
            place.set_title(f"{head}\n{told['modes']} of 8, {100 * told['near']:.0f} % near", size=9)
            place.set_xlabel(f"generator's gradient: {told['gradient'][-1]:.2g}", size=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--games", nargs="+", choices=list(GAMES), default=list(GAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--picture", type=Path, default=Path("gan_8gaussians.png"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    samples, found = {}, {name: {} for name in args.games}
    for seed in args.seeds:
        for name in args.games:
            samples[name, seed], found[name][seed] = train(name, seed)
            print(name, seed, json.dumps(found[name][seed]), flush=True)
        draw(samples, found, args.picture)  # after each seed: a run that is cut short leaves what it has
        if args.out:
            games = {name: {**GAMES[name][0], **GAMES[name][1]} for name in args.games}
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"games": games, "found": found, "genkit": __version__}, indent=1) + "\n")
    print(f"picture  {args.picture}")


if __name__ == "__main__":
    main()
