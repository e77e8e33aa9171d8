"""``genkit bench quality``."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from benchmarks.quality.measuring import Bench, Result
from benchmarks.quality.page import write_results
from benchmarks.quality.settings import PROG, Quality, find_row
from benchmarks.quality.training import train_row
from genkit.config import parse
from genkit.core.device import pick_device
from genkit.core.progress import Progress, terminal_progress
from genkit.evaluation import Card
from genkit.training.run import load_run

console = Console(highlight=False, soft_wrap=True)


def main(argv: list[str]) -> int:
    """Train and measure all rows, and write the report after each; the exit code."""
    settings = parse(Quality, argv, prog=PROG)
    device = pick_device(settings.device)
    # mistakes are found before any training
    _ = settings.nfe_values
    for name in settings.row_names:
        settings.train_config(name, 0)
        settings.first_stage_config(name, 0)
    jobs = [(name, seed) for seed in range(settings.seeds) for name in settings.row_names]
    bench, results = Bench(settings, device), []
    real: Card | None = None
    for i, (name, seed) in enumerate(jobs, 1):
        console.print(f"[{i}/{len(jobs)}] {name}, seed {seed}", markup=False)
        trained = train_row(settings, name, seed)
        run = load_run(trained.run, device=settings.device)
        torch.set_num_threads(run.config.threads or torch.get_num_threads())
        row, one_pass = find_row(name), run.objective.sampler is None
        sampler = "one pass" if one_pass else f"{row.sampler}, {row.grid}"
        with terminal_progress() as progress:
            for nfe in [1] if one_pass else settings.nfe_values:
                measured = bench.measure_run(run, row, nfe, label_progress(progress, f"measuring, NFE {nfe}"))
                results.append(Result(name, seed, nfe, sampler, measured, trained.cost, trained.run))
            real = real or bench.measure_held_out(run)
        write_results(settings, argv, results, real, device)
    console.print((Path(settings.out) / "report.md").read_text(), markup=False)
    for file in ("report.md", "report.html"):
        console.print(Path(settings.out) / file, markup=False)
    return 0


def label_progress(progress: Progress, label: str) -> Progress:
    """``progress`` with ``label`` as the name of every task."""

    def report(what: str, done: int, total: int | None) -> None:
        progress(label, done, total)

    return report
