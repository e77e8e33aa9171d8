"""``--init diffusers:DIR``: settings and weights of a network that diffusers saved.

DIR is the folder of a model (config.json, diffusion_pytorch_model.safetensors) or of a pipeline, with unet/ or
transformer/ and scheduler/; or OWNER/NAME, which is downloaded from the hub. DIR+FILE takes the weights of its network
from a file in diffusers' layout, or adds the change in a LoRA file. Weights are read from safetensors only.

The module is an ``InitSource`` (``genkit.training.init_sources``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genkit import config
from genkit.backbones.compressed import adopt_tensor
from genkit.backbones.diffusers import (
    MODELS,
    SDXL,
    ContextTokens,
    Diffusers,
    DiffusersDenoiser,
    NetworkConfig,
    UNet2DCondition,
    diffusers_class,
    shift_time_embedding,
)
from genkit.config import load_object
from genkit.core import Objective
from genkit.core.files import format_error
from genkit.core.weight_files import StoredTensor, list_tensors, list_weights
from genkit.diffusion.paths import VP
from genkit.integrations.diffusers_folder import DENOISERS, canonical_name, locate, read_json, split_location
from genkit.integrations.diffusers_scheduler import scheduler_times, solver_of
from genkit.objectives import DDPM
from genkit.objectives.matching.matching import Matching
from genkit.training.pipelines import Pipeline

__all__ = ["canonical_name", "init_defaults", "init_from", "init_note", "pipeline", "scheduler_times", "text_encoder"]
CLASSES = {
    **{m.class_name: m for m in MODELS.values() if m is not SDXL},
    "Transformer2DModel": MODELS["dit"],
}  # the second: DiT's releases
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # diffusers' name -> ours
BETAS = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine"}
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
NOT_SERVED = {  # classes that are like others, and why they are refused
    "CogView4Transformer2DModel": "its pipeline rounds times by a rule of its own",
    "QwenImageTransformer2DModel": "its autoencoder is one of videos",
    "PRXTransformer2DModel": "its pipeline has not been compared with genkit's pictures yet",
    "HunyuanDiT2DModel": "it reads two sequences of words and is given positions",
}
OTHER_LAYOUTS = ("model.diffusion_model.", "double_blocks.", "joint_blocks.")  # as single files are often found
MERGE_LORA_FILE = "genkit.integrations.lora_files:merge_lora_file"  # which imports this module
CLASS_TABLE = re.compile(r"(class_embedding|class_embedder\.embedding_table)\.weight$")


# --------------------------------------------------------------------------------------------------------- the folder
@dataclass(frozen=True)
class SavedModel:
    """A network on disk, with the scheduler of its pipeline if there is one."""

    name: str
    root: Path
    folder: Path
    """of the network: ``root``, or in it"""
    settings: Mapping[str, Any]
    scheduler: Mapping[str, Any] | None
    file: Path | None = None
    """weights of the network, or a LoRA, from elsewhere"""

    @property
    def network(self) -> type[NetworkConfig]:
        """The kind of network, an entry of ``MODELS``."""
        kind = CLASSES[self.settings["_class_name"]]
        return SDXL if kind is UNet2DCondition and self.settings.get("addition_embed_type") == "text_time" else kind

    @cached_property
    def has_lora(self) -> bool:
        """Whether ``file`` is a LoRA. ``ValueError`` if it cannot be read."""
        return self.file is not None and any("lora" in name.lower() for name in list_tensors(self.file))

    @property
    def weights(self) -> Path:
        """The safetensors file, or the index of several. ``ValueError`` if there is none."""
        if self.file is not None and not self.has_lora:
            return self.file
        plain = self.folder / "diffusion_pytorch_model.safetensors"
        index = self.folder / f"{plain.name}.index.json"
        files = [p for p in (plain, index) if p.is_file()] or sorted(self.folder.glob("*.safetensors"))
        if not files:
            pickles = sorted(p.name for p in self.folder.glob("*.bin"))
            hint = f"; {pickles[0]} is a pickle, which genkit never loads: save it as safetensors" if pickles else ""
            raise ValueError(f"init: {self.folder} holds no safetensors{hint}")
        return files[0]


def open_model(location: str) -> SavedModel:
    """The model in a folder, or on the hub. ``ValueError`` if there is none that genkit supports."""
    location, file = split_location(location)
    root = locate(location)
    if file is not None and not file.is_file():
        raise ValueError(f"init: there is no file {file}; needs safetensors with the weights of a network, or a LoRA")
    folder = next((root / p for p in DENOISERS if (root / p / "config.json").is_file()), root)
    if not (folder / "config.json").is_file():
        names = " or ".join(DENOISERS)
        raise ValueError(f"init: {root} holds no config.json, and no {names}; needs a folder of save_pretrained")
    settings = read_json(folder / "config.json")
    if settings.get("_class_name") not in CLASSES:
        kind = settings.get("_class_name", "model without a class")
        if reason := NOT_SERVED.get(kind):
            raise ValueError(f"init: {folder} holds a {kind}, which genkit does not serve: {reason}")
        raise ValueError(f"init: {folder} holds a {kind}, which genkit cannot call; allowed: {', '.join(CLASSES)}")
    scheduler = root / "scheduler" / "scheduler_config.json"
    scheduling = read_json(scheduler) if scheduler.is_file() else None
    return SavedModel(location, root, folder.resolve(), settings, scheduling, file)


# ------------------------------------------------------------------------------------------------------- the settings
@dataclass(frozen=True)
class Blocks:
    """The blocks of config.yaml that the settings of diffusers are translated to."""

    backbone: Any = config.table("genkit.backbones:BACKBONES", "unet")
    objective: Any = config.table("genkit.objectives:OBJECTIVES", "flow")


def init_defaults(location: str) -> dict[str, Any]:
    """The block ``backbone`` of config.yaml, ``objective`` if genkit has the scheduler, ``codec`` if there is one."""
    model = open_model(location)
    settings = model.settings
    timesteps = (model.scheduler or {}).get("num_train_timesteps", 1000)
    learned_sigma = settings.get("out_channels") == 2 * settings.get("in_channels", 0)
    network = model.network.from_config({k: v for k, v in settings.items() if not k.startswith("_")})
    if isinstance(network, SDXL) and (model.root / "vae" / "config.json").is_file():
        levels = read_json(model.root / "vae" / "config.json").get("block_out_channels", [0] * 4)
        network = replace(network, size_factor=2 ** (len(levels) - 1))
    clock = "sigma" if is_flow_matching(model.scheduler) else "index"
    family = Diffusers(network, timesteps, clock, learned_sigma)
    backbone = config.dump(Blocks(backbone=family))["backbone"]
    objective = objective_of(model)
    codec = {"codec": f"diffusers:{canonical_name(model.name)}"} if (model.root / "vae").is_dir() else {}
    return {"backbone": backbone, **({"objective": objective} if objective else {}), **codec}


def text_encoder(location: str) -> str | None:
    """The encoders of the pipeline at ``location``, as ``--data.encoder`` names them; None if it reads no text."""
    model = open_model(location)
    root = model.root
    index = read_json(root / "model_index.json") if (root / "model_index.json").is_file() else {}
    return f"diffusers:{canonical_name(model.name)}" if "text_encoder" in index else None


def pipeline(location: str, objective: Objective) -> Pipeline | None:
    """The scheduler of the pipeline at ``location``, if it goes with the path of ``objective`` and has a solver."""
    model = open_model(location)
    block, solver = objective_of(model), solver_of(model.scheduler or {})
    if block is None or solver is None or model.scheduler is None or not isinstance(objective, Matching):
        return None
    theirs = config.from_dict(Blocks, {"objective": block}).objective
    if theirs.path != objective.path:
        return None
    name, explicit = canonical_name(model.name), model.network.explicit_grid
    return Pipeline("diffusers", name, solver.sampler, dict(model.scheduler), explicit, solver.note)


def objective_of(model: SavedModel) -> dict[str, Any] | None:
    """The objective that the weights were trained by; None if the scheduler is missing, or genkit does not have it."""
    s = model.scheduler
    if s is None:
        return None
    if is_flow_matching(s):
        times = time_distribution(s)
        return {"name": "flow", **({"time_distribution": times} if times else {})}
    if s.get("prediction_type", "epsilon") not in PREDICTIONS or s.get("beta_schedule", "linear") not in BETAS:
        return None
    block: dict[str, Any] = {
        "name": "ddpm",
        "timesteps": s.get("num_train_timesteps", 1000),
        "betas": BETAS[s.get("beta_schedule", "linear")],
        "prediction": PREDICTIONS[s.get("prediction_type", "epsilon")],
        "zero_snr": bool(s.get("rescale_betas_zero_snr", False)),
    }
    ends = {"beta_min": s.get("beta_start", 1e-4), "beta_max": s.get("beta_end", 0.02)}
    block |= {} if block["betas"] == "cosine" else ends
    objective = DDPM(**{k: v for k, v in block.items() if k != "name"})
    assert isinstance(objective.path, VP)
    return block if has_same_alphas(objective.path, s) else None


def time_distribution(scheduler: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the trainers of a shifted flow draw times; None for a flow without a shift.

    They shift logit-normal times by s (Esser et al. 2024, eq. 19 and 23), which adds log s to their logits. Of a shift
    that depends on the number of tokens it is that of the largest pictures.
    """
    dynamic = scheduler.get("use_dynamic_shifting", False)
    mean = scheduler.get("max_shift", 1.15) if dynamic else math.log(scheduler.get("shift", 1.0))
    return {"name": "logit-normal", "mean": mean, "std": 1.0} if mean else None


