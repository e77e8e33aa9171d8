"""The demonstrations of the built-in task of four ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from genkit.data.demonstrations.windows import Demonstrations, Episode, Steps
from genkit.data.source import Split
from genkit.envs.four_ways import NAMES, demonstrations, pictures_of


@dataclass(frozen=True, kw_only=True)
class FourWays(Demonstrations):
    """The built-in task of four ways past two obstacles: its expert's demonstrations, made on the fly."""

    n: Annotated[int, Ge(1)] = 200
    """episodes; the four ways come in turn"""
    seed: Annotated[int, Ge(0)] = 0
    obs_steps: Steps = 1
    """the place is all there is to know"""
    pixels: Annotated[int, Ge(0)] = 0
    """side of square pictures of the world, which are seen in place of the place; 0: none"""
    env: str = "four-ways"

    skills: ClassVar[tuple[str, ...]] = NAMES

    def episodes(self, split: Split) -> Sequence[Episode]:
        found = [Episode(*e) for e in demonstrations(self.n, 2 * self.seed + ("train", "test").index(split))]
        if not self.pixels:
            return found
        if self.pixels < LEAST:
            raise ValueError(f"pixels: given {self.pixels}; needs {LEAST} or more to see anything, or 0 for the place")
        size = (self.pixels, self.pixels)
        return [e._replace(frames=pictures_of(e.obs, size), obs=e.obs[:, :0], last=None) for e in found]


LEAST = 8  # pixels of a side
