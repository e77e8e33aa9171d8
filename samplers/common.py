"""What the scripts of this folder share: options, pictures to start from, restoration of measurements, one-line
errors."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from genkit.core import Draw, pictures
from genkit.data import DATA, find_source
from genkit.diffusion.guidance import within
from genkit.diffusion.inverse_problems import Measurement, Operator, dps, measure, pigdm
from genkit.diffusion.samplers import SAMPLERS, Seeds, bind, uniform
from genkit.training.run import Run

PIXEL_VARIANCE = 0.3  # of pixels in [-1, 1]; 0.29 for the digits. The default of PiGDM is for data of unit variance
METHODS = {"pigdm": lambda measurement: pigdm(measurement, PIXEL_VARIANCE), "dps": dps}


def options(doc: str | None, out: str, steps: int = 40, n: int = 10) -> argparse.ArgumentParser:
    """The options of every script that draws from a run; ``doc`` is its docstring."""
    parser = argparse.ArgumentParser(description=str(doc).splitlines()[0])
    parser.add_argument("run", help="a run directory, such as runs/latest")
    parser.add_argument("--steps", type=int, default=steps, help="steps of the sampler")
    parser.add_argument("--n", type=int, default=n, help="number of samples of each row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def editing_options(doc: str | None, out: str) -> argparse.ArgumentParser:
    """The options of scripts that start from pictures."""
    parser = options(doc, out)
    parser.add_argument("--images", help="a folder, .zip or .npz; default: held-out pictures of the run's data")
    parser.add_argument("--sampler", default="heun", choices=SAMPLERS)
    return parser


def load_pictures(args: argparse.Namespace, run: Run) -> Tensor:
    """``args.n`` pictures ``[N, C, H, W]`` in the model's numbers, spread evenly over the data."""
    name, fields = find_source(args.images) if args.images else ("", {})
    data = DATA[name](**fields).load("train") if name else run.config.data.load("test")
    spread = torch.linspace(0, len(data) - 1, args.n).long()
    x0 = run.codec.encode(data.batch(spread, Draw((0,), 0, args.n)).to(run.device)).x
    if data.spec.shape != run.spec.shape or x0.ndim != 4 or args.n < 1:
        raise ValueError(f"images: given {args.n} of {data.spec.shape}, the model draws {run.spec.shape}; needs images")
    return x0


def restore(args: argparse.Namespace, run: Run, x0: Tensor, operator: Operator) -> tuple[Measurement, list[Tensor]]:
    """A measurement of ``x0``, and its restoration by each of ``args.methods``."""
    seeds = range(args.seed, args.seed + args.n)
    measurement = measure(operator, x0, args.noise, Seeds([10**9 + s for s in seeds], run.device))
    restored = []
    for method in args.methods:
        noise, guidance = Seeds(seeds, run.device), within(0, 0.9, METHODS[method](measurement))
        generate = bind(args.sampler, uniform(args.steps), guidance)(run.denoiser)
        restored.append(generate(noise(run.spec.shape), {}, noise))
    return measurement, restored


def rms(difference: Tensor) -> float:
    """Root mean square."""
    return float(difference.square().mean().sqrt())


def save_rows(args: argparse.Namespace, run: Run, rows: list[Tensor]) -> None:
    """Write rows of pictures in the model's numbers, ``args.n`` in each, to ``args.out``."""
    print(pictures.save(pictures.mosaic(run.codec.decode(torch.cat(rows)).cpu(), args.n), args.out))


def start(main: Callable[[], None]) -> None:
    """Run a script; a ``ValueError`` ends it with one line."""
    try:
        main()
    except ValueError as e:
        sys.exit(f"{Path(sys.argv[0]).stem}: {e}")