def has_same_alphas(path: VP, scheduler: Mapping[str, Any]) -> bool:
    """Whether the path passes through the scheduler's own alphas; ``trained_betas``, for instance, may differ."""
    theirs = diffusers_class("DDIMScheduler").from_config(dict(scheduler)).alphas_cumprod.double()
    t = torch.arange(1, path.timesteps + 1, dtype=torch.float64) / path.timesteps
    return len(theirs) == len(t) and bool(torch.allclose(path.alpha(t) ** 2, theirs, rtol=1e-3, atol=1e-6))


def is_flow_matching(scheduler: Mapping[str, Any] | None) -> bool:
    """Whether a scheduler is one of flow matching."""
    return bool(scheduler) and str((scheduler or {}).get("_class_name", "")).startswith("FlowMatch")


def init_note(location: str, objective: Objective) -> str | None:
    """A remark for the user if the weights were trained by another objective than ``objective``, else None."""
    model = open_model(location)
    theirs, ours = objective_of(model), config.dump(Blocks(objective=objective))["objective"]
    name = ours["name"]
    if model.scheduler is None:
        return f"{location} has no scheduler, so it is unknown how its weights were trained; continuing with {name}"
    if theirs is None:
        kind = model.scheduler.get("_class_name")
        unknown = f"{location} was trained with a {kind} whose schedule --objective=ddpm does not have"
        return f"{unknown}; continuing with {name}"
    changed = {k: v for k, v in theirs.items() if ours.get(k) != v and k != "time_distribution"}
    if not changed:
        return sampler_note(model)
    before = ", ".join(f"{k} {v}" for k, v in changed.items())
    after = ", ".join(f"{k} {ours[k]}" for k in changed if k in ours)
    return f"{location} was trained with {before}; continuing with {after}: at first its output means something else"


