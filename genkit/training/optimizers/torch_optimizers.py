"""Optimizers of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Lt

from genkit.config.numbers import Fraction, Positive
from genkit.training.optimizers.family import OptimizerFamily


@dataclass(frozen=True)
class AdamW(OptimizerFamily):
    """AdamW (Loshchilov & Hutter 2019)."""

    target: ClassVar[str] = "torch.optim:AdamW"
    fixed: ClassVar[Mapping[str, Any]] = {"fused": True}
    shards: ClassVar[bool] = True
    eps: Positive = 1e-8
    """added to the root of the second moment"""


@dataclass(frozen=True)
class Adam(OptimizerFamily):
    """Adam (Kingma & Ba 2015), in which weight decay is a part of the gradient."""

    target: ClassVar[str] = "torch.optim:Adam"
    fixed: ClassVar[Mapping[str, Any]] = {"fused": True}
    shards: ClassVar[bool] = True
    eps: Positive = 1e-8
    """added to the root of the second moment"""
    amsgrad: bool = False
    """use the largest second moment so far (Reddi et al. 2018)"""


@dataclass(frozen=True)
class SGD(OptimizerFamily):
    """Gradient descent with momentum; weight decay is a part of the gradient."""

    target: ClassVar[str] = "torch.optim:SGD"
    fixed: ClassVar[Mapping[str, Any]] = {"fused": True}
    shards: ClassVar[bool] = True
    default_settings: ClassVar[Mapping[str, Any]] = {"lr": 0.1}
    momentum: Fraction = 0.9
    """decay rate of the averaged gradient"""
    nesterov: bool = False
    """look ahead by one step (Sutskever et al. 2013)"""

    def __post_init__(self):
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: needs a momentum above 0")


@dataclass(frozen=True)
class RAdam(OptimizerFamily):
    """Rectified Adam (Liu et al. 2020), with decoupled weight decay."""

    target: ClassVar[str] = "torch.optim:RAdam"
    fixed: ClassVar[Mapping[str, Any]] = {"decoupled_weight_decay": True}
    shards: ClassVar[bool] = True
    eps: Positive = 1e-8
    """added to the root of the second moment"""


@dataclass(frozen=True)
class NAdam(OptimizerFamily):
    """Adam with Nesterov momentum (Dozat 2016), with decoupled weight decay."""

    target: ClassVar[str] = "torch.optim:NAdam"
    fixed: ClassVar[Mapping[str, Any]] = {"decoupled_weight_decay": True}
    shards: ClassVar[bool] = True
    eps: Positive = 1e-8
    """added to the root of the second moment"""
    momentum_decay: Positive = 4e-3
    """how fast the momentum approaches its value"""


@dataclass(frozen=True)
class Adafactor(OptimizerFamily):
    """Adafactor (Shazeer & Stern 2018): the second moment of a matrix from its rows and columns; no first moment.

    ``--lr`` is the largest step relative to the size of a weight.
    """

    target: ClassVar[str] = "torch.optim:Adafactor"
    default_settings: ClassVar[Mapping[str, Any]] = {"lr": 1e-2}
    beta2_decay: Annotated[float, Lt(0)] = -0.8
    """power of the step with which the second moment forgets"""
    d: Positive = 1.0
    """largest root mean square of an update, before the rate"""
