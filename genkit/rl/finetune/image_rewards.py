"""Rewards of pictures (Black et al. 2024): `genkit finetune RUN --reward genkit.rl.finetune.image_rewards:brightness`.

Each is a function of pictures ``[B, C, H, W]`` in [0, 1] and their conditions, to ``[B]``. All but the sizes of files
are differentiable, so that --method=mixed --method.gradient=through may climb them.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache

import torch
from PIL import Image
from torch import Tensor, nn

from genkit.core import Cond, Data, Draw
from genkit.evaluation.metrics import Estimate, Moments, frechet_from_features, prdc
from genkit.evaluation.metrics.estimate import proportion
from genkit.evaluation.metrics.features import Classifier


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


def asked(x: Tensor, cond: Cond) -> Tensor:
    """What that classifier says of the class that was asked for; of runs that draw classes."""
    if "label" not in cond:
        raise ValueError("reward: asked needs cond['label'], and this model has no classes; take another")
    return judge()(255 * x.clamp(0, 1)).logits.log_softmax(1).gather(1, cond["label"][:, None])[:, 0]


Likeness = Callable[[Tensor, Tensor | None], dict[str, Estimate]]


def likeness(data: Data) -> Likeness:
    """How much pictures, uint8 ``[B, C, H, W]``, are like small labelled ones, in the features of their classifier.

    ``frechet`` is the distance to all of the data, ``frechet_class`` to the nearest class of them: what a reward that
    asks for one class still leaves comparable. ``precision`` is the share of the pictures that lie among the data,
    ``recall`` the share of the data that lie among the pictures; ``accuracy`` how often the class is the one asked for.
    """
    see = Classifier().load("cpu", data)
    batch = data.batch(torch.arange(len(data)), Draw((0,), 0, len(data)))
    real, label = see(batch.x).features, batch.cond["label"]
    whole = Moments.of(real)
    parts = [Moments.of(real[label == c]) for c in label.unique()]

    def like(x: Tensor, wanted: Tensor | None) -> dict[str, Estimate]:
        seen = see(x)
        logits = seen.logits
        assert logits is not None
        both = prdc(real, seen.features)
        found = {
            "frechet": frechet_from_features(seen.features, whole),
            "frechet_class": min(frechet_from_features(seen.features, part) for part in parts),
            "precision": both["precision"],
            "recall": both["recall"],
        }
        if wanted is not None:
            found["accuracy"] = proportion(int((logits.argmax(1) == wanted).sum()), len(x))
        return found

    return like


@lru_cache(maxsize=1)
def judge() -> nn.Module:
    from genkit.data.standard_images import Digits

    network = Classifier().load("cpu", Digits().load("train")).network
    return network.eval().requires_grad_(False)
