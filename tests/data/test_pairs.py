"""Pairs (source, sample): the file that holds them, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from genkit.core import Draw, Label, Spec
from genkit.data.codecs import Identity, MinMax, Pixels
from genkit.data.pairs import Pairs, decode_exactly, save_pairs


@pytest.mark.parametrize("codec", [Pixels(), MinMax((-3.0, 0.0, 1.0), (5.0, 2.0, 1.0))])
def test_pairs_come_back_in_the_models_numbers(tmp_path, codec):
    """Unrounded, also beyond the codec's range; with their conditions, in any order."""
    x, x1, label = torch.randn(20, 3, 2, 2) * 1.5, torch.randn(20, 3, 2, 2), torch.arange(20) % 7
    spec = Spec((3, 2, 2), {"label": Label(7, ("a", "b"))})
    path = save_pairs(tmp_path / "deep" / "p.npz", x, x1, {"label": label}, spec, codec, {"seed": 3})
    data = Pairs(root=str(path)).load("train")
    assert (data.spec, data.codec, len(data)) == (spec, codec, 20)
    rows = torch.tensor([4, 19, 0])
    batch = data.codec.encode(data.batch(rows, Draw((0,), 0, 3)))
    assert torch.allclose(batch.x, x[rows], atol=1e-5)
    assert torch.equal(batch.x1, x1[rows])
    assert torch.equal(batch.cond["label"], label[rows])
    with np.load(path, allow_pickle=False) as stored:
        assert json.loads(str(stored["about"]))["made"] == {"seed": 3}


def test_pairs_have_no_test_split(tmp_path):
    """All of them were, so that likelihoods and references called test were of the training data."""
    path = save_pairs(tmp_path / "p.npz", torch.randn(4, 2), torch.randn(4, 2), {}, Spec((2,)), Identity(), {})
    with pytest.raises(ValueError, match=r"p\.npz: has no test split; all pairs are trained on"):
        Pairs(root=str(path)).load("test")


def test_bad_files_of_pairs_are_refused(tmp_path):
    with pytest.raises(ValueError, match="make it with: genkit reflow RUN"):
        Pairs(root=str(tmp_path / "none.npz")).load()
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="holds x; pairs of genkit reflow hold about, x, x1"):
        Pairs(root=str(tmp_path / "other.npz")).load()

    class Cube:
        encode = staticmethod(lambda batch: replace(batch, x=batch.x**3))

    with pytest.raises(ValueError, match="not affine"):
        decode_exactly(torch.randn(4, 2) * 2, Cube())
