"""Measuring the rows: cards, times and pictures, all with one evaluator, kept on disk and made once."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.quality.settings import Quality, Row
from benchmarks.quality.training import Cost
from genkit.core import pictures
from genkit.core.files import write_text
from genkit.core.progress import Progress, silent
from genkit.evaluation import Card, DatasetSamples, Evaluator, ModelSamples, open_run_data
from genkit.evaluation.cards import file_name
from genkit.evaluation.evaluations import default_reference_n
from genkit.evaluation.sources import hash_weights
from genkit.training.run import Run
from genkit.training.sampling import Sampling

GRID_SAMPLES = 40  # samples in the pictures
TIMED_SAMPLES = 64  # samples whose drawing is timed, in one batch


@dataclass(frozen=True)
class RunMeasurement:
    """What is measured of a run at one number of evaluations."""

    card: Card
    milliseconds: float
    """per sample: CPU time if there is no GPU, else wall time"""
    picture: Path


@dataclass(frozen=True)
class Result:
    """One row of one seed at one number of evaluations."""

    row: str
    seed: int
    nfe: int
    sampler: str
    """sampler and grid, for the table"""
    measured: RunMeasurement
    cost: Cost
    run: Path


@dataclass
class Bench:
    """One evaluator for all rows, created for the first of them, and what it measures."""

    settings: Quality
    device: torch.device
    evaluator: Evaluator | None = None

    def evaluator_for(self, samples: ModelSamples) -> Evaluator:
        """The evaluator; the reference is the training data of the first run."""
        if self.evaluator is None:
            self.evaluator = Evaluator.create(
                samples,
                open_run_data(samples.run),
                features=self.settings.features,
                reference_n=default_reference_n(samples.spec, self.settings.n),
                device=self.device,
            )
        return self.evaluator

    def measure_run(self, run: Run, row: Row, nfe: int, progress: Progress = silent) -> RunMeasurement:
        """Card, time and picture of a run at ``nfe`` evaluations, found or made."""
        one_pass = run.objective.sampler is None
        sampling = Sampling() if one_pass else Sampling(sampler=row.sampler, steps=nfe, grid=row.grid)
        samples = ModelSamples(run, sampling, hash_weights(run))
        evaluator = self.evaluator_for(samples)
        path = save_card(evaluator, samples, self.settings.n, run.directory / "eval", progress)
        folder = run.directory / "quality"
        timing, picture = folder / f"{path.stem}.json", folder / f"{path.stem}.png"
        if not (timing.is_file() and picture.is_file()):
            pictures.save_image(run.sample(GRID_SAMPLES, sampling).grid(), picture)
            write_text(timing, json.dumps({"ms_per_sample": time_sampling(run, sampling)}) + "\n")
        return RunMeasurement(Card.load(path), json.loads(timing.read_text())["ms_per_sample"], picture)

    def measure_held_out(self, run: Run) -> Card | None:
        """The card of held-out data, as many as there are up to n; None if no data are held out."""
        try:
            test = open_run_data(run, "test")
        except ValueError:
            return None
        evaluator = self.evaluator_for(ModelSamples(run))
        return Card.load(save_card(evaluator, test, min(self.settings.n, test.limit), Path(self.settings.out) / "real"))


def save_card(
    evaluator: Evaluator, samples: ModelSamples | DatasetSamples, n: int, folder: Path, progress: Progress = silent
) -> Path:
    """The file of the card of ``n`` samples, found by its settings, or made."""
    path = folder / file_name(evaluator.card_settings(samples, n))
    if not path.is_file():
        evaluator.make_card(samples, n, evaluator.measure(samples, n, progress)).save(path)
    progress("samples", n, n)
    return path


def time_sampling(run: Run, sampling: Sampling) -> float:
    """Milliseconds per sample in a batch of 64, the faster of two: CPU time of this process, or wall time on a GPU."""
    clock = time.process_time if run.device.type == "cpu" else time.perf_counter
    seconds = []
    for _ in range(2):
        start = clock()
        # the samples end on the CPU, so a GPU has finished
        run.sample(TIMED_SAMPLES, sampling, batch=TIMED_SAMPLES)
        seconds.append(clock() - start)
    return 1e3 * min(seconds) / TIMED_SAMPLES
