"""LoRA: learn a change of low rank of layers that are frozen (Hu et al. 2022), with the peft library.

:func:`adapt` turns every weight that is not trained into a buffer, and saves no buffer of the network either, so the
code that trains, averages, resumes and stores parameters sees the adapter only. For sampling, :func:`merge` adds the
change to the weights, and the network has its original modules again."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from genkit.backbones.guidance_adapter import add_guidance_adapter
from genkit.config.numbers import Fraction, Positive, Width
from genkit.core.tensors import load_tensors, mismatched_keys

ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)  # the layers of our networks that peft can adapt


@dataclass(frozen=True)
class LoRA:
    """Train low-rank changes of a run's layers instead of all weights (Hu et al. 2022, eq. 3); needs --init."""

    rank: Width | None = None
    """r of the change (alpha / r) B A of a weight; None: no LoRA"""
    alpha: Positive | None = None
    """strength of the change; None: the rank, so that its factor is 1"""
    layers: str | None = None
    """regular expression that matches anywhere in the names of the adapted layers; None: all linear layers. "." adds
    the convolutions"""
    dropout: Fraction = 0.0
    """dropout on the input of the change"""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank: given {self.rank}; allowed 1 and above, or none for no LoRA")
        given = {"alpha": self.alpha, "layers": self.layers, "dropout": self.dropout}
        if self.rank is None and (unused := [k for k, v in given.items() if v]):
            raise ValueError(f"{unused[0]}: has no effect without a rank; give --lora.rank, say 8")
        try:
            re.compile(self.layers or "")
        except re.error as e:
            raise ValueError(f"layers: given {self.layers!r}, which is no regular expression: {e}") from e

    @property
    def active(self) -> bool:
        """Whether an adapter is trained."""
        return self.rank is not None

    def targets(self, name: str, net: nn.Module) -> list[str]:
        """The names of the layers of ``net`` that are adapted."""
        if self.layers is None:
            return [k for k, m in net.named_modules() if k and isinstance(m, nn.Linear)]
        pattern = re.compile(self.layers)
        return [k for k, m in net.named_modules() if k and isinstance(m, ADAPTABLE) and pattern.search(f"{name}.{k}")]

    def insert(self, net: nn.Module, layers: list[str], strength: float) -> None:
        """Add the adapter to these layers of ``net``, in place. ``ValueError`` if peft is missing."""
        if importlib.util.find_spec("peft") is None:
            raise ValueError('lora: needs the peft library; install it with: pip install "genkit-torch[lora]"')
        assert self.rank is not None
        from peft import LoraConfig, inject_adapter_in_model  # lazy: it takes seconds

        pattern = "|".join(map(re.escape, layers))  # of the whole name: a list would match ends of names
        settings = LoraConfig(r=self.rank, lora_alpha=cast(Any, (self.alpha or self.rank) * strength),
                              lora_dropout=self.dropout, target_modules=f"(?:{pattern})")  # fmt: skip
        inject_adapter_in_model(settings, net)

    def finish(self, net: nn.Module) -> None:
        """Add the learned change to the weights of ``net``, which then has its original modules again."""
        from peft.tuners.tuners_utils import BaseTunerLayer  # lazy: it takes seconds

        adapted: list[tuple[str, Any]] = [(k, m) for k, m in net.named_modules() if isinstance(m, BaseTunerLayer)]
        for name, layer in adapted:
            layer.merge()
            parent, _, last = name.rpartition(".")
            setattr(net.get_submodule(parent), last, layer.get_base_layer())


