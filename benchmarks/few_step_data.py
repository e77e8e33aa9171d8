"""The experiments of :mod:`benchmarks.few_step`: networks, training rows, test noise and rulers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ensemble import EnsembleMLP, draw_rows
from benchmarks.reflow import DigitScores, cycle_labels, load_digits
from genkit.backbones import MLP
from genkit.core import NO_COND, Backbone, Batch, Cond, Data, Draw, Noise, Objective, Spec, mean_flat
from genkit.data.standard_images import Digits, FashionMnist
from genkit.diffusion.flow_map import SPAN
from genkit.evaluation.metrics import Moments, frechet_distance, wasserstein2
from genkit.evaluation.metrics.features import Classifier
from genkit.objectives import GAN, FlowMap
from genkit.objectives.adversarial.losses import Relativistic
from genkit.objectives.distillation.student import Student
from genkit.objectives.flow_map.flow_map import SLACK
from genkit.objectives.matching.matching import PredictionName

NUM_PAIRS, NUM_TEST, NUM_TRAIN = 10_000, 1000, 50_000
NUM_DRAWS = 20  # of real data with replacement
RADIUS, STD = 2.0, 0.1
PLANE_GAN = GAN(latent=(2,), gan_loss=Relativistic(r1=0.01, r2=0.01))  # penalties as for the ring of docs/results

DrawBatch = Callable[[int], Batch]
Nets = dict[str, nn.Module]


@dataclass(frozen=True)
class Setting:
    """What all rows of one experiment share."""

    make_nets: Callable[[int, Objective], Nets]
    """new networks for a seed and an objective"""
    draw: DrawBatch
    """training rows"""
    draw_members: DrawBatch
    """the same with the member of an ensemble as a class, for an objective whose rows interact within a class"""
    test: Callable[[int, Sequence[int] | None], tuple[Tensor, Mapping[str, Tensor]]]
    """noise and conditions to sample from, for a seed and a shape of one z, if it is not a sample's; seed -1: as many
    as pairs"""
    score: Callable[[Tensor], dict[str, list[float]]]
    """values of samples"""
    noise: Callable[[int], Noise]
    """further noise, for a seed"""
    seeds: Sequence[int]
    """seeds that are trained one after the other"""
    batch: int
    lr: float
    interacting: int
    """rows of a batch whose rows interact: 32 or more of each class"""
    gan: GAN
    prediction: PredictionName = "velocity"
    """what the networks of flows and flow maps predict"""
    radius: float | None = None
    """within which the targets of flow maps point, as ``genkit train`` measures it; None: anywhere"""


def normals_of(shape: Sequence[int], seed: int) -> Tensor:
    """Normals of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------------- the plane
class Timeless(nn.Module):
    """A player of a GAN: ``(x, cond)``, and ``net`` sees the time 0."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, cond: Cond = NO_COND) -> Tensor:
        """``x`` ``[B, dim]`` to ``[B, out]``."""
        return self.net(x, x.new_zeros(len(x)))


@dataclass(frozen=True)
class Ensembles(Backbone):
    """The networks of a student's teacher and its discriminator: an MLP for each of ``members``."""

    members: int

    def denoiser(self, spec: Spec) -> nn.Module:
        return ensemble(self.members)

    def encoder(self, spec: Spec, out: tuple[int, ...]) -> nn.Module:
        return Timeless(ensemble(self.members, out=out[0]))


def ensemble(members: int, numbers: Sequence[str] = (), out: int | None = None) -> EnsembleMLP:
    """The network of the plane."""
    return EnsembleMLP(members, 2, 128, 3, F.silu, numbers, out)


def draw_ring(n: int, seed: int) -> Tensor:
    """Points ``[n, 2]`` of the eight Gaussians, drawn independently."""
    g = torch.Generator().manual_seed(seed)
    angle = torch.randint(8, (n,), generator=g) * (math.pi / 4)
    return RADIUS * torch.stack([angle.cos(), angle.sin()], 1) + STD * torch.randn(n, 2, generator=g)


