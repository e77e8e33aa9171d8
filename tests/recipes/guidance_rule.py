"""A guidance rule in one class and one line: the optimised scale of CFG-Zero* (Fan et al. 2025)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from genkit.diffusion.guidance import Rule


@dataclass(frozen=True)
class CFGZeroStar(Rule):
    """Extrapolate from the projection of the better estimate on the worse one.

    That is ``s bad`` with ``s = <good, bad> / |bad|^2``. The paper projects velocities; a rule sees predicted data.
    """

    def __call__(self, good: Tensor, bad: Tensor, scale: float, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
        axes = tuple(range(1, good.ndim))
        size = (bad**2).sum(axes, keepdim=True)
        s = torch.where(size > 0, (good * bad).sum(axes, keepdim=True) / size, torch.ones_like(size))
        return torch.lerp(s * bad, good, scale), None
