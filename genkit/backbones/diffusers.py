"""Networks of diffusers as denoisers: to fine-tune pretrained ones, and to export trained ones.

diffusers' networks embed an index n = 0 .. 999 of DDPM's 1000 time steps. The same time has the label (n + 1) / 1000
here, so they are given ``1000 label - 1``, for every objective (also for a label log(sigma) / 4). It need not be an
integer, since they embed it by sinusoids. Those that were trained by flow matching are given ``1000 label``, 1000 times
the noise level (the setting ``clock``); :func:`shift_time_embedding` converts weights from one to the other.

Importing diffusers takes seconds, so it is imported when a network is made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from accelerate import init_empty_weights
from jaxtyping import Float
from torch import Tensor, nn

from genkit.backbones.diffusers_networks import (
    DiT2D,
    NetworkConfig,
    UNet2D,
    UNet2DCondition,
    class_condition,
    diffusers_class,
)
from genkit.backbones.diffusers_text_to_image import SD3, SDXL, AuraFlow, Chroma, Flux, Lumina2, PixArt, Sana
from genkit.backbones.embed import Conditioner, TokensEmbed, embedder_of, module_name
from genkit.backbones.encoded_text import EncodedText, has_encoded_text
from genkit.config.numbers import Width
from genkit.core import NO_COND, SCALE_INPUT, SIZES_INPUT, Backbone, Cond, Spec, Tokens, Vector

INTEGER_TOLERANCE = 1e-3  # float32 holds 1000 t - 1 to 1e-4: an index this near to an integer is rounded to it


MODELS: dict[str, type[NetworkConfig]] = {
    "unet2d": UNet2D,
    "unet2d-condition": UNet2DCondition,
    "dit": DiT2D,
    "sdxl": SDXL,
    "sd3": SD3,
    "flux": Flux,
    "pixart": PixArt,
    "sana": Sana,
    "chroma": Chroma,
    "auraflow": AuraFlow,
    "lumina2": Lumina2,
}


EMPTY: ContextVar[bool] = ContextVar("EMPTY", default=False)


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Make networks of diffusers without memory for their weights, which a file will give (``adopt_tensor``)."""
    token = EMPTY.set(True)
    try:
        yield
    finally:
        EMPTY.reset(token)


# -------------------------------------------------------------------------------------------------------- the family
@dataclass(frozen=True)
class Diffusers(Backbone):
    """One of diffusers' networks, for pictures or latents ``(C, H, W)``."""

    cuts: ClassVar[tuple[str, ...]] = ("denoiser",)
    routes: ClassVar[tuple[str, ...]] = ("global", "tokens")  # the model decides which of them
    axes: ClassVar[tuple[int, ...]] = (2,)

    model: NetworkConfig = field(default_factory=UNet2D, metadata={"table": "genkit.backbones.diffusers:MODELS"})
    """unet2d, unet2d-condition or dit, and its settings under diffusers' names; those of text-to-image pipelines (sdxl,
    sd3, flux, pixart, sana, chroma, auraflow, lumina2) are read from one by --init"""
    timesteps: Width = 1000
    """number of time steps of the network"""
    clock: Literal["index", "sigma"] = "index"
    """what the network is told of the time: index, timesteps * label - 1, as in diffusion; sigma, timesteps * label, as
    pretrained flows expect"""
    learned_sigma: bool = False
    """the network has twice the output channels, as DiT's released weights do; the half for the variance is not used"""
    checkpoint: bool = False
    """recompute activations in the backward pass: less memory, a third more time"""

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        return self.model.guidance_range

    def denoiser(self, spec: Spec) -> nn.Module:
        return DiffusersDenoiser(self, spec)


def token_spec(spec: Spec) -> Spec:
    """The spec with only the conditions that cross-attention sees."""
    return Spec(spec.shape, {k: v for k, v in spec.cond.items() if embedder_of(v).route == "tokens"})


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
    require_states(model, spec)
    for name, kind in spec.cond.items():
        pooled = isinstance(kind, Vector) and kind.encoder and "pooled" in model.text_states
        if not (name in tokens and context) and name != (classes and classes[0]) and not pooled:
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


def require_states(model: NetworkConfig, spec: Spec) -> None:
    """``ValueError`` unless the data have the text states that a network of a pipeline reads."""
    if not model.text_states:
        return
    given = set(EncodedText(spec).sources) if has_encoded_text(spec) else set()
    if given != set(model.text_states):
        raise ValueError(
            f"diffusers: {model.class_name} reads the words of its pipeline ({', '.join(model.text_states)}); given "
            f"{', '.join(sorted(given)) or 'none'}; take --data.captions, with --init diffusers:PIPELINE"
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
        settings = {**cfg.model.settings(), "out_channels": channels, **cfg.model.data_settings(spec)}
        empty = init_empty_weights(include_buffers=False) if EMPTY.get() else contextlib.nullcontext()
        try:
            with empty:
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
        context = {} if self.sequences is None else dict(self.sequences(x, cond))
        if self.cfg.guidance_range:
            context["guidance"] = cond.get(SCALE_INPUT, torch.ones_like(label))
        if SIZES_INPUT in cond:
            context["sizes"] = cond[SIZES_INPUT]
        timesteps, by_index = self.cfg.timesteps, self.cfg.clock == "index"
        time = timestep_index(label, timesteps) if by_index else timesteps * label
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
