"""Planning: a generator of future states that begin at the current one, and the actions that lead through them.

Diffuser (Janner et al. 2022) draws states and actions together; Decision Diffuser (Ajay et al. 2023) draws states only
and infers the actions by inverse dynamics. The known part of a plan, the states up to now and a goal at its end, is
held exactly at every step of the sampler (Janner et al. 2022, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genkit.core import Cond, Denoiser, Guidance, Prediction, Vector, expand
from genkit.data.codecs import Plans
from genkit.diffusion.guidance import Wrapped
from genkit.diffusion.paths import require_diffusion
from genkit.diffusion.posterior import replace_endpoints
from genkit.rl.policies.inverse_dynamics import InverseDynamics, load_inverse_dynamics
from genkit.rl.policies.policy import Policy
from genkit.training.run import Run

# (samples [B, *S], conditions) -> (which numbers are known, Bool [*S], and their values [B, *S])
Conditioning = Callable[[Tensor, Cond], tuple[Tensor, Tensor]]


def inpaint(conditioning: Conditioning) -> Guidance:
    """Inpainting by replacement: the known numbers of the predicted data are set, and the predicted noise there is what
    then explains ``x``.

    A sampler thus moves those numbers along the straight path of its own noise, ``alpha known + sigma z``, and ends at
    the known values exactly.
    """

    def guide(denoise: Denoiser) -> Denoiser:
        path = denoise.path
        require_diffusion("plan", path)

        def guided(x: Tensor, t: Tensor, cond: Cond) -> Prediction:
            p = denoise(x, t, cond)
            mask, value = conditioning(p.x0, cond)
            noise = (x - expand(path.alpha(t), x) * value) / expand(path.sigma(t), x)
            return replace_endpoints(p, torch.where(mask, value, p.x0), torch.where(mask, noise, p.x1))

        return Wrapped(denoise, guided)

    return guide


def plan_conditioning(codec: Plans) -> Conditioning:
    """The known part of a plan: its first To states, ``cond["obs"]``, and its last one, ``cond["goal"]`` if given."""

    def known(x: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        obs, a = cond["obs"], codec.actions
        mask, value = torch.zeros(x.shape[1:], dtype=torch.bool, device=x.device), torch.zeros_like(x)
        mask[a:, : obs.shape[1]] = True
        value[:, a:, : obs.shape[1]] = codec.encode_states(obs.transpose(1, 2)).to(x)
        if "goal" in cond:
            mask[a:, -1] = True
            value[:, a:, -1] = codec.encode_states(cond["goal"]).to(x)
        return mask, value

    return known


@dataclass
class Planner(Policy):
    """A policy whose samples are plans. It carries out the plan's actions, or those between its states."""

    inverse_dynamics: InverseDynamics | None = None
    """None if actions are part of the plan"""
    explained_variance: float | None = None
    """share of the held-out actions' variance that the inverse dynamics explain"""

    def __post_init__(self) -> None:
        last = self.run.spec.shape[1] - self.obs_shape[0]
        if self.inverse_dynamics is not None and self.act_steps > last:
            raise ValueError(f"act_steps: given {self.act_steps}, but these plans have {last} steps between states "
                             "from now on; take fewer")  # fmt: skip

    @property
    def supports_q(self) -> bool:
        return False

    @classmethod
    def require_suitable(cls, run: Run) -> None:
        if not isinstance(run.codec, Plans) or not isinstance(run.spec.cond.get("obs"), Vector):
            raise ValueError(f"run: {run.directory.name} draws samples of shape {run.spec.shape}, not plans given "
                             "obs; train one: genkit train --data=four-ways --data.plan states")  # fmt: skip

    @classmethod
    def guides(cls, run: Run) -> list[Guidance]:
        assert isinstance(run.codec, Plans)
        return [inpaint(plan_conditioning(run.codec))]

    @classmethod
    def extra_fields(cls, run: Run) -> dict[str, Any]:
        assert isinstance(run.codec, Plans)
        if run.codec.actions:
            return {}
        net, explained_variance = load_inverse_dynamics(run, int(run.codec.states[0]))
        return {"inverse_dynamics": net, "explained_variance": explained_variance}

    @property
    def codec(self) -> Plans:
        """The run's codec."""
        assert isinstance(self.run.codec, Plans)
        return self.run.codec

    @property
    def action_dim(self) -> int:
        if self.inverse_dynamics is None:
            return self.codec.actions
        return len(self.inverse_dynamics.get_buffer("action_mean"))

    @property
    def future_steps(self) -> int:
        return super().future_steps - int(self.inverse_dynamics is not None)

    @property
    def details(self) -> dict[str, Any]:
        return {} if self.explained_variance is None else {"inverse_explained_variance": self.explained_variance}

    def plan(self, obs: Tensor, frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(actions [N, A, Tp], states [N, Do, Tp])`` in the environment's units, for ``[N, To, Do]``; A may be 0."""
        x = self.sample(obs, frames)
        mask, value = plan_conditioning(self.codec)(x, self.cond(obs))
        x = self.codec.decode(torch.where(mask, value, x))  # some samplers reach it only up to rounding
        return x[:, : self.codec.actions], x[:, self.codec.actions :]

    def chunk(self, obs: Tensor, frames: Tensor | None = None) -> Tensor:
        actions, states = self.plan(obs, frames)
        if self.inverse_dynamics is None:
            return actions
        before, after = states[:, :, :-1].transpose(1, 2), states[:, :, 1:].transpose(1, 2)
        with torch.no_grad():
            inferred = self.inverse_dynamics(before.flatten(0, 1), after.flatten(0, 1))
        return inferred.unflatten(0, before.shape[:2]).transpose(1, 2)
