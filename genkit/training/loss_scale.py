"""The loss scale of fp16, in which small gradients would be rounded to 0."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class LossScale:
    """A factor of the loss that is halved when a gradient overflows, and doubled after ``INTERVAL`` steps without that
    (Micikevicius et al. 2018, section 3.2; ``torch.amp.GradScaler`` follows the same rule).

    It stays on the device, which is not synchronised. What is skipped is decided by the guard of training, which tells
    it (:meth:`update`), so the two cannot disagree.
    """

    START, FACTOR, INTERVAL = 2.0**16, 2.0, 2000

    def __init__(self, device: torch.device, stored: Mapping[str, float] | None = None):
        """``stored`` is what :meth:`dump` returned at the checkpoint that training resumes from."""
        stored = stored or {"scale": self.START, "finite_steps": 0.0}
        self.scale = torch.tensor(stored["scale"], device=device)
        self.finite_steps = torch.tensor(stored["finite_steps"], device=device)

    def dump(self) -> dict[str, float]:
        """Return the state as JSON values. Synchronises the device."""
        return {"scale": float(self.scale), "finite_steps": float(self.finite_steps)}

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide gradients by the scale, in place."""
        inverse = 1 / self.scale
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(inverse)

    @property
    def is_exhausted(self) -> Tensor:
        """1.0 if a smaller scale would not help: a gradient that is not finite then is one in fp32 too. Else 0.0."""
        return (self.scale <= 1).float()

    def update(self, bad: Tensor) -> None:
        """Adapt the scale after a step; ``bad`` is 1.0 if it was skipped, else 0.0."""
        finite_steps = (self.finite_steps + 1) * (1 - bad)
        grows = finite_steps >= self.INTERVAL
        kept = torch.where(grows, self.scale * self.FACTOR, self.scale)
        self.scale = torch.where(bad > 0, self.scale / self.FACTOR, kept)
        self.finite_steps = torch.where(grows, 0.0, finite_steps)
