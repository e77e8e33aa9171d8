"""Four ways: two round obstacles in a row and a goal. Each obstacle is passed above or below, so there are four ways.

The smallest task in which the mean of the demonstrations is not a demonstration: between above and below lies the
obstacle. Needs numpy only; N copies run side by side, a million steps a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from genkit.envs import check_actions

START = (0.0, 0.0)
OBSTACLES = ((0.8, 0.0), (2.0, 0.0))
RADIUS = 0.25  # of an obstacle
GOAL, GOAL_RADIUS = (2.8, 0.0), 0.2
START_STD = 0.04  # on each axis
MAX_STEP = 0.15  # length of the longest step
BOUND = 1.2  # beyond this |y|, or this far behind the start or past the goal, an episode ends
NUM_MODES = 4
MODE_NAMES = ("below, below", "below, above", "above, below", "above, above")  # of the first and the second obstacle


class FourWays:
    """N copies side by side. An observation is the position (x, y); an action the displacement (dx, dy), at most
    ``MAX_STEP`` long.

    An episode ends with success (1, the only reward) in the goal, without at an obstacle or out of bounds, and is
    truncated after ``max_steps``. Row i depends on its seed only. A row that has ended stays as it is, with reward 0,
    until it is reset.
    """

    obs_dim: int = 2
    action_dim: int = 2
    modes: int = NUM_MODES

    def __init__(self, num: int, max_steps: int = 80):
        self.num, self.max_steps = num, max_steps
        self.position = np.zeros((num, 2))
        self.ended = np.ones(num, bool)
        self.steps = np.zeros(num, int)
        self.above = np.full((num, len(OBSTACLES)), -1)  # 1 above, 0 below, -1 not passed yet

    def reset(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> np.ndarray:
        """Begin episodes with these seeds in ``rows`` (None: all); the observations of all rows ``[N, 2]``."""
        rows = range(self.num) if rows is None else rows
        if len(seeds) != len(rows):
            raise ValueError(f"seeds: given {len(seeds)} for {len(rows)} rows; needs one each")
        for row, seed in zip(rows, seeds, strict=True):
            self.position[row] = START + START_STD * np.random.default_rng(int(seed)).standard_normal(2)
            self.ended[row], self.steps[row], self.above[row] = False, 0, -1
        return self.position.copy()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """One step of every row: ``(obs [N, 2], reward [N], terminated [N], truncated [N], info)``.

        ``info`` has ``success`` ``[N]`` and ``mode`` ``[N]``, the way that was taken (-1: not yet past both obstacles).
        """
        actions = check_actions(actions, self.num, self.action_dim, "four-ways")
        length = np.linalg.norm(actions, axis=1, keepdims=True)
        moves = actions * np.minimum(1, MAX_STEP / np.maximum(length, 1e-12))
        moves[self.ended] = 0
        before = self.position
        self.position = after = before + moves
        hit = np.zeros(self.num, bool)
        for i, (x, y) in enumerate(OBSTACLES):
            hit |= distance(np.array([x, y]), before, after) < RADIUS
            passed = (before[:, 0] < x) & (after[:, 0] >= x) & (self.above[:, i] < 0)
            self.above[passed, i] = after[passed, 1] > y
        outside = (np.abs(after[:, 1]) > BOUND) | (after[:, 0] < -BOUND) | (after[:, 0] > GOAL[0] + BOUND)
        acting = ~self.ended
        success = acting & ~hit & ~outside & (distance(np.array(GOAL), before, after) < GOAL_RADIUS)
        terminated = acting & (hit | outside | success)
        self.steps += acting
        truncated = acting & ~terminated & (self.steps >= self.max_steps)
        self.ended |= terminated | truncated
        mode = np.where((self.above >= 0).all(1), self.above @ [2, 1], -1)
        return self.position.copy(), success.astype(float), terminated, truncated, {"success": success, "mode": mode}

    def pixels(self, size: tuple[int, int]) -> np.ndarray:
        """Small images of all rows now, uint8 ``[N, 3, *size]``."""
        return draw_views(self.position, size)

    def draw(self, paths: Sequence[np.ndarray], colours: Sequence[Any] | None = None, title: str = "") -> Any:
        """A figure of paths ``[T, 2]`` through the world, as a PIL image."""
        from matplotlib.patches import Circle  # lazy: speed

        from genkit.core.pictures import draw_figure

        def plot(axes: Any) -> None:
            for centre in OBSTACLES:
                axes.add_patch(Circle(centre, RADIUS, color="0.35"))
            axes.add_patch(Circle(GOAL, GOAL_RADIUS, color="tab:green", alpha=0.35))
            for i, path in enumerate(paths):
                axes.plot(path[:, 0], path[:, 1], lw=0.7, alpha=0.7, color=colours[i] if colours else None)
            axes.set(xlim=(-0.3, 3.1), ylim=(-0.9, 0.9), aspect="equal", title=title)
            axes.set_xticks([])
            axes.set_yticks([])

        return draw_figure(plot, (7, 4))

    def frame(self, row: int) -> Any:
        """One row now, as a PIL image for films."""
        from PIL import Image, ImageDraw  # lazy: speed

        scale, left, top = 100, 0.3, 0.9
        image = Image.new("RGB", (340, 180), "white")
        pen = ImageDraw.Draw(image)

        def disc(centre: Any, radius: float, colour: str) -> None:
            x, y, r = (centre[0] + left) * scale, (top - centre[1]) * scale, radius * scale
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)

        disc(GOAL, GOAL_RADIUS, "#b5dcb5")
        for centre in OBSTACLES:
            disc(centre, RADIUS, "#595959")
        disc(self.position[row], 0.04, "#d62728")
        return image


# -------------------------------------------------------------------------------------------------- small images
VIEW = (-0.4, 3.2, -0.9, 0.9)  # left, right, bottom, top
AGENT_RADIUS, EDGE = 0.12, 0.06  # radius of the disc at the position, and width of soft edges
COLOURS = {"ground": (255, 255, 255), "goal": (150, 210, 150), "obstacle": (90, 90, 90), "agent": (215, 40, 40)}


def coverage(x: Any, y: Any, radius: float, size: tuple[int, int]) -> np.ndarray:
    """The fraction of each pixel ``[..., 1, *size]`` that a disc covers, approximately; smooth in its position."""
    (h, w), (left, right, bottom, top) = size, VIEW
    columns = left + (right - left) * (np.arange(w) + 0.5) / w
    rows = top - (top - bottom) * (np.arange(h) + 0.5) / h
    x, y = (np.asarray(v, float)[..., None, None, None] for v in (x, y))
    away = np.hypot(columns[None, None, :] - x, rows[None, :, None] - y)
    return np.clip(0.5 + (radius - away) / (2 * EDGE), 0, 1)


@lru_cache(maxsize=4)
def draw_background(size: tuple[int, int]) -> np.ndarray:
    """The world without an agent, float ``[3, *size]``."""
    colour = {k: np.asarray(v, float)[:, None, None] for k, v in COLOURS.items()}
    out = np.broadcast_to(colour["ground"], (3, *size))
    discs = [(GOAL, GOAL_RADIUS, "goal"), *((centre, RADIUS, "obstacle") for centre in OBSTACLES)]
    for (x, y), radius, name in discs:
        share = coverage(x, y, radius, size)
        out = out * (1 - share) + colour[name] * share
    return out


def draw_views(positions: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Small images uint8 ``[N, 3, *size]`` of the world with an agent at ``positions`` ``[N, 2]``."""
    share = coverage(positions[:, 0], positions[:, 1], AGENT_RADIUS, size)
    colour = np.asarray(COLOURS["agent"], float)[:, None, None]
    return (draw_background(size) * (1 - share) + colour * share).round().astype(np.uint8)


