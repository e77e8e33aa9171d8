"""Lines of progress, and the estimate of the time, by a clock that the test moves."""

import itertools

import pytest
import torch

from genkit.training import pace
from genkit.training.pace import Pace


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def run(monkeypatch):
    """What a run of ``total`` steps of ``seconds`` each says: estimates, and lines with the time at which they come."""

    def work(total, seconds, start=0, samples=None, unit="step"):
        clock, said, lines = Clock(), [], []
        monkeypatch.setattr(pace, "time", clock)

        def line(text):
            lines.append((clock.now, text))

        report = Pace(start, total, torch.device("cpu"), said.append, line, unit)
        for step in range(start + 1, total + 1):
            clock.now += seconds(step) if callable(seconds) else seconds
            report(step, "loss 1", samples)
        return said, lines

    return work


def test_the_estimate_is_of_all_steps_that_are_left_and_comes_once(run):
    assert run(100, 2.0)[0] == ["time     about 3 min for 100 steps (2.0 s each)"]
    assert run(100, 2.0, start=90)[0] == ["time     about 20 s for 10 steps (2.0 s each)"]
    assert run(60, 2.0, unit="iteration")[0] == ["time     about 2 min for 60 iterations (2.0 s each)"]


def test_the_first_step_which_is_slow_does_not_count(run):
    assert run(100, lambda step: 60.0 if step == 1 else 2.0)[0] == run(100, 2.0)[0]


@pytest.mark.parametrize("slow", [(1, 2), (1, 2, 3)])
def test_further_steps_that_are_compiled_do_not_count_and_nothing_is_estimated_from_them(run, slow):
    said, lines = run(100, lambda step: 60.0 if step in slow else 2.0)
    assert said == run(100, 2.0)[0]
    left = [text for _, text in lines if text.endswith("left")]
    assert len(left) >= 3
    assert all("2.0 s each" in text for text in left)


@pytest.mark.parametrize(("total", "seconds"), [(9, 2.0), (3, 2.0), (1, 500.0), (1000, 0.001)])
def test_short_work_has_no_estimate(run, total, seconds):
    assert run(total, seconds)[0] == []


def test_lines_come_every_ten_seconds_then_thirty_then_sixty(run):
    _, lines = run(2000, 1.0)
    times = [at - 100 for at, _ in lines]
    gaps = [(b - a, a) for a, b in itertools.pairwise(times)]
    assert {gap for gap, at in gaps if at < 50} == {10.0}
    assert {gap for gap, at in gaps if 70 < at < 570} == {30.0}
    assert {gap for gap, at in gaps if at > 630} == {60.0}


def test_a_line_has_the_step_the_rate_and_the_time_left(run):
    at, first = run(100, 2.0, samples=64)[1][0]
    assert at == 110.0  # the step after which ten seconds have passed
    assert first.startswith("step 5/100  loss 1  32 samples/s  ")
    assert first.endswith("  about 3 min left")
    assert "  2.0 s each  " in run(100, 2.0)[1][0][1]


def test_the_last_step_has_no_line(run):
    assert run(5, 30.0)[1][-1][1].startswith("step 4/5")
