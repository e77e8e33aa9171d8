"""Trainings that are compared at equal seconds."""

import math
from itertools import count

import pytest

from benchmarks.timed_training import QUIET, measure_held_out, run_timed, step_seconds

OPTIONS = {
    "objective": "flow", "data": "moons", "backbone": {"name": "mlp", "width": 8, "depth": 1}, "batch": 16,
    "device": "cpu", "threads": 1, **QUIET,
}  # fmt: skip


def test_a_step_takes_the_time_between_its_end_and_that_of_the_one_before():
    """A clock that counts its own calls: one call for each step."""
    ticks = count()
    assert step_seconds(OPTIONS, (2, 8), lambda: 3.0 * next(ticks)) == pytest.approx(3.0)
    assert 0 < step_seconds(OPTIONS, (2, 8)) < 5


def test_every_step_has_its_time(tmp_path):
    run, ends = run_timed({**OPTIONS, "steps": 5, "out": str(tmp_path)})
    assert set(range(1, 6)) <= ends.keys()
    assert list(ends.values()) == sorted(ends.values())
    assert run.directory.is_dir()


def test_the_loss_of_held_out_samples_falls_with_training_and_is_infinite_if_it_diverges():
    short, long = (measure_held_out({**OPTIONS, "steps": n, "seed": 0, "lr": 1e-2}) for n in (1, 150))
    assert long.loss < 0.8 * short.loss
    assert 0 < short.cpu_seconds < long.cpu_seconds
    for steps in (6, 60):  # too few for training to notice, and enough
        wild = {**OPTIONS, "steps": steps, "lr": 1e30, "clip": 0.0, "optimizer": "sgd"}
        assert measure_held_out(wild).loss == math.inf
