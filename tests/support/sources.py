"""The contract of a data source, as checks of one configuration."""

import dataclasses

import torch

from genkit.core import Draw
from genkit.data import DataSource


def check_fields(source: DataSource):
    """A frozen dataclass, equal to its copy, that is changed only by the methods of the contract."""
    assert dataclasses.is_dataclass(source)
    assert dataclasses.replace(source) == source
    hash(source)
    assert source.with_fields(no_such_field=1) == source
    assert not source.unaugmented().random_flip
    assert type(source.decoded_source()).load


def check_samples(source: DataSource):
    """Samples, conditions and codec fit the spec, and loading twice gives the same."""
    data, again = source.load("train"), source.load("train")
    assert len(data) == len(again) > 0
    assert data.spec == again.spec
    rows = torch.arange(min(4, len(data)))
    batch, same = (d.batch(rows, Draw((0,), 0, len(rows))) for d in (data, again))
    assert torch.equal(batch.x, same.x)
    assert set(batch.cond) == set(data.spec.cond)
    data.spec.check(batch.cond, len(rows))
    encoded = data.codec.encode(batch)
    assert encoded.x.is_floating_point()
    assert tuple(encoded.x.shape[1:]) == tuple(data.spec.shape)
    assert data.codec.decode(encoded.x).dtype == batch.x.dtype


def check_splits(source: DataSource):
    """The test split has the shape, the conditions and the codec of the training split."""
    train, test = source.load("train"), source.load("test")
    assert (train.spec, train.codec) == (test.spec, test.codec)
    try:
        source.load("validation")  # type: ignore[arg-type]
    except ValueError as e:
        assert "validation" in str(e)  # noqa: PT017
        return
    raise AssertionError("an unknown split was accepted")


def check_all(source: DataSource):
    check_fields(source)
    check_samples(source)
    check_splits(source)
