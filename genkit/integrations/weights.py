"""``--init diffusers:DIR``: the configuration and the weights of a network that diffusers saved.

DIR is a model's folder (config.json, diffusion_pytorch_model.safetensors), or a pipeline's, with unet/ or transformer/
and scheduler/; or OWNER/NAME, which is downloaded from the hub. Weights are read from safetensors alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genkit import config
from genkit.backbones.diffusers import MODELS, Diffusers, DiffusersDenoiser, class_of, told_from
from genkit.core import Objective
from genkit.core.files import one_line
from genkit.diffusion.paths import VP
from genkit.objectives import DDPM

PARTS = ("unet", "transformer")  # where a pipeline keeps the network
KINDS = {**{m.kind: m for m in MODELS.values()}, "Transformer2DModel": MODELS["dit"]}  # the second: DiT's own releases
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
BETAS = {"linear": "linear", "scaled_linear": "scaled-linear", "squaredcos_cap_v2": "cosine"}
CLASSES = re.compile(r"(class_embedding|class_embedder\.embedding_table)\.weight$")
Notes = Callable[[str], None]


# --------------------------------------------------------------------------------------------------------- the folder
@dataclass(frozen=True)
class Folder:
    """A network on disk, with the scheduler of its pipeline where there is one."""

    name: str
    part: Path
    settings: Mapping[str, Any]
    scheduler: Mapping[str, Any] | None

    @property
    def weights(self) -> Path:
        """The safetensors, or the index of several. ``ValueError`` where there are none."""
        found = sorted(self.part.glob("*.safetensors")) or sorted(self.part.glob("*.safetensors.index.json"))
        if not found:
            pickles = sorted(p.name for p in self.part.glob("*.bin"))
            why = f"; {pickles[0]} is a pickle, which genkit never loads: save it as safetensors" if pickles else ""
            raise ValueError(f"init: {self.part} holds no safetensors{why}")
        plain = self.part / "diffusion_pytorch_model.safetensors"
        return plain if plain in found else found[0]


def open_folder(where: str) -> Folder:
    """The folder, or the one that the hub has. ``ValueError`` where there is none that we can use."""
    root = Path(where).expanduser()
    if not root.is_dir():
        root = download(where)
    part = next((root / p for p in PARTS if (root / p / "config.json").is_file()), root)
    if not (part / "config.json").is_file():
        raise ValueError(f"init: {root} holds no config.json, and no {' or '.join(PARTS)}; needs a folder of "
                         "save_pretrained")  # fmt: skip
    settings = read_json(part / "config.json")
    if settings.get("_class_name") not in KINDS:
        kind = settings.get("_class_name", "model without a class")
        raise ValueError(f"init: {part} holds a {kind}; allowed: {', '.join(KINDS)}")
    scheduler = root / "scheduler" / "scheduler_config.json"
    return Folder(where, part.resolve(), settings, read_json(scheduler) if scheduler.is_file() else None)


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"init: {path} is not valid JSON: {e}") from e
    if not isinstance(found, dict):
        raise ValueError(f"init: {path} holds no settings")
    return found


@lru_cache(maxsize=8)  # a command asks three times: for the network, for what fits it, for its weights
def download(name: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ValueError(
            f"init: there is no folder {name}; needs a folder of save_pretrained, or OWNER/NAME of the hub"
        )
    try:
        from huggingface_hub import snapshot_download

        wanted = ["*.json", *(f"{p}/*.safetensors" for p in PARTS), "diffusion_pytorch_model*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as e:  # of many kinds: no library, no network, no such repository
        why = one_line(e)[:150]
        raise ValueError(f"init: there is no folder {name}, and the hub did not give it ({why}); is there a network? "
                         "Else download it elsewhere and name its folder") from e  # fmt: skip


def canonical_name(where: str) -> str:
    """DIR as config.yaml keeps it: the same from everywhere. A name of the hub stays one."""
    return str(Path(where).expanduser().resolve()) if Path(where).expanduser().is_dir() else where


# ----------------------------------------------------------------------------------------------- what it says of itself
def init_defaults(where: str) -> dict[str, Any]:
    """The blocks ``backbone`` and, where the scheduler is one that we have, ``objective`` of config.yaml."""
    folder = open_folder(where)
    s, kind = folder.settings, KINDS[folder.settings["_class_name"]]
    train = (folder.scheduler or {}).get("num_train_timesteps", 1000)
    twofold = s.get("out_channels") == 2 * s.get("in_channels", 0)
    backbone = Diffusers(kind.of({k: v for k, v in s.items() if not k.startswith("_")}), train, twofold)
    objective = objective_of(folder)
    return {"backbone": config.dump(Networks(backbone))["backbone"], **({"objective": objective} if objective else {})}


@dataclass(frozen=True)
class Networks:
    backbone: Any = config.table("genkit.backbones:BACKBONES", "unet")


def objective_of(folder: Folder) -> dict[str, Any] | None:
    """What the weights were trained by, as far as the scheduler knows and we have it."""
    s = folder.scheduler
    if s is None:
        return None
    if flow_matching(s):
        return {"name": "flow"}
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
    made = DDPM(**{k: v for k, v in block.items() if k != "name"})
    assert isinstance(made.path, VP)
    return block if same_table(made.path, s) else None


def same_table(path: VP, scheduler: Mapping[str, Any]) -> bool:
    """Whether the path goes through the scheduler's own alphas; ``trained_betas``, say, need not be ours."""
    theirs = class_of("DDIMScheduler").from_config(dict(scheduler)).alphas_cumprod.double()
    t = torch.arange(1, path.timesteps + 1, dtype=torch.float64) / path.timesteps
    return len(theirs) == len(t) and bool(torch.allclose(path.alpha(t) ** 2, theirs, rtol=1e-3, atol=1e-6))


