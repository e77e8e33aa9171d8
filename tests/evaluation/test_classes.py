"""Samples and reference have the same distribution of classes, or the card says that they have not."""

import numpy as np
import pytest
import torch

from genkit.evaluation import evaluate, evaluations
from genkit.evaluation.classes import describe_classes, need_proportions, proportional_classes
from tests.support.evaluation import train


@pytest.mark.parametrize("seed", range(5))
def test_classes_come_in_the_proportions_of_the_data(seed):
    """Close for any n, exact after all data, the same first rows for any n, and none of an empty class."""
    counts = torch.from_numpy(np.random.default_rng(seed).integers(0, 12, 6))
    counts[0] = 5
    total = int(counts.sum())
    classes = proportional_classes(counts, 2 * total)
    assert torch.equal(torch.bincount(classes, minlength=6), 2 * counts)
    assert torch.equal(proportional_classes(counts, 7), classes[:7])
    for n in range(1, total):
        error = torch.bincount(classes[:n], minlength=6) - n * counts / total
        assert error.abs().max() < 1.5


@pytest.mark.parametrize("num", [1, 2, 10])
def test_equal_classes_come_in_turn(num):
    assert torch.equal(proportional_classes(torch.full((num,), 7), 35), torch.arange(35) % num)
    assert not need_proportions(torch.full((num,), 7))


def test_classes_that_differ_little_come_in_turn_and_empty_ones_never():
    assert not need_proportions(torch.tensor([178, 182, 177, 183, 181, 182, 181, 179, 174, 180]))
    assert need_proportions(torch.tensor([170, 12]))
    assert need_proportions(torch.tensor([100] * 99 + [0]))


def save_images(path, counts):
    """An npz of grey images with so many of each class."""
    y = np.repeat(np.arange(len(counts)), counts)
    x = np.random.default_rng(len(y)).integers(0, 255, (len(y), 8, 8), dtype=np.uint8)
    np.savez(path, x=x, y=y)
    return path


def drawn_classes(monkeypatch):
    """The classes of the samples that are measured."""
    classes, measure = [], evaluations.measure_together

    def spy(evaluators, samples, n, progress):
        measurements = measure(evaluators, samples, n, progress)
        classes.extend(samples.rows(0, n, n).labels.tolist())
        return measurements

    monkeypatch.setattr(evaluations, "measure_together", spy)
    return classes


@pytest.mark.parametrize(("counts", "expected"), [((36, 12, 12), (12, 4, 4)), ((20, 20, 20), (7, 7, 6))])
def test_a_run_is_measured_in_the_proportions_of_its_data(tmp_path, monkeypatch, counts, expected):
    data = save_images(tmp_path / "data.npz", counts)
    run = train(
        tmp_path,
        "--data=npz",
        f"--data.root={data}",
        "--data.held-out=0",
        "--backbone=mlp",
        "--backbone.width=8",
        "--steps=1",
    )
    classes = drawn_classes(monkeypatch)
    card = evaluate(run, metrics="fid", features="raw", n=20, steps=2, device="cpu")
    assert tuple(np.bincount(classes, minlength=3)) == expected
    unequal = counts[0] != counts[1]
    assert ("classes" in card.settings) == unequal
    assert any("drawn in these proportions" in note for note in card.notes) == unequal


def test_what_cannot_be_matched_is_said(tmp_path):
    """Two stored sets; classes without samples are named."""
    a, b = save_images(tmp_path / "a.npz", (30, 30, 2)), save_images(tmp_path / "b.npz", (40, 4, 2))
    card = evaluate(a, reference=str(b), metrics="fid", features="raw")
    assert any("2 to 40 samples each; the samples have others" in note for note in card.notes)
    same = evaluate(a, reference=str(a), metrics="fid", features="raw")
    assert not any("classes" in note for note in same.notes)


def test_classes_without_samples_are_named():
    note = describe_classes(torch.tensor([3, 0, 5]), ("cat", "dog", "owl"), matched=True)
    assert note.endswith("without a sample in the reference: dog")
