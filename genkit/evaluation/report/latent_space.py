"""Pictures of a run's latent space: what its principal directions change, and where samples are in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor

from genkit.core import Cond, Data, Draw, Label, pictures
from genkit.data import DataSource
from genkit.objectives.autoencoders.autoencoder import EncoderDecoder
from genkit.training.run import Run

NUM_SAMPLES = 1000  # samples that are encoded
MAX_AXES = 8  # rows of the traversals
TRAVERSAL_STEPS = 9  # columns of the traversals
TRAVERSAL_REACH = 2.5  # standard deviations to either side
MAX_LEGEND = 20  # largest number of classes that the map has a legend for


class PrincipalAxes(NamedTuple):
    """The principal axes of codes, largest variance first; all float64."""

    mean: Tensor
    """``[D]``"""
    directions: Tensor
    """``[k, D]``, of length 1"""
    deviation: Tensor
    """``[k]``, the standard deviation of the codes along each direction"""
    share: Tensor
    """``[k]``, the share of the total variance along each direction"""

    def scores(self, codes: Tensor) -> Tensor:
        """The coordinates ``[N, k]`` of codes ``[N, ...]`` along the directions."""
        return (codes.flatten(1).double() - self.mean) @ self.directions.T


def principal_axes(codes: Tensor, num: int) -> PrincipalAxes:
    """At most ``num`` principal axes of codes ``[N, ...]`` (Pearson 1901). ``ValueError`` if the codes are all equal.

    Each direction's sign is such that its largest entry is positive.
    """
    x = codes.flatten(1).double()
    mean = x.mean(0)
    _, values, rows = torch.linalg.svd(x - mean, full_matrices=False)
    variance = values.square() / len(x)
    k = min(num, int((variance > 1e-12 * (1 + mean.square().sum())).sum()))
    if not k:
        raise ValueError("all samples have the same code: the posterior has collapsed, so there is nothing to show")
    rows = rows[:k] * rows[:k].gather(1, rows[:k].abs().argmax(1, keepdim=True)).sign()
    return PrincipalAxes(mean, rows, variance[:k].sqrt(), variance[:k] / variance.sum())


class EncodedSamples(NamedTuple):
    """Codes of some samples of a run's data, with their conditions and classes."""

    codes: Tensor
    """``[N, *latent]``, the means of the posteriors"""
    cond: Cond
    """the conditions that the run was trained with"""
    label: Tensor | None
    """``[N]``, the classes, even if the run was trained without"""
    names: tuple[str, ...]
    """of the classes; may be empty"""


def encode_dataset(run: Run, n: int = NUM_SAMPLES, batch: int = 64) -> EncodedSamples:
    """Encode ``n`` samples, spread evenly over the test split, or over the training split if there is no other."""
    objective = cast(EncoderDecoder, run.objective)
    data = load_held_out(run.config.data.decoded_source().unaugmented().with_labels())
    n = min(n, len(data))
    rows, codes, conds = torch.arange(n) * len(data) // n, [], []
    for first in range(0, n, batch):
        indices = rows[first : first + batch]
        last = first + len(indices)
        samples = data.batch(indices, Draw((0,), first, last))
        model_cond = {k: v.to(run.device) for k, v in samples.cond.items() if k in run.spec.cond}
        draw = Draw((0, 1), first, last, run.device)
        encoded = replace(run.codec.encode(replace(samples.to(run.device), draw=draw)), cond=model_cond)
        with torch.no_grad():
            codes.append(objective.encode(run.nets, objective.encoder_input(encoded), encoded.cond).mean.float().cpu())
        conds.append(samples.cond)
    cond = {k: torch.cat([c[k] for c in conds]) for k in conds[0]}
    kind = data.spec.cond.get("label")
    label, names = (cond.get("label"), kind.names) if isinstance(kind, Label) else (None, ())
    return EncodedSamples(torch.cat(codes), {k: v for k, v in cond.items() if k in run.spec.cond}, label, names)


