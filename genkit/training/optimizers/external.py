"""Optimizers from other packages: ``--optimizer package.module:Class``, whose arguments are options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any, cast

import torch

from genkit.training.optimizers.family import OptimizerFamily, PhaseRates

SIMPLE = (int, float, str, bool)
NAMED = {kind.__name__: kind for kind in SIMPLE}  # annotations may be text
COMMON = {f.name for f in dataclasses.fields(PhaseRates)}


def adapt_optimizer(given: Any) -> Any:
    """The family of a class of torch's kind; anything else as it is."""
    return adapt_class(given) if isinstance(given, type) and issubclass(given, torch.optim.Optimizer) else given


def option_type(parameter: inspect.Parameter) -> Any:
    """The type of an option: the argument's annotation if that is simple, else its default's. A whole number may stand
    for any number."""
    annotated = NAMED.get(parameter.annotation, parameter.annotation)
    if annotated in SIMPLE:
        return annotated
    return int | float if type(parameter.default) is int else type(parameter.default)


@functools.cache
def adapt_class(cls: type[torch.optim.Optimizer]) -> type[OptimizerFamily]:
    """The family of an optimizer's class. Its fields are the constructor's arguments with a simple default.

    ``ValueError`` if it needs other arguments than the parameters, or calls the loss itself.
    """
    closure = inspect.signature(cls.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(f"{cls.__qualname__}: evaluates the loss itself (a closure), which training does not; try sam")
    settings: list[Any] = []
    for name, parameter in [*inspect.signature(cls).parameters.items()][1:]:
        if name in COMMON or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty:
            raise ValueError(f"{cls.__qualname__}: no option can give its argument {name}; give it a default")
        if type(parameter.default) in SIMPLE:
            settings.append((name, option_type(parameter), parameter.default))
    members = {
        "load_class": classmethod(lambda family: cls),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": f"The optimizer {cls.__qualname__}.",
    }
    made = dataclasses.make_dataclass(
        cls.__name__, settings, bases=(OptimizerFamily,), namespace=members, frozen=True, kw_only=True
    )
    made.__module__ = cls.__module__
    return cast(type[OptimizerFamily], made)
