"""Draw a grid from a run with several samplers, one row each, from the same noise.

    python samplers/sample_grid.py runs/latest --samplers ddim heun dpmpp_2m --steps 10 --out grid.png

Copy this file and change it: it shows all that sampling from Python needs.
"""

from pathlib import Path

import torch

import genkit
from genkit import SAMPLERS
from genkit.cli.scripts import ScriptParser, run_script
from genkit.core import pictures


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("run", help="a run directory, such as runs/latest")
    parser.add_argument("--samplers", nargs="+", default=["ddim", "heun", "dpmpp_2m", "ancestral"], choices=SAMPLERS)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--n", type=int, default=10, help="samples of each sampler")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("grid.png"))
    args = parser.parse_args()

    run = genkit.load(args.run)
    if len(run.spec.shape) != 3:
        parser.error(f"this script draws images; {args.run} has samples of shape {run.spec.shape}: try genkit sample")
    rows = []
    for name in args.samplers:
        x, _ = run.sample(args.n, sampler=name, steps=args.steps, guidance=args.guidance, seed=args.seed)
        rows.append(x)
        print(f"{name:<10} {args.n} samples, {args.steps} steps")
    print(pictures.save_image(pictures.make_grid(torch.cat(rows), args.n, captions=args.samplers), args.out))


if __name__ == "__main__":
    run_script(main)
