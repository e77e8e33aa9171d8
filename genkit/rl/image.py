"""Rewards of pictures (Black et al. 2024): `genkit finetune RUN --reward genkit.rl.image:brightness`.

Each is a function of pictures ``[B, C, H, W]`` in [0, 1] and their conditions, to ``[B]``. All but the sizes of files
are differentiable, so that --method=mixed --method.gradient=through may climb them.
"""

from __future__ import annotations

import io
from functools import lru_cache

import torch
from PIL import Image
from torch import Tensor, nn

from genkit.core import Cond


def brightness(x: Tensor, cond: Cond) -> Tensor:
    """The mean of all pixels."""
    return x.flatten(1).mean(1)


def darkness(x: Tensor, cond: Cond) -> Tensor:
    return -brightness(x, cond)


def compressibility(x: Tensor, cond: Cond) -> Tensor:
    """Minus the size as a JPEG of quality 95, in kilobytes."""
    return -incompressibility(x, cond)


def incompressibility(x: Tensor, cond: Cond) -> Tensor:
    pictures = (x.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    sizes = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(buffer, "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    return torch.tensor(sizes, device=x.device)


def eight(x: Tensor, cond: Cond) -> Tensor:
    """What the classifier of the digits says of "8", a log-probability; for runs of --data=digits."""
    return judge()(255 * x.clamp(0, 1)).logits.log_softmax(1)[:, 8]


@lru_cache(maxsize=1)
def judge() -> nn.Module:
    from genkit.data.images import Digits
    from genkit.metrics.features import Classifier

    network = Classifier().load("cpu", Digits().load("train")).network
    return network.eval().requires_grad_(False)
