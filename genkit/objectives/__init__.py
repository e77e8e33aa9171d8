"""Objectives: what is learned. To add one, write one file and one line in ``OBJECTIVES``."""

from __future__ import annotations

from collections.abc import Mapping

from genkit.objectives.adversarial.gan import GAN
from genkit.objectives.autoencoders.autoencoder import Autoencoder
from genkit.objectives.autoencoders.first_stage import FirstStage
from genkit.objectives.autoencoders.vae import VAE
from genkit.objectives.autoencoders.vq import VQ
from genkit.objectives.classifier import Classifier
from genkit.objectives.distillation.dmd import DMD
from genkit.objectives.distillation.progressive import ProgressiveDistillation
from genkit.objectives.drift import Drift
from genkit.objectives.flow_map.flow_map import FlowMap
from genkit.objectives.matching.anchored import AnchoredFlow
from genkit.objectives.matching.ddpm import DDPM
from genkit.objectives.matching.distillation import Distillation
from genkit.objectives.matching.edm import EDM
from genkit.objectives.matching.flow import Flow
from genkit.objectives.matching.guidance_distillation import GuidanceDistillation
from genkit.objectives.matching.regression import Regression

OBJECTIVES: Mapping[str, type] = {
    "flow": Flow,
    "ddpm": DDPM,
    "edm": EDM,
    "flow-map": FlowMap,
    "drift": Drift,
    "anchored": AnchoredFlow,
    "regression": Regression,
    "distillation": Distillation,
    "guidance-distillation": GuidanceDistillation,
    "progressive-distillation": ProgressiveDistillation,
    "dmd": DMD,
    "vae": VAE,
    "ae": Autoencoder,
    "vq": VQ,
    "autoencoder": FirstStage,
    "gan": GAN,
    "classifier": Classifier,
}

__all__ = [
    "DDPM", "DMD", "EDM", "GAN", "OBJECTIVES", "VAE", "VQ", "AnchoredFlow", "Autoencoder", "Classifier", "Distillation",
    "Drift", "FirstStage", "Flow", "FlowMap", "GuidanceDistillation",
    "ProgressiveDistillation", "Regression",
]  # fmt: skip
