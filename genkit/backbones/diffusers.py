"""diffusers' own networks as denoisers of our objectives: pretrained ones are fine-tuned, trained ones are exported.

They are told the time by an index into DDPM's table of 1000: theirs, n = 0 .. 999, is our label (n + 1) / 1000, so they
see ``1000 label - 1``, for every objective (a label log(sigma) / 4 too). It need not be whole: they embed it by
sinusoids. :func:`shift_time_embedding` turns weights that were trained so into weights that want to see ``1000 label``,
the convention of diffusers' flow-matching schedulers.

diffusers itself takes seconds to import, and is imported when a network is made.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Lt
from jaxtyping import Float
from torch import Tensor, nn

from genkit.backbones.embed import EMBEDDERS, Conditioner, TokensEmbed, key
from genkit.core import NO_COND, Backbone, Cond, Label, Spec, Tokens

WHOLE = 1e-3  # float32 holds 1000 t - 1 to 1e-4: an index that is nearer to a whole number than this is meant as one


# --------------------------------------------------------------------------------------------- their configurations
@dataclass(frozen=True)
class Model(ABC):
    """One of diffusers' classes. Its fields have diffusers' names; sizes of samples and conditions come from the data.

    ``more`` holds the settings that have no field here.
    """

    kind: ClassVar[str]
    """its name in diffusers"""
    from_data: ClassVar[tuple[str, ...]] = ("sample_size", "in_channels", "out_channels")
    """settings that the data decide"""
    alone: ClassVar[bool] = False
    """whether diffusers has a pipeline that draws with it and nothing else"""
    only: ClassVar[Mapping[str, Any]] = {}
    """settings that change what the network is told, with the one value that we can serve"""

    more: tuple[str, ...] = ()
    """further settings of diffusers' class, each name=JSON, such as norm_eps=1e-6"""

    def __post_init__(self) -> None:
        for name, value in self.further().items():
            if name in self.from_data:
                raise ValueError(f"more: given {name}, which the data decide; leave it out")
            if name in self.only and value != self.only[name]:
                raise ValueError(f"more: given {name}={value}; genkit serves only {json.dumps(self.only[name])} there")

    def further(self) -> dict[str, Any]:
        """``more``, read."""
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
        """All that diffusers' class is given besides ``from_data``."""
        mine = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "more"}
        return {**mine, **self.further()}

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Model:
        """The one of a config.json; what is not a field here, or not of a field's type, goes into ``more``."""
        usual = {k: p.default for k, p in inspect.signature(class_of(cls.kind).__init__).parameters.items()}
        mine = {f.name: f.default for f in fields(cls) if f.name != "more"}
        values, more = {}, []
        for name, value in {**usual, **stored}.items():
            value = tuple(value) if isinstance(value, list) else value
            if name not in usual or name in ("self", "kwargs", *cls.from_data):
                continue
            if name in mine and type(value) is type(mine[name]):
                values[name] = value
            elif name in mine or value != usual[name]:
                more.append(f"{name}={json.dumps(value)}")
        return cls(**values, more=tuple(more))

    @abstractmethod
    def sizes(self, spec: Spec) -> dict[str, Any]:
        """The settings ``from_data``, but for the output's channels. ``ValueError`` for data that it cannot serve."""

    @abstractmethod
    def ask(self, net: nn.Module, x: Tensor, time: Tensor, label: Tensor | None, seen: Sequence[Any]) -> Tensor:
        """The answer of diffusers' network; ``seen`` are tokens and their mask."""

    def multiple(self) -> int:
        """What the sides of pictures have to be multiples of."""
        return 1

    def context(self) -> int:
        """How many numbers a token of its cross-attention has; 0 where it has none."""
        return 0


