"""Data sets of torch (``torch.utils.data.Dataset``) as data sources: a class by its name, or an object in Python.

``--data=my.module:Rings`` makes a source of the class: its arguments are options. ``train(data=dataset)`` takes an
object. All items are read once, in order, into memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import random
import types
import typing
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from genkit.core import Codec, Condition, Spec
from genkit.core.messages import warn_once
from genkit.data.classes import build_label
from genkit.data.codecs import Pixels, Standardize
from genkit.data.held_out import DEFAULT_SHARE, HeldOut, row_names, split_rows
from genkit.data.images import PROGRESS_FROM, to_pixels, with_progress
from genkit.data.in_memory import InMemory
from genkit.data.source import DataSource, Split, check_split

SIMPLE = (int, float, str, bool, Path)
SAMPLE_KEYS = ("x", "image", "img", "pixel_values", "data")
LABEL_KEYS = ("label", "y", "target", "class", "labels")
MAX_BYTES = 8 * 2**30
OBJECTS: dict[str, Dataset] = {}
"""the data sets that were given as objects to this process, by what :class:`DatasetObject` calls them"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchSource(DataSource):
    """Base of the sources that read a data set of torch.

    An item is a sample, a pair (sample, class), or a mapping with the keys x or image, and label. A sample is a picture
    of Pillow, or an array: images uint8 or float in [0, 1] or [-1, 1], numbers ``[D]`` or ``[C, T]``.
    """

    held_out: HeldOut = None
    """share of the samples that is kept for evaluation, chosen by a hash of their row; None: 0.1 when training begins,
    unless the class has an argument train or split"""
    labels: bool = True
    """condition on the class of each sample, if there are classes"""

    @property
    def has_splits(self) -> bool:
        """Whether the data set itself has a test split."""
        return False

    @abstractmethod
    def open(self, split: Split) -> Dataset:
        """The data set of a split."""

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{type(self).__module__}:{type(self).__qualname__}"

    def with_decisions(self) -> TorchSource:
        if self.held_out is not None:
            return self
        return self.with_fields(held_out=0.0 if self.has_splits else DEFAULT_SHARE)

    def preview(self) -> tuple[tuple[int, ...], int] | None:
        dataset = self.open("train")
        x = as_array(split_item(dataset[0])[0], self.title, 0)
        return tuple(x.shape), count_items(dataset, self.title)

    def load(self, split: Split = "train") -> InMemory:
        check_split(split)
        own_test = self.has_splits and not self.held_out
        if split == "test" and not own_test and not self.held_out:
            raise ValueError(
                f"{self.title}: has no test split; hold out a share of it: --data.held-out {DEFAULT_SHARE:g}"
            )
        x, label, names = read_items(self.open("train"), self.title)
        of_training = split_rows(row_names(len(x)), self.held_out or 0.0, "train", self.title)
        codec = fit_codec(x[of_training])
        kind = None if label is None else build_label(label, len(names) or int(label.max()) + 1, names, self.title)
        if own_test and split == "test":
            x, label, _ = read_items(self.open("test"), self.title)
            rows = torch.arange(len(x))
        else:
            rows = split_rows(row_names(len(x)), self.held_out or 0.0, split, self.title)
        cond: dict[str, Tensor] = {}
        kinds: dict[str, Condition] = {}
        if label is not None and kind is not None and self.labels:
            cond, kinds = {"label": label[rows]}, {"label": kind}
        num_held_out = len(row_names(len(x))) - len(of_training) if self.held_out else 0
        return InMemory(x[rows], cond, Spec(tuple(x.shape[1:]), kinds), codec, num_held_out=num_held_out)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetObject(TorchSource):
    """A data set of torch that a program gave as an object; only that program has it."""

    about: str
    """its class and number of samples"""

    @property
    def title(self) -> str:
        return self.about

    def open(self, split: Split) -> Dataset:
        if self.about not in OBJECTS:
            raise ValueError(
                f"data: {self.about} was an object in the program that trained on it; give it again there; elsewhere "
                "name a class, --data=package.module:Class, or another reference"
            )
        return OBJECTS[self.about]


