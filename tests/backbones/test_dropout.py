"""Dropout by row: what a mask depends on, its statistics, and other libraries' layers."""

import pytest
import torch
from torch import nn

from genkit.backbones.dropout import Dropout, install_dropout, kept_entries

KEYS = torch.randint(2**62, (64,), generator=torch.Generator().manual_seed(0))
LIKE = torch.ones(64, 4, 32, 32)


def keyed(p=0.25, layer=0, keys=KEYS):
    dropout = Dropout(p, layer).train()
    dropout.keys = keys
    return dropout


def standardised(p=0.25, layer=0, keys=KEYS):
    kept = kept_entries(keys, layer, LIKE, p).flatten(1).double()
    return (kept - (1 - p)) / (p * (1 - p)) ** 0.5


def test_the_mean_is_kept_and_the_share_is_right():
    for p in (0.01, 0.1, 0.5, 0.9):
        z = standardised(p)
        assert abs(float(z.mean())) * z.numel() ** 0.5 < 4, p
        by_row = z.mean(1) * z.shape[1] ** 0.5  # standard normals, if the entries are independent
        assert float(by_row.abs().max()) < 4.5, p
        assert 0.6 < float(by_row.var()) < 1.5, p
    y = keyed(0.1)(LIKE)
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.9)]


@pytest.mark.parametrize("other", [{"layer": 1}, {"layer": 2}, {"keys": KEYS.flip(0)}, {"keys": KEYS + 1}])
def test_masks_of_rows_layers_and_neighbours_are_uncorrelated(other):
    a, b = standardised(), standardised(**other)
    n = a.numel() ** 0.5
    assert abs(float((a * b).mean())) * n < 4
    for lag in (1, 2, 3, 32, 33, 1024):
        assert abs(float((a[:, lag:] * a[:, :-lag]).mean())) * n < 4, lag
        assert abs(float((a[:, lag:] * b[:, :-lag]).mean())) * n < 4, lag
    between = torch.corrcoef(a)[~torch.eye(64, dtype=torch.bool)] * a.shape[1] ** 0.5
    assert float(between.abs().max()) < 5
    assert 0.9 < float(between.var()) < 1.1


def test_a_row_has_the_mask_of_its_key_wherever_it_is():
    x = torch.randn(64, 3, 8)
    whole = keyed()(x)
    parts = [keyed(keys=KEYS[rows])(x[rows]) for rows in (slice(0, 5), slice(5, 64))]
    assert torch.equal(whole, torch.cat(parts))
    dropout = keyed()
    assert torch.equal(dropout(x), dropout(x))  # all passes of one loss, and recomputed activations
    real_and_fake = keyed()(torch.cat([x, -x]))
    assert torch.equal(real_and_fake, torch.cat([whole, -whole]))


def test_without_keys_or_in_evaluation_it_is_torchs():
    x = torch.randn(8, 100)
    plain = Dropout(0.5).train()
    torch.manual_seed(1)
    y = plain(x)
    torch.manual_seed(1)
    assert torch.equal(y, nn.functional.dropout(x, 0.5))
    assert keyed().eval()(x) is x
    assert keyed(p=0.0)(x) is x
    assert not keyed(p=1.0)(x).any()


def test_the_gradient_has_the_same_mask_and_half_precision_stays():
    x = torch.randn(64, 5, requires_grad=True)
    y = keyed(0.5)(x)
    y.sum().backward()
    assert torch.equal(x.grad, 2.0 * (y != 0))
    half = keyed(0.1)(torch.ones(64, 50, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert float(half.max()) == float(torch.tensor(1 / 0.9).bfloat16())


def test_layers_of_other_libraries_are_replaced_and_all_are_numbered():
    nets = {"a": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1), nn.ModuleDict({"x": nn.Dropout(0.2)})),
            "b": nn.Sequential(Dropout(0.3), nn.Dropout2d(0.5))}  # fmt: skip
    layers = install_dropout(nets)
    assert [layer.p for layer in layers] == [0.1, 0.2, 0.3]
    assert [layer.layer for layer in layers] == [0, 1, 2]
    assert not [m for m in nets["a"].modules() if isinstance(m, nn.Dropout)]
    assert isinstance(nets["b"][1], nn.Dropout2d)
    assert install_dropout(nets) == layers


@pytest.mark.slow
def test_it_compiles_whole():
    torch._dynamo.reset()
    dropout = keyed()
    compiled = torch.compile(dropout, fullgraph=True, backend="eager")
    x = torch.randn(64, 10)
    assert torch.equal(compiled(x), dropout(x))
    dropout.keys = KEYS.flip(0)
    assert torch.equal(compiled(x), dropout(x))