def plane(seeds: int, offset: int = 0) -> Setting:
    """The eight Gaussians, all seeds at once. Test points are those of seeds from ``1000 + offset``."""

    def score(x: Tensor) -> dict[str, list[float]]:
        parts = enumerate(x.chunk(seeds))
        return {"W2": [wasserstein2(p, draw_ring(NUM_TEST, 1000 + offset + i)) for i, p in parts]}

    def make_nets(seed: int, objective: Objective) -> Nets:
        torch.manual_seed(seed + offset)
        if isinstance(objective, GAN):
            return {"generator": Timeless(ensemble(seeds)), "discriminator": Timeless(ensemble(seeds, out=1))}
        if isinstance(objective, Student):
            return objective.networks(Ensembles(seeds), Spec((2,)))
        return {"net": ensemble(seeds, (SPAN,) if isinstance(objective, FlowMap) else ())}

    rows, points = {True: NUM_PAIRS, False: NUM_TEST}, draw_ring(NUM_TRAIN, 1)

    def draw_members(count: int) -> Batch:
        member = torch.arange(seeds).repeat_interleave(count // seeds)
        return Batch(points[torch.randint(len(points), (count,))], {"member": member})

    return Setting(
        make_nets=make_nets,
        draw=draw_rows(points),
        draw_members=draw_members,
        test=lambda seed, shape: (normals_of((seeds * rows[seed < 0], 2), 2000 + offset), NO_COND),
        score=score,
        noise=lambda seed: lambda shape: normals_of((seeds * NUM_TEST, *shape), 3000 + offset),
        seeds=[0],
        batch=256 * seeds,
        lr=1e-3,
        interacting=256 * seeds,
        gan=PLANE_GAN,
    )


# ------------------------------------------------------------------------------------------------------- the images
def images(
    rows: Batch,
    size: int,
    width: int,
    score: Callable[[Tensor], dict[str, float]],
    data: Data,
    seeds: int,
    offset: int,
    samples: int | None,
) -> Setting:
    """Images by class in the model's own numbers, one seed after the other, NUM_TEST or so many ``samples`` of each."""
    num_test = samples or NUM_TEST

    def draw(count: int) -> Batch:
        i = torch.randint(len(rows), (count,))
        return Batch(rows.x[i], {"label": rows.cond["label"][i]})

    def make_nets(seed: int, objective: Objective) -> Nets:
        torch.manual_seed(seed)
        return objective.networks(MLP(width=width, depth=4), data.spec)

    def test(seed: int, shape: Sequence[int] | None) -> tuple[Tensor, Mapping[str, Tensor]]:
        n = NUM_PAIRS if seed < 0 else num_test
        return normals_of((n, *(shape or (1, size, size))), 2000 + offset + seed), cycle_labels(n)

    return Setting(
        make_nets=make_nets,
        draw=draw,
        draw_members=draw,
        test=test,
        score=lambda x: {name: [value] for name, value in score(x).items()},
        noise=lambda seed: lambda shape: normals_of((num_test, *shape), 3000 + offset + seed),
        seeds=range(seeds),
        batch=64,
        lr=1e-3,
        interacting=320,
        gan=GAN(),
        radius=SLACK * float(mean_flat(rows.x.square()).max().sqrt()),
    )


def digits(seeds: int, offset: int = 0, samples: int | None = None) -> Setting:
    """Scikit-learn's digits, by the ruler of :mod:`benchmarks.reflow`."""
    real = load_digits("train")
    scores = DigitScores(real, load_digits("test"))

    def score(x: Tensor) -> dict[str, float]:
        right = scores.svm.predict(scores.pixels(x)) == cycle_labels(len(x))["label"].numpy()
        return {"Fréchet": scores.distance(x), "accuracy": float(right.mean())}

    return images(real, 8, 192, score, Digits().load("train"), seeds, offset, samples)


@dataclass
class FashionScores:
    """Fréchet distance to held-out pictures in the features of genkit's classifier of this data set."""

    root: Path

    def __post_init__(self) -> None:
        self.data = FashionMnist(root=str(self.root)).load("train")
        self.classify = Classifier().load(torch.device("cpu"), self.data)
        held_out = FashionMnist(root=str(self.root)).load("test")
        self.reference = Moments.of(self.classify(first_rows(held_out, len(held_out)).x).features)

    def distance(self, x: Tensor) -> float:
        """The distance of pictures uint8 ``[N, 1, 28, 28]``."""
        return frechet_distance(Moments.of(self.classify(x).features), self.reference)

    def score(self, x: Tensor) -> dict[str, float]:
        """The values of samples in the model's own numbers, whose classes come in turn."""
        pixels = self.data.codec.decode(x)
        scores: Any = self.classify(pixels).logits
        right = scores.argmax(1) == cycle_labels(len(x))["label"]
        return {"Fréchet": self.distance(pixels), "accuracy": float(right.double().mean())}


def first_rows(data: Data, count: int) -> Batch:
    """The first rows of a data set as they are."""
    return data.batch(torch.arange(count), Draw((0,), 0, count))


def fashion(root: Path, seeds: int, offset: int = 0, samples: int | None = None) -> Setting:
    """Fashion-MNIST, 28x28."""
    scores = FashionScores(root)
    rows = scores.data.codec.encode(first_rows(scores.data, len(scores.data)))
    setting = images(rows, 28, 256, scores.score, scores.data, seeds, offset, samples)
    return replace(setting, prediction="x0")


# --------------------------------------------------------------------------------------------------------- real data
def real_plane(seeds: int, root: Path) -> dict[str, list[float]]:
    """The distance of further points to each seed's."""
    pairs = [(draw_ring(NUM_TEST, 4000 + i), draw_ring(NUM_TEST, 1000 + i)) for i in range(seeds)]
    return {"W2": [wasserstein2(a, b) for a, b in pairs]}


def real_digits(seeds: int, root: Path) -> dict[str, list[float]]:
    """The distance of all training digits."""
    real = load_digits("train")
    return {"Fréchet": [DigitScores(real, load_digits("test")).distance(real.x)]}


def resampled_digits(samples: int | None) -> dict[str, list[float]]:
    """The distances of training digits drawn with replacement, as many as samples are measured: a perfect model's."""
    real = load_digits("train")
    scores, labels = DigitScores(real, load_digits("test")), real.cond["label"]
    members = [(labels == label).nonzero()[:, 0] for label in range(10)]
    distances = []
    for seed in range(NUM_DRAWS):
        g = torch.Generator().manual_seed(seed)
        rows = [m[torch.randint(len(m), ((samples or NUM_TEST) // 10,), generator=g)] for m in members]
        distances.append(scores.distance(real.x[torch.cat(rows)]))
    return {"Fréchet": distances}


def real_fashion(seeds: int, root: Path) -> dict[str, list[float]]:
    """The distance of as many training pictures as samples are measured."""
    scores = FashionScores(root)
    return {"Fréchet": [scores.distance(first_rows(scores.data, NUM_TEST).x)]}
