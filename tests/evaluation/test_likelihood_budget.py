"""The likelihood ends in minutes by default, and says what it left out; a number that is given is measured."""

import json
import logging
import time
from dataclasses import replace

import pytest
import torch

from genkit.cli import main as cli
from genkit.core import Draw
from genkit.core.progress import silent
from genkit.evaluation import likelihood, likelihoods
from genkit.evaluation.likelihoods import ESTIMATORS, LikelihoodSettings, choose_rows, read_batches
from genkit.training.run import load_run
from tests.support.evaluation import train
from tests.support.refusals import refuses

SECONDS = 0.02  # that a slow model takes for a sample


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A run of a small VAE."""
    argv = ["--objective=vae", "--data=digits", "--backbone=mlp", "--backbone.width=8", "--steps=1"]
    return train(tmp_path_factory.mktemp("vae"), *argv)


@pytest.fixture
def slow(monkeypatch):
    """Every estimator takes some time for each sample; how many it was given."""
    counts = []

    def slow_down(estimate):
        def run_slowly(run, settings, progress):
            counts.append(settings.n)
            result = estimate(run, settings, progress)
            time.sleep(SECONDS * result.n)
            return result

        return run_slowly

    monkeypatch.setattr(likelihoods, "ESTIMATORS", {name: slow_down(f) for name, f in ESTIMATORS.items()})
    monkeypatch.setattr(likelihoods, "PILOT_SECONDS", 0.05)
    return counts


def options(bound):
    """Cheap settings of an estimator."""
    return {"draws": 2} if bound == "iwae" else {"steps": 2}


@pytest.mark.parametrize("bound", ESTIMATORS)
def test_every_estimator_ends_in_time_and_says_what_it_left_out(bound, moons, vae, slow, caplog):
    run, budget = (vae if bound == "iwae" else moons), 0.5
    with caplog.at_level(logging.INFO, "genkit"):
        start = time.perf_counter()
        result = likelihood(run, bound=bound, max_minutes=budget / 60, device="cpu", **options(bound))
    assert time.perf_counter() - start < 8 * budget
    assert 2 <= result.n <= budget / SECONDS < result.available
    assert f"{result.n} of {result.available} test samples, at random" in caplog.text
    assert f"{result.n} of {result.available} samples, at random" in result.summary()
    assert result.settings["rows"] == "random"
    same = likelihood(run, bound=bound, n=result.n, device="cpu", **options(bound))
    assert result.bits_per_dim.value == pytest.approx(same.bits_per_dim.value, rel=1e-4)


def test_a_number_that_is_given_is_measured(moons, slow):
    assert likelihood(moons, n=12, steps=2, max_minutes=0.001, device="cpu").n == 12
    assert slow == [12], "nothing was timed"


def test_more_samples_than_the_split_has_are_refused(moons):
    available = len(load_run(moons, device="cpu").config.data.load("test"))
    refuses(lambda: likelihood(moons, n=available + 1, steps=2, device="cpu"),
            f"n: given {available + 1}, but the test split has {available} samples")  # fmt: skip


def test_what_fits_is_measured_as_if_there_were_no_limit(moons, capsys):
    """All samples in batches of the usual size: the same number, bit for bit."""
    assert cli.main(["likelihood", str(moons), "--steps=2", "--json", "--device=cpu"]) == 0
    result = json.loads(capsys.readouterr().out)
    everything = likelihood(moons, n=result["available"], steps=2, device="cpu")
    assert result["bits_per_dim"]["value"] == everything.bits_per_dim.value
    assert result["settings"]["n"] == result["available"]


def test_the_samples_are_a_random_subset_that_the_seed_determines(moons):
    """Of a split that is sorted, the first ones are no sample of it."""
    rows = choose_rows(1000, 100, 0)
    assert len(rows.unique()) == 100
    assert abs(float(rows.double().mean()) - 499.5) < 4 * 1000 / 12**0.5 / 10
    assert rows.equal(choose_rows(1000, 100, 0))
    assert choose_rows(1000, 30, 0).equal(rows[:30])  # more samples contain the fewer
    assert not choose_rows(1000, 100, 1).equal(rows)
    assert choose_rows(7, 7, 0).tolist() == choose_rows(7, 9, 0).tolist() == [*range(7)]
    run, read = load_run(moons, device="cpu"), []
    for x, _, _ in read_batches(run, LikelihoodSettings(n=5, batch=2, device="cpu"), silent, dequantised=False):
        read.append(x)
    data = run.config.data.load("test")
    batch = data.batch(choose_rows(len(data), 5, 0), Draw((0,), 0, 5))
    assert torch.cat(read).equal(run.codec.encode(batch).x)


def test_pictures_are_measured_as_they_are_stored(vae):
    """Those of a run that was trained on mirrored ones too were mirrored at random."""
    run = load_run(vae)
    mirrored = replace(run, config=replace(run.config, data=run.config.data.with_fields(flip=True)))
    settings = LikelihoodSettings(n=40, split="test")
    stored, same = ([x for x, _, _ in read_batches(r, settings, silent, False)] for r in (run, mirrored))
    assert torch.cat(stored).equal(torch.cat(same))
