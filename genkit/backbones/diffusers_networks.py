"""Configurations of diffusers' networks for pictures, and how each is called.

Importing diffusers takes seconds, so it is imported when a network is made.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from genkit.config.numbers import Fraction, Layers, Width
from genkit.core import Label, Spec


def diffusers_class(name: str) -> Any:
    """The class of this name in diffusers."""
    import diffusers  # lazy: it takes seconds

    return getattr(diffusers, name)


def class_condition(spec: Spec) -> tuple[str, int] | None:
    """The name of the class condition and the number of classes, which is also the row of the null class."""
    return next(((k, v.num) for k, v in spec.cond.items() if isinstance(v, Label)), None)


# --------------------------------------------------------------------------------------------- their configurations
@dataclass(frozen=True)
class NetworkConfig(ABC):
    """The configuration of one of diffusers' classes, with diffusers' names.

    The sizes of samples and conditions come from the data; ``more`` holds the settings that have no field here.
    """

    class_name: ClassVar[str]
    """its name in diffusers"""
    set_by_data: ClassVar[tuple[str, ...]] = ("sample_size", "in_channels", "out_channels")
    """settings that follow from the data"""
    has_own_pipeline: ClassVar[bool] = False
    """whether diffusers has a pipeline of this network and a scheduler only"""
    fixed: ClassVar[Mapping[str, Any]] = {}
    """settings that change the network's inputs, with the one value that is supported"""
    text_states: ClassVar[tuple[str, ...]] = ()
    """what the network of a pipeline reads of a text: tokens, mask, pooled; (): any tokens, or none"""
    explicit_grid: ClassVar[bool] = False
    """whether its pipeline gives the scheduler n equal levels from 1 to 1 / n"""

    more: tuple[str, ...] = ()
    """further settings of diffusers' class, each name=JSON, such as norm_eps=1e-6"""

    def __post_init__(self) -> None:
        for name, value in self.further_settings().items():
            if name in self.set_by_data:
                raise ValueError(f"more: given {name}, which follows from the data; leave it out")
            if name in self.fixed and value != self.fixed[name]:
                raise ValueError(
                    f"more: given {name}={value}; genkit supports only {json.dumps(self.fixed[name])} there"
                )

    def further_settings(self) -> dict[str, Any]:
        """The settings in ``more``, by name."""
        out = {}
        for item in self.more:
            name, equals, value = item.partition("=")
            try:
                out[name] = json.loads(value)
            except json.JSONDecodeError:
                equals = ""
            if not equals or not name.isidentifier():
                raise ValueError(f"more: given {item}; needs name=JSON, such as norm_eps=1e-6 or act_fn='\"gelu\"'")
        return out

    def settings(self) -> dict[str, Any]:
        """The settings of diffusers' class, except ``set_by_data``."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "more"}
        return {**own, **self.further_settings()}

    @classmethod
    def from_config(cls, stored: Mapping[str, Any]) -> NetworkConfig:
        """From a config.json; a setting without a field here, or not of its type, goes into ``more``."""
        defaults = {
            k: p.default for k, p in inspect.signature(diffusers_class(cls.class_name).__init__).parameters.items()
        }
        own = {f.name: f.default for f in fields(cls) if f.name != "more"}
        values, more = {}, []
        for name, value in {**defaults, **stored}.items():
            value = tuple(value) if isinstance(value, list) else value
            if name not in defaults or name in ("self", "kwargs", *cls.set_by_data):
                continue
            if name in own and type(value) is type(own[name]):
                values[name] = value
            elif name in own or value != defaults[name]:
                more.append(f"{name}={json.dumps(value)}")
        return cls(**values, more=tuple(more))

    @abstractmethod
    def data_settings(self, spec: Spec) -> dict[str, Any]:
        """The settings ``set_by_data`` except the output's channels. ``ValueError`` for data that it cannot serve."""

    @abstractmethod
    def call(self, net: nn.Module, x: Tensor, time: Tensor, label: Tensor | None, context: Mapping[str, Any]) -> Tensor:
        """The output of diffusers' network; ``context`` is empty, or tokens and their mask (or None) by name."""

    def size_multiple(self) -> int:
        """The number of which the sides of pictures must be multiples."""
        return 1

    def context_dim(self) -> int:
        """The dimension of the tokens of its cross-attention; 0 if it has none."""
        return 0

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """Scales of guidance that the network takes as an input; None: guidance takes two passes."""
        return None

    @classmethod
    def sample_channels(cls, settings: Mapping[str, Any]) -> int | None:
        """The channels of samples of a network with these settings of diffusers."""
        return settings.get("in_channels")

    def setting(self, name: str) -> Any:
        """The value of a setting in ``more``, or diffusers' default."""
        default = inspect.signature(diffusers_class(self.class_name).__init__).parameters[name].default
        return self.further_settings().get(name, default)


