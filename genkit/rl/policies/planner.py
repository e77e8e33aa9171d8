"""Planning: a generator of the states to come, that begin where one is, and the actions that bring them about.

Diffuser (Janner et al. 2022) draws states and actions together; Decision Diffuser (Ajay et al. 2023) draws states alone
and finds the actions by inverse dynamics. What is known of a plan, the states up to now and a goal at its end, is fixed
at every step of the sampler (Janner et al. 2022, section 3.3), and exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from genkit.backbones import MLP
from genkit.core import Cond, Denoiser, Guidance, Prediction, Spec, Vector, expand
from genkit.core.files import whole
from genkit.data.codecs import Actions, Plans
from genkit.data.demonstrations.windows import Demonstrations, Episode
from genkit.diffusion.guidance import Wrapped
from genkit.diffusion.paths import require_diffusion
from genkit.diffusion.posterior import with_ends
from genkit.rl.policies.policy import Policy, Watcher
from genkit.training import run as runs

Known = Callable[[Tensor, Cond], tuple[Tensor, Tensor]]  # (samples [B, *S], conditions) -> (Bool [*S], values [B, *S])


def fixed(known: Known) -> Guidance:
    """Inpainting by replacement: of the expected data, what is known is that; the noise explains ``x`` there.

    A sampler then takes those numbers along the straight path of its own noise, ``alpha known + sigma z``, to what is
    known exactly.
    """

    def guide(denoise: Denoiser) -> Denoiser:
        path = denoise.path
        require_diffusion("plan", path)

        def guided(x: Tensor, t: Tensor, cond: Cond) -> Prediction:
            p = denoise(x, t, cond)
            mask, value = known(p.x0, cond)
            noise = (x - expand(path.alpha(t), x) * value) / expand(path.sigma(t), x)
            return with_ends(p, torch.where(mask, value, p.x0), torch.where(mask, noise, p.x1))

        return Wrapped(denoise, guided)

    return guide


def known(codec: Plans) -> Known:
    """Of a plan: its first To states, ``cond["obs"]``, and its last one, ``cond["goal"]``, where there is one."""

    def of(x: Tensor, cond: Cond) -> tuple[Tensor, Tensor]:
        obs, a = cond["obs"], codec.actions
        mask, value = torch.zeros(x.shape[1:], dtype=torch.bool, device=x.device), torch.zeros_like(x)
        mask[a:, : obs.shape[1]], value[:, a:, : obs.shape[1]] = True, codec.seen(obs.transpose(1, 2)).to(x)
        if "goal" in cond:
            mask[a:, -1], value[:, a:, -1] = True, codec.seen(cond["goal"]).to(x)
        return mask, value

    return of


# ------------------------------------------------------------------------------------------------ inverse dynamics
class Inverse(nn.Module):
    """What was done between a state and the next: ``([N, Do], [N, Do]) -> [N, A]``, in the world's units.

    It sees the state and, scaled by itself, the difference: a step is small against the world.
    """

    def __init__(self, states: int, actions: int, width: int = 128, depth: int = 2):
        super().__init__()
        self.net = MLP(width, depth).encoder(Spec((2 * states,)), (actions,))
        for name, size in (("state", states), ("move", states), ("action", actions)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def scaled(self, name: str, value: Tensor) -> Tensor:
        return (value - self.get_buffer(f"{name}_mean")) / self.get_buffer(f"{name}_std")

    def measure(self, name: str, value: Tensor) -> None:
        """Take mean and deviation from ``value`` ``[N, D]``; 1 where nothing varies."""
        std = value.std(0, correction=0)
        self.get_buffer(f"{name}_mean").copy_(value.mean(0))
        self.get_buffer(f"{name}_std").copy_(torch.where(std > 1e-7, std, 1))

    def forward(self, state: Tensor, following: Tensor) -> Tensor:
        x = torch.cat([self.scaled("state", state), self.scaled("move", following - state)], 1)
        return self.net(x) * self.get_buffer("action_std") + self.get_buffer("action_mean")


def learn_inverse(
    episodes: Sequence[Episode], *, steps: int = 500, batch: int = 256, lr: float = 5e-3, seed: int = 0
) -> tuple[Inverse, float]:
    """Inverse dynamics, and the share of the variance of a held-out tenth of the actions that they explain."""
    state, following, action = pairs(episodes)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(action), generator=g)
    held, rest = order[: len(order) // 10], order[len(order) // 10 :]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Inverse(state.shape[1], action.shape[1])
    for name, value in (("state", state), ("move", following - state), ("action", action)):
        net.measure(name, value[rest])
    optimizer = torch.optim.AdamW(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    wide = net.get_buffer("action_std")
    for _ in range(steps):
        rows = rest[torch.randint(len(rest), (batch,), generator=g)]
        loss = ((net(state[rows], following[rows]) - action[rows]) / wide).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval().requires_grad_(False)
    error = ((net(state[held], following[held]) - action[held]) / wide).square().mean()
    return net, float(1 - error / ((action[held] - action[held].mean(0)) / wide).square().mean().clamp(min=1e-12))


def pairs(episodes: Sequence[Episode]) -> tuple[Tensor, Tensor, Tensor]:
    """States ``[N, Do]``, those that followed, and the actions ``[N, A]`` between them."""
    found: tuple[list[np.ndarray], ...] = ([], [], [])
    for e in episodes:
        states = e.obs if e.last is None else np.concatenate([e.obs, e.last[None]])
        for part, values in zip(found, (states[:-1], states[1:], e.actions[: len(states) - 1]), strict=True):
            part.append(values)
    state, following, action = (torch.from_numpy(np.concatenate(part)).float() for part in found)
    if len(action) < 20:
        raise ValueError(f"inverse dynamics: given {len(action)} steps of demonstrations; needs 20 to learn from")
    return state, following, action


FILE = "inverse.safetensors"


def inverse_of(found: runs.Run, codec: Plans) -> tuple[Inverse, float]:
    """The run's inverse dynamics, and how much they explain: from its folder, or learned from its demonstrations and
    put there."""
    path, data = found.directory / FILE, found.config.data
    if not path.is_file():
        if not isinstance(data, Demonstrations):
            raise ValueError(f"run: {found.directory.name} plans states, but was not trained on demonstrations")
        net, explains = learn_inverse(data.episodes("train"))
        with whole(path) as part:
            weights = {k: v.contiguous() for k, v in net.state_dict().items()}
            about = {"actions": net.get_buffer("action_mean").numel(), "explains": explains}
            save_file(weights, part, {"about": json.dumps(about)})
    try:
        with safe_open(path, "pt") as f:
            about = json.loads((f.metadata() or {})["about"])
            net = Inverse(int(codec.states[0]), int(about["actions"]))
            net.load_state_dict({k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118  it is no dict
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as e:
        raise ValueError(f"{path}: is damaged; delete it, and it is learned again") from e
    return net.eval().requires_grad_(False).to(found.device), float(about["explains"])


# ------------------------------------------------------------------------------------------------------- planning
@dataclass
class Planner(Policy):
    """A policy whose samples are plans. It carries out what its actions say, or what the states take."""

    inverse: Inverse | None = None
    """None where actions are part of the plan"""
    explains: float | None = None
    """the share of the held-out actions' variance that the inverse dynamics explain"""

    @property
    def valued(self) -> bool:
        return False

    def __post_init__(self) -> None:
        last = self.run.spec.shape[1] - self.obs_shape[0]
        if self.inverse is not None and self.act_steps > last:
            raise ValueError(f"act_steps: given {self.act_steps}, but these plans have {last} steps between states "
                             "from now on; take fewer")  # fmt: skip

    @classmethod
    def require(cls, found: runs.Run) -> None:
        seen = found.spec.cond.get("obs")
        if not isinstance(found.codec, Plans) or not isinstance(seen, Vector):
            raise ValueError(f"run: {found.directory.name} draws samples of shape {found.spec.shape}, not plans given "
                             "obs; train one: genkit train --data=four-ways --data.plan states")  # fmt: skip

    @classmethod
    def guides(cls, found: runs.Run) -> list[Guidance]:
        assert isinstance(found.codec, Plans)
        return [fixed(known(found.codec))]

    @classmethod
    def further(cls, found: runs.Run) -> dict[str, Any]:
        assert isinstance(found.codec, Plans)
        if found.codec.actions:
            return {}
        net, explains = inverse_of(found, found.codec)
        return {"inverse": net, "explains": explains}

    @property
    def codec(self) -> Plans:
        assert isinstance(self.run.codec, Plans)
        return self.run.codec

    @property
    def action_dim(self) -> int:
        return self.codec.actions if self.inverse is None else len(self.inverse.get_buffer("action_mean"))

    @property
    def about(self) -> dict[str, Any]:
        return {} if self.explains is None else {"inverse_explains": self.explains}

    def plan(self, obs: Tensor, frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(actions [N, A, Tp], states [N, Do, Tp])`` in the world's units, for ``[N, To, Do]``; A may be 0."""
        x = self.sample(obs, frames)
        mask, value = known(self.codec)(x, self.cond(obs))
        x = self.codec.decode(torch.where(mask, value, x))  # some samplers come to it but for rounding
        return x[:, : self.codec.actions], x[:, self.codec.actions :]

    def chunk(self, obs: Tensor, frames: Tensor | None = None) -> Tensor:
        actions, states = self.plan(obs, frames)
        if self.inverse is None:
            return actions
        before, after = states[:, :, :-1].transpose(1, 2), states[:, :, 1:].transpose(1, 2)
        with torch.no_grad():
            found = self.inverse(before.flatten(0, 1), after.flatten(0, 1))
        return found.unflatten(0, before.shape[:2]).transpose(1, 2)


ACTORS: Mapping[tuple[type, bool], type[Policy]] = {  # codec, whether pictures are seen
    (Actions, False): Policy,
    (Actions, True): Watcher,
    (Plans, False): Planner,
    (Plans, True): Planner,
}


def load(run: str | File | runs.Run, **how: Any) -> Policy:
    """The policy or planner of a run, as its samples are; ``how`` is that of :meth:`Policy.load`."""
    where = {k: how.pop(k) for k in ("ema", "step", "device") if k in how}
    found = run if isinstance(run, runs.Run) else runs.load(run, **{"device": "cpu", **where})
    return ACTORS.get((type(found.codec), "frames" in found.spec.cond), Policy).load(found, **how)
