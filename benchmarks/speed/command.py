"""``genkit bench speed``."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import genkit
from benchmarks.speed.contenders import Contender, Factory
from benchmarks.speed.measuring import (
    Batch,
    Clock,
    count_flops,
    draw_batch,
    load_images,
    pick_clock,
    take_turns,
    time_to_quality,
)
from genkit.backbones import UNet
from genkit.cli.scripts import ScriptParser
from genkit.core.files import write_text
from genkit.training.precision import has_fast_bf16

PEAK_FLOPS = {  # bf16, dense
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}
Pair = tuple[str, str, str]  # label, diffusers' contender, genkit's contender


@dataclass(frozen=True)
class Machine:
    """The device, its name and its peak FLOP/s (None if unknown)."""

    device: torch.device
    name: str
    peak: float | None

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """What is known about ``device``."""
        if device.type != "cuda":
            return cls(device, processor_name(), None)
        name = torch.cuda.get_device_name(device)
        return cls(device, name, next((peak for key, peak in PEAK_FLOPS.items() if key in name), None))


def processor_name() -> str:
    """The model of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def versions() -> dict[str, str]:
    """Versions of what is measured, and the platform."""
    import diffusers  # lazy: slow to import

    packages = {"torch": torch.__version__, "diffusers": diffusers.__version__, "genkit": genkit.__version__}
    return {**packages, "python": platform.python_version(), "platform": platform.platform()}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    description = "one training step of genkit's U-Net and of diffusers', at equal parameters and FLOPs"
    parser = ScriptParser(description, "genkit bench speed")
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each contender")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--width", type=int, default=UNet.width)
    parser.add_argument("--mults", type=int, nargs="+", default=list(UNet.mults))
    parser.add_argument("--blocks", type=int, default=UNet.num_blocks)
    parser.add_argument("--attention", type=int, nargs="*", default=list(UNet.attention), help="sides with attention")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; with 1, CPU time is measured")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="also a compiled genkit")
    parser.add_argument("--channels-last", action="store_true", help="also genkit in channels_last")
    parser.add_argument("--quality", action="store_true", help="also: seconds to the same validation loss (minutes)")
    parser.add_argument("--quality-steps", type=int, default=120)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--data-root", help="a zip of images; default: scikit-learn's digits, enlarged")
    parser.add_argument("--out", help="write everything to this JSON file")
    return parser.parse_args(argv)


def make_contenders(factory: Factory, args: argparse.Namespace, bf16: bool) -> tuple[dict[str, Contender], list[Pair]]:
    """All contenders, and which are compared."""
    heads8 = UNet(**{**asdict(factory.cfg), "head_size": 8})
    contenders = {
        "d": factory.diffusers("diffusers, as shipped", 8, False),
        "g": factory.genkit("genkit, as shipped", bf16),
        "d64": factory.diffusers("diffusers, AdaGN, heads of 64, fp32", 64, True),
        "g64": factory.genkit("genkit, heads of 64, fp32", False),
        "d8": factory.diffusers("diffusers, AdaGN, heads of 8, fp32", 8, True),
        "g8": factory.genkit("genkit, heads of 8, fp32", False, heads8),
    }
    pairs = [("(a) as shipped", "d", "g"), ("(b) same network, heads of 64, fp32", "d64", "g64")]
    pairs.append(("(b) same network, heads of 8, fp32", "d8", "g8"))
    if bf16:
        contenders["d64h"] = factory.diffusers("diffusers, AdaGN, heads of 64, bf16", 64, True, True)
        pairs.append(("(b) same network, heads of 64, bf16", "d64h", "g"))
    if args.compile:
        contenders["gc"] = factory.genkit("genkit, compiled", bf16, compiled=True)
        pairs.append(("as shipped, genkit compiled", "d", "gc"))
    if args.channels_last:
        contenders["gl"] = factory.genkit("genkit, channels_last", bf16, channels_last=True)
        pairs.append(("as shipped, genkit channels_last", "d", "gl"))
    return contenders, pairs


def count_all_flops(contenders: Mapping[str, Contender], batch: Batch) -> dict[str, int]:
    """FLOPs per image of each contender. A compiled network cannot be counted; it has those of the other one."""
    flops = {key: count_flops(c, batch) for key, c in contenders.items() if not c.settings.get("compiled")}
    flops.setdefault("gc", flops["g"])
    return flops


def summarise(
    contenders: Mapping[str, Contender], flops: Mapping[str, int], batch: int, peak: float | None
) -> dict[str, dict[str, Any]]:
    """Size, FLOPs and speed of each contender."""
    rows = {}
    for key, contender in contenders.items():
        median = statistics.median(contender.seconds)
        low, *_, high = statistics.quantiles(contender.seconds, n=10)
        row = {"name": contender.name, "params": contender.params, "flops_per_image": flops[key], "seconds": median}
        row |= {"p10": low, "p90": high, "images_per_second": batch / median, **contender.settings}
        if peak:
            row["mfu"] = flops[key] * batch / median / peak
        rows[key] = row
    return rows


