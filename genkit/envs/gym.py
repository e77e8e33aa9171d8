"""Environments of gymnasium, N of one kind in this process. gymnasium is imported when one is made."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np

from genkit.core.files import format_error
from genkit.envs import check_actions

logger = logging.getLogger("genkit")
INSTALL = {  # start of an environment's id -> the package that registers it, and how to install it
    "gym_pusht/": ("gym_pusht", 'pip install "gymnasium>=1.0" "gym-pusht==0.1.8"'),
    "PointMaze": ("gymnasium_robotics", 'pip install gymnasium-robotics "mujoco<4"'),
    "Adroit": ("gymnasium_robotics", 'pip install gymnasium-robotics "mujoco<4"'),
    "Fetch": ("gymnasium_robotics", 'pip install gymnasium-robotics "mujoco<4"'),
}
REGISTERING_PACKAGES = {"gymnasium", *(package for package, _ in INSTALL.values())}  # whose ids need no module
INSTALL_MUJOCO = 'pip install "gymnasium[mujoco]" "mujoco<4"'  # 4.0.0 breaks Fetch, HandReach and Meta-World
DEFAULT_MAX_STEPS = 1000  # if the environment has no limit of its own
INFO_NAMES = {"is_success": "success", "success": "success", "coverage": "coverage"}


class Gym:
    """N environments ``id`` whose observations and actions are flat boxes.

    ``info`` has ``success`` if they report ``is_success`` or ``success``, and ``coverage``. The last observation and
    info of an episode are its own, since nothing resets itself (gymnasium's vector environments do, and have hidden the
    last info in other places since 1.0).
    """

    def __init__(
        self,
        num: int,
        id: str,
        *,
        hint: str = "",
        max_steps: int | None = None,
        entries: Sequence[str] = (),
        **arguments: Any,
    ):
        self.num, self.id = num, id
        if max_steps is not None:  # gymnasium's own limit, or it would end longer episodes
            arguments["max_episode_steps"] = max_steps
        self.envs = [create(id, hint, entries, **arguments) for _ in range(num)]
        first = self.envs[0]
        self.observation_space, self.action_space = first.observation_space, first.action_space
        for name, space in (("observations", first.observation_space), ("actions", first.action_space)):
            if type(space).__name__ != "Box" or len(space.shape or ()) != 1:
                raise ValueError(f"env: {id} has {name} {space}; needs a flat box of numbers")
        self.obs_dim, self.action_dim = first.observation_space.shape[0], first.action_space.shape[0]
        self.max_steps = (first.spec.max_episode_steps if first.spec else None) or DEFAULT_MAX_STEPS
        self.ended = np.ones(num, bool)
        self.steps = np.zeros(num, int)
        self.obs = np.zeros((num, self.obs_dim))
        self.info: dict[str, np.ndarray] = {}

    def observe(self, raw: Any) -> np.ndarray:
        """The observation ``[Do]`` of a policy, from the one that the environment returned."""
        return np.asarray(raw, float)

    def reset(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> np.ndarray:
        """Begin episodes with these seeds in ``rows`` (None: all); the observations of all rows ``[N, Do]``."""
        rows = range(self.num) if rows is None else rows
        if len(seeds) != len(rows):
            raise ValueError(f"seeds: given {len(seeds)} for {len(rows)} rows; needs one each")
        for row, seed in zip(rows, seeds, strict=True):
            raw, _ = self.envs[row].reset(seed=int(seed))
            self.obs[row] = self.observe(raw)
            self.ended[row], self.steps[row] = False, 0
            for values in self.info.values():
                values[row] = 0
        return self.obs.copy()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """One step of every row that has not ended; actions ``[N, A]`` are clipped to the action space."""
        actions = check_actions(actions, self.num, self.action_dim, self.id)
        reward, terminated, truncated = np.zeros(self.num), np.zeros(self.num, bool), np.zeros(self.num, bool)
        for row in np.flatnonzero(~self.ended):
            bounded = np.clip(actions[row], self.action_space.low, self.action_space.high)
            raw, reward[row], ended, cut, info = self.envs[row].step(bounded.astype(self.action_space.dtype))
            self.obs[row] = self.observe(raw)
            self.steps[row] += 1
            terminated[row] = ended
            truncated[row] = (cut or self.steps[row] >= self.max_steps) and not ended
            for name, value in info.items():
                if name in INFO_NAMES:
                    self.info.setdefault(INFO_NAMES[name], np.zeros(self.num))[row] = float(value)
        self.ended |= terminated | truncated
        return self.obs.copy(), reward, terminated, truncated, {k: v.copy() for k, v in self.info.items()}

    def frame(self, row: int) -> Any:
        """One row now, as a PIL image. ``ValueError`` if the environment renders none."""
        from PIL import Image  # lazy: speed

        if self.envs[row].render_mode != "rgb_array":
            raise ValueError(f"{self.id}: renders no images, for films or observations")
        return Image.fromarray(np.asarray(self.envs[row].render()))

    def pixels(self, size: tuple[int, int]) -> np.ndarray:
        """Small images of all rows now, uint8 ``[N, 3, *size]``."""
        h, w = size
        images = [np.asarray(self.frame(row).convert("RGB").resize((w, h))) for row in range(self.num)]
        return np.stack(images).transpose(0, 3, 1, 2)


def create(id: str, hint: str = "", entries: Sequence[str] = (), **arguments: Any) -> Any:
    """One environment, made with these keyword arguments. ``id`` may name a module to import first: ``module:Env-v0``.

    Observations that are dictionaries are flattened, ``entries`` first to last; without them in the order of the names.
    ``ValueError`` says what to install, which names are allowed, or which argument is refused.
    """
    try:
        import gymnasium  # lazy: optional
    except ImportError:
        raise ValueError(f'env: {id} needs gymnasium; install it: pip install "genkit-torch[policy]"{hint}') from None
    own_module, _, plain = id.rpartition(":")
    if own_module:
        import_environments(id, own_module)
    module, install = next((v for k, v in INSTALL.items() if plain.startswith(k)), ("", ""))
    if module:
        try:
            package = importlib.import_module(module)
        except ImportError:
            raise ValueError(f"env: {id} needs the package {module}; install it: {install}") from None
        gymnasium.register_envs(package)
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        os.environ.setdefault("MUJOCO_GL", "egl")  # of the ways to draw without a screen, the most common
    try:
        with warnings.catch_warnings(), mute_mujoco():
            warnings.simplefilter("ignore", DeprecationWarning)
            env = gymnasium.make(plain, **render_options(plain), **arguments)
            flat = not isinstance(env.observation_space, gymnasium.spaces.Dict)
            return env if flat else flatten_observations(env, id, entries)
    except gymnasium.error.DependencyNotInstalled as e:
        reason = format_error(e)
        raise ValueError(f"env: {id} needs more than gymnasium ({reason}); for MuJoCo: {INSTALL_MUJOCO}") from None
    except gymnasium.error.Error as e:
        reason = format_error(e)
        raise ValueError(
            f"env: given {id!r}, which gymnasium does not know ({reason}); allowed: four-ways, pusht, or an id that an "
            f"installed package registers, or module:id, whose module registers it{hint}"
        ) from None
    except TypeError as e:
        if not arguments:
            raise
        given = ", ".join(f"{k}={v}" for k, v in arguments.items())
        raise ValueError(f"env_args: {id} refuses {given} ({format_error(e)}); leave out what it does not know") from e


def import_environments(id: str, module: str) -> None:
    """Import the module that registers an environment. An error inside it is its author's and keeps its traceback."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as e:
        if not f"{module}.".startswith(f"{e.name}."):
            raise
        raise ValueError(f"env: given {id}; there is no module {e.name}; is it on PYTHONPATH?") from None


