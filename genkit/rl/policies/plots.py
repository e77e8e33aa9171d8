"""Pictures of what a policy has in mind."""

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

DRAWN, COLUMNS = 100, 6  # chunks, and numbers of an action
COLOURS = ("blue", "orange", "green")


def looked(policy: Policy, path: np.ndarray) -> dict[int, np.ndarray]:
    """What is seen ``[To, Do]`` at three moments of an episode, by the step: the first is repeated before the start."""
    to, _ = policy.obs_shape
    return {t: path[np.clip(np.arange(t - to + 1, t + 1), 0, None)] for t in (0, len(path) // 3, 2 * len(path) // 3)}


def asked(policy: Policy, moments: Mapping[int, np.ndarray]) -> Iterator[Tensor]:
    """Observations ``[DRAWN, To, Do]`` of each, with the policy about to answer each from the same noise."""
    for seen in moments.values():
        policy.reset(range(DRAWN))
        yield torch.from_numpy(np.stack([seen] * DRAWN)).float()


def plans(planner: Planner, path: np.ndarray, draw: Callable[..., Image.Image]) -> Image.Image:
    """What a planner has in mind at three moments of an episode, each in a colour: the states ``[Tp, Do]`` to come, as
    the environment draws ways (``draw(ways, colours, title)``)."""
    moments = looked(planner, path)
    states = [planner.plan(obs)[1].transpose(1, 2).cpu().numpy() for obs in asked(planner, moments)]
    colours = [f"tab:{c}" for c, each in zip(COLOURS, states, strict=True) for _ in each]
    return draw(
        [way for each in states for way in each],
        colours,
        "plans at steps " + ", ".join(f"{t} ({c})" for t, c in zip(moments, COLOURS, strict=True)),
    )


def fans(policy: Policy, path: np.ndarray) -> Image.Image:
    """What a policy may do at three moments of an episode, seen as ``path`` ``[T + 1, Do]``: the chunks that it draws
    there, in the world's units. A row is a moment, a column one number of an action (the first of them). The steps that
    are carried out before it looks again are shaded; those before 0 lie in the past.
    """
    moments = looked(policy, path)
    chunks = [policy.chunk(obs).cpu().numpy() for obs in asked(policy, moments)]
    steps = np.arange(chunks[0].shape[2]) - policy.obs_shape[0] + 1

    def draw(axes: Any) -> None:
        for t, row, chunk in zip(moments, axes, chunks, strict=True):
            row[0].set_ylabel(f"at step {t}")
            for i, each in enumerate(row):
                each.axvspan(-0.5, policy.act_steps - 0.5, color="0.92")
                each.plot(steps, chunk[:, i].T, color="C0", alpha=0.12, lw=1)
        for i, each in enumerate(axes[0]):
            each.set_title(f"action {i}")
        for each in axes[-1]:
            each.set_xlabel("step from now on")

    columns = min(COLUMNS, chunks[0].shape[1])
    return pictures.figures(draw, (len(moments), columns), (3.2 * columns + 0.6, 6.4), sharex=True, sharey="col")
