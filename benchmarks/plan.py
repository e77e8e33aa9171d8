"""Memory, traffic and time of a training step on 8 and on 256 GPUs, by arithmetic; nothing is run.

    genkit bench plan [--out FILE.json]

Parameters, FLOPs and activations are counted on tensors without numbers; all else follows from the sizes and the data
sheets of the GPUs (``genkit.training.plan``).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.results import make_console, make_table
from genkit import __version__
from genkit.backbones import DiT
from genkit.backbones.presets import DIT_PRESETS
from genkit.cli.scripts import ScriptParser
from genkit.core import Label, Spec
from genkit.core.files import write_text
from genkit.training.plan import Cluster, measure_network, plan_step
from genkit.training.settings import Parallel

LATENTS = Spec((4, 32, 32), {"label": Label(1000)})
PIXELS = Spec((3, 256, 256), {"label": Label(1000)})
NETWORKS = {
    "DiT-B/2": (DiT(**DIT_PRESETS["B/2"]), LATENTS),
    "DiT-XL/2": (DiT(**DIT_PRESETS["XL/2"]), LATENTS),
    "JiT-G/16": (DiT(**DIT_PRESETS["JiT-G/16"]), PIXELS),
}
BATCHES = {8: 512, 256: 4096}  # GPUs -> samples of a step
PARALLEL: tuple[Parallel, ...] = ("ddp", "fsdp", "hsdp")


def main(argv: list[str]) -> int:
    """Print the plans; the exit code."""
    parser = ScriptParser(__doc__, "genkit bench plan")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON, with the assumptions")
    args = parser.parse_args(argv)
    table = make_table("network", "GPUs", "parallel", "GB a GPU", "GB in the node", "GB across", "ms a step")
    costs, rows = {}, []
    for name, (backbone, spec) in NETWORKS.items():
        cost = costs[name] = measure_network(backbone, spec)
        for gpus, batch in BATCHES.items():
            for parallel in PARALLEL:
                if parallel == "hsdp" and gpus <= Cluster(gpus).per_node:
                    continue  # one node: the same as fsdp
                plan = plan_step(cost, Cluster(gpus), parallel, batch)
                row = {"network": name, "gpus": gpus, "batch": batch, "parallel": parallel, **asdict(plan)}
                rows.append({**row, "total_memory": plan.total_memory, "seconds": plan.seconds})
                sizes = plan.total_memory, plan.in_node_bytes, plan.across_bytes
                numbers = [f"{size / 1e9:.2f}" for size in sizes]
                low, high = plan.seconds
                table.add_row(name, str(gpus), parallel, *numbers, f"{1e3 * low:.0f} to {1e3 * high:.0f}")
    make_console().print(table)
    if args.out:
        networks = {name: asdict(cost) for name, cost in costs.items()}
        result = {"networks": networks, "cluster": asdict(Cluster(8)), "rows": rows, "genkit": __version__}
        write_text(args.out, json.dumps(result, indent=1) + "\n")
    return 0
