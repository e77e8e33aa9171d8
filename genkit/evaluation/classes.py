"""The classes of samples and of their reference: a distance between sets measures their proportions too."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 0.05  # total variation between equal shares and the data's; digits, MNIST and CIFAR-10 are below 0.03


def shares_distance(a: Tensor, b: Tensor) -> float:
    """The total variation distance, in 0..1, between the shares of the classes in counts ``a`` and ``b``, ``[K]``."""
    p, q = (counts.double() / counts.sum().clamp(min=1) for counts in (a, b))
    return float((p - q).abs().sum() / 2)


def need_proportions(counts: Tensor) -> bool:
    """Whether samples whose classes come in turn would differ from data with ``counts`` ``[K]`` samples of each."""
    return bool((counts == 0).any()) or shares_distance(counts, torch.ones_like(counts)) > TOLERANCE


def proportional_classes(counts: Tensor, n: int) -> Tensor:
    """Classes ``[n]`` in the proportions of ``counts`` ``[K]``: each next one is that which is furthest behind.

    Equal counts give the classes in turn. The first rows do not depend on ``n``; after a multiple of the number of data
    the proportions are exact, and a class without data never comes.
    """
    total, due = int(counts.sum()), torch.zeros_like(counts)
    classes = []
    for _ in range(n):
        due += counts
        chosen = int(due.argmax())
        due[chosen] -= total
        classes.append(chosen)
    return torch.tensor(classes, dtype=torch.int64)


def describe_classes(counts: Tensor, names: tuple[str, ...], matched: bool) -> str:
    """A note for the card: the proportions of the reference, and its empty classes by name."""
    largest, smallest = int(counts.max()), int(counts[counts > 0].min())
    what = (
        "samples are drawn in these proportions" if matched else "the samples have others, which distances measure too"
    )
    each = f"{smallest} to {largest}" if smallest < largest else str(largest)
    note = f"classes of the reference have {each} samples each; {what}"
    empty = [names[i] if names else str(i) for i in (counts == 0).nonzero().flatten().tolist()]
    if not empty:
        return note
    shown = ", ".join(empty[:8]) + (f" and {len(empty) - 8} more" if len(empty) > 8 else "")
    return f"{note}; without a sample in the reference: {shown}"
