"""Make variations of real pictures: noise them up to some time, and sample from there (SDEdit, Meng et al. 2022).

    python samplers/sdedit.py runs/latest --strengths 0.3 0.5 0.7 0.9 --out variations.png
    python samplers/sdedit.py runs/latest --label 8 --guidance 2          # turn them into eights

Rows of the picture: the originals, then one row a strength, the same noise in all: little strength keeps the picture,
1 forgets it. The pictures are held-out ones of the run's own data, or those of a folder, .zip or .npz of the same size.
"""

import argparse
import sys
from pathlib import Path

import torch

from genkit.core import Draw, pictures
from genkit.data import DATA, find_source
from genkit.diffusion.guidance import classifier_free
from genkit.diffusion.inverse_problems import sdedit
from genkit.diffusion.samplers import SAMPLERS, Seeds, uniform
from genkit.training.run import load_run
from genkit.training.sampling import sample_conditions


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("run", help="a run directory, such as runs/latest")
    parser.add_argument("--images", help="a folder, .zip or .npz; without it, held-out pictures of the run's data")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.9], help="above 0, up to 1")
    parser.add_argument("--label", type=int, help="the class that they are to become; without it, none is told")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--sampler", default="heun", choices=SAMPLERS)
    parser.add_argument("--steps", type=int, default=40, help="of the whole way; a strength takes its part of them")
    parser.add_argument("--n", type=int, default=10, help="how many pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("variations.png"))
    args = parser.parse_args()

    run = load_run(args.run)
    name, fields = find_source(args.images) if args.images else ("", {})
    data = DATA[name](**fields).load("train") if name else run.config.data.load("test")
    spread = torch.linspace(0, len(data) - 1, args.n).long()
    x0 = run.codec.encode(data.batch(spread, Draw((0,), 0, args.n)).to(run.device)).x
    if data.spec.shape != run.spec.shape or x0.ndim != 4 or args.n < 1:
        raise ValueError(f"images: given {args.n} of {data.spec.shape}, the model draws {run.spec.shape}; needs images")

    cond = sample_conditions(run.spec, args.n, args.label) if args.label is not None else {}
    cond = {k: v.to(run.device) for k, v in cond.items()}
    denoise = classifier_free(args.guidance)(run.denoiser)
    times, rows = uniform(args.steps)(denoise.path), [x0]
    for strength in args.strengths:
        noise = Seeds(range(args.seed, args.seed + args.n), run.device)
        x = sdedit(denoise, x0, times, cond, strength=strength, sampler=args.sampler, noise=noise)
        away = (x - x0).square().mean().sqrt()
        print(f"strength {strength:<5g} root mean square distance to the originals {float(away):.3f}")
        rows.append(x)
    print(pictures.save_image(pictures.make_grid(run.codec.decode(torch.cat(rows)).cpu(), args.n), args.out))


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(f"sdedit: {e}")
