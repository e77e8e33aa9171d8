"""The demonstrations of PushT (Chi et al. 2023; Florence et al. 2022), and their mirror images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from genkit.data.demonstrations.replay import Replay
from genkit.data.demonstrations.windows import Episode
from genkit.data.source import Split
from genkit.envs.gym import keypoints


@dataclass(frozen=True, kw_only=True)
class Pusht(Replay):
    """Push a T into place (Chi et al. 2023; Florence et al. 2022), demonstrated by a person: 206 episodes.

    Nine corners of the T and the hand are seen, targets of the hand are the actions, counted from where it is.
    """

    observed: tuple[str, ...] = ("keypoint", "state[0:2]")
    relative_to: str | None = "state[0:2]"
    mirror: bool = False
    """train on each episode's mirror image too: the world looks the same in a mirror along the line from corner to
    corner that the T, in its place, is symmetric about"""
    env: str = "pusht"

    def episodes(self, split: Split) -> Sequence[Episode]:
        found = super().episodes(split)
        if not self.mirror or split != "train":
            return found
        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        return [*found, *Mirrored(**{**settings, "mirror": False}).episodes(split)]


SIDE = 512  # of the world of PushT
REFLECTED = ("state", "action", "keypoint", "n_contacts")


class Mirrored(Pusht):
    """What PushT's demonstrations are in the mirror x + y = 512."""

    def arrays(self, names: Sequence[str]) -> Mapping[str, np.ndarray]:
        if unknown := set(names) - {*REFLECTED, *self.frames, self.reward, self.skill}:
            raise ValueError(f"mirror: {min(unknown)!r} has no known mirror image; allowed: {', '.join(REFLECTED)}")
        found = dict(super().arrays([*names, "state"]))
        found["state"] = state = mirrored(found["state"])
        if "action" in found:
            found["action"] = SIDE - found["action"][:, ::-1]
        if "keypoint" in found:  # those points of the T in the mirror that were looked at before it
            found["keypoint"] = keypoints(state[:, 2:]).astype(found["keypoint"].dtype)
        return found

    def pictures(self) -> np.ndarray | None:
        found = super().pictures()
        return None if found is None else found[:, :, ::-1, ::-1].swapaxes(2, 3)


def mirrored(state: np.ndarray) -> np.ndarray:
    """States ``[N, 5]`` (hand x, y; T x, y, angle) in the mirror x + y = 512."""
    hand, place, angle = state[:, 1::-1], state[:, 3:1:-1], state[:, 4:]
    return np.concatenate([SIDE - hand, SIDE - place, (np.pi / 2 - angle) % (2 * np.pi)], 1).astype(state.dtype)
