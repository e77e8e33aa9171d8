"""A backbone in one file and one line: a plain ResNet, which makes a denoiser only."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from genkit.backbones.blocks import CONV, GroupNorm, ResBlock, zero_init
from genkit.backbones.embed import Conditioner, require_routes
from genkit.core import NO_COND, Backbone, Cond, Spec


@dataclass(frozen=True)
class ResNet(Backbone):
    """Residual blocks at full size (He et al. 2016), modulated by time and conditions."""

    routes: ClassVar[tuple[str, ...]] = ("global",)

    width: Annotated[int, Ge(1)] = 32
    """channels"""
    depth: Annotated[int, Ge(1)] = 4
    """residual blocks"""

    def denoiser(self, spec: Spec) -> nn.Module:
        return ResNetDenoiser(self, spec)


class ResNetDenoiser(nn.Module):
    """``(x [B, *S], label [B], cond) -> [B, *S]``. Zero when initialised."""

    def __init__(self, cfg: ResNet, spec: Spec):
        super().__init__()
        dims = len(spec.shape) - 1
        if dims not in cfg.axes:
            raise ValueError(
                f"ResNet: given samples of shape {spec.shape}; allowed (C, T) or (C, H, W); try --backbone=mlp"
            )
        require_routes(cfg, spec, "--backbone=unet")
        self.cond = Conditioner(spec, cfg.width)
        self.first = CONV[dims](spec.shape[0], cfg.width, 3, padding=1)
        self.blocks = nn.ModuleList(ResBlock(dims, cfg.width, cfg.width, cfg.width) for _ in range(cfg.depth))
        self.norm = GroupNorm(cfg.width)
        self.last = zero_init(CONV[dims](cfg.width, spec.shape[0], 3, padding=1))

    def forward(self, x: Tensor, label: Tensor, cond: Cond = NO_COND) -> Tensor:
        emb = F.silu(self.cond(x, (), label, cond).emb)
        h = self.first(x)
        for block in self.blocks:
            h = block(h, emb)
        return self.last(F.silu(self.norm(h)))
