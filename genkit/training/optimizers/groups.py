"""The parameters of a phase: what its optimizer steps, in groups that decay and that do not, and at which rates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from genkit.config.blocks import check_value, get_hints
from genkit.core import Objective, Phase
from genkit.training.optimizers.family import OptimizerFamily, PhaseRates
from genkit.training.optimizers.modes import has_two_modes
from genkit.training.settings import TrainSettings

if TYPE_CHECKING:
    from genkit.training.sharding import Sharding


def phase_parameters(phase: Phase, nets: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield ``("net.conv.weight", parameter)`` of all networks that the phase trains, in a fixed order."""
    for name in phase.trains:
        yield from nets[name].named_parameters(prefix=name)


def parameter_groups(
    phase: Phase,
    nets: Mapping[str, nn.Module],
    weight_decay: float,
    sharding: Sharding | None = None,
    decays_all: bool = False,
) -> list[dict[str, Any]]:
    """The groups of a phase's optimizer: matrices and convolutions, which decay, and all else, which does not.

    Decay towards 0 means nothing for a norm, a bias, a table of classes, a learned null or a learned scale. Without
    decay, or if it ``decays_all``, there is one group.
    """
    named = list(phase_parameters(phase, nets))
    stepped = {key: sharding.share_of(p) if sharding else p for key, p in named}
    if not weight_decay or decays_all:
        return [{"params": list(stepped.values())}]
    embeddings = [m for net in nets.values() for m in net.modules() if isinstance(m, nn.Embedding)]
    tables = {id(p) for m in embeddings for p in m.parameters()}
    decays = {key: p.ndim >= 2 and id(p) not in tables and not key.endswith(".null") for key, p in named}
    groups = [
        {"params": [p for key, p in stepped.items() if decays[key]]},
        {"params": [p for key, p in stepped.items() if not decays[key]], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def create_optimizer(
    phase: Phase, nets: Mapping[str, nn.Module], settings: TrainSettings, sharding: Sharding | None = None
) -> torch.optim.Optimizer:
    """The optimizer of a phase, in training mode. ``ValueError`` if it cannot be made, or cannot step shares."""
    family, own = settings.optimizer, settings_of_phase(settings, phase.name)
    if sharding and not family.shards:
        raise ValueError(
            f"optimizer: {title(family)} looks at whole weights, of which --parallel {settings.parallel} gives each "
            f"rank some rows; use --parallel ddp, or one of {', '.join(shardable())}"
        )
    standard = {TrainSettings.betas, settings.objective.default_settings.get("betas")}
    if own.weight_decay and not family.takes("weight_decay"):
        raise ValueError(
            f"weight_decay: given {own.weight_decay}, but {title(family)} has none; leave --weight-decay out"
        )
    if not family.takes("betas") and own.betas not in standard:
        raise ValueError(f"betas: given {own.betas}, but {title(family)} has none; leave --betas out")
    groups = parameter_groups(phase, nets, own.weight_decay, sharding, settings.decay == "all")
    rates = PhaseRates(own.lr, own.betas, own.weight_decay)
    optimizer = family.create(groups, rates, {name: nets[name] for name in phase.trains})
    if settings.objective.replaces_weights and has_two_modes(optimizer):
        raise ValueError(
            f"optimizer: {title(family)} averages the weights of the whole training, and "
            f"{type(settings.objective).__name__} replaces them at times; take another, say adamw"
        )
    if hasattr(optimizer, "train"):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def title(family: OptimizerFamily) -> str:
    """The name of a family, or of an external class."""
    from genkit.training.optimizers import OPTIMIZERS  # lazy: the registry imports the families

    return next((name for name, cls in OPTIMIZERS.items() if cls is type(family)), type(family).__qualname__)


def shardable() -> list[str]:
    """The names of the optimizers that can step shares."""
    from genkit.training.optimizers import OPTIMIZERS  # lazy: the registry imports the families

    return [name for name, cls in OPTIMIZERS.items() if cls.shards]


# -------------------------------------------------------------------------------------------- settings of a phase
PHASE_KEYS = ("lr", "betas", "weight_decay")


def settings_of_phase(settings: TrainSettings, phase: str) -> TrainSettings:
    """``settings`` with what ``phase_settings`` say of one phase."""
    given = dict(read_phase_setting(text)[1:] for text in settings.phase_settings if text.split(".")[0] == phase)
    return replace(settings, **given) if given else settings


def read_phase_setting(text: str) -> tuple[str, str, Any]:
    """``("discriminator", "lr", 4e-4)`` of ``"discriminator.lr=4e-4"``. ``ValueError`` for another form."""
    name, _, value = text.partition("=")
    phase, _, key = name.partition(".")
    key = key.replace("-", "_")
    if not (phase and value) or key not in PHASE_KEYS:
        raise ValueError(f"phase_settings: given {text!r}; needs PHASE.SETTING=VALUE with a setting of "
                         f"{', '.join(PHASE_KEYS)}: discriminator.lr=4e-4, or discriminator.betas=0,0.9")  # fmt: skip
    parts: Any = value.split(",") if key == "betas" else value
    return phase, key, check_value(get_hints(TrainSettings)[key], parts, f"phase_settings: {name}")


def require_phases(settings: TrainSettings, objective: Objective) -> None:
    """``ValueError`` if ``phase_settings`` name a phase that the objective has not."""
    known = [phase.name for phase in objective.phases]
    for text in settings.phase_settings:
        phase = read_phase_setting(text)[0]
        if phase not in known:
            raise ValueError(f"phase_settings: given {text}; the phases are {', '.join(known)}")
