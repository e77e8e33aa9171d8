"""Why a step has no finite gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genkit.core import Batch, Objective
from genkit.training.precision import use_precision


@torch.no_grad()
def find_bad_layer(objective: Objective, nets: Mapping[str, nn.Module], batch: Batch, precision: str) -> str:
    """Name what is not finite first: the data, a parameter, the output of a module on ``batch``, or a gradient."""
    if not bool(torch.isfinite(batch.x).all()):
        return "the data: a batch holds numbers that are not finite"
    for name, net in nets.items():
        for key, p in net.named_parameters(prefix=name):
            if not bool(torch.isfinite(p).all()):
                return f"{key}, a weight"
    bad_modules: list[str] = []
    hooks = []
    for name, net in nets.items():
        for key, module in net.named_modules(prefix=name):

            def check_output(_module: nn.Module, _args: Any, out: Any, key: str = key) -> None:
                if isinstance(out, Tensor) and not bool(torch.isfinite(out).all()):
                    bad_modules.append(key)

            hooks.append(module.register_forward_hook(check_output))
    with use_precision(precision, batch.x.device):
        for phase in objective.phases:
            objective.loss(phase.name, nets, batch)
    for hook in hooks:
        hook.remove()
    return f"{bad_modules[0]}, its output" if bad_modules else "a gradient; all outputs are finite (try a lower --lr)"
