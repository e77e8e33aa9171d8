"""Points in the plane, drawn from shapes that a person can judge by eye.

Every shape is centred and scaled to a mean variance of one over its two dimensions, by constants of the shape and not
of the sample, so that all splits and sizes share one space. ``noise`` is added after the scaling, in those units.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import pi, sqrt
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Ge

from genkit.core import Label, Spec, seed_of
from genkit.data.codecs import Identity
from genkit.data.images import InMemory
from genkit.data.source import DataSource, Split, check_split

Points = tuple[np.ndarray, np.ndarray | None]  # float [n, 2], and classes int [n] where the shape has any


@dataclass(frozen=True, kw_only=True)
class Toy(DataSource):
    n: Annotated[int, Ge(1)] = 50_000
    noise: Annotated[float, Ge(0)] = 0.05
    seed: int = 0
    labels: bool = True  # False: leave out the classes, where there are any

    default_backbone: ClassVar[str] = "mlp"
    classes: ClassVar[int] = 0
    mean: ClassVar[tuple[float, float]] = (0.0, 0.0)  # of the shape itself
    scale: ClassVar[float] = 1.0  # the root of its mean variance

    @abstractmethod
    def shape(self, rng: np.random.Generator) -> Points:
        """``n`` points of the bare shape."""

    def load(self, split: Split = "train") -> InMemory:
        check_split(split)
        rng = np.random.default_rng(seed_of(self.seed, ("train", "test").index(split)))
        points, labels = self.shape(rng)
        points = (points - self.mean) / self.scale + self.noise * rng.standard_normal(points.shape)
        x = torch.from_numpy(points).float()
        if labels is None or not self.labels:
            return InMemory(x, {}, Spec((2,)), Identity())
        spec = Spec((2,), {"label": Label(self.classes)})
        return InMemory(x, {"label": torch.from_numpy(labels).long()}, spec, Identity())


@dataclass(frozen=True, kw_only=True)
class Moons(Toy):
    """Two half circles that reach into each other; the class says which."""

    classes = 2
    mean = (0.5, 0.25)
    scale = 0.70503  # variances 3/4 and 1/2 - (2/pi)^2 + (2/pi - 1/4)^2

    def shape(self, rng: np.random.Generator) -> Points:
        from sklearn.datasets import make_moons

        points, labels = make_moons(self.n, random_state=int(rng.integers(2**32)))
        return np.asarray(points), np.asarray(labels)


@dataclass(frozen=True, kw_only=True)
class RotatedMoons(Toy):
    """Two moons, turned counter-clockwise by ``angle`` degrees: the same data set seen from another domain."""

    angle: float = 45.0

    classes = Moons.classes
    mean = Moons.mean
    scale = Moons.scale

    def shape(self, rng: np.random.Generator) -> Points:
        points, labels = Moons(n=self.n).shape(rng)
        c, s = np.cos(self.angle * pi / 180), np.sin(self.angle * pi / 180)
        return (points - self.mean) @ np.array([[c, s], [-s, c]]) + self.mean, labels


@dataclass(frozen=True, kw_only=True)
class EightGaussians(Toy):
    """Eight normals of deviation ``noise`` on a circle of radius sqrt(2), counted from the positive x-axis."""

    noise: Annotated[float, Ge(0)] = 0.1
    classes = 8

    def shape(self, rng: np.random.Generator) -> Points:
        labels = rng.integers(8, size=self.n)
        return sqrt(2) * np.stack([np.cos(labels * pi / 4), np.sin(labels * pi / 4)], axis=1), labels


@dataclass(frozen=True, kw_only=True)
class Checkerboard(Toy):
    """The eight black squares of a 4x4 board."""

    noise: Annotated[float, Ge(0)] = 0.0  # the edges are the point
    scale = 2 / sqrt(3)  # the variance of a uniform on [-2, 2] is 4/3

    def shape(self, rng: np.random.Generator) -> Points:
        column, row = rng.integers(4, size=self.n), rng.integers(2, size=self.n)
        corner = np.stack([column - 2, 2 * row + column % 2 - 2], axis=1)
        return corner + rng.random((self.n, 2)), None


@dataclass(frozen=True, kw_only=True)
class SwissRoll(Toy):
    """The roll seen from its end: one arm, turning one and a half times, uniform in the angle."""

    mean = (2.0, 0.2122)
    scale = 6.7891

    def shape(self, rng: np.random.Generator) -> Points:
        from sklearn.datasets import make_swiss_roll

        return make_swiss_roll(self.n, random_state=int(rng.integers(2**32)))[0][:, [0, 2]], None


@dataclass(frozen=True, kw_only=True)
class Spirals(Toy):
    """Two arms, each the other turned by half a turn, uniform in area; the class says which."""

    classes = 2
    scale = 1 / 2  # of the radius, which is the root of a uniform: E[r^2] / 2 = 1/4

    def shape(self, rng: np.random.Generator) -> Points:
        labels = rng.integers(2, size=self.n)
        r = np.sqrt(rng.random(self.n))
        angle = 3 * pi * r + pi * labels
        return r[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1), labels
