"""Sharpen blurred pictures with any model of sharp ones.

    python samplers/deblur.py runs/latest --width 1 --noise 0.05 --out deblurred.png
    python samplers/deblur.py runs/latest --images my/folder --width 2

Rows of the picture: the original, what is seen of it, and one restoration a method. The pictures are held-out ones of
the run's own data, or those of a folder, .zip or .npz of the same size.
"""

import argparse
import sys
from pathlib import Path

import torch

from genkit.core import Draw, pictures
from genkit.data import DATA, find_source
from genkit.diffusion.guidance import within
from genkit.diffusion.inverse_problems import Blur, dps, measure, pigdm
from genkit.diffusion.samplers import SAMPLERS, Seeds, bind, uniform
from genkit.training.run import load_run

PIXEL = 0.3  # variance of a pixel in [-1, 1]; of the digits 0.29. PiGDM's own 1 is for data of unit variance
METHODS = {"pigdm": lambda seen: pigdm(seen, PIXEL), "dps": dps}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("run", help="a run directory, such as runs/latest")
    parser.add_argument("--images", help="a folder, .zip or .npz; without it, held-out pictures of the run's data")
    parser.add_argument("--width", type=float, default=1.0, help="standard deviation of the Gaussian blur, in pixels")
    parser.add_argument("--noise", type=float, default=0.05, help="standard deviation of what is seen, in [-1, 1]")
    parser.add_argument("--methods", nargs="+", default=["pigdm", "dps"], choices=METHODS)
    parser.add_argument("--sampler", default="heun", choices=SAMPLERS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--n", type=int, default=10, help="how many pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("deblurred.png"))
    args = parser.parse_args()

    run = load_run(args.run)
    name, fields = find_source(args.images) if args.images else ("", {})
    data = DATA[name](**fields).load("train") if name else run.config.data.load("test")
    spread = torch.linspace(0, len(data) - 1, args.n).long()
    x0 = run.codec.encode(data.batch(spread, Draw((0,), 0, args.n)).to(run.device)).x
    if data.spec.shape != run.spec.shape or x0.ndim != 4 or args.n < 1:
        raise ValueError(f"images: given {args.n} of {data.spec.shape}, the model draws {run.spec.shape}; needs images")

    operator = Blur.gaussian(args.width)
    seeds = range(args.seed, args.seed + args.n)
    seen = measure(operator, x0, args.noise, Seeds([10**9 + s for s in seeds], run.device))
    rows = [x0, seen.y]
    for method in args.methods:
        noise, guidance = Seeds(seeds, run.device), within(0, 0.9, METHODS[method](seen))
        x = bind(args.sampler, uniform(args.steps), guidance)(run.denoiser)(noise(run.spec.shape), {}, noise)
        print(f"{method:<6} error {float((x.clamp(-1, 1) - x0).square().mean().sqrt()):.3f} (root mean square)")
        rows.append(x)
    print(pictures.save_image(pictures.make_grid(run.codec.decode(torch.cat(rows)).cpu(), args.n), args.out))


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(f"deblur: {e}")