def compare_pairs(pairs: Sequence[Pair], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Speed-up, and ratio of parameters and FLOPs, of each pair."""
    ratios = {}
    for label, theirs, ours in pairs:
        a, b = rows[theirs], rows[ours]
        ratios[label] = {
            "speedup": a["seconds"] / b["seconds"],
            "params": b["params"] / a["params"],
            "flops": b["flops_per_image"] / a["flops_per_image"],
        }
    return ratios


def compare_quality(
    factory: Factory, images: Tensor, args: argparse.Namespace, bf16: bool, clock: Clock
) -> list[dict[str, Any]]:
    """Seconds to the same validation loss, of newly initialised networks."""
    pairs = {
        "(c) as shipped": (
            factory.diffusers("diffusers, as shipped", 8, False),
            factory.genkit("genkit, as shipped", bf16),
        ),
        "(c) same network, fp32": (
            factory.diffusers("diffusers, AdaGN, 64, fp32", 64, True),
            factory.genkit("genkit, fp32", False),
        ),
    }
    results = []
    for label, (theirs, ours) in pairs.items():
        result = time_to_quality(theirs, ours, images, args, clock, factory.device)
        results.append({**result, "row": label})
    return results


# ---------------------------------------------------------------------------------------------------------- printing
def new_table(title: str, *columns: str) -> Table:
    """A table whose first column is left-aligned, the others right-aligned."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    return table


def contender_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """Size and speed of each contender."""
    has_mfu = any("mfu" in row for row in rows.values())
    columns = ["network and loop", "parameters", "GFLOP/image", "ms (median)", "images/s", *(["MFU"] * has_mfu)]
    table = new_table(title, *columns)
    for row in rows.values():
        cells = [row["name"], f"{row['params']:,}", f"{row['flops_per_image'] / 1e9:.3f}"]
        cells += [f"{1e3 * row['seconds']:.1f}", f"{row['images_per_second']:.1f}"]
        table.add_row(*cells, *([f"{row['mfu']:.1%}"] if has_mfu else []))
    return table


def ratio_table(title: str, ratios: Mapping[str, Mapping[str, float]]) -> Table:
    """The comparisons."""
    table = new_table(title, "row", "speed-up", "parameters", "FLOPs")
    for label, ratio in ratios.items():
        table.add_row(label, f"{ratio['speedup']:.2f}x", f"{ratio['params'] - 1:+.1%}", f"{ratio['flops'] - 1:+.1%}")
    return table


def quality_table(title: str, results: Sequence[Mapping[str, Any]]) -> Table:
    """Seconds to the same validation loss."""
    table = new_table(title, "row", "loss", "diffusers", "genkit", "speed-up")
    for r in results:
        reached = (f"{r['ours_seconds']:.1f}", f"{r['ratio']:.2f}x") if r["ratio"] else ("not reached", "-")
        table.add_row(r["row"], f"{r['goal']:.4f}", f"{r['theirs_seconds']:.1f}", *reached)
    return table


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    cfg = UNet(width=args.width, mults=tuple(args.mults), num_blocks=args.blocks, attention=tuple(args.attention))
    factory = Factory(cfg, (3, args.size, args.size), device, args.lr)
    bf16, machine = has_fast_bf16(device), Machine.of(device)
    clock_name, clock = pick_clock(device, args.threads)
    images, source = load_images(args.data_root, args.size)
    batch = draw_batch(images, args.batch, torch.Generator().manual_seed(0), device)
    contenders, pairs = make_contenders(factory, args, bf16)
    flops = count_all_flops(contenders, batch)
    take_turns(list(contenders.values()), args.steps, batch, clock)

    console = Console()
    rows = summarise(contenders, flops, args.batch, machine.peak)
    place = f"{args.size}x{args.size}x3, batch {args.batch}, {machine.name}, {args.threads} thread(s)"
    console.print(contender_table(f"training step, {place}", rows))
    ratios = compare_pairs(pairs, rows)
    medians = f"{clock_name}; medians of {args.steps} interleaved steps"
    console.print(ratio_table(f"speed-up of genkit over diffusers ({medians})", ratios))
    quality = []
    if args.quality:
        quality = compare_quality(factory, images, args, bf16, clock)
        title = f"(c) seconds ({clock_name}) to the same validation loss on {source}, lr {args.lr}"
        console.print(quality_table(title, quality))
    if args.out:
        results = {"command": ["genkit", "bench", "speed", *argv], "settings": vars(args), "backbone": asdict(cfg)}
        results |= {"clock": clock_name, "device": machine.name, "data": source, "rows": rows, "ratios": ratios}
        results |= {"quality": quality, "versions": versions(), "peak_flops": machine.peak}
        write_text(args.out, json.dumps(results, indent=1) + "\n")
        console.print(f"written: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
