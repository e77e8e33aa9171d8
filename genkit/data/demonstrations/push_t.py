"""The demonstrations of PushT, and their mirror images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from genkit.config.numbers import Natural
from genkit.data.demonstrations.frames import cached_frames
from genkit.data.demonstrations.replay import Replay
from genkit.data.demonstrations.windows import Episode
from genkit.data.source import Split
from genkit.envs.gym import PushT, keypoints

SIDE = 512  # of PushT's world
MIN_PIXELS = 16  # side of the smallest image that shows anything
MIRRORED = ("state", "action", "keypoint", "n_contacts")  # arrays whose mirror image is known


@dataclass(frozen=True, kw_only=True)
class Pusht(Replay):
    """Push a T into place (Chi et al. 2023; Florence et al. 2022): 206 episodes of a human.

    Observed are nine corners of the T and the hand; actions are target positions of the hand, relative to it.
    """

    observed: tuple[str, ...] = ("keypoint", "state[0:2]")
    """observed arrays, or some of their columns: state[0:2]"""
    relative_to: str | None = "state[0:2]"
    """one of ``observed``, whose newest value actions are relative to; None: they are absolute"""
    mirror: bool = False
    """train on each episode's mirror image too: the world is symmetric about the diagonal that is the axis of the T in
    its target pose"""
    pixels: Natural = 0
    """side of square images, drawn from the recorded states once, that are observed in place of the corners of the T;
    0: none"""
    env: str = "pusht"
    """the environment in which a policy is evaluated"""

    def observed_columns(self) -> tuple[str, ...]:
        return tuple(name for name in self.observed if not (self.pixels and name == "keypoint"))

    def observed_entries(self) -> tuple[str, ...]:
        return self.observed_columns() if self.pixels else super().observed_entries()

    def images(self) -> list[np.ndarray]:
        return [*super().images(), *([self.drawn_images()] if self.pixels else [])]

    def drawn_images(self) -> np.ndarray:
        """The images of all recorded states, uint8 ``[N, 3, pixels, pixels]``."""
        if self.pixels < MIN_PIXELS:
            raise ValueError(f"pixels: given {self.pixels}; needs {MIN_PIXELS} or more to see anything, or 0 for none")
        states, size = self.arrays(["state"])["state"], (self.pixels, self.pixels)

        def write(frames: np.ndarray) -> None:
            env = PushT(1)
            env.reset([0])
            for i, image in enumerate(env.draw_states(states, size)):
                frames[i] = image

        # by content: a folder of zarr does not tell when a file in it changes
        key = {"states": hashlib.sha256(np.ascontiguousarray(states, np.float64).tobytes()).hexdigest()}
        return cached_frames(key, (len(states), 3, *size), write, "pusht")

    def episodes(self, split: Split) -> Sequence[Episode]:
        episodes = super().episodes(split)
        if not self.mirror or split != "train":
            return episodes
        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        return [*episodes, *MirroredPusht(**{**settings, "mirror": False}).episodes(split)]


class MirroredPusht(Pusht):
    """PushT's demonstrations, mirrored at the line x + y = 512."""

    def arrays(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        if unknown := set(names) - {*MIRRORED, self.reward, self.skill}:
            raise ValueError(f"mirror: {min(unknown)!r} has no known mirror image; allowed: {', '.join(MIRRORED)}")
        arrays = dict(super().arrays([*names, *({"state"} - {*names})]))
        arrays["state"] = state = mirror_state(arrays["state"])
        if "action" in arrays:
            arrays["action"] = SIDE - arrays["action"][:, ::-1]
        if "keypoint" in arrays:  # recomputed, so that each row is the same corner of the T as before
            arrays["keypoint"] = keypoints(state[:, 2:]).astype(arrays["keypoint"].dtype)
        return arrays

    def camera(self, name: str) -> np.ndarray:
        return super().camera(name)[:, :, ::-1, ::-1].swapaxes(2, 3)


def mirror_state(state: np.ndarray) -> np.ndarray:
    """States ``[N, 5]`` (hand x, y; T x, y, angle), mirrored at the line x + y = 512."""
    hand, place, angle = state[:, 1::-1], state[:, 3:1:-1], state[:, 4:]
    return np.concatenate([SIDE - hand, SIDE - place, (np.pi / 2 - angle) % (2 * np.pi)], 1).astype(state.dtype)
