"""Inverse dynamics: the action between a state and the next, for planners that plan states only (Ajay et al. 2023)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from genkit.backbones import MLP
from genkit.core import Spec
from genkit.core.files import atomic_write
from genkit.data.demonstrations.windows import Demonstrations, Episode
from genkit.training.run import Run

FILE = "inverse.safetensors"


class InverseDynamics(nn.Module):
    """``(states [N, Do], next states [N, Do]) -> actions [N, A]``, in the environment's units.

    The network's input is the state and, standardized separately, the difference: a step is small compared with the
    range of the states.
    """

    def __init__(self, states: int, actions: int, width: int = 128, depth: int = 2):
        super().__init__()
        self.net = MLP(width, depth).encoder(Spec((2 * states,)), (actions,))
        for name, size in (("state", states), ("move", states), ("action", actions)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def standardize(self, name: str, value: Tensor) -> Tensor:
        """``value`` [N, D] with the mean and deviation of ``name`` ("state", "move" or "action") removed."""
        return (value - self.get_buffer(f"{name}_mean")) / self.get_buffer(f"{name}_std")

    def set_scale(self, name: str, value: Tensor) -> None:
        """Take mean and deviation of ``name`` from ``value`` ``[N, D]``; a deviation of 0 becomes 1."""
        std = value.std(0, correction=0)
        self.get_buffer(f"{name}_mean").copy_(value.mean(0))
        self.get_buffer(f"{name}_std").copy_(torch.where(std > 1e-7, std, 1))

    def forward(self, state: Tensor, following: Tensor) -> Tensor:
        """Actions ``[N, A]`` from ``state`` to ``following``, ``[N, Do]`` each."""
        x = torch.cat([self.standardize("state", state), self.standardize("move", following - state)], 1)
        return self.net(x) * self.get_buffer("action_std") + self.get_buffer("action_mean")


def fit_inverse_dynamics(
    episodes: Sequence[Episode], *, steps: int = 500, batch: int = 256, lr: float = 5e-3, seed: int = 0
) -> tuple[InverseDynamics, float]:
    """Inverse dynamics, and the share of the variance of a held-out tenth of the actions that they explain."""
    state, following, action = transitions(episodes)
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(action), generator=g)
    test, train = order[: len(order) // 10], order[len(order) // 10 :]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = InverseDynamics(state.shape[1], action.shape[1])
    for name, value in (("state", state), ("move", following - state), ("action", action)):
        net.set_scale(name, value[train])
    optimizer = torch.optim.AdamW(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    action_std = net.get_buffer("action_std")
    for _ in range(steps):
        rows = train[torch.randint(len(train), (batch,), generator=g)]
        loss = ((net(state[rows], following[rows]) - action[rows]) / action_std).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval().requires_grad_(False)
    error = ((net(state[test], following[test]) - action[test]) / action_std).square().mean()
    variance = ((action[test] - action[test].mean(0)) / action_std).square().mean()
    return net, float(1 - error / variance.clamp(min=1e-12))


def transitions(episodes: Sequence[Episode]) -> tuple[Tensor, Tensor, Tensor]:
    """States ``[N, Do]``, the next states ``[N, Do]`` and the actions ``[N, A]`` between them."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for episode in episodes:
        states = episode.obs if episode.last_obs is None else np.concatenate([episode.obs, episode.last_obs[None]])
        parts.append((states[:-1], states[1:], episode.actions[: len(states) - 1]))
    state, following, action = (torch.from_numpy(np.concatenate(v)).float() for v in zip(*parts, strict=True))
    if len(action) < 20:
        raise ValueError(f"inverse dynamics: given {len(action)} steps of demonstrations; needs 20 to learn from")
    return state, following, action


def load_inverse_dynamics(run: Run, state_dim: int) -> tuple[InverseDynamics, float]:
    """The run's inverse dynamics and their explained variance, from its folder; if they are not there yet, fit them to
    the run's demonstrations and save them first. ``ValueError`` if the file is damaged, or there are no demonstrations.
    """
    path = run.directory / FILE
    if not path.is_file():
        data = run.config.data
        if not isinstance(data, Demonstrations):
            raise ValueError(f"run: {run.directory.name} plans states, but was not trained on demonstrations")
        save_inverse_dynamics(path, *fit_inverse_dynamics(data.episodes("train")))
    try:
        with safe_open(path, "pt") as f:
            about = json.loads((f.metadata() or {})["about"])
            net = InverseDynamics(state_dim, int(about["actions"]))
            net.load_state_dict({k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118  not a dict
    except (OSError, SafetensorError, RuntimeError, KeyError, ValueError) as e:
        raise ValueError(f"{path}: is damaged; delete it, and it is learned again") from e
    return net.eval().requires_grad_(False).to(run.device), float(about["explained_variance"])


def save_inverse_dynamics(path: Path, net: InverseDynamics, explained_variance: float) -> None:
    """Write the network, its number of actions and its explained variance."""
    about = {"actions": net.get_buffer("action_mean").numel(), "explained_variance": explained_variance}
    with atomic_write(path) as part:
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, part, {"about": json.dumps(about)})
