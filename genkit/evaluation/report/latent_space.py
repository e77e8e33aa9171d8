"""The space of a run's code, to look at: what its principal directions change, and where samples lie in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor

from genkit.core import Cond, Data, Draw, Label, pictures
from genkit.objectives.autoencoders.autoencoder import EncoderDecoder
from genkit.training.run import Run

SAMPLES = 1000  # that are encoded
DIRECTIONS, PLACES, REACH = 8, 9, 2.5  # of a traversal: rows, columns, and deviations to either side
NAMED = 20  # classes up to which the map has a legend


class Axes(NamedTuple):
    """The principal axes of codes: their ``mean`` ``[D]``, ``directions`` ``[k, D]`` of length 1, the codes'
    ``deviation`` ``[k]`` along each, and its ``share`` ``[k]`` of all variance; float64, the largest first."""

    mean: Tensor
    directions: Tensor
    deviation: Tensor
    share: Tensor

    def scores(self, codes: Tensor) -> Tensor:
        """Where codes ``[N, ...]`` lie along each direction, ``[N, k]``."""
        return (codes.flatten(1).double() - self.mean) @ self.directions.T


def principal(codes: Tensor, most: int) -> Axes:
    """At most so many axes of codes ``[N, ...]`` (Pearson 1901), each the way round that makes its largest number
    positive. ``ValueError`` where the codes do not vary."""
    x = codes.flatten(1).double()
    mean = x.mean(0)
    _, values, rows = torch.linalg.svd(x - mean, full_matrices=False)
    variance = values.square() / len(x)
    k = min(most, int((variance > 1e-12 * (1 + mean.square().sum())).sum()))
    if not k:
        raise ValueError("all samples have the same code: it has collapsed, and holds nothing that could be shown")
    rows = rows[:k] * rows[:k].gather(1, rows[:k].abs().argmax(1, keepdim=True)).sign()
    return Axes(mean, rows, variance[:k].sqrt(), variance[:k] / variance.sum())


class Coded(NamedTuple):
    """Some samples of a run's data: their codes ``[N, *latent]``, what the code is told beside them, and their class,
    also where the run was trained without."""

    codes: Tensor
    cond: Cond
    label: Tensor | None
    names: tuple[str, ...]


def coded(run: Run, n: int = SAMPLES, batch: int = 64) -> Coded:
    """The test split, or where there is none the training split, evenly taken; each posterior's mean."""
    objective, config = (
        cast(EncoderDecoder, run.objective),
        run.config.data.decoded_source().unaugmented().with_labels(),
    )
    data = held_out(config)
    codes, conds = [], []
    every = torch.arange(min(n, len(data))) * len(data) // min(n, len(data))
    for first in range(0, len(every), batch):
        here = every[first : first + batch]
        drawn = data.batch(here, Draw((0,), first, first + len(here)))
        told = {k: v for k, v in drawn.cond.items() if k in run.spec.cond}
        draw = Draw((0, 1), first, first + len(here), run.device)
        seen = run.codec.encode(replace(drawn.to(run.device), draw=draw))
        seen = replace(seen, cond={k: v.to(run.device) for k, v in told.items()})
        with torch.no_grad():
            codes.append(objective.encode(run.nets, objective.encoder_input(seen), seen.cond).mean.float().cpu())
        conds.append(drawn.cond)
    cond = {k: torch.cat([c[k] for c in conds]) for k in conds[0]}
    kind = data.spec.cond.get("label")
    label = cond.get("label") if isinstance(kind, Label) else None
    return Coded(torch.cat(codes), {k: v for k, v in cond.items() if k in run.spec.cond}, label,
                 kind.names if isinstance(kind, Label) else ())  # fmt: skip


def held_out(config: Any) -> Data:
    try:
        return config.load("test")
    except ValueError:
        return config.load("train")


def walk(axes: Axes, code: Tensor) -> Tensor:
    """``[k * PLACES, *latent]``: for each axis ``code`` ``[*latent]`` moved along it, from REACH deviations below the
    mean of all codes to as many above."""
    there = torch.linspace(-REACH, REACH, PLACES).double() * axes.deviation[:, None]
    away = there - axes.scores(code[None]).T
    moved = code.double().flatten() + away[..., None] * axes.directions[:, None]
    return moved.reshape(-1, *code.shape).to(code)


def traversal(run: Run, found: Coded, axes: Axes) -> Image.Image:
    """What each axis changes in the sample whose code is nearest to the mean of all; a row an axis."""
    objective = cast(EncoderDecoder, run.objective)
    typical = int((found.codes.flatten(1).double() - axes.mean).square().sum(1).argmin())
    z = walk(axes, found.codes[typical]).to(run.device)
    told = {k: v[typical : typical + 1].expand(len(z), *v.shape[1:]).to(run.device) for k, v in found.cond.items()}
    with torch.no_grad():
        x = run.codec.decode(objective.decode(run.nets, objective.quantize(run.nets, z), told)).cpu()
    return SHEETS[x.ndim - 1](x, {"label": torch.arange(len(axes.deviation)).repeat_interleave(PLACES)})


SHEETS: Mapping[int, Callable[..., Image.Image]] = {
    1: pictures.scatter,
    2: lambda x, cond: pictures.curves(x[:PLACES], cond),
    3: lambda x, cond: pictures.mosaic(x, PLACES),
}


def chart(found: Coded, axes: Axes) -> Image.Image:
    """The codes along the first two axes, coloured by class; along one, where they have no second, a histogram."""

    def name(i: int) -> str:
        return f"principal direction {i + 1}: {100 * float(axes.share[i]):.0f} % of the variance"

    def draw(ax: Any) -> None:
        place = axes.scores(found.codes).numpy()
        ax.set_xlabel(name(0))
        if place.shape[1] == 1:
            ax.hist(place[:, 0], bins=max(10, int(len(place) ** 0.5)))
            return
        classes = [None] if found.label is None else found.label.unique().tolist()
        for i, c in enumerate(classes):
            rows = slice(None) if c is None else (found.label == c).numpy()
            said = None if c is None else found.names[c] if found.names else str(c)
            ax.scatter(place[rows, 0], place[rows, 1], s=7, color=f"C{i % 10}", marker="o^s"[i // 10 % 3], label=said)
        ax.set_ylabel(name(1))
        if 1 < len(classes) <= NAMED:
            ax.legend(fontsize=8, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)

    return pictures.figure(draw, (7, 5))


def views(run: Run, n: int = SAMPLES) -> dict[str, Image.Image]:
    """``traversals`` and ``map`` of a run with a code. ``ValueError`` where its data are not there, or all have the
    same code."""
    found = coded(run, n)
    axes = principal(found.codes, DIRECTIONS)
    return {"traversals": traversal(run, found, axes), "map": chart(found, axes)}
