"""Networks of diffusers as denoisers: to fine-tune pretrained ones, and to export trained ones.

diffusers' networks embed an index n = 0 .. 999 of DDPM's 1000 time steps. The same time has the label (n + 1) / 1000
here, so they are given ``1000 label - 1``, for every objective (also for a label log(sigma) / 4). It need not be an
integer, since they embed it by sinusoids. :func:`shift_time_embedding` turns weights that were trained this way into
weights that expect ``1000 label``, the convention of diffusers' flow-matching schedulers.

Importing diffusers takes seconds, so it is imported when a network is made.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from genkit.backbones.embed import EMBEDDERS, Conditioner, TokensEmbed, module_name
from genkit.backbones.encoded_text import EncodedText, has_encoded_text
from genkit.config.numbers import Fraction, Layers, Width
from genkit.core import NO_COND, Backbone, Cond, Label, Spec, Tokens

INTEGER_TOLERANCE = 1e-3  # float32 holds 1000 t - 1 to 1e-4: an index this near to an integer is rounded to it


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


MODELS: dict[str, type[NetworkConfig]] = {"unet2d": UNet2D, "unet2d-condition": UNet2DCondition, "dit": DiT2D}


def diffusers_class(name: str) -> Any:
    """The class of this name in diffusers."""
    import diffusers  # lazy: it takes seconds

    return getattr(diffusers, name)


# -------------------------------------------------------------------------------------------------------- the family
@dataclass(frozen=True)
class Diffusers(Backbone):
    """One of diffusers' networks, for pictures or latents ``(C, H, W)``."""

    cuts: ClassVar[tuple[str, ...]] = ("denoiser",)
    routes: ClassVar[tuple[str, ...]] = ("global", "tokens")  # the model decides which of them
    axes: ClassVar[tuple[int, ...]] = (2,)

    model: NetworkConfig = field(default_factory=UNet2D, metadata={"table": "genkit.backbones.diffusers:MODELS"})
    """unet2d, unet2d-condition or dit, and its settings under diffusers' names"""
    timesteps: Width = 1000
    """number of time steps of the network, which is given timesteps * label - 1"""
    learned_sigma: bool = False
    """the network has twice the output channels, as DiT's released weights do; the half for the variance is not used"""
    checkpoint: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""

    def denoiser(self, spec: Spec) -> nn.Module:
        return DiffusersDenoiser(self, spec)


def class_condition(spec: Spec) -> tuple[str, int] | None:
    """The name of the class condition and the number of classes, which is also the row of the null class."""
    return next(((k, v.num) for k, v in spec.cond.items() if isinstance(v, Label)), None)


def token_spec(spec: Spec) -> Spec:
    """The spec with only the conditions that cross-attention sees."""
    return Spec(spec.shape, {k: v for k, v in spec.cond.items() if EMBEDDERS[type(v)].route == "tokens"})


def require_served(model: NetworkConfig, spec: Spec) -> None:
    """``ValueError`` if diffusers' network cannot take the samples or their conditions."""
    if len(spec.shape) != 3:
        raise ValueError(f"diffusers: given samples of shape {spec.shape}; allowed (C, H, W); try --backbone=mlp")
    if any(n % model.size_multiple() for n in spec.shape[1:]):
        size = "x".join(map(str, spec.shape[1:]))
        raise ValueError(
            f"diffusers: pictures of {size} are not multiples of {model.size_multiple()}; take another --data.size, "
            "fewer levels or smaller patches"
        )
    context, tokens, classes = model.context_dim(), token_spec(spec).cond, class_condition(spec)
    for name, kind in spec.cond.items():
        if not (name in tokens and context) and name != (classes and classes[0]):
            takes = "one Label, Tokens and Text" if context else "one Label"
            raise ValueError(
                f"diffusers: {model.class_name} takes {takes}; condition {name!r} is of kind {type(kind).__name__}; "
                "leave it out, or try --backbone=unet"
            )
        if isinstance(kind, Tokens) and kind.dim != context:
            raise ValueError(
                f"diffusers: condition {name!r} has tokens of {kind.dim} numbers, this network takes {context}; try "
                f"--backbone.model.cross-attention-dim {kind.dim}"
            )


# ------------------------------------------------------------------------------------------------------- the network
class RawTokensEmbed(TokensEmbed):
    """Tokens that go to cross-attention without a layer in between, as pretrained weights expect."""

    def __init__(self, kind: Tokens, dim: int):
        super().__init__(kind, dim)
        self.layer = nn.Identity()


