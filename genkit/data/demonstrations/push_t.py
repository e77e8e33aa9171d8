"""The demonstrations of PushT, and their mirror images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from genkit.data.demonstrations.replay import Replay
from genkit.data.demonstrations.windows import Episode
from genkit.data.source import Split
from genkit.envs.gym import keypoints

SIDE = 512  # of PushT's world
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
    env: str = "pusht"
    """the environment in which a policy is evaluated"""

    def episodes(self, split: Split) -> Sequence[Episode]:
        episodes = super().episodes(split)
        if not self.mirror or split != "train":
            return episodes
        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        return [*episodes, *MirroredPusht(**{**settings, "mirror": False}).episodes(split)]


class MirroredPusht(Pusht):
    """PushT's demonstrations, mirrored at the line x + y = 512."""

    def arrays(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        if unknown := set(names) - {*MIRRORED, *self.frames, self.reward, self.skill}:
            raise ValueError(f"mirror: {min(unknown)!r} has no known mirror image; allowed: {', '.join(MIRRORED)}")
        arrays = dict(super().arrays([*names, "state"]))
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
