"""Sharpen blurred images with any model of sharp ones.

    python samplers/deblur.py runs/latest --width 1 --noise 0.05 --out deblurred.png
    python samplers/deblur.py runs/latest --images my/folder --width 2

Rows of the picture: the original, its measurement, and one restoration for each method. The images are held-out ones of
the run's own data, or those of a folder, .zip or .npz of the same size.
"""

from editing import (
    add_restoration_arguments,
    load_images,
    make_parser,
    measurement_noise,
    restore,
    rms_error,
    save_rows,
)

import genkit
from genkit.cli.scripts import run_script
from genkit.diffusion.inverse_problems import Blur, measure


def main() -> None:
    parser = make_parser(str(__doc__), out="deblurred.png")
    add_restoration_arguments(parser, noise=0.05)
    parser.add_argument("--width", type=float, default=1.0, help="standard deviation of the Gaussian blur, in pixels")
    args = parser.parse_args()

    run = genkit.load(args.run)
    x0 = load_images(args, run)
    measurement = measure(Blur.gaussian(args.width), x0, args.noise, measurement_noise(args, run))
    rows = {"original": x0, "blurred": measurement.y}
    for method in args.methods:
        x = restore(args, run, measurement, method)
        print(f"{method:<6} error {rms_error(x, x0):.3f} (root mean square)")
        rows[method] = x
    save_rows(args, run, rows)


if __name__ == "__main__":
    run_script(main)
