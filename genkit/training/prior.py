"""What keeps a fine-tuned model from forgetting: a second data source, and the model without its adapter.

Prior preservation (Ruiz et al. 2023, eq. 2) adds pictures of the general class to every batch. An adapter needs no such
pictures: with the adapter switched off the network is the frozen base, whose predictions under generic prompts are the
targets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from annotated_types import Gt, Lt
from torch import Tensor, nn

from genkit.backbones import lora
from genkit.config import table
from genkit.config.numbers import NonNegative, Positive
from genkit.config.paths import PathText
from genkit.core import Batch, Data, Draw, Objective, Spec, Tokens, seed_of
from genkit.data import DATA, DataSource, InLatents, Stream
from genkit.data.source import Split
from genkit.data.stream import join_batches
from genkit.data.text import encode_prompts
from genkit.data.text_states import known_texts
from genkit.training.settings import TrainSettings
from genkit.training.shown import read_prompts

SECOND = 2  # in the key of the second source's order, so that it differs from that of the first


@dataclass(frozen=True, kw_only=True)
class NoData(DataSource):
    """No second data source."""

    def load(self, split: Split = "train") -> Data:
        raise ValueError("prior.data: given none; name a data source")


SOURCES: dict[str, type[DataSource]] = {"none": NoData, **DATA}


@dataclass(frozen=True)
class Prior:
    """What a model that is fine-tuned on few samples is to keep."""

    data: DataSource = table(
        "genkit.training.prior:SOURCES",
        "none",
        kind="genkit.data:DataSource",
        fallback="genkit.data:find_source",
        adapt="genkit.data.torch_dataset:adapt",
    )
    """second data source: samples of the general class, say, with its captions (DreamBooth)"""
    share: Annotated[float, Gt(0), Lt(1)] = 0.5
    """share of each batch that comes from the second data source"""
    weight: Positive = 1.0
    """weight of these samples in the loss"""
    preserve: NonNegative = 0.0
    """weight of a further loss that holds an adapter's predictions near those of its frozen base; 0: none"""
    prompts: PathText | None = None
    """text file of the prompts under which they are held, one a line; None: without conditions"""

    def __post_init__(self) -> None:
        if self.prompts is not None and not self.preserve:
            raise ValueError(
                f"prompts: given {self.prompts}, which has no effect without a weight; give --prior.preserve"
            )
        changed = {"share": self.share != 0.5, "weight": self.weight != 1.0}
        if isinstance(self.data, NoData) and (idle := [name for name, given in changed.items() if given]):
            raise ValueError(f"{idle[0]}: has no effect without a second data source; give --prior.data")

    @property
    def has_data(self) -> bool:
        """Whether there is a second data source."""
        return not isinstance(self.data, NoData)

    def rows(self, batch: int) -> int:
        """Samples of a batch that come from the second source. ``ValueError`` if it would have none, or all."""
        rows = round(self.share * batch)
        if not 0 < rows < batch:
            raise ValueError(f"prior.share: given {self.share:g}, which is {rows} of a batch of {batch}; needs 1 to "
                             f"{batch - 1}: take a larger --batch")  # fmt: skip
        return rows


PRIOR: dict[str, type[Prior]] = {"prior": Prior}


# ------------------------------------------------------------------------------------------- the second data source
class MixedStream:
    """Batches of two streams: the first rows are of ``first``, the others of ``second``, whose loss has ``weight``.

    As a :class:`~genkit.data.Stream` it is a pure function of (step, draw, rows).
    """

    def __init__(self, first: Stream, second: Stream, weight: float):
        self.first, self.second, self.weight = first, second, weight
        self.batch_size = first.batch_size + second.batch_size

    def describe(self) -> str:
        """What comes from the second source, in words."""
        rows, whole = self.second.batch_size, self.batch_size
        return f"{rows} of each {whole} samples from {len(self.second.data)} others, with weight {self.weight:g}"

    def __call__(self, step: int, draw: int, start: int, stop: int) -> Batch:
        cut = self.first.batch_size
        parts = []
        if start < cut:
            parts.append(self.first(step, draw, start, min(stop, cut)))
        if stop > cut:
            parts.append(self.second(step, draw, max(start - cut, 0), stop - cut))
        weight = torch.where(torch.arange(start, stop) < cut, 1.0, self.weight)
        numbers = Draw((self.first.seed, step, draw), start, stop, self.first.device)
        return replace(join_batches(parts), draw=numbers, step=step, weight=weight.to(self.first.device))


