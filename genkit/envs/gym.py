"""Environments of gymnasium, N of one kind, in this process. gymnasium is imported when one is made."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from genkit.core.files import one_line

INSTALL = {  # what brings the environments whose id begins like this
    "gym_pusht/": ("gym_pusht", 'pip install "gymnasium>=1.0" "gym-pusht==0.1.8"'),
    "PointMaze": ("gymnasium_robotics", 'pip install gymnasium-robotics "mujoco<4"'),
    "Adroit": ("gymnasium_robotics", 'pip install gymnasium-robotics "mujoco<4"'),
    "Fetch": ("gymnasium_robotics", 'pip install gymnasium-robotics "mujoco<4"'),
}
MUJOCO = 'pip install "gymnasium[mujoco]" "mujoco<4"'  # 4.0.0 breaks Fetch, HandReach and Meta-World
MAX_STEPS = 1000  # of an environment that says nothing


class Gym:
    """N environments ``id``, whose observations and actions are flat boxes. ``info`` knows ``success`` where they say
    ``is_success`` or ``success``, and ``coverage``.

    The last observation and info of an episode are its own: nothing resets itself (the vector environments of
    gymnasium do, and since 1.0 they hide the last info in other places).
    """

    def __init__(self, num: int, id: str, *, hint: str = "", **options: Any):
        self.num, self.id = num, id
        self.worlds = [create(id, hint, **options) for _ in range(num)]
        one = self.worlds[0]
        self.observation_space, self.action_space = one.observation_space, one.action_space
        for what, space in (("observations", one.observation_space), ("actions", one.action_space)):
            if type(space).__name__ != "Box" or len(space.shape or ()) != 1:
                raise ValueError(f"env: {id} has {what} {space}; needs a flat box of numbers")
        self.obs_dim, self.action_dim = one.observation_space.shape[0], one.action_space.shape[0]
        self.max_steps = (one.spec.max_episode_steps if one.spec else None) or MAX_STEPS
        self.ended = np.ones(num, bool)
        self.steps = np.zeros(num, int)
        self.obs = np.zeros((num, self.obs_dim))
        self.known: dict[str, np.ndarray] = {}

    def observe(self, raw: Any) -> np.ndarray:
        """What a policy sees ``[Do]`` of what the environment gives."""
        return np.asarray(raw, float)

    def reset(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> np.ndarray:
        rows = range(self.num) if rows is None else rows
        if len(seeds) != len(rows):
            raise ValueError(f"seeds: given {len(seeds)} for {len(rows)} worlds; needs one each")
        for row, seed in zip(rows, seeds, strict=True):
            raw, _ = self.worlds[row].reset(seed=int(seed))
            self.obs[row] = self.observe(raw)
            self.ended[row], self.steps[row] = False, 0
            for values in self.known.values():
                values[row] = 0
        return self.obs.copy()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        actions = np.asarray(actions, float)
        if actions.shape != (self.num, self.action_dim):
            raise ValueError(f"actions: given shape {actions.shape}; {self.id} needs {(self.num, self.action_dim)}")
        if not np.isfinite(actions).all():
            bad = int(np.flatnonzero(~np.isfinite(actions).all(1))[0])
            raise ValueError(f"actions: row {bad} is not finite; the policy has diverged")
        reward, terminated, truncated = np.zeros(self.num), np.zeros(self.num, bool), np.zeros(self.num, bool)
        for row in np.flatnonzero(~self.ended):
            bounded = np.clip(actions[row], self.action_space.low, self.action_space.high)
            raw, reward[row], ended, cut, info = self.worlds[row].step(bounded.astype(self.action_space.dtype))
            self.obs[row] = self.observe(raw)
            self.steps[row] += 1
            terminated[row] = ended
            truncated[row] = (cut or self.steps[row] >= self.max_steps) and not ended
            for name, value in told(info).items():
                self.known.setdefault(name, np.zeros(self.num))[row] = value
        self.ended |= terminated | truncated
        return self.obs.copy(), reward, terminated, truncated, {k: v.copy() for k, v in self.known.items()}

    def frame(self, row: int) -> Any:
        """A picture of a row now (PIL). ``ValueError`` where the environment draws none."""
        from PIL import Image

        if self.worlds[row].render_mode != "rgb_array":
            raise ValueError(f"{self.id}: draws no pictures, to be filmed or seen")
        return Image.fromarray(np.asarray(self.worlds[row].render()))

    def pixels(self, size: tuple[int, int]) -> np.ndarray:
        """The worlds now, as pictures uint8 ``[N, 3, *size]``."""
        h, w = size
        seen = [np.asarray(self.frame(row).convert("RGB").resize((w, h))) for row in range(self.num)]
        return np.stack(seen).transpose(0, 3, 1, 2)


def told(info: dict[str, Any]) -> dict[str, float]:
    names = {"is_success": "success", "success": "success", "coverage": "coverage"}
    return {names[k]: float(v) for k, v in info.items() if k in names}


def create(id: str, hint: str = "", **options: Any) -> Any:
    """One environment; observations that are dictionaries become one row of numbers, their names in order.
    ``ValueError`` says what to install, or what else there is."""
    try:
        import gymnasium
    except ImportError:
        raise ValueError(f'env: {id} needs gymnasium; install it: pip install "genkit[policy]"{hint}') from None
    module, install = next((v for k, v in INSTALL.items() if id.startswith(k)), ("", ""))
    if module:
        try:
            package = importlib.import_module(module)
        except ImportError:
            raise ValueError(f"env: {id} needs the package {module}; install it: {install}") from None
        gymnasium.register_envs(package)
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        os.environ.setdefault("MUJOCO_GL", "egl")  # of the ways to draw without a screen, the one that is often there
    try:
        with warnings.catch_warnings(), silent_compiler():
            warnings.simplefilter("ignore", DeprecationWarning)
            made = gymnasium.make(id, **drawing(id), **options)
            flat = not isinstance(made.observation_space, gymnasium.spaces.Dict)
            return made if flat else gymnasium.wrappers.FlattenObservation(made)
    except gymnasium.error.DependencyNotInstalled as e:
        reason = one_line(e)
        raise ValueError(f"env: {id} needs more than gymnasium ({reason}); for MuJoCo: {MUJOCO}") from None
    except gymnasium.error.Error as e:
        reason = one_line(e)
        raise ValueError(
            f"env: given {id!r}, which gymnasium does not know ({reason}); allowed: four-ways, pusht, or an id that an "
            f"installed package registers{hint}"
        ) from None


def drawing(id: str) -> dict[str, str]:
    """``render_mode``, where the environment can draw into an array. Nothing is drawn before :meth:`Gym.frame`."""
    from gymnasium.envs.registration import load_env_creator, spec

    entry = spec(id).entry_point
    creator: Any = load_env_creator(entry) if isinstance(entry, str) else entry
    modes = getattr(creator, "metadata", {}).get("render_modes", ())
    return {"render_mode": "rgb_array"} if "rgb_array" in modes else {}


@contextmanager
def silent_compiler() -> Iterator[None]:
    """Without what MuJoCo says of the models that gymnasium ships: a line on stderr and one in a file MUJOCO_LOG.TXT,
    in the folder one is in, for each world. What it says of a simulation, later, is heard."""
    try:
        mujoco: Any = importlib.import_module("mujoco")
    except ImportError:
        yield
        return
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


# The nine corners of the T in its own frame, found from the demonstrations (state against keypoint; residual 0.03).
CORNERS = np.array(
    [
        [9.2686, 90.0228], [-60.9922, -1.1872], [60.9071, -1.3929], [-0.2705, 25.5436], [-14.0637, 122.8113],
        [39.0003, 32.8608], [-39.9545, 32.7342], [-16.8217, 62.8724], [23.5411, -1.7001],
    ]
)  # fmt: skip


def keypoints(pose: np.ndarray) -> np.ndarray:
    """The corners ``[..., 9, 2]`` of a T at poses ``[..., 3]`` (x, y, angle)."""
    c, s = np.cos(pose[..., 2]), np.sin(pose[..., 2])
    turn = np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)
    return CORNERS @ turn.swapaxes(-1, -2) + pose[..., None, :2]


class PushT(Gym):
    """``gym_pusht/PushT-v0`` seen as the demonstrations are: nine corners of the T, then the hand, in pixels of 512."""

    def __init__(self, num: int, max_steps: int = 300):
        super().__init__(num, "gym_pusht/PushT-v0", obs_type="state", visualization_width=256, visualization_height=256)
        self.obs_dim, self.max_steps = 20, max_steps
        self.obs = np.zeros((num, self.obs_dim))

    def observe(self, raw: Any) -> np.ndarray:
        return np.concatenate([keypoints(np.asarray(raw)[2:]).reshape(-1), np.asarray(raw)[:2]])

    def set_state(self, row: int, state: np.ndarray) -> np.ndarray:
        """Put a row to (hand x, y; T x, y, angle), to replay a demonstration; the observations of all rows.

        The angle first: gym-pusht's own ``reset_to_state`` sets it last, which turns the T about its centre of mass
        and moves it up to 90 pixels.
        """
        world = self.worlds[row].unwrapped
        world.agent.position = [float(v) for v in state[:2]]
        world.agent.velocity = (0.0, 0.0)
        world.block.angle = float(state[4])
        world.block.position = [float(v) for v in state[2:4]]
        world.space.step(world.dt)
        self.obs[row] = self.observe(world.get_obs())
        return self.obs.copy()
