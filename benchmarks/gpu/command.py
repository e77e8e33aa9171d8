"""``genkit bench gpu``."""

from __future__ import annotations

import argparse
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import crashes, sampling, training
from benchmarks.gpu.setup import NEEDS_CUDA, Row, Setup, rounded
from benchmarks.speed.command import Machine
from genkit import __version__
from genkit.cli.scripts import ScriptParser
from genkit.core.device import pick_device
from genkit.core.files import write_text
from genkit.core.markdown import markdown_table

GRACE = 60  # seconds beyond its budget after which the process of a part is ended


@dataclass(frozen=True)
class Part:
    """One part of the benchmark."""

    measure: Callable[[Setup], Iterator[Row]]
    budget: int
    """seconds"""
    summary: str
    needs_cuda: bool = False


PARTS = {
    "table": Part(crashes.check_table, 45, "every objective and backbone: two steps and a sample"),
    "digits": Part(crashes.check_run, 60, "training, resuming, sampling and evaluation on the digits"),
    "step": Part(training.measure_steps, 120, "a training step of DiT-B/2 on latents of 4x32x32"),
    "launches": Part(training.profile_steps, 25, "kernels of a training step"),
    "waits": Part(training.count_waits, 25, "waits of the host for the device", needs_cuda=True),
    "layouts": Part(training.measure_layouts, 45, "a U-Net by layout and cudnn.benchmark"),
    "precision": Part(sampling.measure_precisions, 90, "drawing in several precisions"),
    "guidance": Part(sampling.measure_guidance, 20, "the cost of guidance"),
    "save": Part(training.measure_saving, 90, "a checkpoint of DiT-XL/2"),
}


class OutOfTime(Exception):
    """A part has used up its budget."""


def run_part(part: Part, setup: Setup) -> dict[str, Any]:
    """Run a part in this process: its state, seconds, rows, and error. It never raises."""
    if part.needs_cuda and not setup.is_cuda:
        return {"state": NEEDS_CUDA, "seconds": 0.0, "rows": []}

    def end(number: int, frame: object) -> None:
        raise OutOfTime(f"more than {part.budget} s")

    rows: list[Row] = []
    result: dict[str, Any] = {"state": "done"}
    began, previous = time.perf_counter(), signal.signal(signal.SIGALRM, end)
    signal.alarm(part.budget)
    try:
        rows.extend(rounded(row) for row in part.measure(setup))
    except OutOfTime as e:
        result = {"state": "out of time", "error": str(e)}
    except Exception as e:  # the others go on
        result = {"state": "failed", "error": f"{type(e).__name__}: {' '.join(str(e).split())[:500]}"}
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return {**result, "seconds": round(time.perf_counter() - began, 2), "rows": rows}


def run_apart(name: str, device: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """Run a part in a process of its own."""
    out, budget = folder / f"{name}.json", PARTS[name].budget + GRACE
    command = [sys.executable, "-m", "genkit", "bench", "gpu", "--device", device, "--part", name, "--out", str(out)]
    began = time.perf_counter()
    try:
        done = subprocess.run([*command, *(["--tiny"] if tiny else [])], capture_output=True, text=True, timeout=budget)
    except subprocess.TimeoutExpired:
        error = f"no answer for {budget} s"
    else:
        if out.is_file():
            return json.loads(out.read_text())["parts"][name]
        error = f"exit code {done.returncode}: {' '.join(done.stderr.split())[-500:]}"
    return {"state": "failed", "seconds": round(time.perf_counter() - began, 2), "rows": [], "error": error}


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    machine = Machine.of(device)
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    return {"device": machine.name, "peak_flops": machine.peak, "memory": memory, "torch": torch.__version__,
            "cuda": torch.version.cuda, "genkit": __version__, "python": platform.python_version()}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- the page
def format_page(result: Mapping[str, Any]) -> str:
    """The results as a page of Markdown."""
    machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items() if value is not None)
    lines = ["# genkit on a device", "", f"`{' '.join(result['command'])}`: {machine}.", ""]
    if result["tiny"]:
        lines += ["In miniature: this tests the command, and the numbers mean nothing.", ""]
    for name, part in sorted(result["parts"].items(), key=lambda item: list(PARTS).index(item[0])):
        lines += [f"## {PARTS[name].summary[0].upper()}{PARTS[name].summary[1:]}", ""]
        lines += [f"{part['state']}, {part['seconds']} s{': ' + part['error'] if 'error' in part else ''}", ""]
        lines += format_table(part["rows"])
    return "\n".join(lines)


def format_table(rows: Sequence[Row]) -> list[str]:
    """Rows as a table; a column that a row lacks is empty."""
    if not rows:
        return []
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [markdown_table(columns, ([str(row.get(key, "")) for key in columns] for row in rows)), ""]


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = ScriptParser(sys.modules["benchmarks.gpu"].__doc__, "genkit bench gpu")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: a test of the command")
    parser.add_argument("--part", choices=PARTS, help="this part only, in this process")
    parser.add_argument("--only", choices=PARTS, nargs="+", help="these parts; others that --out has are kept")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the JSON; the page is beside it, as .md")
    return parser.parse_args(argv)


def measured_before(out: Path, machine: Mapping[str, Any], tiny: bool) -> dict[str, Any]:
    """The parts that are in ``out`` already.

    Raises:
        ValueError: They are of another machine or size, so they cannot stand beside new ones.
    """
    if not out.is_file():
        return {}
    before = json.loads(out.read_text())
    if (before["machine"], before["tiny"]) != (dict(machine), tiny):
        there, here = ({**m, "tiny": t} for m, t in ((before["machine"], before["tiny"]), (machine, tiny)))
        raise ValueError(f"--out {out} was measured on {there}; this is {here}: give another file")
    return before["parts"]


def main(argv: list[str]) -> int:
    """Run the benchmark; the exit code is 0 also if parts failed, which the results say."""
    args = parse_arguments(argv)
    device = pick_device(args.device)
    result: dict[str, Any] = {"command": ["genkit", "bench", "gpu", *argv], "tiny": args.tiny}
    result |= {"machine": describe_machine(device), "parts": {}}
    if args.only:
        result["parts"] = measured_before(args.out, result["machine"], args.tiny)
    with tempfile.TemporaryDirectory() as folder:
        for name in [args.part] if args.part else args.only or PARTS:
            scratch = Path(folder) / name
            scratch.mkdir()
            if args.part or device.type != "cuda":
                done = run_part(PARTS[name], Setup(device, args.tiny, scratch))
            else:
                done = run_apart(name, device.type, args.tiny, scratch)
            result["parts"][name] = done
            print(f"{name:<10} {done['state']}, {done['seconds']} s{': ' + done['error'] if 'error' in done else ''}")
            write_text(args.out, json.dumps(result, indent=1) + "\n")
            write_text(args.out.with_suffix(".md"), format_page(result))
    print(f"written: {args.out}, {args.out.with_suffix('.md')}")
    return 0