@dataclass(frozen=True)
class UNet2D(Model):
    """diffusers' UNet2DModel: that of DDPM (Ho et al. 2020) and of its successors without text."""

    kind: ClassVar[str] = "UNet2DModel"
    alone: ClassVar[bool] = True
    from_data: ClassVar[tuple[str, ...]] = (*Model.from_data, "num_class_embeds")
    only: ClassVar[Mapping[str, Any]] = {"time_embedding_type": "positional", "class_embed_type": None}

    block_out_channels: tuple[Annotated[int, Ge(1)], ...] = (32, 64, 128)
    """channels of each level; each level halves the size"""
    layers_per_block: Annotated[int, Ge(1)] = 1
    """residual blocks of a level"""
    down_block_types: tuple[str, ...] = ()
    """a name for each level, downwards; without: DownBlock2D, and AttnDownBlock2D at the last"""
    up_block_types: tuple[str, ...] = ()
    """upwards; without: as downwards"""
    attention_head_dim: Annotated[int, Ge(1)] = 32
    """channels of an attention head"""
    norm_num_groups: Annotated[int, Ge(1)] = 8
    """groups of the norms; has to divide all channels"""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """inside residual blocks"""

    usual: ClassVar[tuple[str, str, str, str]] = ("DownBlock2D", "AttnDownBlock2D", "AttnUpBlock2D", "UpBlock2D")

    def settings(self) -> dict[str, Any]:
        levels, (down, down_last, up_first, up) = len(self.block_out_channels), self.usual
        names = {"down_block_types": self.down_block_types or (*[down] * (levels - 1), down_last),
                 "up_block_types": self.up_block_types or (up_first, *[up] * (levels - 1))}  # fmt: skip
        return {**super().settings(), **names}

    def sizes(self, spec: Spec) -> dict[str, Any]:
        found = classes(spec)
        rows = {"num_class_embeds": found[1] + 1} if found else {}
        return {"sample_size": list(spec.shape[1:]), "in_channels": spec.shape[0], **rows}

    def ask(self, net: nn.Module, x: Tensor, time: Tensor, label: Tensor | None, seen: Sequence[Any]) -> Tensor:
        return net(x, time, class_labels=label).sample

    def multiple(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class UNet2DCondition(UNet2D):
    """diffusers' UNet2DConditionModel: that of latent diffusion (Rombach et al. 2022), with cross-attention."""

    kind: ClassVar[str] = "UNet2DConditionModel"
    alone: ClassVar[bool] = False
    only: ClassVar[Mapping[str, Any]] = {
        **UNet2D.only, "addition_embed_type": None, "encoder_hid_dim_type": None, "encoder_hid_dim": None
    }  # fmt: skip
    usual: ClassVar[tuple[str, str, str, str]] = (
        "CrossAttnDownBlock2D",
        "DownBlock2D",
        "UpBlock2D",
        "CrossAttnUpBlock2D",
    )

    attention_head_dim: Annotated[int, Ge(1)] = 8
    """heads of each attention (diffusers' name is wrong, and is kept)"""
    cross_attention_dim: Annotated[int, Ge(1)] = 64
    """numbers of a token; that of the data's tokens"""

    def ask(self, net: nn.Module, x: Tensor, time: Tensor, label: Tensor | None, seen: Sequence[Any]) -> Tensor:
        tokens, mask = seen
        return net(x, time, tokens, class_labels=label, encoder_attention_mask=mask).sample

    def multiple(self) -> int:
        return 1

    def context(self) -> int:
        return self.cross_attention_dim


@dataclass(frozen=True)
class DiT2D(Model):
    """diffusers' DiTTransformer2DModel: the diffusion transformer (Peebles & Xie 2023), for square pictures."""

    kind: ClassVar[str] = "DiTTransformer2DModel"
    from_data: ClassVar[tuple[str, ...]] = (*Model.from_data, "num_embeds_ada_norm")
    only: ClassVar[Mapping[str, Any]] = {"norm_type": "ada_norm_zero"}

    num_attention_heads: Annotated[int, Ge(1)] = 4
    """heads of each attention"""
    attention_head_dim: Annotated[int, Ge(1)] = 32
    """channels of each head; times the heads this is the width"""
    num_layers: Annotated[int, Ge(1)] = 6
    """blocks"""
    patch_size: Annotated[int, Ge(1)] = 2
    """side of a patch, which is one token"""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """inside the blocks"""

    def sizes(self, spec: Spec) -> dict[str, Any]:
        if spec.shape[1] != spec.shape[2]:
            raise ValueError(f"diffusers: dit takes square pictures; given {list(spec.shape)}; try --backbone=dit")
        found = classes(spec)
        return {
            "sample_size": spec.shape[1],
            "in_channels": spec.shape[0],
            "num_embeds_ada_norm": found[1] if found else 1,
        }

    def ask(self, net: nn.Module, x: Tensor, time: Tensor, label: Tensor | None, seen: Sequence[Any]) -> Tensor:
        null = torch.ones(len(x), dtype=torch.long, device=x.device)  # without classes: the last of two rows
        return net(x, time, class_labels=null if label is None else label).sample

    def multiple(self) -> int:
        return self.patch_size


MODELS: dict[str, type[Model]] = {"unet2d": UNet2D, "unet2d-condition": UNet2DCondition, "dit": DiT2D}


def class_of(kind: str) -> Any:
    import diffusers  # takes seconds

    return getattr(diffusers, kind)


# -------------------------------------------------------------------------------------------------------- the family
@dataclass(frozen=True)
class Diffusers(Backbone):
    """One of diffusers' networks, for pictures or latents ``(C, H, W)``: unet2d, unet2d-condition or dit."""

    cuts: ClassVar[tuple[str, ...]] = ("denoiser",)
    routes: ClassVar[tuple[str, ...]] = ("global", "tokens")  # which of them, the model decides
    axes: ClassVar[tuple[int, ...]] = (2,)

    model: Model = field(default_factory=UNet2D, metadata={"table": "genkit.backbones.diffusers:MODELS"})
    """which, and its settings under diffusers' names"""
    timesteps: Annotated[int, Ge(1)] = 1000
    """how many times they count: they see timesteps * label - 1"""
    learned_sigma: bool = False
    """the network puts out twice the channels, as DiT's released weights do; the half for the variance is carried along
    and not used"""
    checkpoint: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""

    def denoiser(self, spec: Spec) -> nn.Module:
        return DiffusersDenoiser(self, spec)


def classes(spec: Spec) -> tuple[str, int] | None:
    """The name of the class condition and the number of classes, which is also the row of the null class."""
    return next(((k, v.num) for k, v in spec.cond.items() if isinstance(v, Label)), None)


def on_tokens(spec: Spec) -> Spec:
    """The conditions that cross-attention sees."""
    return Spec(spec.shape, {k: v for k, v in spec.cond.items() if EMBEDDERS[type(v)].route == "tokens"})


def require_served(model: Model, spec: Spec) -> None:
    """``ValueError`` where diffusers' network has no place for the samples or their conditions."""
    if len(spec.shape) != 3:
        raise ValueError(f"diffusers: given samples of shape {spec.shape}; allowed (C, H, W); try --backbone=mlp")
    if any(n % model.multiple() for n in spec.shape[1:]):
        size = "x".join(map(str, spec.shape[1:]))
        raise ValueError(
            f"diffusers: pictures of {size} are not multiples of {model.multiple()}; take another --data.size, fewer "
            "levels or smaller patches"
        )
    context, tokens, found = model.context(), on_tokens(spec).cond, classes(spec)
    for name, kind in spec.cond.items():
        if not (name in tokens and context) and name != (found and found[0]):
            takes = "one Label, Tokens and Text" if context else "one Label"
            raise ValueError(
                f"diffusers: {model.kind} takes {takes}; condition {name!r} is of kind {type(kind).__name__}; leave it "
                "out, or try --backbone=unet"
            )
        if isinstance(kind, Tokens) and kind.dim != context:
            raise ValueError(
                f"diffusers: condition {name!r} has tokens of {kind.dim} numbers, this network takes {context}; try "
                f"--backbone.model.cross-attention-dim {kind.dim}"
            )


# ------------------------------------------------------------------------------------------------------- the network
class AsTheyAre(TokensEmbed):
    """Tokens that go to cross-attention without a layer before it, as pretrained weights expect them."""

    def __init__(self, kind: Tokens, dim: int):
        super().__init__(kind, dim)
        self.layer = nn.Identity()


class Nothing(nn.Module):
    """In place of a time: diffusers' networks embed theirs themselves."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, label: None) -> Tensor:
        return torch.zeros(self.dim)


class Sequences(nn.Module):
    """What cross-attention sees: tokens ``[B, L, dim]`` and their mask ``[B, L]``; without any, a learned one."""

    def __init__(self, spec: Spec, dim: int):
        super().__init__()
        self.spec = on_tokens(spec)
        self.null = None if self.spec.cond else nn.Parameter(torch.randn(1, 1, dim))
        self.cond = Conditioner(self.spec, dim, time=False) if self.spec.cond else None
        if self.cond:
            self.cond.start = Nothing(dim)  # pyright: ignore[reportAttributeAccessIssue]
            for name, kind in self.spec.cond.items():
                if isinstance(kind, Tokens):
                    self.cond.embed[key(name)] = AsTheyAre(kind, dim)

    def forward(self, x: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None]:
        if self.cond is None:
            assert self.null is not None
            return self.null.expand(len(x), -1, -1), None
        routed = self.cond(x[:0].new_zeros(len(x)), (), None, cond)
        assert routed.tokens is not None
        return routed.tokens, routed.mask


class DiffusersDenoiser(nn.Module):
    """``(x [B, *S], label [B], cond) -> [B, *S]``, by the network ``model`` of diffusers.

    The null class is the row after the last class, as in DiT.
    """

    def __init__(self, cfg: Diffusers, spec: Spec):
        super().__init__()
        require_served(cfg.model, spec)
        self.cfg, self.spec, self.classes = cfg, spec, classes(spec)
        channels = spec.shape[0] * (2 if cfg.learned_sigma else 1)
        settings = {**cfg.model.settings(), **cfg.model.sizes(spec), "out_channels": channels}
        try:
            self.model: nn.Module = class_of(cfg.model.kind)(**settings)
        except (ValueError, TypeError, NotImplementedError, ZeroDivisionError) as e:
            raise ValueError(f"diffusers: {cfg.model.kind} cannot be made: {' '.join(str(e).split())[:300]}") from e
        for module in self.model.modules():
            if type(module).__name__ == "LabelEmbedding":
                module.dropout_prob = 0.0  # type: ignore[assignment]  # conditions are dropped by our draws, and by row
        if cfg.checkpoint:
            self.model.enable_gradient_checkpointing()  # type: ignore[operator]  # of diffusers, not of nn.Module
        self.sequences = Sequences(spec, cfg.model.context()) if cfg.model.context() else None

    def forward(
        self, x: Float[Tensor, "b c h w"], label: Float[Tensor, " b"], cond: Cond = NO_COND
    ) -> Float[Tensor, "b c h w"]:
        seen = () if self.sequences is None else self.sequences(x, cond)
        out = self.cfg.model.ask(self.model, x, index_of(label, self.cfg.timesteps), self.label(x, cond), seen)
        return out[:, : x.shape[1]] if self.cfg.learned_sigma else out

    def label(self, x: Tensor, cond: Cond) -> Tensor | None:
        """The row of each sample's class ``[B]``, that of the null class where it has none."""
        if self.classes is None:
            return None
        name, null = self.classes
        nulls = torch.full((len(x),), null, device=x.device)
        label = cond.get(name, nulls)
        for keep in ("keep", f"keep.{name}"):
            label = torch.where(cond[keep], label, nulls) if keep in cond else label
        return label


def index_of(label: Float[Tensor, " b"], timesteps: int = 1000) -> Float[Tensor, " b"]:
    """diffusers' index of our time label: n of ``t = (n + 1) / timesteps``, exactly where it is a whole number."""
    n = timesteps * label - 1
    whole = n.detach().round()
    return torch.where((n.detach() - whole).abs() < WHOLE, n + (whole - n.detach()), n)


@torch.no_grad()
def shift_time_embedding(
    weight: Float[Tensor, "e d"], rates: Float[Tensor, " h"], cosine_first: bool, by: float
) -> Tensor:
    """The first layer behind the sinusoids of n, for sinusoids of ``n + by``: a rotation of each pair.

    ``cos(w n) = cos(w (n + by)) cos(w by) + sin(w (n + by)) sin(w by)``, and so for the sine.
    """
    h = len(rates)
    first, second, rest = weight.double().split([h, h, weight.shape[1] - 2 * h], 1)
    c, s = (first, second) if cosine_first else (second, first)
    angle = rates.double() * by
    c, s = c * angle.cos() - s * angle.sin(), c * angle.sin() + s * angle.cos()
    return torch.cat([*((c, s) if cosine_first else (s, c)), rest], 1).to(weight.dtype)
