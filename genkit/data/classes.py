"""Classes of samples: their order, their names and how many samples each has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from genkit.core import Label
from genkit.core.messages import warn_once

MAX_CLASSES = 2**20  # an embedding has a row for each; more are identifiers that were taken for classes
MAX_LISTED = 20  # classes that are listed in one message


def sort_naturally(names: Iterable[str]) -> list[str]:
    """Names in natural order: 2 before 10, class2 before class10; whole numbers by their value."""
    names = sorted(names)
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        return sorted(names, key=int)
    # text and numbers alternate, so that like is compared with like
    return sorted(names, key=lambda name: [int(p) if i % 2 else p for i, p in enumerate(re.split(r"([0-9]+)", name))])


def folder_classes(names: Sequence[str], path: object, required: bool = False) -> tuple[str, ...]:
    """The classes that the folders of images in ``path`` stand for, from the paths of the images below it.

    Two or more top folders without an image beside them are classes; otherwise there are none, and images beside
    folders are mentioned. ``ValueError`` if there are none and they are ``required``.
    """
    folders = {name.partition("/")[0] for name in names if "/" in name}
    beside = [name for name in names if "/" not in name]
    if len(folders) > 1 and not beside:
        return tuple(sort_naturally(folders))
    if len(folders) > 1:
        problem = (
            f"{path}: its {len(folders)} folders are no classes, because {len(beside)} of {len(names)} images are "
            f"beside them: {abbreviate_list(beside)}; move these into a folder"
        )
        if not required:
            warn_once(f"{problem}, or give --data.labels=false")
    else:
        problem = f"{path}: has no classes, which --data.labels needs; arrange the images in a folder for each class"
    if required:
        raise ValueError(problem)
    return ()


def folder_labels(names: Sequence[str], classes: Sequence[str], path: object, train: object) -> Tensor:
    """The class ``[N]`` of each image by its top folder. ``ValueError`` for one that is not among ``classes``."""
    index = {c: i for i, c in enumerate(classes)}
    for name in names:
        if name.partition("/")[0] not in index:
            raise ValueError(f"{path}/{name}: {name.partition('/')[0]} is not one of the classes of {train}")
    return torch.tensor([index[name.partition("/")[0]] for name in names])


def class_kind(label: Tensor, train_label: Tensor | None, names: tuple[str, ...], path: object, train: object) -> Label:
    """The classes of the training split. ``ValueError`` if this split has others, or numbers that are no classes."""
    if train_label is None:
        raise ValueError(f"{path}: has classes, but {train} has none")
    num = len(names) or int(train_label.max()) + 1
    if num > MAX_CLASSES:
        raise ValueError(f"{train}: has the class {num - 1}; allowed 0..{MAX_CLASSES - 1}; number the classes from 0")
    if int(label.max()) >= num:
        raise ValueError(f"{path}: has the class {int(label.max())}; {train} has 0..{num - 1}")
    return build_label(train_label, num, names, train)


def build_label(train_label: Tensor, num: int, names: tuple[str, ...], where: object) -> Label:
    """The classes of the training data, with those that have no samples, which are mentioned."""
    empty = (torch.bincount(train_label, minlength=num) == 0).nonzero().flatten().tolist()
    if empty:
        listed = abbreviate_list([names[i] if names else str(i) for i in empty])
        warn_once(f"{where}: {len(empty)} of the {num} classes have no samples: {listed}")
    return Label(num, names, empty=tuple(empty))


def abbreviate_list(items: Sequence[str]) -> str:
    """Items in one line; of many, the first, and how many more there are."""
    more = f", and {len(items) - MAX_LISTED} more" if len(items) > MAX_LISTED else ""
    return ", ".join(items[:MAX_LISTED]) + more


def list_classes(kind: Label, counts: Sequence[int] = ()) -> str:
    """Number, name and, if ``counts`` are given, number of samples of each class: "0 cat: 120, 1 dog: 80"."""
    names = [f"{i} {name}" if name != str(i) else name for i, name in enumerate(kind.names)]
    names = names or list(map(str, range(kind.num)))
    if counts:
        names = [f"{name}: {count}" for name, count in zip(names, counts, strict=True)]
    return abbreviate_list(names)


def describe_classes(data: Any) -> str | None:
    """:func:`list_classes` of a data set that holds the classes of its samples; None for one without classes."""
    for name, kind in data.spec.cond.items():
        label = getattr(data, "cond", {}).get(name)
        if isinstance(kind, Label) and not kind.centers and isinstance(label, Tensor):
            return list_classes(kind, torch.bincount(label.flatten().long(), minlength=kind.num).tolist())
    return None
