"""Optimizers of the package pytorch-optimizer (``pip install "genkit-torch[optim]"``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from genkit.config.numbers import Count, Fraction, NonNegative, Positive
from genkit.training.optimizers.family import OptimizerFamily


@dataclass(frozen=True)
class PackagedFamily(OptimizerFamily):
    """Base of the optimizers of pytorch-optimizer."""

    package: ClassVar[str] = "pytorch-optimizer"


@dataclass(frozen=True)
class LARS(PackagedFamily):
    """LARS (You et al. 2017): momentum, with a rate for each weight in proportion to its norm."""

    target: ClassVar[str] = "pytorch_optimizer:LARS"
    default_settings: ClassVar[Mapping[str, Any]] = {"lr": 1.0}
    momentum: Fraction = 0.9
    """decay rate of the averaged gradient"""
    trust_coefficient: Positive = 1e-3
    """step relative to a weight's norm, at a rate of 1"""


@dataclass(frozen=True)
class LAMB(PackagedFamily):
    """LAMB (You et al. 2020): Adam, with a rate for each weight in proportion to its norm."""

    target: ClassVar[str] = "pytorch_optimizer:Lamb"
    default_settings: ClassVar[Mapping[str, Any]] = {"lr": 1e-2}
    eps: Positive = 1e-6
    """added to the root of the second moment"""


@dataclass(frozen=True)
class AdaBelief(PackagedFamily):
    """AdaBelief (Zhuang et al. 2020): Adam with the variance of gradients around their average."""

    target: ClassVar[str] = "pytorch_optimizer:AdaBelief"
    shards: ClassVar[bool] = True
    eps: Positive = 1e-16
    """added to the variance, and to its root"""
    rectify: bool = False
    """rectify as RAdam does"""


@dataclass(frozen=True)
class Shampoo(PackagedFamily):
    """Shampoo (Gupta et al. 2018): a preconditioner for each axis of a weight."""

    target: ClassVar[str] = "pytorch_optimizer:Shampoo"
    default_settings: ClassVar[Mapping[str, Any]] = {"lr": 1e-2}
    momentum: Fraction = 0.9
    """decay rate of the averaged gradient"""
    preconditioning_compute_steps: Count = 10
    """steps between computations of the preconditioners"""
    matrix_eps: Positive = 1e-6
    """multiple of the identity that preconditioners begin with"""


@dataclass(frozen=True)
class SOAP(PackagedFamily):
    """SOAP (Vyas et al. 2025): Adam in the eigenbasis of Shampoo's preconditioners."""

    target: ClassVar[str] = "pytorch_optimizer:SOAP"
    default_settings: ClassVar[Mapping[str, Any]] = {"lr": 3e-3}
    precondition_frequency: Count = 10
    """steps between new eigenbases"""
    max_precondition_dim: Count = 10_000
    """longest axis that has a preconditioner"""
    eps: Positive = 1e-8
    """added to the root of the second moment"""


@dataclass(frozen=True)
class Lion(PackagedFamily):
    """Lion (Chen et al. 2023): the sign of an average of gradients."""

    target: ClassVar[str] = "pytorch_optimizer:Lion"
    shards: ClassVar[bool] = True
    default_settings: ClassVar[Mapping[str, Any]] = {"lr": 1e-4}


@dataclass(frozen=True)
class Prodigy(PackagedFamily):
    """Prodigy (Mishchenko & Defazio 2024): Adam that finds its rate, of which ``--lr`` is a multiple."""

    target: ClassVar[str] = "pytorch_optimizer:Prodigy"
    default_settings: ClassVar[Mapping[str, Any]] = {"lr": 1.0}
    d_coef: Positive = 1.0
    """multiple of the estimated rate"""
    d0: Positive = 1e-6
    """estimate to begin with"""
    safeguard_warmup: bool = True
    """leave the warm-up out of the estimate"""


@dataclass(frozen=True)
class ScheduleFree(PackagedFamily):
    """Schedule-free AdamW (Defazio et al. 2024): an average of the weights takes the place of a schedule.

    The average is what is validated, drawn from and saved as the raw weights; the run needs no other.
    """

    target: ClassVar[str] = "pytorch_optimizer:ScheduleFreeAdamW"
    default_settings: ClassVar[Mapping[str, Any]] = {
        "lr": 2.5e-3, "schedule": "constant", "ema": (), "betas": (0.9, 0.99),
    }  # fmt: skip
    r: NonNegative = 0.0
    """power of the step by which later weights count more"""
    weight_lr_power: NonNegative = 2.0
    """power of the rate by which weights count"""