def flow_matching(scheduler: Mapping[str, Any] | None) -> bool:
    return bool(scheduler) and str((scheduler or {}).get("_class_name", "")).startswith("FlowMatch")


def init_note(where: str, objective: Objective) -> str | None:
    """What a person should hear where the weights were trained by another objective than they go on with."""
    folder = open_folder(where)
    trained, mine = objective_of(folder), config.dump(Objectives(objective))["objective"]
    if folder.scheduler is None:
        return f"{where} has no scheduler, so nothing is known of how its weights were trained; {mine['name']} goes on"
    if trained is None:
        kind = folder.scheduler.get("_class_name")
        return (
            f"{where} was trained with a {kind} whose schedule --objective=ddpm does not have; {mine['name']} goes on"
        )
    odd = {k: v for k, v in trained.items() if mine.get(k) != v}
    if not odd:
        return None
    had = ", ".join(f"{k} {v}" for k, v in odd.items())
    have = ", ".join(f"{k} {mine[k]}" for k in odd if k in mine)
    return f"{where} was trained with {had}; you go on with {have}: at first its output means something else"


@dataclass(frozen=True)
class Objectives:
    objective: Any = config.table("genkit.objectives:OBJECTIVES", "flow")


# ---------------------------------------------------------------------------------------------------------- the weights
def init_from(nets: Mapping[str, nn.Module], where: str, say: Notes = lambda text: None) -> dict[str, str]:
    """Give the one network of diffusers among ``nets`` the weights of the folder; where those came from.

    Rows of classes that the weights do not know begin as their null class, or the mean of all. ``ValueError`` names the
    first tensor that does not fit.
    """
    folder = open_folder(where)
    here = [m for net in nets.values() for m in net.modules() if isinstance(m, DiffusersDenoiser)]
    if len(here) != 1:
        raise ValueError(f"init: {where} is a network of diffusers; needs --backbone=diffusers, and one such network")
    weights, kind = folder.weights, KINDS[folder.settings["_class_name"]]
    if type(here[0].cfg.model) is not kind:
        raise ValueError(f"init: {where} is a {kind.kind}; the backbone is a {here[0].cfg.model.kind}; leave "
                         "--backbone.model out")  # fmt: skip
    channels, shape = folder.settings.get("in_channels"), list(here[0].spec.shape)
    if channels != shape[0]:
        raise ValueError(
            f"init: {where} is for samples of {channels} channels; the data are {shape}; grey and colour are changed "
            f"by --data.channels={channels}"
        )
    try:
        net = class_of(kind.kind).from_pretrained(
            folder.part, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError) as e:
        raise ValueError(f"init: {folder.part} cannot be read: {' '.join(str(e).split())[:200]}") from e
    stored = {k: v.float() for k, v in net.state_dict().items()}
    if flow_matching(folder.scheduler):
        stored |= retold(net, -1.0)
    wanted = here[0].model.state_dict()
    for key in [k for k in wanted if CLASSES.search(k)]:
        stored[key], told = rows(stored.get(key), wanted[key], key)
        if told:
            say(told)
    for key in sorted(wanted.keys() | stored.keys()):
        there, mine = (list(v[key].shape) if key in v else "absent" for v in (stored, wanted))
        if there != mine:
            why = "; it was trained with classes, keep the data's labels" if CLASSES.search(key) else ""
            raise ValueError(f"init: {where} does not fit, first at {key}: {there} there, {mine} here{why}")
    here[0].model.load_state_dict(stored)
    return {"run": f"diffusers:{canonical_name(where)}", "weights": str(weights)}


def rows(there: Tensor | None, here: Tensor, key: str) -> tuple[Tensor, str | None]:
    """The table of classes ``[N + 1, D]``, the null class last, and what is new in it."""
    if there is None:
        return torch.zeros_like(here), "the classes are new, and begin without an effect"
    if there.shape == here.shape or there.shape[1:] != here.shape[1:]:
        return there, None
    if len(there) == len(here) - 1:
        return torch.cat([there, there.mean(0, keepdim=True)]), "the null class is new, and begins as the mean of all"
    dit = "embedder" in key  # whose last row is the null class; a U-Net need not have one
    null = there[-1:] if dit else there.mean(0, keepdim=True)
    first = "the null class" if dit else "the mean of all"
    return null.expand(len(here), -1).clone(), f"{len(there)} classes there, {len(here)} here: all begin as {first}"


def retold(net: nn.Module, by: float) -> dict[str, Tensor]:
    """The weights of ``net`` behind the sinusoids of the time, for a network that is told times later by ``by``."""
    changed, parents = {}, dict(net.named_modules())
    for name, proj in list(parents.items()):
        if not name.endswith("time_proj"):
            continue
        parent = name.removesuffix("time_proj")
        layer = next(k for k in ("time_embedding.linear_1", "timestep_embedder.linear_1") if parent + k in parents)
        half = proj.num_channels // 2  # type: ignore[operator]
        sines = proj(torch.tensor([1.0]))[0, : 2 * half]  # the rates are those whose sines these are: all in (0, 1]
        cosine_first = bool(proj.flip_sin_to_cos)
        rates = torch.atan2(
            sines[half:] if cosine_first else sines[:half], sines[:half] if cosine_first else sines[half:]
        )
        changed[f"{parent}{layer}.weight"] = told_from(parents[parent + layer].weight, rates, cosine_first, by)  # type: ignore
    return changed
