"""Sharpen blurred pictures with any model of sharp ones.

    python samplers/deblur.py runs/latest --width 1 --noise 0.05 --out deblurred.png
    python samplers/deblur.py runs/latest --images my/folder --width 2

Rows of the picture: the originals, their measurement, and one restoration a method. The originals are held-out pictures
of the run's data, or those of a folder, .zip or .npz of the same size.
"""

from common import METHODS, editing_options, load_pictures, restore, rms, save_rows, start

from genkit.diffusion.inverse_problems import Blur
from genkit.training.run import load_run


def main() -> None:
    parser = editing_options(__doc__, "deblurred.png")
    parser.add_argument("--width", type=float, default=1.0, help="standard deviation of the Gaussian blur, in pixels")
    parser.add_argument("--noise", type=float, default=0.05, help="standard deviation of the measurement, in [-1, 1]")
    parser.add_argument("--methods", nargs="+", default=["pigdm", "dps"], choices=METHODS)
    args = parser.parse_args()

    run = load_run(args.run)
    x0 = load_pictures(args, run)
    measurement, restored = restore(args, run, x0, Blur.gaussian(args.width))
    for method, x in zip(args.methods, restored, strict=True):
        print(f"{method:<6} error {rms(x.clamp(-1, 1) - x0):.3f} (root mean square)")
    save_rows(args, run, [x0, measurement.y, *restored])


if __name__ == "__main__":
    start(main)
