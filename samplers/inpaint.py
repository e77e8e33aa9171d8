"""Fill in what a mask hides of real pictures, with any model of such pictures, told nothing but the visible part.

    python samplers/inpaint.py runs/latest --hide right --methods pigdm dps --out inpainted.png
    python samplers/inpaint.py runs/latest --images my/folder --hide box --noise 0.05

Rows of the picture: the original, what is seen of it, and one restoration a method. The pictures are held-out ones of
the run's own data, or those of a folder, .zip or .npz of the same size.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from genkit.core import Draw, pictures
from genkit.data import DATA, find_source
from genkit.diffusion.guidance import within
from genkit.diffusion.inverse_problems import Mask, dps, measure, pigdm
from genkit.diffusion.samplers import SAMPLERS, Seeds, bind, uniform
from genkit.training.run import load_run

PIXEL = 0.3  # variance of a pixel in [-1, 1]; of the digits 0.29. PiGDM's own 1 is for data of unit variance
METHODS = {"pigdm": lambda seen: pigdm(seen, PIXEL), "dps": dps}
HIDE = {
    "right": lambda row, column: column >= 0.5,
    "bottom": lambda row, column: row >= 0.5,
    "box": lambda row, column: (row - 0.5).abs().maximum((column - 0.5).abs()) < 0.25,
    "half": lambda row, column: torch.rand(row.shape, generator=torch.Generator().manual_seed(0)) < 0.5,
}


def visible(hide: str, shape: tuple[int, ...]) -> Tensor:
    """Bool ``[C, H, W]``: True where a picture is seen; all of its channels or none."""
    row, column = ((torch.arange(n) + 0.5) / n for n in shape[1:])
    return ~HIDE[hide](*torch.meshgrid(row, column, indexing="ij")).expand(shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("run", help="a run directory, such as runs/latest")
    parser.add_argument("--images", help="a folder, .zip or .npz; without it, held-out pictures of the run's data")
    parser.add_argument("--hide", default="right", choices=HIDE, help="which part; half: every other pixel, at random")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of what is seen, in [-1, 1]")
    parser.add_argument("--methods", nargs="+", default=["pigdm", "dps"], choices=METHODS)
    parser.add_argument("--sampler", default="heun", choices=SAMPLERS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--n", type=int, default=10, help="how many pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("inpainted.png"))
    args = parser.parse_args()

    run = load_run(args.run)
    name, fields = find_source(args.images) if args.images else ("", {})
    data = DATA[name](**fields).load("train") if name else run.config.data.load("test")
    spread = torch.linspace(0, len(data) - 1, args.n).long()
    x0 = run.codec.encode(data.batch(spread, Draw((0,), 0, args.n)).to(run.device)).x
    if data.spec.shape != run.spec.shape or x0.ndim != 4 or args.n < 1:
        raise ValueError(f"images: given {args.n} of {data.spec.shape}, the model draws {run.spec.shape}; needs images")

    mask = Mask(visible(args.hide, run.spec.shape).to(run.device))
    seeds = range(args.seed, args.seed + args.n)
    seen = measure(mask, x0, args.noise, Seeds([10**9 + s for s in seeds], run.device))
    rows = [x0, mask.forward(seen.y)]
    for method in args.methods:
        noise, guidance = Seeds(seeds, run.device), within(0, 0.9, METHODS[method](seen))
        x = bind(args.sampler, uniform(args.steps), guidance)(run.denoiser)(noise(run.spec.shape), {}, noise)
        hidden = (x.clamp(-1, 1) - x0)[:, ~mask.mask]
        print(f"{method:<6} error of the hidden part {float(hidden.square().mean().sqrt()):.3f} (root mean square)")
        rows.append(x)
    print(pictures.save_image(pictures.make_grid(run.codec.decode(torch.cat(rows)).cpu(), args.n), args.out))


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(f"inpaint: {e}")
