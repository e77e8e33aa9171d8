"""``--codec diffusers:DIR``: an autoencoder that diffusers saved, as a first stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genkit.backbones.diffusers import diffusers_class
from genkit.core import Batch
from genkit.core.files import format_error
from genkit.core.hub import HUB_NAME
from genkit.data.codecs import Pixels, decode_smoothly
from genkit.integrations.diffusers_folder import locate
from genkit.objectives.autoencoders.autoencoder import Posterior, point_posterior
from genkit.training.first_stage import ForeignStage, encode_in_chunks


def kl_posterior(out: Any) -> Posterior:
    """The posterior in the output of AutoencoderKL."""
    return Posterior(out.latent_dist.mean, out.latent_dist.logvar)


def deterministic_posterior(out: Any) -> Posterior:
    """The posterior in the output of a deterministic encoder."""
    return point_posterior(out.latents if hasattr(out, "latents") else out.latent)


POSTERIORS: Mapping[str, Callable[[Any], Posterior]] = {
    "AutoencoderKL": kl_posterior,
    "AutoencoderTiny": deterministic_posterior,
    "VQModel": deterministic_posterior,
    "AutoencoderDC": deterministic_posterior,
}


class DiffusersStage(ForeignStage):
    """An autoencoder of diffusers for images of one ``shape``. Its ``scaling_factor`` is used with the weights of its
    pipeline (``--init``); without them mean and standard deviation of the latents are measured."""

    def __init__(self, name: str, kind: str, settings: Mapping[str, Any], shape: tuple[int, ...], net: nn.Module):
        self.name, self.kind, self.settings, self.shape = name, kind, dict(settings), tuple(shape)
        self.nets = {"net": net.eval()}
        # the shape of latents depends on the number of levels, so one black image tells it
        with torch.no_grad():
            blank = torch.zeros(1, *shape, device=next(net.parameters()).device)
            mean = self.encode(blank).mean
            back = net.decode(mean).sample  # type: ignore[operator]
        if back.shape != blank.shape:
            raise ValueError(
                f"codec: {name} turns images {list(shape)} into {list(back.shape[1:])}; choose a size that it can "
                "halve evenly, with --data.size"
            )
        self.latent = tuple(mean.shape[1:])

    @property
    def own_scaling(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """``(z - shift_factor) * scaling_factor``, or by ``latents_mean`` and ``latents_std``, as one map."""
        settings: Any = self.nets["net"].config  # which has the defaults that config.json may leave out
        scale = settings.get("scaling_factor")
        if scale is None:
            return None
        channels = self.latent[0]
        mean = settings.get("latents_mean") or [settings.get("shift_factor") or 0.0] * channels
        std = settings.get("latents_std") or [1.0] * channels
        return tuple(mean), tuple(s / scale for s in std)

    def encode(self, x: Tensor) -> Posterior:
        """The posterior of images in [-1, 1]."""
        out: Any = self.nets["net"].encode(x)  # type: ignore[operator]
        return POSTERIORS[self.kind](out)

    def posterior(self, batch: Batch) -> Posterior:
        return encode_in_chunks(self.encode, Pixels().encode(batch).x)

    def decode(self, z: Tensor) -> Tensor:
        return Pixels().decode(self.nets["net"].decode(z).sample)  # type: ignore[operator]

    def decode_smoothly(self, z: Tensor) -> Tensor:
        return decode_smoothly(Pixels(), self.nets["net"].decode(z).sample)  # type: ignore[operator]

    def to_dict(self) -> dict[str, Any]:
        about = {"class": self.kind, "config": self.settings, "shape": list(self.shape)}
        return {"kind": "diffusers", "run": self.name, **about}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> DiffusersStage:
        net = autoencoder_class(stored["class"], stored["run"]).from_config(stored["config"])
        return DiffusersStage(stored["run"], stored["class"], stored["config"], tuple(stored["shape"]), net)

    @staticmethod
    def open(location: str, shape: tuple[int, ...], device: torch.device) -> DiffusersStage:
        """The model in a folder, or in the folder ``vae`` of a pipeline, which may be on the hub."""
        folder = Path(location).expanduser()
        if not folder.exists() and HUB_NAME.fullmatch(location):
            folder = locate(location, "codec")
        folder = folder / "vae" if (folder / "model_index.json").is_file() else folder
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"codec: diffusers:{location} holds no config.json; needs a local folder of save_pretrained"
            )
        settings = json.loads((folder / "config.json").read_text())
        kind = settings.get("_class_name", "")
        model = autoencoder_class(kind, str(folder))
        settings = {k: v for k, v in settings.items() if not k.startswith("_")}
        channels = settings.get("in_channels", 3)
        if len(shape) != 3 or shape[0] != channels:
            raise ValueError(
                f"codec: {folder} is for images of {channels} channels; the data are {list(shape)}; grey and colour "
                f"are changed by --data.channels={channels}"
            )
        try:
            net = model.from_pretrained(folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False)
        except (OSError, ValueError, RuntimeError) as e:
            raise ValueError(f"codec: {folder} cannot be read: {format_error(e)[:200]}") from e
        return DiffusersStage(str(folder), kind, settings, shape, net.float().to(device))


def autoencoder_class(kind: str, location: str) -> Any:
    """The class ``kind`` of diffusers. ``ValueError`` unless it is a supported autoencoder."""
    if kind not in POSTERIORS:
        allowed = ", ".join(POSTERIORS)
        raise ValueError(f"codec: {location} holds a {kind or 'model without a class'}; allowed: {allowed}")
    return diffusers_class(kind)
