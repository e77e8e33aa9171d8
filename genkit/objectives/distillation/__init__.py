"""Distillation of a trained diffusion model or flow into a generator of few steps."""