@dataclass(frozen=True)
class UNet2D(NetworkConfig):
    """diffusers' UNet2DModel: that of DDPM (Ho et al. 2020) and of its successors without text."""

    class_name: ClassVar[str] = "UNet2DModel"
    has_own_pipeline: ClassVar[bool] = True
    set_by_data: ClassVar[tuple[str, ...]] = (*NetworkConfig.set_by_data, "num_class_embeds")
    fixed: ClassVar[Mapping[str, Any]] = {"time_embedding_type": "positional", "class_embed_type": None}

    block_out_channels: tuple[Width, ...] = (32, 64, 128)
    """channels of each level; each level halves the size"""
    layers_per_block: Layers = 1
    """residual blocks of a level"""
    down_block_types: tuple[str, ...] = ()
    """a name for each level, downwards; (): DownBlock2D, and AttnDownBlock2D at the last"""
    up_block_types: tuple[str, ...] = ()
    """a name for each level, upwards; (): as downwards"""
    attention_head_dim: Width = 32
    """channels of an attention head"""
    norm_num_groups: Width = 8
    """groups of the norms, a divisor of all channels"""
    dropout: Fraction = 0.0
    """inside residual blocks"""

    usual: ClassVar[tuple[str, str, str, str]] = ("DownBlock2D", "AttnDownBlock2D", "AttnUpBlock2D", "UpBlock2D")

    def settings(self) -> dict[str, Any]:
        levels, (down, down_last, up_first, up) = len(self.block_out_channels), self.usual
        names = {"down_block_types": self.down_block_types or (*[down] * (levels - 1), down_last),
                 "up_block_types": self.up_block_types or (up_first, *[up] * (levels - 1))}  # fmt: skip
        return {**super().settings(), **names}

    def data_settings(self, spec: Spec) -> dict[str, Any]:
        classes = class_condition(spec)
        rows = {"num_class_embeds": classes[1] + 1} if classes else {}
        return {"sample_size": list(spec.shape[1:]), "in_channels": spec.shape[0], **rows}

    def call(self, net: nn.Module, x: Tensor, time: Tensor, label: Tensor | None, context: Mapping[str, Any]) -> Tensor:
        return net(x, time, class_labels=label).sample

    def size_multiple(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class UNet2DCondition(UNet2D):
    """diffusers' UNet2DConditionModel: that of latent diffusion (Rombach et al. 2022), with cross-attention."""

    class_name: ClassVar[str] = "UNet2DConditionModel"
    has_own_pipeline: ClassVar[bool] = False
    fixed: ClassVar[Mapping[str, Any]] = {
        **UNet2D.fixed, "addition_embed_type": None, "encoder_hid_dim_type": None, "encoder_hid_dim": None
    }  # fmt: skip
    usual: ClassVar[tuple[str, str, str, str]] = (
        "CrossAttnDownBlock2D",
        "DownBlock2D",
        "UpBlock2D",
        "CrossAttnUpBlock2D",
    )

    attention_head_dim: Width = 8
    """heads of each attention layer (diffusers' name is wrong)"""
    cross_attention_dim: Width = 64
    """dimension of the data's tokens"""

    def call(self, net: nn.Module, x: Tensor, time: Tensor, label: Tensor | None, context: Mapping[str, Any]) -> Tensor:
        tokens, mask = context["tokens"], context.get("mask")
        return net(x, time, tokens, class_labels=label, encoder_attention_mask=mask).sample

    def size_multiple(self) -> int:
        return 1

    def context_dim(self) -> int:
        return self.cross_attention_dim


@dataclass(frozen=True)
class DiT2D(NetworkConfig):
    """diffusers' DiTTransformer2DModel: the diffusion transformer (Peebles & Xie 2023), for square pictures."""

    class_name: ClassVar[str] = "DiTTransformer2DModel"
    set_by_data: ClassVar[tuple[str, ...]] = (*NetworkConfig.set_by_data, "num_embeds_ada_norm")
    fixed: ClassVar[Mapping[str, Any]] = {"norm_type": "ada_norm_zero"}

    num_attention_heads: Width = 4
    """heads of each attention"""
    attention_head_dim: Width = 32
    """channels of each head; times the heads this is the width"""
    num_layers: Layers = 6
    """blocks"""
    patch_size: Width = 2
    """side of a patch, which is one token"""
    dropout: Fraction = 0.0
    """inside the blocks"""

    def data_settings(self, spec: Spec) -> dict[str, Any]:
        if spec.shape[1] != spec.shape[2]:
            raise ValueError(f"diffusers: dit takes square pictures; given {list(spec.shape)}; try --backbone=dit")
        classes = class_condition(spec)
        return {
            "sample_size": spec.shape[1],
            "in_channels": spec.shape[0],
            "num_embeds_ada_norm": classes[1] if classes else 1,
        }

    def call(self, net: nn.Module, x: Tensor, time: Tensor, label: Tensor | None, context: Mapping[str, Any]) -> Tensor:
        null = torch.ones(len(x), dtype=torch.long, device=x.device)  # without classes: the second of two rows
        return net(x, time, class_labels=null if label is None else label).sample

    def size_multiple(self) -> int:
        return self.patch_size