def load_held_out(source: DataSource) -> Data:
    """The test split of a data source, or the training split if it has no other."""
    try:
        return source.load("test")
    except ValueError:
        return source.load("train")


def traverse_axes(axes: PrincipalAxes, code: Tensor) -> Tensor:
    """``code`` ``[*latent]`` moved along each axis in turn, ``[k * TRAVERSAL_STEPS, *latent]``.

    Its coordinate on the axis goes from TRAVERSAL_REACH standard deviations below the mean of all codes to as many
    above; the other coordinates stay.
    """
    targets = torch.linspace(-TRAVERSAL_REACH, TRAVERSAL_REACH, TRAVERSAL_STEPS).double() * axes.deviation[:, None]
    steps = targets - axes.scores(code[None]).T
    moved = code.double().flatten() + steps[..., None] * axes.directions[:, None]
    return moved.reshape(-1, *code.shape).to(code)


def draw_traversals(run: Run, samples: EncodedSamples, axes: PrincipalAxes) -> Image.Image:
    """What each axis changes in the sample whose code is nearest to the mean of all; one row per axis."""
    objective = cast(EncoderDecoder, run.objective)
    typical = int((samples.codes.flatten(1).double() - axes.mean).square().sum(1).argmin())
    z = traverse_axes(axes, samples.codes[typical]).to(run.device)
    cond = {k: v[typical : typical + 1].expand(len(z), *v.shape[1:]).to(run.device) for k, v in samples.cond.items()}
    with torch.no_grad():
        x = run.codec.decode(objective.decode(run.nets, objective.quantize(run.nets, z), cond)).cpu()
    return draw_rows(x, {"label": torch.arange(len(axes.deviation)).repeat_interleave(TRAVERSAL_STEPS)})


def draw_rows(x: Tensor, cond: Mapping[str, Tensor]) -> Image.Image:
    """Decoded samples in rows of TRAVERSAL_STEPS: a scatter plot of vectors, curves of signals, a grid of images."""
    if x.ndim == 2:
        return pictures.plot_points(x, cond)
    return pictures.plot_signals(x[:TRAVERSAL_STEPS], cond) if x.ndim == 3 else pictures.make_grid(x, TRAVERSAL_STEPS)


def draw_map(samples: EncodedSamples, axes: PrincipalAxes) -> Image.Image:
    """The codes along the first two axes, coloured by class; a histogram if there is only one axis."""

    def axis_label(i: int) -> str:
        return f"principal direction {i + 1}: {100 * float(axes.share[i]):.0f} % of the variance"

    def draw(ax: Any) -> None:
        scores = axes.scores(samples.codes).numpy()
        ax.set_xlabel(axis_label(0))
        if scores.shape[1] == 1:
            ax.hist(scores[:, 0], bins=max(10, int(len(scores) ** 0.5)))
            return
        classes = [None] if samples.label is None else samples.label.unique().tolist()
        for i, c in enumerate(classes):
            rows = slice(None) if c is None else (samples.label == c).numpy()
            name = None if c is None else samples.names[c] if samples.names else str(c)
            marker = "o^s"[i // 10 % 3]
            ax.scatter(scores[rows, 0], scores[rows, 1], s=7, color=f"C{i % 10}", marker=marker, label=name)
        ax.set_ylabel(axis_label(1))
        if 1 < len(classes) <= MAX_LEGEND:
            ax.legend(fontsize=8, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)

    return pictures.draw_figure(draw, (7, 5))


def latent_figures(run: Run, n: int = NUM_SAMPLES) -> dict[str, Image.Image]:
    """The pictures ``traversals`` and ``map`` of a run with a code.

    ``ValueError`` if its data cannot be loaded, or all samples have the same code.
    """
    samples = encode_dataset(run, n)
    axes = principal_axes(samples.codes, MAX_AXES)
    return {"traversals": draw_traversals(run, samples, axes), "map": draw_map(samples, axes)}
