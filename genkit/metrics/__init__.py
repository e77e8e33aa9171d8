"""How far samples are from data."""

from genkit.metrics.features import FEATURES

__all__ = ["FEATURES"]
