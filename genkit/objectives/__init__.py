"""Objectives: what is learned. A new one is one file, and one line in this dict."""

from __future__ import annotations

from collections.abc import Mapping

from genkit.objectives.autoencoder import Autoencoder
from genkit.objectives.classifier import Classifier
from genkit.objectives.ddpm import DDPM
from genkit.objectives.edm import EDM
from genkit.objectives.flow import Flow
from genkit.objectives.vae import VAE
from genkit.objectives.vq import VQ

OBJECTIVES: Mapping[str, type] = {
    "flow": Flow,
    "ddpm": DDPM,
    "edm": EDM,
    "vae": VAE,
    "ae": Autoencoder,
    "vq": VQ,
    "classifier": Classifier,
}

__all__ = ["DDPM", "EDM", "OBJECTIVES", "VAE", "VQ", "Autoencoder", "Classifier", "Flow"]
