"""`genkit bench NAME`: the benchmarks of a checkout, each a module of `benchmarks/` with `main(argv)`."""

from __future__ import annotations

import difflib
import importlib
import sys
from pathlib import Path

import genkit

CHECKOUT = Path(genkit.__file__).parents[1]

BENCHES = {  # name -> (module with main(argv), one line of help)
    "speed": ("benchmarks.speed", "a training step of our U-Net against diffusers' in the loop of its example"),
    "overhead": ("benchmarks.overhead", "what samplers cost besides the network, against diffusers' schedulers"),
    "quality": ("benchmarks.quality", "objectives on one network, data and budget, measured in the same way"),
    "order": ("benchmarks.order", "the convergence order of every solver, on a mixture in closed form"),
    "toy": ("benchmarks.toy", "flows in the plane with and without optimal transport, and the published numbers"),
    "prediction": (
        "benchmarks.prediction",
        "what to predict, x0, eps or velocity, of a plane in 512 dimensions",
    ),
    "reflow": ("benchmarks.reflow", "one step of 1-, 2- and 3-rectified flow, and distilled"),
}


def main(argv: list[str]) -> int:
    """Run the benchmark that ``argv`` names; the exit code."""
    lines = "\n".join(f"  {name:<10} {text}" for name, (_, text) in BENCHES.items())
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: genkit bench NAME [options]\n\nbenchmarks:\n{lines}\n\ngenkit bench NAME --help says more.")
        return 0
    if argv[0] not in BENCHES:
        near = difflib.get_close_matches(argv[0], BENCHES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"bench: given {argv[0]!r}; allowed: {', '.join(BENCHES)}{hint}")
    if not (CHECKOUT / "benchmarks" / "__init__.py").is_file():
        raise ValueError("bench: benchmarks/ is part of a checkout, not of the installed package; use pip install -e .")
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    return importlib.import_module(BENCHES[argv[0]][0]).main(argv[1:])
