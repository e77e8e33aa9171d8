"""Muon for hidden matrices and convolutions, and AdamW for all else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, cast

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from genkit.config.numbers import Fraction
from genkit.core.device import has_fast_bf16
from genkit.core.weights import Fused, hidden_matrices
from genkit.training.optimizers.family import Group, Networks, OptimizerFamily, PhaseRates

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, those of the original Muon
EPS = 1e-7  # smallest norm by which a matrix is divided


@dataclass(frozen=True)
class MuonFamily(OptimizerFamily):
    """Muon (Jordan et al. 2024) for hidden matrices and convolutions; AdamW for first and last layers and all else.

    Updates are scaled to the size of AdamW's (Liu et al. 2025, eq. 4), so that one learning rate suits both.
    """

    default_settings: ClassVar[Mapping[str, Any]] = {"lr": 2e-3}
    momentum: Fraction = 0.95
    """decay rate of the averaged gradient of matrices; --betas are those of AdamW"""
    nesterov: bool = True
    """look ahead by one step"""
    ns_steps: Annotated[int, Ge(1), Le(20)] = 5
    """Newton-Schulz steps of the orthogonalisation"""

    def create(self, groups: Sequence[Group], rates: PhaseRates, nets: Networks) -> torch.optim.Optimizer:
        fused = {id(m.parameter): m.fused for m in hidden_matrices(nets)}
        return Muon(groups, fused, rates, self.momentum, self.nesterov, self.ns_steps)

    @classmethod
    def load_class(cls) -> Any:
        return torch.optim.AdamW


class Muon(torch.optim.Optimizer):
    """Muon for the parameters that ``fused`` lists by their id, AdamW for the others of ``groups``.

    A weight ``[rows, ...]`` is a matrix ``[rows, columns]``, and one that is several matrices in one is orthogonalised
    matrix by matrix; those of equal shape are multiplied together.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        fused: Mapping[int, Fused],
        rates: PhaseRates,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
    ):
        matrices = [{**g, "params": [p for p in g["params"] if id(p) in fused]} for g in groups]
        others = [{**g, "params": [p for p in g["params"] if id(p) not in fused]} for g in groups]
        options = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        super().__init__([g for g in (*matrices, *others) if g["params"]], {**vars(rates), **options})
        self.fused = {p: fused[id(p)] for g in matrices for p in g["params"]}
        self.num_groups = sum(bool(g["params"]) for g in matrices)
        self._step_supports_amp_scaling = True  # it reads found_inf, as torch's GradScaler asks
        self.found_inf: Tensor | None = None
        self.adamw: torch.optim.AdamW | None = None
        if len(self.param_groups) > self.num_groups:
            rest = self.param_groups[self.num_groups :]
            self.adamw = torch.optim.AdamW(rest, rates.lr, rates.betas, weight_decay=rates.weight_decay, fused=True)
            self.adamw.state = self.state  # one state and one list of groups for both
            self.param_groups[self.num_groups :] = self.adamw.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both; none of either if ``found_inf`` is 1."""
        if self.adamw is not None:
            cast(Any, self.adamw).found_inf = self.found_inf
            self.adamw.step()
        for group in self.param_groups[: self.num_groups]:
            self._step_matrices(group)

    def _step_matrices(self, group: Group) -> None:
        stepped = [p for p in group["params"] if p.grad is not None]
        updates = [self._average(p, group) for p in stepped]
        keep: Tensor | float = 1.0 if self.found_inf is None else 1 - self.found_inf
        together: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        for p, update in zip(stepped, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"] * keep)
            for weight, matrix in zip(self._matrices(p, p), self._matrices(p, update), strict=True):
                if matrix.shape[0] > matrix.shape[1]:  # the product of the shorter side is the cheaper one
                    weight, matrix = weight.T, matrix.T
                together.setdefault((matrix.shape[0], matrix.shape[1]), []).append((weight, matrix))
        for (_, longer), pairs in together.items():
            orthogonal = orthogonalize(torch.stack([matrix for _, matrix in pairs]), group["ns_steps"])
            scaled = orthogonal.to(pairs[0][0].dtype) * (keep * 0.2 * math.sqrt(longer))
            for (weight, _), update in zip(pairs, scaled, strict=True):
                weight.add_(update, alpha=-group["lr"])

    def _average(self, p: nn.Parameter, group: Group) -> Tensor:
        """The gradient, averaged; the average stays as it is if the step is to be skipped."""
        gradient = p.grad
        assert gradient is not None
        average = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        if self.found_inf is not None:
            gradient = torch.where(self.found_inf > 0, average, gradient)
        average.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(average, group["momentum"]) if group["nesterov"] else average

    def _matrices(self, p: nn.Parameter, value: Tensor) -> list[Tensor]:
        """The matrices ``[rows, columns]`` that a value of the parameter's shape holds, as views."""
        parts, interleaved = self.fused[p]
        rows = value.detach().view(len(value), -1)
        return [rows[i::parts] for i in range(parts)] if interleaved else [*rows.chunk(parts)]


def orthogonalize(matrices: Tensor, steps: int) -> Tensor:
    """The nearest matrices with singular values of about 1 to ``[n, rows, columns]``, for rows <= columns.

    A quintic Newton-Schulz iteration (Jordan et al. 2024), whose singular values end between 0.7 and 1.2. In bf16, for
    which it was made; in fp32 where bf16 is emulated (13 times the time for 8 matrices of 96 x 864, with AVX2).
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(torch.bfloat16 if has_fast_bf16(matrices.device) else torch.float32)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