def sampler_note(model: SavedModel) -> str | None:
    """A remark if genkit samples in another way than the model's scheduler."""
    assert model.scheduler is not None
    solver, name = solver_of(model.scheduler), model.scheduler.get("_class_name")
    if solver is None and name != "DDPMScheduler":
        return f"{model.name} is sampled by {name}, of which genkit has no counterpart; genkit sample uses its own grid"
    return f"{model.name} is sampled by {name}: {solver.note}" if solver and solver.note else None


# ---------------------------------------------------------------------------------------------------------- the weights
def init_from(
    nets: Mapping[str, nn.Module], location: str, note: Callable[[str], None] = lambda text: None
) -> dict[str, str]:
    """Load the weights at ``location`` into the one network of diffusers among ``nets``, and return their origin.

    Classes that the weights do not have start as their null class, or as the mean of all; ``note`` receives a remark.
    ``ValueError`` names the first tensor that does not fit.
    """
    model = open_model(location)
    target = single_network(nets, model)
    if isinstance(target.sequences, ContextTokens) and text_encoder(location):
        note(f"{location} was trained with the words of its own encoders, and here they are others, or none: give "
             "--data.captions, without --data.encoder")  # fmt: skip
    wanted = target.model.state_dict()
    stored: dict[str, StoredTensor | Tensor] = {**with_new_names(read_header(model), wanted)}
    for key in [k for k in wanted if CLASS_TABLE.search(k)]:
        given = stored.get(key)
        table, remark = fit_class_table(
            given.read().float() if isinstance(given, StoredTensor) else None, wanted[key], key
        )
        stored[key] = table
        if remark:
            note(remark)
    for key in sorted(wanted.keys() | stored.keys()):
        theirs, ours = (list(v[key].shape) if key in v else "absent" for v in (stored, wanted))
        if theirs != ours:
            hint = "; it was trained with classes, keep the data's labels" if CLASS_TABLE.search(key) else ""
            if model.file is not None and any(k.startswith(OTHER_LAYOUTS) for k in stored):
                hint = "; it has the layout of other programs: convert it by from_single_file of diffusers"
            raise ValueError(f"init: {location} does not fit, first at {key}: {theirs} there, {ours} here{hint}")
    for key, tensor in stored.items():
        adopt_tensor(target.model, key, tensor.read() if isinstance(tensor, StoredTensor) else tensor)
    if is_flow_matching(model.scheduler) and target.cfg.clock == "index":
        changed = remap_time_embedding(target.model, -1.0)  # from 1000 t to our timesteps * label - 1
        target.model.load_state_dict(changed, strict=False)
    origin = {"run": f"diffusers:{canonical_name(location)}", "weights": str(model.weights)}
    if not model.has_lora:
        return origin
    load_object(MERGE_LORA_FILE)(nets, model.file)
    return {**origin, "adapter": str(model.file)}


