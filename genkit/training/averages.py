"""Averages of the weights while training: their decay, one kernel for all parameters of a network, and their files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from genkit.core.tensors import local_rows
from genkit.training.power_ema import PREFIX, average_names, power_decay, slowest_key, width_of

if TYPE_CHECKING:
    from genkit.training.settings import TrainSettings


def ema_decay(decay: float | str, step: int) -> float:
    """The decay rate at ``step``: ``decay``, after a warm-up in which the average spans a fixed share of training.

    That of a power function is given by the average's name (:mod:`genkit.training.power_ema`).
    The warm-up ``(1 + s) / (1 + c + s)`` is a power-function average of exponent c, too: it spans
    about 1 / c of the training. ``c = 27 / log10(1 / (1 - decay))`` is 9 for 0.999 and 6.75 for 0.9999, so that
    averages of different decay differ from the first steps on.
    """
    if isinstance(decay, str):
        return power_decay(width_of(decay) or 0.0, step)
    if decay == 0:
        return 0.0
    exponent = round(27 / math.log10(1 / (1 - decay)), 6)
    return min(decay, (1 + step) / (1 + exponent + step))


class Average:
    """An exponential average of networks, which is updated in place. The parameters are listed once, for a walk over
    the modules takes longer than the kernel; of buffers the places are, as a network may put another tensor there."""

    def __init__(self, decay: float | str, ema: Mapping[str, nn.Module], nets: Mapping[str, nn.Module]):
        """``ema`` are the averages of ``nets``; ``decay`` is a number or ``power-WIDTH``."""
        self.decay = decay
        # a list for each network: the kernel takes a faster way for tensors of one device and dtype
        self.parameters: list[tuple[list[Tensor], list[Tensor]]] = []
        self.buffers: list[tuple[nn.Module, nn.Module, str]] = []
        for name, net in nets.items():
            with torch.no_grad():
                old, new = ([local_rows(p) for p in n.parameters()] for n in (ema[name], net))
            if old:
                self.parameters.append((old, new))
            pairs = zip(ema[name].modules(), net.modules(), strict=True)
            self.buffers += [(a, b, key) for a, b in pairs for key, value in a._buffers.items() if value is not None]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """``ema += (1 - d) (net - ema)`` with ``d`` of :func:`ema_decay`; buffers are copied."""
        weight = 1 - ema_decay(self.decay, step)
        for old, new in self.parameters:
            torch._foreach_lerp_(old, new, weight)  # pyright: ignore  # private, and 6.7 times faster than a loop
        for average, net, key in self.buffers:
            mine, theirs = average._buffers[key], net._buffers[key]
            if mine is not theirs:  # tables are shared
                mine.copy_(theirs)  # type: ignore[union-attr, arg-type]


def weights_file(cfg: TrainSettings, ema: str | None) -> str:
    """The file of a checkpoint that holds this average. ``ValueError`` names those that exist."""
    kept = [*map(str, sorted(cfg.ema)), *average_names(cfg.power_ema)]
    if ema is None:
        slowest = slowest_key([*cfg.ema, *average_names(cfg.power_ema)])
        ema = "none" if slowest is None else str(slowest)
    if ema != "none" and ema not in kept:
        further = f", {PREFIX}WIDTH of any width" if cfg.power_ema else ""
        raise ValueError(f"ema: given {ema}; this run has: {', '.join([*kept, 'none'])}{further}")
    return "nets.safetensors" if ema == "none" else f"ema-{ema}.safetensors"


def reconstructed_width(cfg: TrainSettings, ema: str | None) -> float | None:
    """The width of a power-function average that the run did not keep, but can reconstruct; None for any other."""
    width = None if ema is None or not cfg.power_ema else width_of(ema)
    return None if width in cfg.power_ema else width
