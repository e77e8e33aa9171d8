"""Interpolate between samples: spherical interpolation of their noise, drawn with a deterministic sampler.

    python samplers/interpolate.py runs/latest --label 3 --rows 5 --columns 10 --out interpolation.png

Each row goes from the noise of seed 2i to that of seed 2i + 1 along a great circle (Shoemake 1985), which keeps the
norm that normal noise has.
"""

from pathlib import Path

import torch
from torch import Tensor

import genkit
from genkit.cli.scripts import ScriptParser, run_script
from genkit.core import pictures
from genkit.diffusion.samplers import Seeds
from genkit.training.sampling import picture_names, sample_conditions


def slerp(a: Tensor, b: Tensor, w: float) -> Tensor:
    """The point at fraction ``w`` of the great circle from ``a`` to ``b``, each ``[*S]``."""
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - w) * angle) * a + torch.sin(w * angle) * b) / torch.sin(angle)


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("run", help="a run directory, such as runs/latest")
    parser.add_argument("--label", help="the class of all rows, by name or number; default: row i has class i")
    parser.add_argument("--rows", type=int, default=5)
    parser.add_argument("--columns", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("interpolation.png"))
    args = parser.parse_args()

    run = genkit.load(args.run)
    z = Seeds(range(args.seed, args.seed + 2 * args.rows))(run.spec.shape)
    fractions = torch.linspace(0, 1, args.columns).tolist()
    noise = torch.stack([slerp(z[2 * i], z[2 * i + 1], w) for i in range(args.rows) for w in fractions])
    labels = sample_conditions(run.spec, args.rows, args.label)
    cond = {name: value.repeat_interleave(args.columns).to(run.device) for name, value in labels.items()}
    generate = run.generator(genkit.Sampling(sampler="heun", steps=args.steps, guidance=args.guidance))
    x = run.codec.decode(generate(noise.to(run.device), cond)).cpu()
    names = picture_names(run.spec) if args.label is None else ()
    captions = [names[i % len(names)] for i in range(args.rows)] if names else ()
    image = pictures.make_grid(x, args.columns, captions=captions) if x.ndim == 4 else pictures.draw_samples(x, {})
    print(pictures.save_image(image, args.out))


if __name__ == "__main__":
    run_script(main)
