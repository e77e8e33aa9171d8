"""Helpers for tests that train a small run and evaluate something."""

import os

import numpy as np
from scipy.linalg import sqrtm

from genkit.cli.main import main
from genkit.evaluation import Card

TRAIN = ["--tensorboard=false", "--device=cpu", "--sample-every=0", "--warmup=0", "--batch=16", "--lr=1e-3"]


def subprocess_environment():
    """The environment of a process that is started by a test."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def train(out, *args):
    """Train a run below ``out`` and return its directory."""
    assert main(["train", *TRAIN, f"--out={out}", *args]) == 0
    return (out / "latest").resolve()


def evaluate_to_card(tmp_path, *argv):
    """The card that ``genkit eval ARGV`` writes."""
    out = tmp_path / "card.json"
    assert main(["eval", *map(str, argv), "--out", str(out)]) == 0
    return Card.load(out)


def values(card):
    """The metrics of a card without their intervals."""
    return {name: estimate.value for name, estimate in card.metrics.items()}


def save_vectors(path, x):
    """Write vectors as a data source."""
    np.savez(path, x=x.astype(np.float32))
    return str(path)


def reference_fid(x, y):
    """Heusel et al. 2017, with scipy's matrix root."""
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real))


def refusal(capsys, *argv):
    """The one line with which genkit refuses a command."""
    capsys.readouterr()
    assert main(list(map(str, argv))) == 2
    err = capsys.readouterr().err
    assert err.startswith("genkit: ")
    assert err.count("\n") == 1, err
    return err
