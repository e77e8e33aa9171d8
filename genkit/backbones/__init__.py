"""Backbones: families of networks that make a denoiser, an encoder and a decoder (``genkit.core.Backbone``)."""

from genkit.backbones.diffusers import Diffusers
from genkit.backbones.dit import DiT
from genkit.backbones.mlp import MLP
from genkit.backbones.unet import UNet
from genkit.core import Backbone

BACKBONES: dict[str, type[Backbone]] = {"mlp": MLP, "unet": UNet, "dit": DiT, "diffusers": Diffusers}

__all__ = ["BACKBONES", "MLP", "DiT", "Diffusers", "UNet"]
