"""Plots of the actions or plans that a policy samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genkit.core import pictures
from genkit.rl.policies.planner import Planner
from genkit.rl.policies.policy import Policy

SAMPLES = 100  # chunks or plans drawn at each moment
COLUMNS = 6  # largest number of action dimensions that are drawn
COLOURS = ("blue", "orange", "green")


def three_moments(policy: Policy, path: np.ndarray) -> dict[int, np.ndarray]:
    """The observations ``[To, Do]`` at three steps of an episode ``path`` [T + 1, Do], by step; the first observation
    is repeated before the start."""
    obs_steps, _ = policy.obs_shape
    steps = (0, len(path) // 3, 2 * len(path) // 3)
    return {t: path[np.clip(np.arange(t - obs_steps + 1, t + 1), 0, None)] for t in steps}


def repeated(policy: Policy, moments: Mapping[int, np.ndarray]) -> Iterator[Tensor]:
    """Observations ``[SAMPLES, To, Do]`` of each moment in turn, with the policy reset to the same seeds for each."""
    for obs in moments.values():
        policy.reset(range(SAMPLES))
        yield torch.from_numpy(np.stack([obs] * SAMPLES)).float()


def plot_plans(planner: Planner, path: np.ndarray, draw: Callable[..., Image.Image]) -> Image.Image:
    """Plans sampled at three moments of an episode, a colour each: states ``[Tp, Do]``, drawn as the environment draws
    paths (``draw(paths, colours, title)``)."""
    moments = three_moments(planner, path)
    states = [planner.plan(obs)[1].transpose(1, 2).cpu().numpy() for obs in repeated(planner, moments)]
    colours = [f"tab:{colour}" for colour, plans in zip(COLOURS, states, strict=True) for _ in plans]
    title = "plans at steps " + ", ".join(f"{t} ({c})" for t, c in zip(moments, COLOURS, strict=True))
    return draw([plan for plans in states for plan in plans], colours, title)


def plot_actions(policy: Policy, path: np.ndarray) -> Image.Image:
    """Chunks of actions sampled at three moments of an episode with observations ``path`` ``[T + 1, Do]``, in the
    environment's units. A row is a moment, a column one of the first dimensions of an action. The steps that would be
    carried out are shaded; those before 0 lie in the past.
    """
    moments = three_moments(policy, path)
    chunks = [policy.chunk(obs).cpu().numpy() for obs in repeated(policy, moments)]
    steps = np.arange(chunks[0].shape[2]) - policy.obs_shape[0] + 1

    def draw(axes: Any) -> None:
        for t, row, chunk in zip(moments, axes, chunks, strict=True):
            row[0].set_ylabel(f"at step {t}")
            for i, panel in enumerate(row):
                panel.axvspan(-0.5, policy.act_steps - 0.5, color="0.92")
                panel.plot(steps, chunk[:, i].T, color="C0", alpha=0.12, lw=1)
        for i, panel in enumerate(axes[0]):
            panel.set_title(f"action {i}")
        for panel in axes[-1]:
            panel.set_xlabel("step from now on")

    columns = min(COLUMNS, chunks[0].shape[1])
    return pictures.draw_figures(draw, (len(moments), columns), (3.2 * columns + 0.6, 6.4), sharex=True, sharey="col")
