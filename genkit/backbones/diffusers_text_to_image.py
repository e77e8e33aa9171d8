"""The networks of diffusers' text-to-image pipelines, which are made by ``--init diffusers:PIPELINE``.

Each reads what the encoders of its pipeline make of a text (:class:`~genkit.backbones.encoded_text.EncodedText`). Their
settings have no fields here: all are in ``more``, as the pipeline has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from genkit.backbones.diffusers_networks import NetworkConfig, UNet2DCondition
from genkit.config.numbers import Width
from genkit.core import Spec


@dataclass(frozen=True)
class SDXL(UNet2DCondition):
    """UNet2DConditionModel of Stable Diffusion XL (Podell et al. 2023), which is also told the size of the picture."""

    text_states: ClassVar[tuple[str, ...]] = ("tokens", "pooled")
    pipeline: ClassVar[str | None] = "StableDiffusionXLPipeline"
    fixed: ClassVar[Mapping[str, Any]] = {**UNet2DCondition.fixed, "addition_embed_type": "text_time"}

    size_factor: Width = 8
    """pixels of the side of a latent, for the size that the network is told: that of the sample, not cropped, unless
    the data tell it"""

    def settings(self) -> dict[str, Any]:
        return {k: v for k, v in super().settings().items() if k != "size_factor"}

    def call(self, net: nn.Module, x: Tensor, time: Tensor, label: Tensor | None, context: Mapping[str, Any]) -> Tensor:
        size = [self.size_factor * n for n in x.shape[-2:]]
        whole = torch.tensor([*size, 0, 0, *size], device=x.device).expand(len(x), -1)
        added = {"text_embeds": context["pooled"], "time_ids": context.get("sizes", whole).to(x)}
        return net(x, time, context["tokens"], class_labels=label, added_cond_kwargs=added).sample


@dataclass(frozen=True)
class TextTransformer(NetworkConfig):
    """A transformer of a text-to-image pipeline. Its own ``sample_size`` stays: positions are relative to it."""

    set_by_data: ClassVar[tuple[str, ...]] = ("in_channels", "out_channels")
    context_setting: ClassVar[str] = "caption_channels"
    """the setting that is the dimension of its tokens"""

    def data_settings(self, spec: Spec) -> dict[str, Any]:
        return {"in_channels": spec.shape[0]}

    def size_multiple(self) -> int:
        return int(self.setting("patch_size"))

    def context_dim(self) -> int:
        return int(self.setting(self.context_setting))


@dataclass(frozen=True)
class SD3(TextTransformer):
    """SD3Transformer2DModel of Stable Diffusion 3 (Esser et al. 2024)."""

    class_name: ClassVar[str] = "SD3Transformer2DModel"
    pipeline: ClassVar[str | None] = "StableDiffusion3Pipeline"
    text_states: ClassVar[tuple[str, ...]] = ("tokens", "pooled")
    context_setting: ClassVar[str] = "joint_attention_dim"

    def call(self, net: nn.Module, x: Tensor, time: Tensor, label: Tensor | None, context: Mapping[str, Any]) -> Tensor:
        words = {"encoder_hidden_states": context["tokens"], "pooled_projections": context["pooled"]}
        return net(hidden_states=x, timestep=time, **words).sample


@dataclass(frozen=True)
class Flux(TextTransformer):
    """FluxTransformer2DModel of Flux 1 (dev, which is told the scale of guidance, and schnell).

    Its tokens are patches of 2x2 latents, with their positions.
    """

    class_name: ClassVar[str] = "FluxTransformer2DModel"
    pipeline: ClassVar[str | None] = "FluxPipeline"
    text_states: ClassVar[tuple[str, ...]] = ("tokens", "pooled")
    context_setting: ClassVar[str] = "joint_attention_dim"
    explicit_grid: ClassVar[bool] = True

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        return (0.0, 100.0) if self.setting("guidance_embeds") else None

    @classmethod
    def sample_channels(cls, settings: Mapping[str, Any]) -> int | None:
        return settings.get("in_channels", 64) // 4

    def data_settings(self, spec: Spec) -> dict[str, Any]:
        return {"in_channels": 4 * spec.shape[0], "out_channels": 4 * spec.shape[0]}

    def size_multiple(self) -> int:
        return 2

    def call(self, net: nn.Module, x: Tensor, time: Tensor, label: Tensor | None, context: Mapping[str, Any]) -> Tensor:
        further = {"guidance": context.get("guidance"), "pooled_projections": context["pooled"]}
        return self.call_on_patches(net, x, time, context["tokens"], further)

    def call_on_patches(
        self, net: nn.Module, x: Tensor, time: Tensor, tokens: Tensor, further: Mapping[str, Tensor | None]
    ) -> Tensor:
        """The output for samples ``[B, C, H, W]``, of which the network reads patches and their positions."""
        b, c, h, w = x.shape
        rows, columns = h // 2, w // 2
        patches = x.view(b, c, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, 4 * c)
        positions = torch.zeros(rows, columns, 3, device=x.device)
        positions[..., 1] = torch.arange(rows, device=x.device)[:, None]
        positions[..., 2] = torch.arange(columns, device=x.device)
        out = net(
            hidden_states=patches,
            timestep=time / 1000,
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros(tokens.shape[1], 3, device=x.device),
            img_ids=positions.reshape(-1, 3),
            **further,
        ).sample
        return out.view(b, rows, columns, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


@dataclass(frozen=True)
class PixArt(TextTransformer):
    """PixArtTransformer2DModel of PixArt-Sigma (Chen et al. 2024)."""

    class_name: ClassVar[str] = "PixArtTransformer2DModel"
    text_states: ClassVar[tuple[str, ...]] = ("tokens", "mask")
    fixed: ClassVar[Mapping[str, Any]] = {"use_additional_conditions": False}

    def call(self, net: nn.Module, x: Tensor, time: Tensor, label: Tensor | None, context: Mapping[str, Any]) -> Tensor:
        words = {"encoder_hidden_states": context["tokens"], "encoder_attention_mask": context["mask"]}
        unused = {"resolution": None, "aspect_ratio": None}
        return net(x, timestep=time, added_cond_kwargs=unused, **words).sample


@dataclass(frozen=True)
class Sana(TextTransformer):
    """SanaTransformer2DModel of Sana (Xie et al. 2024)."""

    class_name: ClassVar[str] = "SanaTransformer2DModel"
    pipeline: ClassVar[str | None] = "SanaPipeline"
    text_states: ClassVar[tuple[str, ...]] = ("tokens", "mask")
    fixed: ClassVar[Mapping[str, Any]] = {"guidance_embeds": False}

    def call(self, net: nn.Module, x: Tensor, time: Tensor, label: Tensor | None, context: Mapping[str, Any]) -> Tensor:
        words = {"encoder_hidden_states": context["tokens"], "encoder_attention_mask": context["mask"]}
        config: Any = net.config
        return net(x, timestep=time * config.timestep_scale, **words).sample


@dataclass(frozen=True)
class Chroma(Flux):
    """ChromaTransformer2DModel, Flux without a pooled state and an input for guidance."""

    class_name: ClassVar[str] = "ChromaTransformer2DModel"
    pipeline: ClassVar[str | None] = "ChromaPipeline"
    text_states: ClassVar[tuple[str, ...]] = ("tokens", "mask")

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        return None

    def call(self, net: nn.Module, x: Tensor, time: Tensor, label: Tensor | None, context: Mapping[str, Any]) -> Tensor:
        count = x.shape[-2] * x.shape[-1] // 4
        # its pipeline gives numbers, which attention adds to its scores
        mask = torch.cat([context["mask"].to(x.dtype), x.new_ones(len(x), count)], 1)
        return self.call_on_patches(net, x, time, context["tokens"], {"attention_mask": mask})


@dataclass(frozen=True)
class AuraFlow(TextTransformer):
    """AuraFlowTransformer2DModel of AuraFlow (fal 2024)."""

    class_name: ClassVar[str] = "AuraFlowTransformer2DModel"
    pipeline: ClassVar[str | None] = "AuraFlowPipeline"
    text_states: ClassVar[tuple[str, ...]] = ("tokens",)
    context_setting: ClassVar[str] = "joint_attention_dim"

    def call(self, net: nn.Module, x: Tensor, time: Tensor, label: Tensor | None, context: Mapping[str, Any]) -> Tensor:
        return net(hidden_states=x, timestep=time / 1000, encoder_hidden_states=context["tokens"]).sample


@dataclass(frozen=True)
class Lumina2(TextTransformer):
    """Lumina2Transformer2DModel of Lumina-Image 2.0 (Qin et al. 2025), for which data are at time 1."""

    class_name: ClassVar[str] = "Lumina2Transformer2DModel"
    pipeline: ClassVar[str | None] = "Lumina2Pipeline"
    text_states: ClassVar[tuple[str, ...]] = ("tokens", "mask")
    context_setting: ClassVar[str] = "cap_feat_dim"
    explicit_grid: ClassVar[bool] = True

    def call(self, net: nn.Module, x: Tensor, time: Tensor, label: Tensor | None, context: Mapping[str, Any]) -> Tensor:
        words = {"encoder_hidden_states": context["tokens"], "encoder_attention_mask": context["mask"]}
        return -net(hidden_states=x, timestep=1 - time / 1000, **words).sample
