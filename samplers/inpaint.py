"""Fill in the hidden part of real images with any model of such images, given the visible part only.

    python samplers/inpaint.py runs/latest --hide right --methods pigdm dps --out inpainted.png
    python samplers/inpaint.py runs/latest --images my/folder --hide box --noise 0.05

Rows of the picture: the original, its visible part, and one restoration for each method. The images are held-out ones
of the run's own data, or those of a folder, .zip or .npz of the same size.
"""

import torch
from editing import (
    add_restoration_arguments,
    load_images,
    make_parser,
    measurement_noise,
    restore,
    rms_error,
    save_rows,
)
from torch import Tensor

import genkit
from genkit.cli.scripts import run_script
from genkit.diffusion.inverse_problems import Mask, measure

PARTS = ("right", "bottom", "box", "half")


def visible_mask(part: str, shape: tuple[int, ...]) -> Tensor:
    """Bool ``[C, H, W]``: True if a pixel is visible; all of its channels are, or none."""
    row, column = torch.meshgrid(*[(torch.arange(n) + 0.5) / n for n in shape[1:]], indexing="ij")
    if part == "right":
        hidden = column >= 0.5
    elif part == "bottom":
        hidden = row >= 0.5
    elif part == "box":
        hidden = (row - 0.5).abs().maximum((column - 0.5).abs()) < 0.25
    else:
        hidden = torch.rand(row.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    return ~hidden.expand(shape)


def main() -> None:
    parser = make_parser(str(__doc__), out="inpainted.png")
    add_restoration_arguments(parser, noise=0.0)
    parser.add_argument(
        "--hide", default="right", choices=PARTS, help="the hidden part; half: every other pixel, at random"
    )
    args = parser.parse_args()

    run = genkit.load(args.run)
    x0 = load_images(args, run)
    operator = Mask(visible_mask(args.hide, run.spec.shape).to(run.device))
    measurement = measure(operator, x0, args.noise, measurement_noise(args, run))
    rows = {"original": x0, "visible": operator.forward(measurement.y)}
    for method in args.methods:
        x = restore(args, run, measurement, method)
        print(f"{method:<6} error of the hidden part {rms_error(x, x0, ~operator.mask):.3f} (root mean square)")
        rows[method] = x
    save_rows(args, run, rows)


if __name__ == "__main__":
    run_script(main)
