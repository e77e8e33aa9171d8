"""What an optimizer is to the training loop: a dataclass of its own options that makes the optimizer of a phase.

Learning rate, decay and beta are settings of the training (``--lr``, ``--weight-decay``, ``--betas``), the same for all
optimizers; the dotted options of a family are what only it has.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

Group = dict[str, Any]
Networks = Mapping[str, nn.Module]


@dataclass(frozen=True)
class PhaseRates:
    """The settings of training that optimizers have in common, as one phase has them."""

    lr: float
    betas: tuple[float, float]
    weight_decay: float


@dataclass(frozen=True)
class OptimizerFamily:
    """Makes the optimizer of a phase. Its fields are keyword arguments of the optimizer's class."""

    target: ClassVar[str] = ""
    """the optimizer's class, module:Class"""
    package: ClassVar[str] = "torch"
    """what has to be installed, as pip names it"""
    fixed: ClassVar[Mapping[str, Any]] = {}
    """keyword arguments that are no options"""
    shards: ClassVar[bool] = False
    """whether it treats each number of a weight by itself, so that a rank can step its share of the rows"""
    default_settings: ClassVar[Mapping[str, Any]] = {}
    """training settings that replace the usual defaults, such as a learning rate that suits it"""

    def create(self, groups: Sequence[Group], rates: PhaseRates, nets: Networks) -> torch.optim.Optimizer:
        """The optimizer of ``groups``, in the form of torch; ``nets`` are the networks that the phase trains.

        Raises ``ValueError`` if its package is not installed.
        """
        cls = self.load_class()
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return cls([*groups], **self.common_options(cls, rates), **options, **self.fixed)

    @classmethod
    def load_class(cls) -> Any:
        """The optimizer's class. ``ValueError`` if its package is not installed."""
        module, _, name = cls.target.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except ImportError as e:
            raise ValueError(
                f"optimizer: {cls.__name__} needs the package {cls.package}, which cannot be imported ({e}): "
                f"pip install {cls.package}"
            ) from None

    @classmethod
    def takes(cls, name: str) -> bool:
        """Whether it has the common setting ``name``, such as betas."""
        return name in inspect.signature(cls.load_class()).parameters

    @staticmethod
    def common_options(target: Any, rates: PhaseRates) -> dict[str, Any]:
        """Those of the common settings that the class takes."""
        known = inspect.signature(target).parameters
        return {name: value for name, value in vars(rates).items() if name in known}


def reads_flag(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer reads on the device that it has to skip a step, by the protocol of torch's GradScaler."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
