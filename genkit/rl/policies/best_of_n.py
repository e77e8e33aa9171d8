"""Best of N: of several samples of a generator, keep the one with the largest value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from genkit.core import Cond, Generator, Noise
from genkit.diffusion.samplers.steps import default_noise
from genkit.diffusion.value_guidance import Value


def best_of(generate: Generator, value: Value, n: int) -> Generator:
    """For each row, the one of ``n`` samples with the largest ``value``; the first is what ``generate`` alone gives.

    All samples are drawn as one batch. Row i still depends on its own random numbers only. ``ValueError`` if n < 1.
    """
    if n < 1:
        raise ValueError(f"best_of: given {n}; needs 1 or more")

    def best(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
        draw, rows = noise or default_noise(z), len(z)

        def repeated(shape: Sequence[int]) -> Tensor:
            return torch.cat([draw(shape) for _ in range(n)])

        starts = torch.cat([z, *(draw(z.shape[1:]) for _ in range(n - 1))])
        conditions = {k: torch.cat([v] * n) for k, v in cond.items()}
        x = generate(starts, conditions, repeated)
        with torch.no_grad():
            values = value(x, conditions).reshape(n, rows)
        return x[values.argmax(0) * rows + torch.arange(rows, device=z.device)]

    return best