def distance(point: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance of a point ``[2]`` to the segments from ``a`` to ``b``, each ``[N, 2]``: no step jumps an obstacle."""
    segment = b - a
    share = ((point - a) * segment).sum(1) / np.maximum((segment**2).sum(1), 1e-12)
    nearest = a + np.clip(share, 0, 1)[:, None] * segment
    return np.linalg.norm(nearest - point, axis=1)


# ---------------------------------------------------------------------------------------------------- the expert
class FourWaysExpert:
    """Steers N rows along smooth paths past the obstacles, row i on way ``i % 4`` (or on way ``mode``).

    Each episode has its own height and speed, and each step a small error, like demonstrations of a human.
    """

    HEIGHTS, SPEEDS, ERROR, HALF_WIDTH = (0.4, 0.5), (0.055, 0.07), 0.01, 0.6

    def __init__(self, num: int, env: str = "four-ways", *, mode: int | None = None):
        if mode is not None and not 0 <= mode < NUM_MODES:
            raise ValueError(f"mode: given {mode}; allowed 0..{NUM_MODES - 1}: {'; '.join(MODE_NAMES)}")
        self.modes = np.arange(num) % NUM_MODES if mode is None else np.full(num, mode)
        self.signs = np.stack([self.modes // 2, self.modes % 2], 1) * 2 - 1

    def reset(self, seeds: Sequence[int]) -> None:
        """Draw the height and speed of each row's episode by its seed."""
        self.rngs = [np.random.default_rng((int(seed), 1)) for seed in seeds]
        self.heights = np.array([r.uniform(*self.HEIGHTS) for r in self.rngs])
        self.speeds = np.array([r.uniform(*self.SPEEDS) for r in self.rngs])

    def track(self, x: np.ndarray) -> np.ndarray:
        """The height ``[N]`` of each row's path at ``x`` ``[N]``."""
        y = np.zeros_like(x)
        for i, (centre, _) in enumerate(OBSTACLES):
            u = np.clip((x - centre) / self.HALF_WIDTH, -1, 1)
            y += self.heights * self.signs[:, i] * np.cos(np.pi / 2 * u) ** 2
        return y

    def act(self, obs: np.ndarray) -> np.ndarray:
        """The next displacement ``[N, 2]`` at positions ``[N, 2]``."""
        x, y = obs.T
        ahead = x + self.speeds
        slope = (self.track(ahead) - self.track(x)) / self.speeds
        dx = self.speeds / np.sqrt(1 + slope**2)  # equal speed along the path, on slopes and straights
        target = self.track(x + dx)
        dy = target - 0.7 * y - 0.3 * self.track(x)  # along the track, and back to it by 0.7 of the deviation
        error = np.stack([r.standard_normal(2) for r in self.rngs])
        return np.stack([dx, dy], 1) + self.ERROR * error


def expert_episodes(num: int, seed: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """``num`` episodes of the expert, the ways in turn: of each the observations ``[T, 2]``, actions ``[T, 2]``,
    rewards ``[T]``, its way ``[T]`` and the last position ``[2]``."""
    env, expert = FourWays(num), FourWaysExpert(num)
    seeds = [seed * 1_000_003 + i for i in range(num)]
    obs, actions, rewards, ends = [env.reset(seeds)], [], [], np.full(num, env.max_steps)
    expert.reset(seeds)
    while not env.ended.all():
        actions.append(expert.act(obs[-1]))
        after, reward, terminated, truncated, _ = env.step(actions[-1])
        obs.append(after)
        rewards.append(reward)
        ends = np.where(terminated | truncated, len(actions), ends)
    o, a, r = np.stack(obs, 1), np.stack(actions, 1), np.stack(rewards, 1)
    return [(o[i, :n], a[i, :n], r[i, :n], np.full(n, expert.modes[i]), o[i, n]) for i, n in enumerate(ends)]