@dataclass(frozen=True)
class GuidanceLoRA(LoRA):
    """A LoRA that takes the scale of guidance as an input, for one pass a step (Jensen et al. 2025); genkit distill."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dropout:
            raise ValueError(
                f"dropout: given {self.dropout}, which has no effect on an adapter of guidance; leave it out"
            )

    def insert(self, net: nn.Module, layers: list[str], strength: float) -> None:
        assert self.rank is not None
        add_guidance_adapter(net, layers, self.rank, (self.alpha or self.rank) / self.rank * strength)

    def finish(self, net: nn.Module) -> None:
        """The adapter stays apart: its change depends on the scale that a sample is drawn with."""


LORA: dict[str, type[LoRA]] = {"lora": LoRA, "guidance": GuidanceLoRA}
Frozen = list[tuple[nn.Module, str, bool]]  # buffers, by their modules and names, and whether they were parameters


def adapt(nets: Mapping[str, nn.Module], lora: LoRA, strength: float = 1.0) -> Frozen:
    """Add an adapter to the layers of ``nets``, in place, with zero change at first; freeze everything else.

    ``strength`` multiplies the change. ``ValueError`` if no layer's name matches, or peft is missing.
    """
    targets = {name: lora.targets(name, net) for name, net in nets.items()}
    if not any(targets.values()):
        adaptable = [f"{n}.{k}" for n, net in nets.items() for k, m in net.named_modules() if isinstance(m, ADAPTABLE)]
        shown = ", ".join([*adaptable[:3], "..."]) if adaptable else "none"
        raise ValueError(f"lora: no layer has a name with {lora.layers or 'a linear layer'!r} in it; there are {shown}")
    for name, net in nets.items():
        if targets[name]:
            lora.insert(net, targets[name], strength)
            for p in net.parameters():
                if p.requires_grad:
                    p.data = p.data.float()  # peft gives it the type of the weight, which may be compressed
        else:
            net.requires_grad_(False)
    return [entry for net in nets.values() for entry in freeze(net)]


@contextlib.contextmanager
def adapters_off(nets: Mapping[str, nn.Module]) -> Iterator[None]:
    """Networks as they are without their adapters, while the context lasts."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # lazy: it takes seconds

    layers: list[Any] = [m for net in nets.values() for m in net.modules() if isinstance(m, BaseTunerLayer)]
    try:
        for layer in layers:  # not by enable_adapters, which also turns their gradients off
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def freeze(net: nn.Module) -> Frozen:
    """Turn the parameters that need no gradient into buffers that are not saved, as the buffers of a network with an
    adapter, and return them: a checkpoint has the adapter alone."""
    frozen: Frozen = []
    adapted = any(p.requires_grad for p in net.parameters())
    for module in net.modules():
        if adapted and not isinstance(module, nn.modules.batchnorm._NormBase):  # whose statistics are learned
            saved = module._buffers.keys() - module._non_persistent_buffers_set
            module._non_persistent_buffers_set |= saved
            frozen += [(module, name, False) for name in sorted(saved)]
        for name, p in list(module.named_parameters(recurse=False)):
            if not p.requires_grad:
                delattr(module, name)
                module.register_buffer(name, p.detach(), persistent=False)
                frozen.append((module, name, True))
    names = {id(b) for m, k, _ in frozen for b in [m.get_buffer(k)]}
    # DistributedDataParallel would send them to all ranks at every step; they are the same everywhere, and stay so
    ignored: Any = [k for k, b in net.named_buffers() if id(b) in names]  # a list, which a module's types do not allow
    net._ddp_params_and_buffers_to_ignore = ignored
    return frozen


def thaw(frozen: Frozen) -> None:
    """The inverse of :func:`freeze`."""
    for module, name, was_parameter in frozen:
        if not was_parameter:
            module._non_persistent_buffers_set.discard(name)
            continue
        value = module.get_buffer(name)
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))


@torch.no_grad()
def merge(
    nets: Mapping[str, nn.Module], lora: LoRA, stored: Mapping[str, Tensor], file: Path, strength: float = 1.0
) -> None:
    """Add the change in ``stored``, read from ``file``, times ``strength``, to the weights of ``nets``, in place.

    A :class:`GuidanceLoRA` stays apart from the weights.

    ``ValueError`` if it is a change of other layers; ``nets`` are then unusable.
    """
    frozen = adapt(nets, lora, strength)
    if odd := mismatched_keys(nets, stored):
        raise ValueError(f"lora: {file} changes other layers than this model has, first at {odd[0]}")
    load_tensors(nets, stored, file)
    for net in nets.values():
        lora.finish(net)
    thaw(frozen)
