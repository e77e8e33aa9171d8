"""Make variations of real pictures: add noise up to some time, and sample from there (SDEdit, Meng et al. 2022).

    python samplers/sdedit.py runs/latest --strengths 0.3 0.5 0.7 0.9 --out variations.png
    python samplers/sdedit.py runs/latest --label 8 --guidance 2          # turn them into eights

Rows of the picture: the originals, then one row for each strength, with the same noise in all: near 0 the picture
stays, at 1 nothing of it is left. The originals are held-out pictures of the run's data, or those of a folder, .zip or
.npz of the same size.
"""

from common import editing_options, load_pictures, rms, save_rows, start

from genkit.diffusion.guidance import classifier_free
from genkit.diffusion.inverse_problems import sdedit
from genkit.diffusion.samplers import Seeds, uniform
from genkit.training.run import load_run
from genkit.training.sampling import sample_conditions


def main() -> None:
    parser = editing_options(__doc__, "variations.png")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.3, 0.5, 0.7, 0.9], help="above 0, up to 1")
    parser.add_argument("--label", type=int, help="the class to turn them into; default: unconditional")
    parser.add_argument("--guidance", type=float, default=1.0)
    args = parser.parse_args()

    run = load_run(args.run)
    x0 = load_pictures(args, run)
    cond = sample_conditions(run.spec, args.n, args.label) if args.label is not None else {}
    cond = {k: v.to(run.device) for k, v in cond.items()}
    denoise = classifier_free(args.guidance)(run.denoiser)
    times, rows = uniform(args.steps)(denoise.path), [x0]
    for strength in args.strengths:
        noise = Seeds(range(args.seed, args.seed + args.n), run.device)
        rows.append(sdedit(denoise, x0, times, cond, strength=strength, sampler=args.sampler, noise=noise))
        print(f"strength {strength:<5g} root mean square distance to the originals {rms(rows[-1] - x0):.3f}")
    save_rows(args, run, rows)


if __name__ == "__main__":
    start(main)