class NoTimeEmbed(nn.Module):
    """Zeros in place of a time embedding: diffusers' networks embed the time themselves."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, label: None) -> Tensor:
        return torch.zeros(self.dim)


class ContextTokens(nn.Module):
    """The tokens ``[B, L, dim]`` of cross-attention and their mask ``[B, L]``; one learned token if there are none."""

    def __init__(self, spec: Spec, dim: int):
        super().__init__()
        self.spec = token_spec(spec)
        self.null = None if self.spec.cond else nn.Parameter(torch.randn(1, 1, dim))
        self.cond = Conditioner(self.spec, dim, time=False) if self.spec.cond else None
        if self.cond:
            self.cond.start = NoTimeEmbed(dim)  # pyright: ignore[reportAttributeAccessIssue]
            for name, kind in self.spec.cond.items():
                if isinstance(kind, Tokens):
                    self.cond.embed[module_name(name)] = RawTokensEmbed(kind, dim)

    def forward(self, x: Tensor, cond: Cond) -> dict[str, Tensor | None]:
        if self.cond is None:
            assert self.null is not None
            return {"tokens": self.null.expand(len(x), -1, -1), "mask": None}
        routed = self.cond(x[:0].new_zeros(len(x)), (), None, cond)
        assert routed.tokens is not None
        return {"tokens": routed.tokens, "mask": routed.mask}


class DiffusersDenoiser(nn.Module):
    """``(x [B, *S], label [B], cond) -> [B, *S]``, by the network ``model`` of diffusers.

    The null class is the row after the last class, as in DiT.
    """

    def __init__(self, cfg: Diffusers, spec: Spec):
        super().__init__()
        require_served(cfg.model, spec)
        self.cfg, self.spec, self.classes = cfg, spec, class_condition(spec)
        channels = spec.shape[0] * (2 if cfg.learned_sigma else 1)
        settings = {**cfg.model.settings(), **cfg.model.data_settings(spec), "out_channels": channels}
        try:
            self.model: nn.Module = diffusers_class(cfg.model.class_name)(**settings)
        except (ValueError, TypeError, NotImplementedError, ZeroDivisionError) as e:
            raise ValueError(
                f"diffusers: {cfg.model.class_name} cannot be made: {' '.join(str(e).split())[:300]}"
            ) from e
        for module in self.model.modules():
            if type(module).__name__ == "LabelEmbedding":
                module.dropout_prob = 0.0  # type: ignore[assignment]  # genkit drops conditions itself, row by row
        if cfg.checkpoint:
            self.model.enable_gradient_checkpointing()  # type: ignore[operator]  # of diffusers, not of nn.Module
        self.sequences: ContextTokens | EncodedText | None = None
        if cfg.model.context_dim():
            encoded = has_encoded_text(spec)
            self.sequences = EncodedText(spec) if encoded else ContextTokens(spec, cfg.model.context_dim())

    def forward(
        self, x: Float[Tensor, "b c h w"], label: Float[Tensor, " b"], cond: Cond = NO_COND
    ) -> Float[Tensor, "b c h w"]:
        context = {} if self.sequences is None else self.sequences(x, cond)
        time = timestep_index(label, self.cfg.timesteps)
        out = self.cfg.model.call(self.model, x, time, self.class_row(x, cond), context)
        return out[:, : x.shape[1]] if self.cfg.learned_sigma else out

    def class_row(self, x: Tensor, cond: Cond) -> Tensor | None:
        """The row of each sample's class in the embedding, ``[B]``; that of the null class for samples without one."""
        if self.classes is None:
            return None
        name, null = self.classes
        nulls = torch.full((len(x),), null, device=x.device)
        label = cond.get(name, nulls)
        for keep in ("keep", f"keep.{name}"):
            label = torch.where(cond[keep], label, nulls) if keep in cond else label
        return label


def timestep_index(label: Float[Tensor, " b"], timesteps: int = 1000) -> Float[Tensor, " b"]:
    """diffusers' index n of our time label ``t = (n + 1) / timesteps``; exact if it is an integer."""
    n = timesteps * label - 1
    rounded = n.detach().round()
    return torch.where((n.detach() - rounded).abs() < INTEGER_TOLERANCE, n + (rounded - n.detach()), n)


@torch.no_grad()
def shift_time_embedding(
    weight: Float[Tensor, "e d"], rates: Float[Tensor, " h"], cosine_first: bool, by: float
) -> Tensor:
    """The first layer after the sinusoids of n, converted to sinusoids of ``n + by``: a rotation of each pair.

    ``cos(w n) = cos(w (n + by)) cos(w by) + sin(w (n + by)) sin(w by)``, and likewise for the sine.
    """
    h = len(rates)
    first, second, rest = weight.double().split([h, h, weight.shape[1] - 2 * h], 1)
    c, s = (first, second) if cosine_first else (second, first)
    angle = rates.double() * by
    c, s = c * angle.cos() - s * angle.sin(), c * angle.sin() + s * angle.cos()
    return torch.cat([*((c, s) if cosine_first else (s, c)), rest], 1).to(weight.dtype)
