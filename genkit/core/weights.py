"""What networks declare about their weights, by methods of their modules, for optimizers that treat matrices as such.

``fused_weights()`` names the weights that are several matrices in one, ``edge_layers()`` the first and last layers of a
network. Modules without them have whole matrices, none of them at an edge.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import nn


class Fused(NamedTuple):
    """Several matrices in one weight ``[rows, ...]``: as blocks of rows, or row by row in turn."""

    parts: int
    interleaved: bool = False


WHOLE = Fused(1)


@dataclass(frozen=True)
class HiddenMatrix:
    """A weight that maps hidden features to hidden features, as ``[rows, columns]``."""

    name: str
    """``"net.blocks.0.layer1.weight"``"""
    parameter: nn.Parameter
    fused: Fused


def hidden_matrices(nets: Mapping[str, nn.Module]) -> list[HiddenMatrix]:
    """The weights of linear layers and convolutions between the first and the last ones, in the order of the networks.

    Embeddings are none, nor are weights with a single row or column.
    """
    found = []
    for net_name, net in nets.items():
        modules = [(f"{net_name}.{name}" if name else net_name, cast(Any, m)) for name, m in net.named_modules()]
        edges = {id(inner) for _, m in modules if hasattr(m, "edge_layers") for layer in m.edge_layers()
                 for inner in layer.modules()}  # fmt: skip
        fused = {f"{name}.{key}": parts for name, m in modules if hasattr(m, "fused_weights")
                 for key, parts in m.fused_weights().items()}  # fmt: skip
        for name, module in modules:
            weight = module._parameters.get("weight")
            if weight is None or id(module) in edges or isinstance(module, nn.Embedding) or weight.ndim < 2:
                continue
            if min(weight.shape[0], weight[0].numel()) > 1:
                key = f"{name}.weight"
                found.append(HiddenMatrix(key, weight, fused.get(key, WHOLE)))
    return found
