"""What the pictures of training show: the same conditions at each step, of the data or of a file of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit.core import Data, Label, Spec
from genkit.core.files import format_error
from genkit.core.grids import full_grid_size
from genkit.data.codecs import decoded_shape
from genkit.data.text import encode_prompts
from genkit.data.text_states import known_texts
from genkit.training.sampling import grid_size, picture_names, sample_conditions
from genkit.training.settings import TrainSettings

GRID_SIZE = 80  # about so many samples are in the pictures made while training
MAX_PROMPTS = 256


@dataclass(frozen=True)
class Shown:
    """The samples of a picture: n conditions, and the classes or prompts that come in turn among them."""

    cond: Mapping[str, Tensor]
    """``[n, ...]`` by name"""
    names: Sequence[str] = ()
    n: int = GRID_SIZE

    def describe(self, settings: TrainSettings) -> str | None:
        """One line on the prompts of a file; None without one."""
        if settings.sample_prompts is None:
            return None
        count = f"{len(self.names)} prompt{'s' if len(self.names) > 1 else ''}"
        return f"pictures {count} of {settings.sample_prompts}, {self.n} samples, every {settings.sample_every} steps"


def choose_shown(settings: TrainSettings, data: Data, stream: Any) -> Shown:
    """The prompts of ``settings.sample_prompts`` in turn; else classes or captions in turn, or, for other kinds of
    conditions, those of the first batch of ``stream``. ``ValueError`` for prompts that the model cannot read."""
    spec = replace(data.spec, shape=decoded_shape(data.codec, data.spec.shape))
    if settings.sample_prompts is not None:
        prompts = read_prompts(settings.sample_prompts)
        n = prompts_grid_size(spec, len(prompts))
        states = encode_prompts(data.spec, prompts, known_texts(data))
        return Shown({k: v[torch.arange(n) % len(prompts)] for k, v in states.items()}, prompts, n)
    n, names = grid_size(spec, GRID_SIZE), picture_names(spec)
    try:
        return Shown(sample_conditions(data.spec, n, known=known_texts(data)), names, n)
    except ValueError:
        cond = stream(0, 0, 0, min(n, stream.batch_size)).cond
        return Shown({k: torch.cat([v.cpu()] * -(-n // len(v)))[:n] for k, v in cond.items()}, names, n)


def prompts_grid_size(spec: Spec, num: int) -> int:
    """The number of samples of ``num`` prompts: as many of each as give a picture of the usual size."""
    plain = replace(spec, cond={k: v for k, v in spec.cond.items() if isinstance(v, Label)})
    about = grid_size(replace(plain, cond={}), GRID_SIZE)
    if len(spec.shape) != 3:
        return max(1, about // num) * num
    return full_grid_size(num, max(about, num), spec.shape[1] / spec.shape[2]) if num < about else num


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The lines of a text file, without empty ones. ``ValueError`` if there are none, or too many."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: cannot be read as a text of prompts, one a line: {format_error(e)}") from e
    prompts = tuple(" ".join(line.split()) for line in lines if line.strip())
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise ValueError(f"{path}: holds {len(prompts)} prompts; allowed: 1 to {MAX_PROMPTS}, one a line")
    return prompts
