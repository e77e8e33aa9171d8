"""Four ways: two round obstacles, one behind the other, and a goal. Each is passed above or below: four ways in all.

The smallest task on which the mean of the demonstrations is no demonstration: between above and below lies the
obstacle. Needs numpy only; N worlds run beside each other, a million steps a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

START = (0.0, 0.0)
OBSTACLES = ((0.8, 0.0), (2.0, 0.0))
RADIUS = 0.25  # of an obstacle
GOAL, REACH = (2.8, 0.0), 0.2
SPREAD = 0.04  # standard deviation of the start, on each axis
FASTEST = 0.15  # longest step
BOUND = 1.2  # past this |y|, or this far behind the start or past the goal, one is out
WAYS = 4
NAMES = ("below, below", "below, above", "above, below", "above, above")  # of the first and the second obstacle


class FourWays:
    """N worlds side by side. An observation is the place (x, y); an action the displacement (dx, dy), at most FASTEST.

    An episode ends with success (1, the only reward) in the goal, without it on a hit or outside, and is cut after
    ``max_steps``. Row i depends on its seed alone. A row that has ended stands still, with reward 0, until its reset.
    """

    obs_dim: int = 2
    action_dim: int = 2
    modes: int = WAYS

    def __init__(self, num: int, max_steps: int = 80):
        self.num, self.max_steps = num, max_steps
        self.place = np.zeros((num, 2))
        self.ended = np.ones(num, bool)
        self.steps = np.zeros(num, int)
        self.above = np.full((num, len(OBSTACLES)), -1)  # 1 above, 0 below, -1 not yet passed

    def reset(self, seeds: Sequence[int], rows: Sequence[int] | None = None) -> np.ndarray:
        """Begin episodes of these seeds in ``rows`` (all); the observations of all rows ``[N, 2]``."""
        rows = range(self.num) if rows is None else rows
        if len(seeds) != len(rows):
            raise ValueError(f"seeds: given {len(seeds)} for {len(rows)} worlds; needs one each")
        for row, seed in zip(rows, seeds, strict=True):
            self.place[row] = START + SPREAD * np.random.default_rng(int(seed)).standard_normal(2)
            self.ended[row], self.steps[row], self.above[row] = False, 0, -1
        return self.place.copy()

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """One step of every row: ``(obs [N, 2], reward [N], terminated [N], truncated [N], info)``.

        ``info`` has ``success`` [N] and ``mode`` [N], which of the four ways was taken (-1: not yet past both).
        """
        actions = np.asarray(actions, float)
        if actions.shape != (self.num, 2):
            raise ValueError(f"actions: given shape {actions.shape}; four-ways needs {(self.num, 2)}")
        if not np.isfinite(actions).all():
            bad = int(np.flatnonzero(~np.isfinite(actions).all(1))[0])
            raise ValueError(f"actions: row {bad} is not finite; the policy has diverged")
        length = np.linalg.norm(actions, axis=1, keepdims=True)
        moves = actions * np.minimum(1, FASTEST / np.maximum(length, 1e-12))
        moves[self.ended] = 0
        before = self.place
        self.place = after = before + moves
        hit = np.zeros(self.num, bool)
        for i, (x, y) in enumerate(OBSTACLES):
            hit |= distance(np.array([x, y]), before, after) < RADIUS
            passed = (before[:, 0] < x) & (after[:, 0] >= x) & (self.above[:, i] < 0)
            self.above[passed, i] = after[passed, 1] > y
        outside = (np.abs(after[:, 1]) > BOUND) | (after[:, 0] < -BOUND) | (after[:, 0] > GOAL[0] + BOUND)
        acting = ~self.ended
        success = acting & ~hit & ~outside & (distance(np.array(GOAL), before, after) < REACH)
        terminated = acting & (hit | outside | success)
        self.steps += acting
        truncated = acting & ~terminated & (self.steps >= self.max_steps)
        self.ended |= terminated | truncated
        mode = np.where((self.above >= 0).all(1), self.above @ [2, 1], -1)
        return self.place.copy(), success.astype(float), terminated, truncated, {"success": success, "mode": mode}

    def pixels(self, size: tuple[int, int]) -> np.ndarray:
        """The worlds now, as pictures uint8 ``[N, 3, *size]``."""
        return pictures_of(self.place, size)

    def draw(self, paths: Sequence[np.ndarray], colours: Sequence[Any] | None = None, title: str = "") -> Any:
        """A picture of ways ``[T, 2]`` through the world (PIL)."""
        from matplotlib.patches import Circle

        from genkit.core.pictures import figure

        def on(axes: Any) -> None:
            for place in OBSTACLES:
                axes.add_patch(Circle(place, RADIUS, color="0.35"))
            axes.add_patch(Circle(GOAL, REACH, color="tab:green", alpha=0.35))
            for i, path in enumerate(paths):
                axes.plot(path[:, 0], path[:, 1], lw=0.7, alpha=0.7, color=colours[i] if colours else None)
            axes.set(xlim=(-0.3, 3.1), ylim=(-0.9, 0.9), aspect="equal", title=title)
            axes.set_xticks([])
            axes.set_yticks([])

        return figure(on, (7, 4))

    def frame(self, row: int) -> Any:
        """The world of a row now (PIL), for films."""
        from PIL import Image, ImageDraw

        scale, left, top = 100, 0.3, 0.9
        picture = Image.new("RGB", (340, 180), "white")
        pen = ImageDraw.Draw(picture)

        def disc(place: Any, radius: float, colour: str) -> None:
            x, y, r = (place[0] + left) * scale, (top - place[1]) * scale, radius * scale
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)

        disc(GOAL, REACH, "#b5dcb5")
        for place in OBSTACLES:
            disc(place, RADIUS, "#595959")
        disc(self.place[row], 0.04, "#d62728")
        return picture


VIEW = (-0.4, 3.2, -0.9, 0.9)  # of small pictures: left, right, bottom, top
SEEN, SOFT = 0.12, 0.06  # radius of what stands for the place there, and width of the edges
COLOURS = {"ground": (255, 255, 255), "goal": (150, 210, 150), "obstacle": (90, 90, 90), "place": (215, 40, 40)}


def cover(x: Any, y: Any, radius: float, size: tuple[int, int]) -> np.ndarray:
    """How much of each pixel ``[..., 1, *size]`` a disc covers, about; between its places it moves smoothly."""
    (h, w), (left, right, bottom, top) = size, VIEW
    across = left + (right - left) * (np.arange(w) + 0.5) / w
    down = top - (top - bottom) * (np.arange(h) + 0.5) / h
    x, y = (np.asarray(v, float)[..., None, None, None] for v in (x, y))
    away = np.hypot(across[None, None, :] - x, down[None, :, None] - y)
    return np.clip(0.5 + (radius - away) / (2 * SOFT), 0, 1)


@lru_cache(maxsize=4)
def scene(size: tuple[int, int]) -> np.ndarray:
    """The world without anybody in it, ``[3, *size]``."""
    colour = {k: np.asarray(v, float)[:, None, None] for k, v in COLOURS.items()}
    out = np.broadcast_to(colour["ground"], (3, *size))
    for (x, y), radius, what in [(GOAL, REACH, "goal"), *((place, RADIUS, "obstacle") for place in OBSTACLES)]:
        share = cover(x, y, radius, size)
        out = out * (1 - share) + colour[what] * share
    return out


def pictures_of(places: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Small pictures uint8 ``[N, 3, *size]`` of the world with somebody at ``places`` ``[N, 2]``."""
    share = cover(places[:, 0], places[:, 1], SEEN, size)
    red = np.asarray(COLOURS["place"], float)[:, None, None]
    return (scene(size) * (1 - share) + red * share).round().astype(np.uint8)