def flatten_observations(env: Any, id: str, entries: Sequence[str]) -> Any:
    """An environment whose dictionaries are flattened to ``entries``, as a policy was trained, or to all by order of
    their names: an environment may list them in another order than a recording does.

    ``entries`` may have dots for what is inside other dictionaries. ``ValueError`` if only some of them are there.
    """
    import gymnasium  # lazy: optional

    space = env.observation_space
    names = list(dict.fromkeys(str(entry).partition(".")[0] for entry in entries))
    missing = [name for name in names if name not in space.spaces]
    if missing and len(missing) < len(names):
        known = ", ".join(space.spaces)
        raise ValueError(f"env: observations of {id} have no {missing[0]!r}, which the policy was trained on: {known}")
    if missing:
        order = ", ".join(sorted(space.spaces))
        logger.warning(f"{id}: the policy was trained on {', '.join(names)}; it is given {order}, in this order")
    ordered = order_entries(space, [] if missing else names)
    if ordered != space or list_entries(ordered) != list_entries(space):
        env = gymnasium.wrappers.TransformObservation(env, keep_observation, ordered)
    return gymnasium.wrappers.FlattenObservation(env)


def order_entries(space: Any, names: Sequence[str] = ()) -> Any:
    """A gymnasium space whose dictionaries have their entries by name, at all depths; with ``names``, these only."""
    inside = getattr(space, "spaces", None)
    if not isinstance(inside, Mapping):
        return space
    return type(space)(OrderedDict((k, order_entries(inside[k])) for k in names or sorted(inside)))


