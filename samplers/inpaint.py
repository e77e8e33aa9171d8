"""Fill in the masked part of real pictures, with any model of such pictures.

    python samplers/inpaint.py runs/latest --hide right --methods pigdm dps --out inpainted.png
    python samplers/inpaint.py runs/latest --images my/folder --hide box --noise 0.05

Rows of the picture: the originals, their measurement, and one restoration a method. The originals are held-out pictures
of the run's data, or those of a folder, .zip or .npz of the same size.
"""

import torch
from common import METHODS, editing_options, load_pictures, restore, rms, save_rows, start
from torch import Tensor

from genkit.diffusion.inverse_problems import Mask
from genkit.training.run import load_run

HIDDEN = {  # from the row and column of each pixel, in [0, 1]
    "right": lambda row, column: column >= 0.5,
    "bottom": lambda row, column: row >= 0.5,
    "box": lambda row, column: (row - 0.5).abs().maximum((column - 0.5).abs()) < 0.25,
    "half": lambda row, column: torch.rand(row.shape, generator=torch.Generator().manual_seed(0)) < 0.5,
}


def visible(hide: str, shape: tuple[int, ...]) -> Tensor:
    """Bool ``[C, H, W]``: True at visible pixels, in all channels."""
    row, column = ((torch.arange(n) + 0.5) / n for n in shape[1:])
    return ~HIDDEN[hide](*torch.meshgrid(row, column, indexing="ij")).expand(shape)


def main() -> None:
    parser = editing_options(__doc__, "inpainted.png")
    parser.add_argument("--hide", default="right", choices=HIDDEN, help="hidden part; half: random pixels")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation of the measurement, in [-1, 1]")
    parser.add_argument("--methods", nargs="+", default=["pigdm", "dps"], choices=METHODS)
    args = parser.parse_args()

    run = load_run(args.run)
    x0 = load_pictures(args, run)
    mask = Mask(visible(args.hide, run.spec.shape).to(run.device))
    measurement, restored = restore(args, run, x0, mask)
    for method, x in zip(args.methods, restored, strict=True):
        error = rms((x.clamp(-1, 1) - x0)[:, ~mask.mask])
        print(f"{method:<6} error of the hidden part {error:.3f} (root mean square)")
    save_rows(args, run, [x0, mask.forward(measurement.y), *restored])


if __name__ == "__main__":
    start(main)
