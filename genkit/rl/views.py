"""Pictures of what a policy has in mind."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from genkit import pictures
from genkit.rl.policy import Policy

DRAWN, COLUMNS = 100, 6  # chunks, and numbers of an action


def fans(policy: Policy, path: np.ndarray) -> Image.Image:
    """What a policy may do at three moments of an episode, seen as ``path`` ``[T + 1, Do]``: the chunks that it draws
    there, in the world's units. A row is a moment, a column one number of an action (the first of them). The steps that
    are carried out before it looks again are shaded; those before 0 lie in the past.
    """
    to, _ = policy.obs_shape
    moments = [0, len(path) // 3, 2 * len(path) // 3]
    chunks = []
    for t in moments:
        seen = path[np.clip(np.arange(t - to + 1, t + 1), 0, None)]
        policy.reset(range(DRAWN))
        chunks.append(policy.chunk(torch.from_numpy(np.stack([seen] * DRAWN)).float()).cpu().numpy())
    steps = np.arange(chunks[0].shape[2]) - to + 1

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
