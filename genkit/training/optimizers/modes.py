"""Optimizers that train at other weights than they evaluate at, such as schedule-free ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

TRAINED = "trained_weight"  # slot of a parameter, while the network has the weights of evaluation


@contextmanager
def evaluation_weights(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[None]:
    """Give the networks the weights of evaluation, for validations, pictures and checkpoints, if an optimizer has the
    methods ``eval()`` and ``train()``; afterwards those of training, to the last bit.

    Meanwhile these are in the optimizer's state, and so in a checkpoint, from which :func:`take_trained` takes them.
    """
    switched = [cast(Any, optimizer) for optimizer in optimizers if has_two_modes(optimizer)]
    for optimizer in switched:
        kept = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
        take_evaluation(optimizer)
        for p, weight in kept:
            optimizer.state[p][TRAINED] = weight
    try:
        yield
    finally:
        for optimizer in switched:
            with torch.no_grad():
                optimizer.train()
            for group in optimizer.param_groups:
                for p in group["params"]:
                    take_trained(optimizer, p)


def has_two_modes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer trains at other weights than it evaluates at."""
    return hasattr(optimizer, "eval") and hasattr(optimizer, "train")


@torch.no_grad()
def take_evaluation(optimizer: torch.optim.Optimizer) -> None:
    """Give the networks of an optimizer with two modes the weights of evaluation, for good."""
    if has_two_modes(optimizer):
        cast(Any, optimizer).eval()


@torch.no_grad()
def take_trained(optimizer: torch.optim.Optimizer, p: torch.nn.Parameter) -> None:
    """Give a parameter the weight of training that its slot holds, if there is one."""
    slots = optimizer.state.get(p, {})
    if TRAINED in slots:
        p.copy_(slots.pop(TRAINED))
