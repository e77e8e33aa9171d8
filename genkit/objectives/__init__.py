"""Objectives: what is learned. A new one is one file, and one line in this dict."""

from __future__ import annotations

from collections.abc import Mapping

from genkit.objectives.anchored import AnchoredFlow
from genkit.objectives.autoencoder import Autoencoder
from genkit.objectives.classifier import Classifier
from genkit.objectives.ddpm import DDPM
from genkit.objectives.edm import EDM
from genkit.objectives.first_stage import FirstStage
from genkit.objectives.flow import Flow
from genkit.objectives.gan import GAN
from genkit.objectives.reflow import Distil
from genkit.objectives.regression import Regression
from genkit.objectives.vae import VAE
from genkit.objectives.vq import VQ

OBJECTIVES: Mapping[str, type] = {
    "flow": Flow,
    "ddpm": DDPM,
    "edm": EDM,
    "anchored": AnchoredFlow,
    "regression": Regression,
    "distil": Distil,
    "vae": VAE,
    "ae": Autoencoder,
    "vq": VQ,
    "autoencoder": FirstStage,
    "gan": GAN,
    "classifier": Classifier,
}

__all__ = [
    "DDPM", "EDM", "GAN", "OBJECTIVES", "VAE", "VQ", "AnchoredFlow", "Autoencoder", "Classifier", "Distil",
    "FirstStage", "Flow",
    "Regression",
]  # fmt: skip