def make_stream(settings: TrainSettings, dataset: Data, device: torch.device) -> Stream | MixedStream:
    """The batches that ``settings`` train on. ``ValueError`` if a second source does not fit ``dataset``."""
    require_weighable(settings.objective, dataset)
    prior, batch, seed, workers = settings.prior, settings.batch, settings.seed, settings.workers
    if not prior.has_data:
        return Stream(dataset, batch, seed, device, workers)
    second = replace_share(prior.data).load("train")
    require_alike(dataset, second)
    rows = prior.rows(batch)
    first_part = Stream(dataset, batch - rows, seed, device, workers)
    return MixedStream(first_part, Stream(second, rows, seed_of(seed, SECOND), device, workers), prior.weight)


def replace_share(source: DataSource) -> DataSource:
    """``source`` with all of its samples, none held out unless it says so."""
    return source if getattr(source, "held_out", 0.0) is not None else source.with_fields(held_out=0.0)


def require_alike(first: Data, second: Data) -> None:
    """``ValueError`` unless samples of both have the same shape, conditions and form."""
    if first.spec.shape != second.spec.shape:
        raise ValueError(f"prior.data: has samples {list(second.spec.shape)}; the data are {list(first.spec.shape)}; "
                         "choose the same --data.size and --prior.data.size")  # fmt: skip
    ours, theirs = (meaning(data.spec) for data in (first, second))
    if ours != theirs:
        odd = next(k for k in ours | theirs if ours.get(k) != theirs.get(k))
        raise ValueError(f"prior.data: has the condition {odd} {'otherwise' if odd in theirs else 'not'}; both sources "
                         "need the same conditions, captions by the same encoder")  # fmt: skip
    cached = [isinstance(data, InLatents) for data in (first, second)]
    if cached[0] != cached[1]:
        raise ValueError("prior.data: one of the sources has cached latents, the other has not; encode both, or none")
    stages = {data.index["stage"]["sha256"] for data in (first, second) if isinstance(data, InLatents)}
    if len(stages) > 1:
        raise ValueError("prior.data: its latents are of another first stage than those of the data; encode again")
    if any(getattr(data, "buckets", None) is not None for data in (first, second)):
        raise ValueError("prior.data: a batch of two sources has one shape; leave --data.bucket out")
    if is_weighted(first) != is_weighted(second):
        raise ValueError("prior.data: one of the sources has weights of places (alpha weight), the other has not")


def meaning(spec: Spec) -> dict[str, Any]:
    """The conditions of a spec without examples of captions and the names of folders."""
    plain = {k: replace(v, examples=()) if hasattr(v, "examples") else v for k, v in spec.cond.items()}  # type: ignore[type-var]
    return {k: replace(v, encoder="") if isinstance(v, Tokens) else v for k, v in plain.items()}


def is_weighted(data: Data) -> bool:
    """Whether samples have weights of places."""
    return bool(getattr(data, "weighted", False))


def require_weighable(objective: Objective, data: Data) -> None:
    """``ValueError`` if ``data`` have weights of places that the loss of ``objective`` would pass over."""
    if is_weighted(data) and not objective.weighs_places:
        raise ValueError(f"data.alpha: given weight, but the loss of {type(objective).__name__} does not weigh places; "
                         "take a path objective without augmentation: flow, ddpm or edm")  # fmt: skip


# ------------------------------------------------------------------------------------------ the adapter switched off
@dataclass(frozen=True)
class Preservation:
    """The loss that holds an adapter's predictions near its base's, under one of ``cond``'s P prompts a sample."""

    objective: Objective
    weight: float
    cond: Mapping[str, Tensor]
    """``[P, ...]`` by name; {}: without conditions"""

    def __call__(self, nets: Mapping[str, nn.Module], batch: Batch) -> Tensor:
        """The weighted loss of each sample ``[B]``."""
        cond: dict[str, Tensor] = {}
        if self.cond:
            num = len(next(iter(self.cond.values())))
            chosen = (batch.uniform() * num).long().clamp(max=num - 1)
            cond = {k: v.to(batch.x.device)[chosen.to(batch.x.device)] for k, v in self.cond.items()}
        generic = replace(batch, cond=cond)
        return self.weight * self.objective.preservation_loss(nets, generic, lambda: lora.adapters_off(nets))


def choose_preservation(prior: Prior, objective: Objective, adapter: lora.LoRA, data: Data) -> Preservation | None:
    """The preservation that the settings ask for. ``ValueError`` without an adapter."""
    if not prior.preserve:
        return None
    if not adapter.active or type(adapter) is not lora.LoRA:
        raise ValueError(
            f"prior.preserve: given {prior.preserve:g}, but there is no adapter to switch off; give --lora.rank 8"
        )
    if type(objective).preservation_loss is Objective.preservation_loss:
        objective.preservation_loss({}, Batch(torch.empty(0)), contextlib.nullcontext)  # says why
    cond = encode_prompts(data.spec, read_prompts(prior.prompts), known_texts(data)) if prior.prompts else {}
    return Preservation(objective, prior.preserve, cond)
