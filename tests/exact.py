"""Closed-form truth for the tests: a Gaussian mixture, and the denoiser that it makes on any path."""

from genkit.bench.mixture import F64, ExactDenoiser, Mixture, three

__all__ = ["F64", "ExactDenoiser", "Mixture", "three"]
