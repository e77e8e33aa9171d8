"""Rewards of images (Black et al. 2024): `genkit finetune RUN --reward genkit.rl.finetune.image_rewards:brightness`.

Each is a function of images ``[B, C, H, W]`` in [0, 1] and their conditions to ``[B]``. All but the file sizes are
differentiable, so that --method=mixed --method.gradient=through can follow their gradient.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache

import torch
from PIL import Image
from torch import Tensor, nn

from genkit.core import Cond, Data, Draw
from genkit.data.standard_images import Digits
from genkit.evaluation.metrics import Estimate, Moments, frechet_from_features, prdc
from genkit.evaluation.metrics.estimate import proportion
from genkit.evaluation.metrics.features import Classifier


def brightness(x: Tensor, cond: Cond) -> Tensor:
    """The mean of all pixels."""
    return x.flatten(1).mean(1)


def darkness(x: Tensor, cond: Cond) -> Tensor:
    """Minus the mean of all pixels."""
    return -brightness(x, cond)


def compressibility(x: Tensor, cond: Cond) -> Tensor:
    """Minus the size as a JPEG of quality 95, in kilobytes."""
    return -incompressibility(x, cond)


def incompressibility(x: Tensor, cond: Cond) -> Tensor:
    """The size as a JPEG of quality 95, in kilobytes."""
    images = (x.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    return torch.tensor(sizes, device=x.device)


def eight(x: Tensor, cond: Cond) -> Tensor:
    """The log-probability that the classifier of the digits gives to "8"; for runs of --data=digits."""
    return digit_classifier(x.device)(255 * x.clamp(0, 1)).logits.log_softmax(1)[:, 8]


def requested_class(x: Tensor, cond: Cond) -> Tensor:
    """The log-probability that this classifier gives to the class of the condition; for class-conditional runs."""
    if "label" not in cond:
        raise ValueError("reward: requested_class needs cond['label'], and this model has no classes; take another")
    return digit_classifier(x.device)(255 * x.clamp(0, 1)).logits.log_softmax(1).gather(1, cond["label"][:, None])[:, 0]


@lru_cache(maxsize=1)
def digit_classifier(device: torch.device) -> nn.Module:
    """The network of the classifier of the digits."""
    network = Classifier().load("cpu", Digits().load("train")).network
    return network.to(device).eval().requires_grad_(False)


SampleQuality = Callable[[Tensor, Tensor | None], dict[str, Estimate]]  # (uint8 images, requested classes or None)


def sample_quality(data: Data) -> SampleQuality:
    """Metrics of uint8 images ``[B, C, H, W]`` against small labelled ones, in the features of their classifier.

    ``frechet`` is the Fréchet distance to all of the data, ``frechet_class`` that to the nearest class: it stays
    comparable if a reward asks for one class. ``precision`` is the share of images that lie among the data, ``recall``
    the share of data that lie among the images, ``accuracy`` how often the class is the requested one.
    """
    extract = Classifier().load("cpu", data)
    batch = data.batch(torch.arange(len(data)), Draw((0,), 0, len(data)))
    real, label = extract(batch.x).features, batch.cond["label"]
    moments = Moments.of(real)
    class_moments = [Moments.of(real[label == c]) for c in label.unique()]

    def quality(x: Tensor, requested: Tensor | None) -> dict[str, Estimate]:
        output = extract(x)
        features, logits = output.features, output.logits
        assert logits is not None
        pr = prdc(real, features)
        metrics = {
            "frechet": frechet_from_features(features, moments),
            "frechet_class": min(frechet_from_features(features, m) for m in class_moments),
            "precision": pr["precision"],
            "recall": pr["recall"],
        }
        if requested is not None:
            metrics["accuracy"] = proportion(int((logits.argmax(1) == requested).sum()), len(x))
        return metrics

    return quality
