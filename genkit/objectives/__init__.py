"""Objectives: what is learned. A new one is one file, and one line in this dict."""

from __future__ import annotations

from collections.abc import Mapping

from genkit.objectives.classifier import Classifier
from genkit.objectives.ddpm import DDPM
from genkit.objectives.edm import EDM
from genkit.objectives.flow import Flow

OBJECTIVES: Mapping[str, type] = {"flow": Flow, "ddpm": DDPM, "edm": EDM, "classifier": Classifier}

__all__ = ["DDPM", "EDM", "OBJECTIVES", "Classifier", "Flow"]
