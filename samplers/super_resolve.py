"""Enlarge pictures of which only the means of blocks are known, with any model of the larger ones.

    python samplers/super_resolve.py runs/latest --factor 2 --out enlarged.png
    python samplers/super_resolve.py runs/latest --factor 4 --noise 0.05 --methods pigdm

Rows of the picture: the originals, their measurement, and one restoration a method. The originals are held-out pictures
of the run's data, or those of a folder, .zip or .npz of the same size.
"""

from common import METHODS, editing_options, load_pictures, restore, rms, save_rows, start

from genkit.diffusion.inverse_problems import Average
from genkit.training.run import load_run


def main() -> None:
    parser = editing_options(__doc__, "enlarged.png")
    parser.add_argument("--factor", type=int, default=2, help="side of a block; a divisor of height and width")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of the measurement, in [-1, 1]")
    parser.add_argument("--methods", nargs="+", default=["pigdm", "dps"], choices=METHODS)
    args = parser.parse_args()

    run = load_run(args.run)
    x0, operator = load_pictures(args, run), Average(args.factor)
    measurement, restored = restore(args, run, x0, operator)
    for method, x in zip(args.methods, restored, strict=True):
        print(f"{method:<6} error {rms(x.clamp(-1, 1) - x0):.3f} (root mean square)")
    save_rows(args, run, [x0, operator.enlarge(measurement.y), *restored])


if __name__ == "__main__":
    start(main)