def read_header(model: SavedModel) -> dict[str, StoredTensor]:
    """Where the tensors of a model lie. ``ValueError`` if a file is damaged or missing."""
    try:
        return list_weights(model.weights)
    except ValueError as e:
        raise ValueError(f"init: {model.file or model.folder} cannot be read: {format_error(e)[:200]}") from e


def with_new_names(stored: Mapping[str, StoredTensor], wanted: Mapping[str, Tensor]) -> dict[str, StoredTensor]:
    """Tensors by the names of today: attention of diffusers before 0.17 was named otherwise."""
    return {
        next((new for old, by in OLD_NAMES.items() if (new := key.replace(old, by)) != key and new in wanted), key)
        if key not in wanted
        else key: entry
        for key, entry in stored.items()
    }


def single_network(nets: Mapping[str, nn.Module], model: SavedModel) -> DiffusersDenoiser:
    """The one network of diffusers among ``nets``. ``ValueError`` if it is of another kind, or of other samples."""
    networks = [m for net in nets.values() for m in net.modules() if isinstance(m, DiffusersDenoiser)]
    if len(networks) != 1:
        raise ValueError(
            f"init: {model.name} is a network of diffusers; needs --backbone=diffusers, and one such network"
        )
    target, kind = networks[0], model.network
    if type(target.cfg.model) is not kind:
        raise ValueError(
            f"init: {model.name} is a {kind.class_name}; the backbone is a {target.cfg.model.class_name}; "
            "leave --backbone.model out"
        )
    channels, shape = kind.sample_channels(model.settings), list(target.spec.shape)
    if channels != shape[0]:
        raise ValueError(
            f"init: {model.name} is for samples of {channels} channels; the data are {shape}; grey and colour are "
            f"changed by --data.channels={channels}"
        )
    return target


def fit_class_table(stored: Tensor | None, wanted: Tensor, key: str) -> tuple[Tensor, str | None]:
    """The table of classes ``[N + 1, D]`` for ``wanted``, the null class last, and a remark on what is new in it."""
    if stored is None:
        return torch.zeros(wanted.shape), "the classes are new, and start without effect"
    if stored.shape == wanted.shape or stored.shape[1:] != wanted.shape[1:]:
        return stored, None
    mean = stored.mean(0, keepdim=True)
    if len(stored) == len(wanted) - 1:
        return torch.cat([stored, mean]), "the null class is new, and starts as the mean of all"
    is_dit = "embedder" in key  # whose last row is the null class; a U-Net need not have one
    null, name = (stored[-1:], "the null class") if is_dit else (mean, "the mean of all")
    counts = f"{len(stored)} classes there, {len(wanted)} here"
    return null.expand(len(wanted), -1).clone(), f"{counts}: all start as {name}"


def remap_time_embedding(net: nn.Module, shift: float) -> dict[str, Tensor]:
    """The weights behind the sinusoids of the time, for a network that is given times larger by ``shift``."""
    changed, modules = {}, dict(net.named_modules())
    for name, proj in list(modules.items()):
        if not name.endswith("time_proj"):
            continue
        parent = name.removesuffix("time_proj")
        layer = next(k for k in ("time_embedding.linear_1", "timestep_embedder.linear_1") if parent + k in modules)
        half = proj.num_channels // 2  # type: ignore[operator]
        waves = proj(torch.tensor([1.0]))[0, : 2 * half]  # at time 1 the angles are the rates, all in (0, 1]
        cosine_first = bool(proj.flip_sin_to_cos)
        cosine, sine = (waves[:half], waves[half:]) if cosine_first else (waves[half:], waves[:half])
        rates = torch.atan2(sine, cosine)
        weight: Any = modules[parent + layer].weight
        changed[f"{parent}{layer}.weight"] = shift_time_embedding(weight, rates, cosine_first, shift)
    return changed
