"""Toy data: points in the plane, drawn from shapes that can be judged by eye.

Every shape is centred and scaled to a mean variance of one over its two dimensions, by constants of the shape and not
of the sample, so that all splits and sizes share one space. ``noise`` is added after the scaling, in those units.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from math import pi, sqrt
from typing import ClassVar

import numpy as np
import torch

from genkit.config.numbers import Count, NonNegative
from genkit.core import Label, Spec, seed_of
from genkit.data.codecs import Identity
from genkit.data.in_memory import InMemory
from genkit.data.source import DataSource, Split, check_split

Points = tuple[np.ndarray, np.ndarray | None]  # float [n, 2], and classes int [n] if the shape has any


@dataclass(frozen=True, kw_only=True)
class Toy(DataSource):
    """Base of the toy shapes; each sets the class attributes below and draws points in :meth:`shape`."""

    n: Count = 50_000
    """points of a split"""
    noise: NonNegative = 0.05
    """standard deviation of the normal noise"""
    seed: int = 0
    """seed of the points; both splits differ"""
    labels: bool = True
    """condition on the class of each point, if the shape has classes"""

    default_backbone: ClassVar[str] = "mlp"
    classes: ClassVar[int] = 0
    mean: ClassVar[tuple[float, float]] = (0.0, 0.0)
    """mean of the bare shape"""
    scale: ClassVar[float] = 1.0
    """square root of the mean variance of the bare shape"""

    @abstractmethod
    def shape(self, rng: np.random.Generator) -> Points:
        """Draw ``n`` points of the bare shape."""

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
    """Two interleaving half circles, one for each class."""

    classes = 2
    mean = (0.5, 0.25)
    scale = 0.70503  # variances 3/4 and 1/2 - (2/pi)^2 + (2/pi - 1/4)^2

    def shape(self, rng: np.random.Generator) -> Points:
        from sklearn.datasets import make_moons  # lazy: speed

        points, labels = make_moons(self.n, random_state=int(rng.integers(2**32)))
        return np.asarray(points), np.asarray(labels)


@dataclass(frozen=True, kw_only=True)
class RotatedMoons(Toy):
    """Two moons rotated by ``angle``: the same data in another domain."""

    angle: float = 45.0
    """degrees, counter-clockwise"""

    classes = Moons.classes
    mean = Moons.mean
    scale = Moons.scale

    def shape(self, rng: np.random.Generator) -> Points:
        points, labels = Moons(n=self.n).shape(rng)
        c, s = np.cos(self.angle * pi / 180), np.sin(self.angle * pi / 180)
        return (points - self.mean) @ np.array([[c, s], [-s, c]]) + self.mean, labels


@dataclass(frozen=True, kw_only=True)
class EightGaussians(Toy):
    """Eight normals on a circle of radius sqrt(2), numbered counter-clockwise from the positive x-axis."""

    noise: NonNegative = 0.1
    """standard deviation of each normal"""
    classes = 8

    def shape(self, rng: np.random.Generator) -> Points:
        labels = rng.integers(8, size=self.n)
        return sqrt(2) * np.stack([np.cos(labels * pi / 4), np.sin(labels * pi / 4)], axis=1), labels


@dataclass(frozen=True, kw_only=True)
class Checkerboard(Toy):
    """The eight black squares of a 4x4 board, without noise so that the edges stay sharp."""

    noise: NonNegative = 0.0
    """standard deviation of the normal noise"""
    scale = 2 / sqrt(3)  # the variance of a uniform on [-2, 2] is 4/3

    def shape(self, rng: np.random.Generator) -> Points:
        column, row = rng.integers(4, size=self.n), rng.integers(2, size=self.n)
        corner = np.stack([column - 2, 2 * row + column % 2 - 2], axis=1)
        return corner + rng.random((self.n, 2)), None


@dataclass(frozen=True, kw_only=True)
class SwissRoll(Toy):
    """The Swiss roll in cross-section: a spiral of one and a half turns, uniform in the angle."""

    mean = (2.0, 0.2122)
    scale = 6.7891

    def shape(self, rng: np.random.Generator) -> Points:
        from sklearn.datasets import make_swiss_roll  # lazy: speed

        return make_swiss_roll(self.n, random_state=int(rng.integers(2**32)))[0][:, [0, 2]], None


@dataclass(frozen=True, kw_only=True)
class Spirals(Toy):
    """Two spiral arms, half a turn apart and uniform in area, one for each class."""

    classes = 2
    scale = 1 / 2  # of the radius, which is the square root of a uniform: E[r^2] / 2 = 1/4

    def shape(self, rng: np.random.Generator) -> Points:
        labels = rng.integers(2, size=self.n)
        r = np.sqrt(rng.random(self.n))
        angle = 3 * pi * r + pi * labels
        return r[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1), labels
