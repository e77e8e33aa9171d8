"""What inpaint.py, super_resolve.py, deblur.py and sdedit.py share: arguments, images, restorations and the picture."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

import genkit
from genkit import SAMPLERS, Guidance, bind, uniform
from genkit.cli.scripts import ScriptParser
from genkit.core import Draw, pictures
from genkit.data import DATA, find_source
from genkit.diffusion.guidance import within
from genkit.diffusion.inverse_problems import Measurement, dps, pigdm
from genkit.diffusion.samplers import Seeds

PIXEL_VARIANCE = 0.3  # of a pixel in [-1, 1]; the digits have 0.29. PiGDM's default of 1 is for data of unit variance
MEASUREMENT_SEED = 10**9  # the noise of a measurement is not that of a sample


def restore_by_pigdm(measurement: Measurement) -> Guidance:
    """PiGDM (Song et al. 2023) for images in [-1, 1]."""
    return pigdm(measurement, PIXEL_VARIANCE)


METHODS: Mapping[str, Callable[[Measurement], Guidance]] = {"pigdm": restore_by_pigdm, "dps": dps}


def make_parser(description: str, out: str) -> ScriptParser:
    """The arguments of every script."""
    parser = ScriptParser(description)
    parser.add_argument("run", help="a run directory, such as runs/latest")
    parser.add_argument("--images", help="a folder, .zip or .npz; default: held-out images of the run's data")
    parser.add_argument("--sampler", default="heun", choices=SAMPLERS)
    parser.add_argument("--steps", type=int, default=40, help="number of sampler steps")
    parser.add_argument("--n", type=int, help="number of images; default: 10, or all if there are fewer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(out))
    return parser


def add_restoration_arguments(parser: ScriptParser, noise: float) -> None:
    parser.add_argument("--noise", type=float, default=noise, help="standard deviation; pixels lie in [-1, 1]")
    parser.add_argument("--methods", nargs="+", default=["pigdm", "dps"], choices=METHODS)


def load_images(args: argparse.Namespace, run: genkit.Run) -> Tensor:
    """``args.n`` images ``[n, C, H, W]`` in [-1, 1], spread over the data; ``n`` is set if it was not given.

    ``ValueError`` if they do not fit the model, or are fewer.
    """
    name, fields = find_source(args.images) if args.images else ("", {})
    data = DATA[name](**fields).load("train") if name else run.config.data.unaugmented().load("test")
    if data.spec.shape != run.spec.shape or len(run.spec.shape) != 3:
        raise ValueError(f"images: given some of {data.spec.shape}, the model draws {run.spec.shape}; needs images")
    args.n = min(10, len(data)) if args.n is None else args.n
    if not 1 <= args.n <= len(data):
        raise ValueError(f"n: given {args.n}; there are {len(data)} images; needs 1 or more, and no image twice")
    rows = torch.linspace(0, len(data) - 1, args.n).long()
    x0 = run.codec.encode(data.batch(rows, Draw((0,), 0, args.n)).to(run.device)).x
    return x0


def measurement_noise(args: argparse.Namespace, run: genkit.Run) -> Seeds:
    return Seeds([MEASUREMENT_SEED + args.seed + i for i in range(args.n)], run.device)


def restore(args: argparse.Namespace, run: genkit.Run, measurement: Measurement, method: str) -> Tensor:
    """One sample for each measurement, ``[n, C, H, W]``: any sampler, guided by the measurement."""
    guidance = within(0, 0.9, METHODS[method](measurement))
    noise = Seeds(range(args.seed, args.seed + args.n), run.device)
    generate = bind(args.sampler, uniform(args.steps), guidance)(run.denoiser)
    return generate(noise(run.spec.shape), {}, noise)


def rms_error(x: Tensor, x0: Tensor, mask: Tensor | None = None) -> float:
    """Root mean square difference of images in [-1, 1], over the pixels of ``mask`` if it is given."""
    difference = x.clamp(-1, 1) - x0
    if mask is not None:
        difference = difference[:, mask]
    return float(difference.square().mean().sqrt())


def save_rows(args: argparse.Namespace, run: genkit.Run, rows: Mapping[str, Tensor]) -> None:
    """Write the picture, one row for each tensor ``[n, C, H, W]`` with its name, and print its path."""
    x = run.codec.decode(torch.cat(list(rows.values()))).cpu()
    print(pictures.save_image(pictures.make_grid(x, args.n, captions=list(rows)), args.out))
