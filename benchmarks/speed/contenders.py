"""The networks that are compared, and what each does in a training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.backbones import UNet
from genkit.core import Spec

LEVELS = 1000  # noise levels of DDPM's linear schedule
foreach_lerp_ = torch._foreach_lerp_  # pyright: ignore[reportPrivateImportUsage]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x0, noise, integer time) -> loss


@dataclass
class Contender:
    """A network, its training step, and how long each step took."""

    name: str
    net: nn.Module
    step: Loss
    predict: Loss
    """the loss without a training step"""
    settings: dict[str, Any]
    seconds: list[float] = field(default_factory=list)

    @property
    def params(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.net.parameters())


def diffusers_unet(cfg: UNet, shape: tuple[int, ...], head: int, same_block: bool) -> nn.Module:
    """diffusers' network of the same widths. ``same_block``: AdaGN as in genkit instead of their default, a shift."""
    from diffusers.models.unets.unet_2d import UNet2DModel  # lazy: slow to import

    attends = [shape[1] // 2**i in cfg.attention for i in range(len(cfg.mults))]

    def block_type(attention: bool, direction: str) -> str:
        return f"{'Attn' if attention else ''}{direction}Block2D"

    return UNet2DModel(
        sample_size=shape[1],
        in_channels=shape[0],
        out_channels=shape[0],
        layers_per_block=cfg.num_blocks,
        block_out_channels=tuple(cfg.width * m for m in cfg.mults),
        down_block_types=tuple(block_type(a, "Down") for a in attends),
        up_block_types=tuple(block_type(a, "Up") for a in reversed(attends)),
        attention_head_dim=head,
        resnet_time_scale_shift="scale_shift" if same_block else "default",
    )


def diffusers_contender(name: str, net: nn.Module, device: torch.device, lr: float, bf16: bool = False) -> Contender:
    """The loop of diffusers' example, written out."""
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler  # lazy: slow to import
    from diffusers.training_utils import EMAModel

    net = net.to(device)
    scheduler = DDPMScheduler(num_train_timesteps=LEVELS, beta_schedule="linear")
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    ema = EMAModel(net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    ema.to(device)

    def loss(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        noisy = scheduler.add_noise(x0, noise, t)  # type: ignore[arg-type]  # annotated as an IntTensor
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = net(noisy, t).sample
        return F.mse_loss(output.float(), noise.float())

    def step(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        value = loss(x0, noise, t)
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(net.parameters())
        return value.detach()

    return Contender(name, net, step, torch.no_grad()(loss), {"bf16": bf16})


def genkit_contender(
    name: str,
    cfg: UNet,
    shape: tuple[int, ...],
    device: torch.device,
    lr: float,
    bf16: bool,
    compiled: bool = False,
    channels_last: bool = False,
) -> Contender:
    """What ``genkit train`` does in a step."""
    net = cfg.denoiser(Spec(shape)).to(device)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    call = torch.compile(net) if compiled else net
    params = list[Tensor](net.parameters())
    ema = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8, fused=True)
    signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, LEVELS, dtype=torch.float64), 0)
    alpha, sigma = ((s.sqrt().float().to(device).view(-1, 1, 1, 1)) for s in (signal, 1 - signal))
    count = 0

    def loss(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        x = alpha[t] * x0 + sigma[t] * noise
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = call(x, t / LEVELS)
        return F.mse_loss(output.float(), noise)

    def step(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        nonlocal count
        value = loss(x0, noise, t)
        value.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        count += 1
        with torch.no_grad():
            foreach_lerp_(ema, params, 1 - min(0.9999, 1 - (1 + count) ** -0.75))
        return value.detach()

    settings = {"bf16": bf16, "head": cfg.head_size, "compiled": compiled, "channels_last": channels_last}
    return Contender(name, net, step, torch.no_grad()(loss), settings)


@dataclass(frozen=True)
class Factory:
    """Makes contenders of one size, on one device."""

    cfg: UNet
    shape: tuple[int, ...]
    device: torch.device
    lr: float

    def diffusers(self, name: str, head: int, same_block: bool, bf16: bool = False) -> Contender:
        """diffusers' network in the loop of their example."""
        net = diffusers_unet(self.cfg, self.shape, head, same_block)
        return diffusers_contender(name, net, self.device, self.lr, bf16)

    def genkit(self, name: str, bf16: bool, cfg: UNet | None = None, **options: bool) -> Contender:
        """genkit's network in genkit's loop."""
        return genkit_contender(name, cfg or self.cfg, self.shape, self.device, self.lr, bf16, **options)