# ------------------------------------------------------------------------------------------------- classes, objects
def adapt(given: Any) -> Any:
    """A data source for a data set of torch, a class or an object; anything else as it is."""
    if isinstance(given, type) and issubclass(given, Dataset):
        return adapt_class(given)
    if not isinstance(given, Dataset):
        return given
    kind = type(given)
    about = f"{kind.__module__}:{kind.__qualname__} of {count_items(given, kind.__qualname__)} samples"
    name, i = about, 2
    while OBJECTS.setdefault(name, given) is not given:
        name, i = f"{about} ({i})", i + 1
    return DatasetObject(about=name)


@functools.cache
def adapt_class(cls: type[Dataset]) -> type[TorchSource]:
    """The data source of a class. Its fields are the constructor's arguments of simple types.

    ``ValueError`` for an argument without default that no option can give.
    """
    settings: list[Any] = []
    parameters = dict(inspect.signature(cls).parameters)
    hints = typing.get_type_hints(cls.__init__)
    splits = next((name for name in ("train", "split") if name in parameters), None)
    for name, parameter in parameters.items():
        if name == splits or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        hint = hints.get(name, str if required else type(parameter.default))
        if is_simple(hint):
            settings.append((name, hint) if required else (name, hint, parameter.default))
        elif required:
            raise ValueError(
                f"{cls.__qualname__}: no option can give its argument {name}; give it a default, or train on an object "
                "in Python: genkit.train(data=...)"
            )

    def open(self: TorchSource, split: Split) -> Dataset:
        arguments = {field[0]: getattr(self, field[0]) for field in settings}
        if splits:
            arguments[splits] = split == "train" if splits == "train" else split
        return cast(Any, cls)(**arguments)

    members = {
        "open": open,
        "has_splits": property(lambda self: splits is not None),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__ or f"The data set {cls.__qualname__}.",
    }
    made = dataclasses.make_dataclass(
        cls.__name__, settings, bases=(TorchSource,), namespace=members, frozen=True, kw_only=True
    )
    made.__module__ = cls.__module__
    return cast(type[TorchSource], made)


def is_simple(hint: Any) -> bool:
    """Whether an option can give a value of this type: a number, text, a switch, a choice, or one of these or None."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return all(arg is type(None) or is_simple(arg) for arg in typing.get_args(hint))
    return typing.get_origin(hint) is Literal or hint in SIMPLE


# ----------------------------------------------------------------------------------------------------------- items
def count_items(dataset: Any, title: str) -> int:
    """The number of items. ``ValueError`` if the data set has no length, or no items."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(f"{title}: is read by index; needs __len__ and __getitem__ (an IterableDataset has none)")
    if len(dataset) < 1:
        raise ValueError(f"{title}: holds no samples")
    return len(dataset)


def split_item(item: Any) -> tuple[Any, Any]:
    """The sample and its class (None: without) of an item."""
    if isinstance(item, Mapping):
        sample = next((item[k] for k in SAMPLE_KEYS if k in item), None)
        return sample, next((item[k] for k in LABEL_KEYS if k in item), None)
    if isinstance(item, tuple | list) and item:
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def as_array(sample: Any, title: str, i: int) -> np.ndarray:
    """A sample as ``[C, H, W]`` uint8 or float, ``[D]`` or ``[C, T]`` float. ``ValueError`` names an unsuitable one."""
    if hasattr(sample, "getbands"):
        return to_pixels(sample)
    array = sample.detach().cpu().numpy() if isinstance(sample, Tensor) else np.asarray(sample)
    if array.dtype == np.uint8 and array.ndim == 2:
        array = array[None]
    if array.ndim == 3 and array.shape[2] in (1, 3) and array.shape[0] not in (1, 3):
        array = array.transpose(2, 0, 1)
    fits = array.ndim == 3 if array.dtype == np.uint8 else array.dtype.kind == "f" and 1 <= array.ndim <= 3
    if not fits or not array.size or (array.ndim == 3 and array.shape[0] not in (1, 3)):
        raise ValueError(
            f"{title}: sample {i} is {type(sample).__name__} {array.dtype} {list(array.shape)}; needs a picture, "
            "uint8 or float [1 or 3, H, W], or float [D] or [C, T]"
        )
    return array


