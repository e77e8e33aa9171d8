"""`genkit info RUN`: show what a run is, its progress and its settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from genkit.backbones.lora import GuidanceLoRA
from genkit.cli.commands.note import list_annotations
from genkit.cli.output import console
from genkit.config import parse, to_yaml
from genkit.config.paths import PathText
from genkit.config.trust import UntrustedCodeError
from genkit.core import Label, Tokens
from genkit.core.tensors import count_parameters
from genkit.data import text
from genkit.data.classes import list_classes
from genkit.data.codecs import LearnedCodec
from genkit.training.annotations import read_annotations
from genkit.training.base_weights import BASE_FILE, read_base
from genkit.training.best import read_best
from genkit.training.directory import find_run, list_checkpoints, list_incomplete, list_saved, read_log, read_state
from genkit.training.power_ema import average_names
from genkit.training.run import Run, load_run
from genkit.training.settings import TrainSettings


@dataclass(frozen=True)
class Info:
    """Show what a run is, its progress and its settings."""

    run: Annotated[PathText, tyro.conf.Positional]
    """Run directory, such as runs/latest."""


def describe_base(run: Run) -> str:
    """Where the weights under the adapter of a LoRA run are."""
    if not (run.directory / BASE_FILE).is_file():
        return "beside the weights that it adapts"
    base, stays_apart = read_base(run.directory), isinstance(run.config.lora, GuidanceLoRA)
    return f"{'beside' if stays_apart else 'merged into'} {base['run']} ({base['weights']})"


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit code."""
    command = parse(Info, argv, prog="genkit info")
    try:
        run = load_run(command.run)
    except UntrustedCodeError as e:
        return show_stored(find_run(command.run), e)
    records = read_log(run.directory)
    count = {k: count_parameters(net) for k, net in run.nets.items()}
    damaged = list_incomplete(run.directory)
    saved = [p.name + (" (damaged)" if p in damaged else "") for p in list_saved(run.directory)]
    cond = ", ".join(f"{k} ({type(v).__name__.lower()})" for k, v in run.spec.cond.items()) or "none"

    # what every run has
    lines = {
        "run": run.directory,
        "step": f"{run.step} of {run.config.steps}, batch {run.config.batch}",
        "samples": f"{'x'.join(map(str, run.spec.shape))}, conditions: {cond}",
        "networks": ", ".join(f"{k} {n / 1e6:.2f}M" for k, n in count.items()),
        "weights": f"{run.weights}; averages kept: {describe_averages(run.config)}",
        "checkpoints": ", ".join(saved),
    }

    if best := read_best(run.directory):
        lines["best"] = f"{best}; {best.worse} evaluations since; --step best"

    # what only some runs have: classes, captions, LoRA, a first stage, a log
    for name, kind in run.spec.cond.items():
        if isinstance(kind, Label) and not kind.centers:
            lines["classes" if name == "label" else f"classes of {name}"] = list_classes(kind)
    for name, kind in text.text_conditions(run.spec).items():
        by = f"by {kind.encoder}" if isinstance(kind, Tokens) else f"up to {kind.length} bytes"
        lines[name] = f"{by}, such as {', '.join(map(repr, kind.examples))}"
    if run.config.lora.active:
        lines["lora"] = f"rank {run.config.lora.rank}, {describe_base(run)}"
        if run.config.weight_format.active:
            lines["lora"] += f"; trained on frozen weights in {run.config.weight_format}"
    if isinstance(run.codec, LearnedCodec):
        lines["decoded"] = f"{'x'.join(map(str, run.data_spec.shape))}, by the first stage in {run.directory / 'codec'}"
    if records:
        last = {
            k: v for r in records if r["step"] == records[-1]["step"] for k, v in r.items()
        }  # validation has its own
        shown = {k: v for k, v in last.items() if k.endswith("/loss") or "samples_per_s" not in last}
        numbers = [f"{k} {v:.5g}" for k, v in shown.items() if isinstance(v, float)]
        rate = [f"{last['samples_per_s']:.0f} samples/s"] if "samples_per_s" in last else []
        lines["last log line"] = ", ".join([f"step {last['step']}", *numbers, *rate])

    for key, value in [*lines.items(), *list_annotations(read_annotations(run.directory))]:
        console.print(f"{key:<14} {value}", markup=False)
    console.print("\n" + to_yaml(run.config), markup=False)
    return 0


def show_stored(run: Path, reason: UntrustedCodeError) -> int:
    """What the files of a run say whose code is not trusted, so that none of it is imported. Returns the exit code."""
    saved = list_checkpoints(run)
    lines = {"run": run, "note": str(reason), "checkpoints": ", ".join(p.name for p in saved)}
    if saved:
        spec = read_state(saved[-1])["spec"]
        lines["samples"] = f"{'x'.join(map(str, spec['shape']))}, conditions: {', '.join(spec['cond']) or 'none'}"
    for key, value in [*lines.items(), *list_annotations(read_annotations(run))]:
        console.print(f"{key:<14} {value}", markup=False)
    console.print("\n" + (run / "config.yaml").read_text(encoding="utf-8", errors="replace"), markup=False)
    return 0


def describe_averages(settings: TrainSettings) -> str:
    """The averages of a run that can be sampled from."""
    kept = [*map(str, settings.ema), *average_names(settings.power_ema)]
    return ", ".join([*kept, *(["power-WIDTH of any width"] if settings.power_ema else [])]) or "none"