def distance(point: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """From a point ``[2]`` to the segments from ``a`` to ``b``, each ``[N, 2]``: no step jumps over an obstacle."""
    along = b - a
    share = ((point - a) * along).sum(1) / np.maximum((along**2).sum(1), 1e-12)
    nearest = a + np.clip(share, 0, 1)[:, None] * along
    return np.linalg.norm(nearest - point, axis=1)


class Expert:
    """Steers N worlds along smooth ways past the obstacles, row i on way ``i % 4`` (or on ``way``).

    Each episode has a height and a speed of its own, each step a small error: a person's demonstrations, not a track.
    """

    HEIGHTS, SPEEDS, ERROR, HALF = (0.4, 0.5), (0.055, 0.07), 0.01, 0.6

    def __init__(self, num: int, env: str = "four-ways", *, way: int | None = None):
        if way is not None and not 0 <= way < WAYS:
            raise ValueError(f"way: given {way}; allowed 0..{WAYS - 1}: {'; '.join(NAMES)}")
        ways = np.arange(num) % WAYS if way is None else np.full(num, way)
        self.signs = np.stack([ways // 2, ways % 2], 1) * 2 - 1
        self.ways = ways

    def reset(self, seeds: Sequence[int]) -> None:
        self.rngs = [np.random.default_rng((int(seed), 1)) for seed in seeds]
        self.heights = np.array([r.uniform(*self.HEIGHTS) for r in self.rngs])
        self.speeds = np.array([r.uniform(*self.SPEEDS) for r in self.rngs])

    def track(self, x: np.ndarray) -> np.ndarray:
        """The height ``[N]`` at which each way passes ``x`` ``[N]``."""
        y = np.zeros_like(x)
        for i, (centre, _) in enumerate(OBSTACLES):
            u = np.clip((x - centre) / self.HALF, -1, 1)
            y += self.heights * self.signs[:, i] * np.cos(np.pi / 2 * u) ** 2
        return y

    def act(self, obs: np.ndarray) -> np.ndarray:
        """The next displacement ``[N, 2]`` at places ``[N, 2]``."""
        x, y = obs.T
        ahead = x + self.speeds
        slope = (self.track(ahead) - self.track(x)) / self.speeds
        dx = self.speeds / np.sqrt(1 + slope**2)  # the same speed along the way, up and down as well as straight on
        aim = self.track(x + dx)
        dy = aim - 0.7 * y - 0.3 * self.track(x)  # along the track, and back to it by 0.7 of what one is off
        error = np.stack([r.standard_normal(2) for r in self.rngs])
        return np.stack([dx, dy], 1) + self.ERROR * error


def demonstrations(num: int, seed: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """``num`` episodes of the expert, the ways in turn: of each the observations ``[T, 2]``, actions ``[T, 2]``,
    rewards ``[T]``, which way it is ``[T]``, and the place at the end ``[2]``."""
    world, expert = FourWays(num), Expert(num)
    seeds = [seed * 1_000_003 + i for i in range(num)]
    obs, actions, rewards, ends = [world.reset(seeds)], [], [], np.full(num, world.max_steps)
    expert.reset(seeds)
    while not world.ended.all():
        actions.append(expert.act(obs[-1]))
        seen, reward, terminated, truncated, _ = world.step(actions[-1])
        obs.append(seen)
        rewards.append(reward)
        ends = np.where(terminated | truncated, len(actions), ends)
    o, a, r = np.stack(obs, 1), np.stack(actions, 1), np.stack(rewards, 1)
    return [(o[i, :n], a[i, :n], r[i, :n], np.full(n, expert.ways[i]), o[i, n]) for i, n in enumerate(ends)]