def as_class(value: Any, title: str, i: int) -> int | None:
    """The class of a sample; None for one without. ``ValueError`` for what is no whole number from 0."""
    if value is None:
        return None
    array = isinstance(value, np.generic | np.ndarray)
    single = value.size == 1 if array else isinstance(value, Tensor) and value.numel() == 1
    number = value.item() if single else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"{title}: the class of sample {i} is {value!r:.60}; needs a whole number from 0")
    return number


@contextlib.contextmanager
def fixed_random_numbers() -> Iterator[None]:
    """Seed the global generators, so that random items are the same each time; their states are put back."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (what data sets use)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def read_items(dataset: Any, title: str) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
    """All samples ``[N, ...]`` (uint8 images or float numbers), their classes ``[N]``, and the classes' names."""
    n = count_items(dataset, title)
    samples: list[np.ndarray] = []
    classes: list[int | None] = []
    with fixed_random_numbers():
        rows = with_progress(range(n), n, "reading") if n > PROGRESS_FROM else range(n)
        for i in rows:
            sample, value = split_item(dataset[i])
            array = as_array(sample, title, i)
            if samples and (array.shape, array.dtype) != (samples[0].shape, samples[0].dtype):
                shapes = (
                    f"{array.dtype} {list(array.shape)}, but sample 0 is {samples[0].dtype} {list(samples[0].shape)}"
                )
                raise ValueError(f"{title}: sample {i} is {shapes}; all need one shape")
            if array.nbytes * n > MAX_BYTES:
                need = f"{array.nbytes * n / 2**30:.0f} GiB of memory"
                raise ValueError(f"{title}: needs {need}; write a DataSource that reads samples when they are needed "
                                 "(docs/contributing/data-source.md)")  # fmt: skip
            samples.append(array)
            classes.append(as_class(value, title, i))
        if not np.array_equal(as_array(split_item(dataset[0])[0], title, 0), samples[0]):
            warn_once(f"{title}: its items are random; each was drawn once and is the same in every epoch")
    x = to_pixel_values(torch.from_numpy(np.stack(samples)), title)
    if all(value is None for value in classes):
        return x, None, ()
    if None in classes:
        raise ValueError(f"{title}: sample {classes.index(None)} has no class, and others have one")
    label = torch.tensor(cast(list[int], classes))
    names = tuple(str(name) for name in getattr(dataset, "classes", ()) or ())
    return x, label, names if len(names) > int(label.max()) else ()


def to_pixel_values(x: Tensor, title: str) -> Tensor:
    """Float images ``[N, C, H, W]`` in [0, 1] or [-1, 1] as uint8; other samples as float32."""
    if x.dtype == torch.uint8 or x.ndim != 4:
        return x if x.dtype == torch.uint8 else x.float()
    low, high = float(x.min()), float(x.max())
    if not (low >= -1 and high <= 1):
        raise ValueError(f"{title}: images are float in [{low:.3g}, {high:.3g}]; needs [0, 1], [-1, 1] or uint8")
    exact = x.double() * 255 if low >= 0 else (x.double() + 1) * 127.5
    pixels = exact.round()
    if float((exact - pixels).abs().max()) > 0.02:
        warn_once(f"{title}: images are rounded to 8 bits")
    return pixels.to(torch.uint8)


def fit_codec(x: Tensor) -> Codec:
    """The codec of the training samples: pixels, or numbers scaled to mean 0 and variance 1."""
    return Pixels() if x.dtype == torch.uint8 else Standardize.fit(x)
