"""`genkit bench NAME`: measurements, each a module of genkit.bench with `main(argv)`."""

from __future__ import annotations

import difflib
import importlib

BENCHES = {  # name -> (module with main(argv), one line of help)
    "speed": ("genkit.bench.speed", "a training step of our U-Net against diffusers' in the loop of its example"),
    "overhead": ("genkit.bench.overhead", "what samplers cost besides the network, against diffusers' schedulers"),
    "order": ("genkit.bench.order", "the convergence order of every solver, on a mixture in closed form"),
}


def main(argv: list[str]) -> int:
    lines = "\n".join(f"  {name:<8} {text}" for name, (_, text) in BENCHES.items())
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: genkit bench NAME [options]\n\nmeasurements:\n{lines}\n\ngenkit bench NAME --help says more.")
        return 0
    if argv[0] not in BENCHES:
        near = difflib.get_close_matches(argv[0], BENCHES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"bench: given {argv[0]!r}; allowed: {', '.join(BENCHES)}{hint}")
    return importlib.import_module(BENCHES[argv[0]][0]).main(argv[1:])
