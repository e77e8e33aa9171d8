"""Families of networks with three cuts each: ``denoiser``, ``encoder``, ``decoder`` (``genkit.core.Backbones``)."""

from genkit.backbones.diffusers import Diffusers
from genkit.backbones.dit import DiT
from genkit.backbones.mlp import MLP
from genkit.backbones.unet import UNet
from genkit.core import Backbones

BACKBONES: dict[str, type[Backbones]] = {"mlp": MLP, "unet": UNet, "dit": DiT, "diffusers": Diffusers}

__all__ = ["BACKBONES", "MLP", "DiT", "Diffusers", "UNet"]
