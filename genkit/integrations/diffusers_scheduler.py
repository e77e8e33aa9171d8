"""The scheduler of a pipeline as a sampler and a grid of times.

A scheduler of diffusers is a solver together with a grid. The solver is one of ours; the grid comes from the scheduler
itself, made from the settings that a run keeps in pipeline.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from genkit.backbones.diffusers import diffusers_class
from genkit.training.pipelines import Pipeline


class Solver(NamedTuple):
    """The sampler that draws as a scheduler does."""

    sampler: str
    note: str = ""
    """how it differs, if it does"""


SOLVERS: Mapping[str, Solver] = {  # classes of schedulers; DDPMScheduler, with as many steps as times, is for training
    "DDIMScheduler": Solver("ddim"),
    "EulerDiscreteScheduler": Solver("ddim"),
    "FlowMatchEulerDiscreteScheduler": Solver("ddim"),
    "DPMSolverMultistepScheduler": Solver("dpmpp_2m"),
    "UniPCMultistepScheduler": Solver("unipc"),
    "PNDMScheduler": Solver("ddim", "PLMS is not among the samplers; ddim draws on its grid, in as many evaluations"),
}
RESPACED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")


def solver_of(scheduler: Mapping[str, Any]) -> Solver | None:
    """The solver of a scheduler with these settings; None if there is none, or its levels are not discrete times."""
    respaced = any(scheduler.get(name) for name in RESPACED)
    return None if respaced else SOLVERS.get(str(scheduler.get("_class_name")))


def scheduler_times(pipeline: Pipeline, num_steps: int, shape: tuple[int, ...]) -> Tensor:
    """The grid of a pipeline's scheduler, for samples of ``shape``: times ``[num_steps + 1]``, float64.

    An index n is the time ``(n + 1) / T``. DDIM without ``set_alpha_to_one`` ends at the first discrete time, 1 / T.
    The levels of a flow are times; where their shift depends on it, patches of 2x2 are the tokens.
    """
    settings, name = pipeline.scheduler, str(pipeline.scheduler["_class_name"])
    scheduler = diffusers_class(name).from_config({k: v for k, v in settings.items() if not k.startswith("_")})
    if name == "PNDMScheduler":  # whose own times contain one twice
        scheduler = diffusers_class("DDIMScheduler").from_config(scheduler.config)
    if name.startswith("FlowMatch"):
        levels = {"sigmas": np.linspace(1, 1 / num_steps, num_steps)} if pipeline.explicit else {}
        scheduler.set_timesteps(num_steps, **levels, **dynamic_shift(scheduler.config, shape))
        return torch.as_tensor(scheduler.sigmas).double()
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.config.num_train_timesteps
    first = name in ("DDIMScheduler", "PNDMScheduler") and not scheduler.config.set_alpha_to_one
    end = torch.tensor([1 / timesteps if first else 0.0], dtype=torch.float64)
    times = (torch.as_tensor(scheduler.timesteps).double() + 1) / timesteps
    if len(times) != num_steps or not bool((times.diff() < 0).all()) or float(times[-1]) <= float(end):
        raise ValueError(f"steps: given {num_steps}, for which {name} has no falling times; give fewer, or --grid")
    return torch.cat([times, end])


def dynamic_shift(settings: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, float]:
    """The argument mu of a flow's scheduler whose shift is linear in the number of tokens (Flux); else nothing."""
    if not settings.get("use_dynamic_shifting"):
        return {}
    low, high = settings["base_image_seq_len"], settings["max_image_seq_len"]
    slope = (settings["max_shift"] - settings["base_shift"]) / (high - low)
    tokens = shape[-1] * shape[-2] // 4
    return {"mu": settings["base_shift"] + slope * (tokens - low)}
