"""LoRA files of other tools: an adapter out (``genkit export RUN --to lora FILE``) and in (``--lora FILE``).

The layouts are those that ``load_lora_weights`` of diffusers reads: its own, ``unet.LAYER.lora_A.weight``, and kohya's,
``lora_unet_LAYER.lora_down.weight`` with ``.alpha``, which other programs read as well. The factor alpha / rank is in
the weights that are written, because readers differ in where they look for it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genkit.backbones.diffusers import Diffusers, DiffusersDenoiser, diffusers_class
from genkit.backbones.lora import LoRA
from genkit.core.files import format_error
from genkit.integrations.diffusers_export import single_network
from genkit.integrations.diffusers_text import silence
from genkit.integrations.export import ExportFormat
from genkit.objectives import Flow
from genkit.training.run import Run

FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
logger = logging.getLogger("genkit")


@dataclass(frozen=True)
class ToLoRA(ExportFormat):
    """The adapter of a LoRA run of --backbone=diffusers alone, for ``pipe.load_lora_weights``: a file, or a folder with
    one. The base is the model that the run began from."""

    single_file: ClassVar[str | None] = FILE

    layout: Literal["diffusers", "kohya"] = "diffusers"
    """diffusers; or kohya, as sd-scripts writes it for a U-Net and ComfyUI and others read it"""

    def write(self, run: Run, folder: Path) -> list[str]:
        cfg, family = run.config.lora, run.config.backbone
        if type(cfg) is not LoRA or not cfg.active or cfg.rank is None:
            raise ValueError(f"export: {run.directory.name} is no LoRA run; train one: --init RUN --lora.rank 8")
        if run.adapter is not None:
            raise ValueError(f"lora: given {run.adapter.place}, but --to lora writes the adapter of "
                             f"{run.directory.name} alone; leave it out, or --to run writes both, merged")  # fmt: skip
        single_network(run)
        assert isinstance(family, Diffusers)
        if isinstance(run.objective, Flow) and family.clock == "index":
            raise ValueError(
                "export: this flow tells its network another time than its pipeline does, so that its adapter means "
                "something else there; begin it again with --init, or --to diffusers"
            )
        part = denoiser_part(family)
        if self.layout == "kohya" and part != "unet":
            raise ValueError(f"to.layout: kohya's names are for a U-Net, this is a {family.model.class_name}; "
                             "take diffusers")  # fmt: skip
        stored = load_file(run.directory / run.weights)
        change = rename(stored, run.adapter_scale * (cfg.alpha or cfg.rank) / cfg.rank)
        tensors = {f"{part}.{k}": v for k, v in change.items()} if self.layout == "diffusers" else to_kohya(change)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / FILE, metadata={"format": "pt"})
        return ["pipe.load_lora_weights('{out}')", "genkit sample RUN --lora {out}"]


def denoiser_part(family: Diffusers) -> str:
    """The name of the network in its pipeline."""
    return "unet" if family.model.class_name.startswith("UNet") else "transformer"


def rename(stored: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """An adapter's tensors under diffusers' names, with ``factor`` in B. ``ValueError`` for layers of ours."""
    renamed = {}
    for key, value in stored.items():
        if not key.startswith("net.model."):
            raise ValueError(f"export: the adapter also changes {key}, which is not in diffusers' network")
        name = key.removeprefix("net.model.").replace(".default.", ".")
        renamed[name] = value * factor if ".lora_B." in name else value
    return renamed


def to_kohya(change: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same under kohya's names, with the rank as alpha, at which the factor is 1."""
    out = {}
    for key, value in change.items():
        layer, _, which = key.partition(".lora_")
        name = f"lora_unet_{layer.replace('.', '_')}"
        out[f"{name}.lora_{'down' if which.startswith('A') else 'up'}.weight"] = value
        if which.startswith("A"):
            out[f"{name}.alpha"] = torch.tensor(float(len(value)))
    return out


def merge_lora_file(nets: Mapping[str, nn.Module], path: Path, strength: float = 1.0) -> None:
    """Add the change in a LoRA file, times ``strength``, to the weights of the network of diffusers among ``nets``.

    diffusers reads it, with each layer's own rank and alpha. ``ValueError`` if the file is damaged or for other layers.
    """
    denoisers = [m for net in nets.values() for m in net.modules() if isinstance(m, DiffusersDenoiser)]
    if len(denoisers) != 1 or denoisers[0].cfg.model.pipeline is None:
        raise ValueError(f"lora: {path} is for a network of a diffusers pipeline, which this run is not")
    denoiser, part = denoisers[0], denoiser_part(denoisers[0].cfg)
    net: Any = denoiser.model
    pipeline = diffusers_class(str(denoiser.cfg.model.pipeline))
    if not path.is_file():
        raise ValueError(f"lora: there is no file {path}; needs a LoRA in safetensors, or a LoRA run")
    try:
        with silence():
            state, alphas = read_state(pipeline, path)
            others = sorted({key.partition(".")[0] for key in state} - {part})
            layers = sum(key.startswith(part) and ("lora_A" in key or "lora.down" in key) for key in state)
            if not layers:
                raise ValueError(f"it has no change of {part}, only of {', '.join(others) or 'nothing'}")
            net.load_lora_adapter(state, network_alphas=alphas, prefix=part)
            found = sum(hasattr(module, "lora_A") for module in net.modules())
            if found != layers:
                raise ValueError(f"it changes {layers} layers, of which this network has {found}")
            net.fuse_lora(lora_scale=strength)
            net.unload_lora()
    except (ValueError, RuntimeError, KeyError, OSError, SafetensorError) as e:
        raise ValueError(f"lora: {path} does not fit this network: {format_error(e)[:200]}") from e
    if others:
        logger.info("note     %s also changes %s, which genkit leaves as it is", path.name, ", ".join(others))


def read_state(pipeline: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, float] | None]:
    """The tensors of a LoRA file under diffusers' names, and alphas by layer if it has them."""
    load_file(path)  # a damaged file is an error here, and not another format
    options = {"return_alphas": True} if "return_alphas" in inspect.getsource(pipeline.lora_state_dict) else {}
    out = pipeline.lora_state_dict(str(path), use_safetensors=True, local_files_only=True, **options)
    return out if isinstance(out, tuple) else (out, None)