def list_entries(space: Any) -> list[str]:
    """The names of all entries of a gymnasium space of dictionaries, in their order."""
    inside = getattr(space, "spaces", None)
    if not isinstance(inside, Mapping):
        return []
    return [name for key, value in inside.items() for name in [key, *list_entries(value)]]


def keep_observation(obs: Any) -> Any:
    """The observation itself, of which flattening takes the entries that the space lists."""
    return obs


def render_options(id: str) -> dict[str, str]:
    """``render_mode``, if the environment can render into an array. Nothing is rendered before :meth:`Gym.frame`."""
    from gymnasium.envs.registration import load_env_creator, spec  # lazy: optional

    entry = spec(id).entry_point
    creator: Any = load_env_creator(entry) if isinstance(entry, str) else entry
    modes = getattr(creator, "metadata", {}).get("render_modes", ())
    return {"render_mode": "rgb_array"} if "rgb_array" in modes else {}


def ignore_warning(message: str) -> None:
    """A warning handler of MuJoCo that drops the message."""


@contextmanager
def mute_mujoco() -> Iterator[None]:
    """Suppress MuJoCo's warnings about the models that gymnasium ships: for each environment a line on stderr and one
    in a file MUJOCO_LOG.TXT of the current folder. Later warnings, about a simulation, are shown."""
    try:
        mujoco: Any = importlib.import_module("mujoco")
    except ImportError:
        yield
        return
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(ignore_warning)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


# -------------------------------------------------------------------------------------------------------- PushT
# The nine corners of the T in its own frame, fitted to the demonstrations (state against keypoints; residual 0.03).
CORNERS = np.array(
    [
        [9.2686, 90.0228], [-60.9922, -1.1872], [60.9071, -1.3929], [-0.2705, 25.5436], [-14.0637, 122.8113],
        [39.0003, 32.8608], [-39.9545, 32.7342], [-16.8217, 62.8724], [23.5411, -1.7001],
    ]
)  # fmt: skip


def keypoints(pose: np.ndarray) -> np.ndarray:
    """The corners ``[..., 9, 2]`` of a T with poses ``[..., 3]`` (x, y, angle)."""
    c, s = np.cos(pose[..., 2]), np.sin(pose[..., 2])
    rotation = np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)
    return CORNERS @ rotation.swapaxes(-1, -2) + pose[..., None, :2]


