"""Backbones: families of networks that make a denoiser, an encoder and a decoder (``genkit.core.Backbone``)."""

from genkit.backbones.diffusers import Diffusers
from genkit.backbones.dit import DiT
from genkit.backbones.edm2 import EDM2
from genkit.backbones.mlp import MLP
from genkit.backbones.unet import UNet
from genkit.core import Backbone

BACKBONES: dict[str, type[Backbone]] = {
    "mlp": MLP,
    "unet": UNet,
    "dit": DiT,
    "edm2": EDM2,
    "diffusers": Diffusers,
}

__all__ = ["BACKBONES", "EDM2", "MLP", "DiT", "Diffusers", "UNet"]
