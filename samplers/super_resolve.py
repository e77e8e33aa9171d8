"""Enlarge images of which only the means of blocks are known, with any model of the larger ones.

    python samplers/super_resolve.py runs/latest --factor 2 --out enlarged.png
    python samplers/super_resolve.py runs/latest --factor 4 --noise 0.05 --methods pigdm

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
from genkit.diffusion.inverse_problems import Average, measure


def main() -> None:
    parser = make_parser(str(__doc__), out="enlarged.png")
    add_restoration_arguments(parser, noise=0.0)
    parser.add_argument("--factor", type=int, default=2, help="how many times smaller; a divisor of height and width")
    args = parser.parse_args()

    run = genkit.load(args.run)
    x0 = load_images(args, run)
    operator = Average(args.factor)
    measurement = measure(operator, x0, args.noise, measurement_noise(args, run))
    rows = {"original": x0, "means of blocks": operator.enlarge(measurement.y)}
    for method in args.methods:
        x = restore(args, run, measurement, method)
        print(f"{method:<6} error {rms_error(x, x0):.3f} (root mean square)")
        rows[method] = x
    save_rows(args, run, rows)


if __name__ == "__main__":
    run_script(main)
