"""Sources of a flow: functions ``(z, cond) -> x1`` of standard normals, the same in training and in sampling.

So a generator takes ``z`` whatever the source, and sample i has its own seed. Only the standard normal makes the flow a
diffusion: from other sources the ODE is right, and the SDE is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from genkit.config.numbers import Positive
from genkit.core import Cond, Data, Draw, Image, Spec, Vector
from genkit.core.device import send


class Source(Protocol):
    """Where a flow starts."""

    is_normal: ClassVar[bool]
    """whether it is the standard normal"""
    is_conditional: ClassVar[bool]
    """whether x1 depends on the condition"""

    def check(self, spec: Spec) -> None:
        """``ValueError`` if it cannot be the source of such samples."""
        ...

    def __call__(self, z: Tensor, cond: Cond) -> Tensor:
        """The sources ``[B, *S]`` of standard normals ``z`` ``[B, *S]``."""
        ...


@dataclass(frozen=True)
class Normal:
    """The standard normal."""

    is_normal: ClassVar[bool] = True
    is_conditional: ClassVar[bool] = False

    def check(self, spec: Spec) -> None:
        pass

    def __call__(self, z: Tensor, cond: Cond) -> Tensor:
        return z


@dataclass(frozen=True)
class Anchored:
    """``N(mu, std^2)`` with mu given by a condition of the sample's own shape: the last action, a blurred picture."""

    anchor: str = "anchor"
    """the name of the condition that is mu"""
    std: Positive = 1.0
    """standard deviation about mu"""
    is_normal: ClassVar[bool] = False
    is_conditional: ClassVar[bool] = True

    def check(self, spec: Spec) -> None:
        fitting = [name for name, kind in spec.cond.items() if kind in (Vector(spec.shape), Image(spec.shape[0]))]
        if self.anchor not in fitting:
            raise ValueError(
                f"source.anchor: given {self.anchor!r}; needs a condition of the sample's shape {spec.shape}; "
                f"the data have: {', '.join(fitting) or 'none'}"
            )

    def __call__(self, z: Tensor, cond: Cond) -> Tensor:
        if self.anchor not in cond:
            raise ValueError(
                f"source anchored: needs the condition {self.anchor!r}; given: {', '.join(cond) or 'none'}"
            )
        return cond[self.anchor].to(z) + self.std * z


@dataclass(frozen=True)
class DatasetSource:
    """Another data set: a flow from data to data, without pairs.

    z selects sample number ``floor(N Phi(z_1))`` of its N samples, with Phi the normal distribution function and z_1
    the first number of z.
    """

    data: Any = field(
        default_factory=lambda: _moons(), metadata={"table": "genkit.data:DATA", "fallback": "genkit.data:find_source"}
    )
    """the data set that is the source, without augmentation"""
    is_normal: ClassVar[bool] = False
    is_conditional: ClassVar[bool] = False

    def check(self, spec: Spec) -> None:
        shape = _load(self.data).spec.shape
        if tuple(shape) != tuple(spec.shape):
            raise ValueError(f"source.data: given samples of shape {tuple(shape)}; needs {tuple(spec.shape)}")

    def __call__(self, z: Tensor, cond: Cond) -> Tensor:
        data = _load(self.data)
        u = torch.special.ndtr(z.flatten(1)[:, 0].double())
        numbers = (u * len(data)).long().clamp(max=len(data) - 1).cpu()
        chosen = data.codec.encode(data.batch(numbers, NoAugmentation((0,), 0, len(z)))).x
        return send(chosen, z.device).to(z.dtype)


class NoAugmentation(Draw):
    """Random numbers with which no augmentation changes anything: no picture is mirrored."""

    def uniform(self, *shape: int) -> Tensor:
        return torch.ones(self.stop - self.start, *shape)


@lru_cache(maxsize=4)
def _load(data: Any) -> Data:
    return data.load("train")


def _moons() -> Any:
    from genkit.data.toy import Moons  # lazy: only for this default

    return Moons()


SOURCES: Mapping[str, type[Source]] = {"normal": Normal, "anchored": Anchored, "data": DatasetSource}
