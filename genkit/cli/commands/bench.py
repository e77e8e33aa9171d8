"""`genkit bench NAME`: run a benchmark, a module of `benchmarks/` in a checkout that has `main(argv)`."""

from __future__ import annotations

import difflib
import importlib
import sys
from pathlib import Path

import genkit

CHECKOUT = Path(genkit.__file__).parents[1]

BENCHES = {  # name -> (module with main(argv), one line of help)
    "speed": ("benchmarks.speed", "a training step of genkit's U-Net, compared with diffusers' training example"),
    "overhead": (
        "benchmarks.overhead",
        "the cost of samplers without the network, compared with diffusers",
    ),
    "gpu": ("benchmarks.gpu", "everything that has to be seen on a GPU, in ten minutes: one JSON and one page"),
    "scale": (
        "benchmarks.scale",
        "steps outside networks, ranks, folders and latents of any size, on CPUs",
    ),
    "plan": ("benchmarks.plan", "memory, traffic and time of a training step on 8 and 256 GPUs, by arithmetic"),
    "quality": ("benchmarks.quality", "objectives with the same network, data and budget, evaluated in the same way"),
    "rollouts": ("benchmarks.rollouts", "steps a second of a policy's episodes, in one process and in several"),
    "race": ("benchmarks.race", "quality for seconds of training: other libraries' loops and genkit"),
    "optimizers": (
        "benchmarks.optimizers",
        "optimizers and schedules at equal CPU seconds, by held-out loss",
    ),
    "order": ("benchmarks.order", "the convergence order of every solver, on a mixture in closed form"),
    "toy": ("benchmarks.toy", "flows in the plane with and without optimal transport, and the published numbers"),
    "prediction": (
        "benchmarks.prediction",
        "predicting x0, eps or velocity, for a spiral in up to 512 dimensions",
    ),
    "dit-blocks": ("benchmarks.dit_blocks", "the blocks of newer transformers in a small DiT, at equal CPU seconds"),
    "few-step": ("benchmarks.few_step", "1 to 8 steps of flow maps, drifting and reflow, at equal CPU seconds"),
    "guidance": ("benchmarks.guidance", "guidance distilled into one pass, against classifier-free guidance in two"),
    "recordings": ("benchmarks.recordings", "images of recordings: how fast they are read, and with how much memory"),
    "reflow": ("benchmarks.reflow", "one-step samples of 1-, 2- and 3-rectified flow, and distilled"),
}


def main(argv: list[str]) -> int:
    """Run the benchmark that ``argv`` names. Returns the exit code."""
    lines = "\n".join(f"  {name:<10} {text}" for name, (_, text) in BENCHES.items())
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"usage: genkit bench NAME [options]\n\nbenchmarks:\n{lines}\n\ngenkit bench NAME --help shows its options."
        )
        return 0
    if argv[0] not in BENCHES:
        near = difflib.get_close_matches(argv[0], BENCHES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"bench: given {argv[0]!r}; allowed: {', '.join(BENCHES)}{hint}")
    if not (CHECKOUT / "benchmarks" / "__init__.py").is_file():
        raise ValueError(
            "bench: benchmarks/ is part of a checkout, not of the installed package; run pip install -e . in one"
        )
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    return importlib.import_module(BENCHES[argv[0]][0]).main(argv[1:])
