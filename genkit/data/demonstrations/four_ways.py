"""The demonstrations of the built-in task of four ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Lt

from genkit.config.numbers import Count, Natural, Seed
from genkit.data.demonstrations.windows import Demonstrations, Episode
from genkit.data.source import Split
from genkit.envs.four_ways import MODE_NAMES, draw_views, expert_episodes

SIDES = (("below", "under", "south of"), ("above", "over", "north of"))  # of an obstacle, in words
SENTENCES = (
    "pass {} the first obstacle and {} the second", "go {} the first one, then {} the next one",
    "first {} it, after that {} the other", "take the way {} the left obstacle and {} the right one",
)  # fmt: skip
MIN_PIXELS = 8  # side of the smallest image that shows anything


@dataclass(frozen=True, kw_only=True)
class FourWays(Demonstrations):
    """The built-in task of four ways past two obstacles: its expert's demonstrations, computed when they are loaded."""

    n: Count = 200
    """episodes; the four ways take turns"""
    seed: Seed = 0
    """seed of the episodes; both splits differ"""
    obs_steps: Count = 1
    """observed steps; one position is a complete state"""
    pixels: Natural = 0
    """side of square images of the world that are observed in place of the position; 0: none"""
    held_out_wordings: Annotated[int, Ge(0), Lt(len(SENTENCES) * 9)] = 0
    """of the 36 wordings of each way, for the condition text, so many, drawn by ``seed``, belong to the test split"""
    env: str = "four-ways"
    """the environment in which a policy is evaluated"""

    skills: ClassVar[tuple[str, ...]] = MODE_NAMES

    def task_texts(self, split: Split = "train") -> Sequence[Sequence[str]]:
        """Every sentence with every pair of words for the two sides, as far as they belong to the split."""
        texts = []
        for mode in range(len(MODE_NAMES)):
            every = [s.format(a, b) for s in SENTENCES for a in SIDES[mode // 2] for b in SIDES[mode % 2]]
            order = np.random.default_rng((self.seed, mode)).permutation(len(every))
            held_out = set(order[: self.held_out_wordings].tolist())
            in_test = split == "test" and bool(held_out)
            texts.append([text for i, text in enumerate(every) if (i in held_out) == in_test])
        return texts

    def episodes(self, split: Split) -> Sequence[Episode]:
        seed = 2 * self.seed + ("train", "test").index(split)
        episodes = [Episode(*e) for e in expert_episodes(self.n, seed)]
        episodes = [e._replace(task=e.skill) for e in episodes]
        if not self.pixels:
            return episodes
        if self.pixels < MIN_PIXELS:
            raise ValueError(
                f"pixels: given {self.pixels}; needs {MIN_PIXELS} or more to see anything, or 0 for the position"
            )
        size = (self.pixels, self.pixels)
        return [e._replace(frames=(draw_views(e.obs, size),), obs=e.obs[:, :0], last_obs=None) for e in episodes]
