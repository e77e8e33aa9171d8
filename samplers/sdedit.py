"""Make variations of real images: add noise up to some time, and sample from there (SDEdit, Meng et al. 2022).

    python samplers/sdedit.py runs/latest --strengths 0.3 0.5 0.7 0.9 --out variations.png
    python samplers/sdedit.py runs/latest --label 8 --guidance 2          # turn them into eights

Rows of the picture: the originals, then one row for each strength, with the same noise in all: a small strength keeps
the image, 1 forgets it. The images are held-out ones of the run's own data, or those of a folder, .zip or .npz of the
same size.
"""

from editing import load_images, make_parser, save_rows

import genkit
from genkit import classifier_free, uniform
from genkit.cli.scripts import run_script
from genkit.diffusion.inverse_problems import sdedit
from genkit.diffusion.samplers import Seeds
from genkit.training.sampling import sample_conditions


def main() -> None:
    parser = make_parser(str(__doc__), out="variations.png")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.9], help="above 0, up to 1")
    parser.add_argument("--label", help="the class to turn them into, by name or number; default: unconditional")
    parser.add_argument("--guidance", type=float, default=1.0)
    args = parser.parse_args()

    run = genkit.load(args.run)
    x0 = load_images(args, run)
    cond = sample_conditions(run.spec, args.n, args.label) if args.label is not None else {}
    cond = {name: value.to(run.device) for name, value in cond.items()}
    denoise = classifier_free(args.guidance)(run.denoiser)
    times, rows = uniform(args.steps)(denoise.path), {"original": x0}
    for strength in args.strengths:
        noise = Seeds(range(args.seed, args.seed + args.n), run.device)
        x = sdedit(denoise, x0, times, cond, strength=strength, sampler=args.sampler, noise=noise)
        distance = (x - x0).square().mean().sqrt()
        print(f"strength {strength:<5g} root mean square distance to the originals {float(distance):.3f}")
        rows[f"strength {strength:g}"] = x
    save_rows(args, run, rows)


if __name__ == "__main__":
    run_script(main)