class Coverage:
    """The share of the goal that the T covers, in place of the method of a ``gym_pusht`` environment, which makes the
    polygons of the goal again in every step."""

    def __init__(self, env: Any):
        self.env, self.make_polygons = env, importlib.import_module("gym_pusht.envs.pusht").pymunk_to_shapely
        self.pose: np.ndarray | None = None

    def __call__(self) -> float:
        env = self.env
        if self.pose is None or not np.array_equal(self.pose, env.goal_pose):
            self.pose = np.array(env.goal_pose)
            self.goal = self.make_polygons(env.get_goal_pose_body(self.pose), env.block.shapes)
        return self.goal.intersection(self.make_polygons(env.block, env.block.shapes)).area / self.goal.area


class PushT(Gym):
    """``gym_pusht/PushT-v0`` with the observations of the demonstrations: nine corners of the T, then the hand, in
    pixels of 512. With ``entries``, names of arrays of the demonstrations, only these."""

    ENTRIES: ClassVar[Mapping[str, slice]] = {"keypoint": slice(0, 18), "state[0:2]": slice(18, 20)}

    def __init__(self, num: int, max_steps: int = 300, entries: Sequence[str] = ()):
        known = bool(entries) and set(entries) <= self.ENTRIES.keys()
        self.columns = np.concatenate([np.arange(20)[self.ENTRIES[e]] for e in (entries if known else self.ENTRIES)])
        size: dict[str, Any] = {"visualization_width": 256, "visualization_height": 256}
        super().__init__(num, "gym_pusht/PushT-v0", max_steps=max_steps, obs_type="state", **size)
        self.obs_dim = len(self.columns)
        self.obs = np.zeros((num, self.obs_dim))
        for env in self.envs:
            env.unwrapped._get_coverage = Coverage(env.unwrapped)

    def observe(self, raw: Any) -> np.ndarray:
        return np.concatenate([keypoints(np.asarray(raw)[2:]).reshape(-1), np.asarray(raw)[:2]])[self.columns]

    def pixels(self, size: tuple[int, int]) -> np.ndarray:
        """Images of all rows now, uint8 ``[N, 3, *size]``, as gym-pusht's observations: without the target of the
        hand, which its films show."""
        h, w = size
        envs = [env.unwrapped for env in self.envs]
        images = [env._get_img(env._draw(), width=w, height=h, render_action=False) for env in envs]
        return np.stack(images).transpose(0, 3, 1, 2)

    def draw_states(self, states: np.ndarray, size: tuple[int, int]) -> Iterator[np.ndarray]:
        """The image uint8 ``[3, *size]`` of each of ``states`` ``[N, 5]`` (hand x, y; T x, y, angle), by the first
        row, which must have been reset."""
        env = self.envs[0].unwrapped
        for state in states:
            env.agent.position = [float(v) for v in state[:2]]
            env.block.angle = float(state[4])  # before the position, as in set_state
            env.block.position = [float(v) for v in state[2:4]]
            for body in (env.agent, env.block):
                env.space.reindex_shapes_for_body(body)
            yield self.pixels(size)[0]

    def set_state(self, row: int, state: np.ndarray) -> np.ndarray:
        """Set a row to (hand x, y; T x, y, angle), to replay a demonstration; the observations of all rows.

        The angle is set first: gym-pusht's own ``reset_to_state`` sets it last, which turns the T about its centre of
        mass and moves it by up to 90 pixels.
        """
        env = self.envs[row].unwrapped
        env.agent.position = [float(v) for v in state[:2]]
        env.agent.velocity = (0.0, 0.0)
        env.block.angle = float(state[4])
        env.block.position = [float(v) for v in state[2:4]]
        env.space.step(env.dt)
        self.obs[row] = self.observe(env.get_obs())
        return self.obs.copy()
