"""Planning a training on many GPUs by arithmetic: memory, traffic and time of a step. Nothing is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genkit.core import Backbone, Cond, Label, Spec
from genkit.core.tensors import count_parameters
from genkit.training.settings import Parallel
from genkit.training.sharding import shard_blocks

FLOAT = 4  # bytes of a number: weights, gradients, averages and AdamW's two slots are fp32


@dataclass(frozen=True)
class NetworkCost:
    """What a denoiser costs, counted on tensors without numbers."""

    params: int
    block_params: int
    """of the largest block, which FSDP gathers at once"""
    flops: float
    """of the forward and backward pass of one sample; a multiplication and an addition are two"""
    activation_bytes: float
    """that the backward pass of one sample needs, in fp32 with attention written out: an upper bound, as bf16 keeps
    about half of it, and fused attention less"""


@dataclass(frozen=True)
class Cluster:
    """GPUs and what connects them. The defaults are data-sheet numbers of 8 H100 SXM with a 400 Gbit/s port each."""

    gpus: int
    per_node: int = 8
    memory: float = 80e9
    """bytes of a GPU"""
    flops: float = 989e12
    """peak of a GPU in bf16, dense, FLOP/s"""
    utilisation: float = 0.4
    """assumed share of the peak that a step reaches"""
    node_bandwidth: float = 450e9
    """bytes/s of a GPU to the others of its node, one direction"""
    network_bandwidth: float = 50e9
    """bytes/s of a GPU to other nodes"""

    def __post_init__(self):
        if self.gpus < 1 or self.per_node < 1 or (self.gpus > self.per_node and self.gpus % self.per_node):
            raise ValueError(
                f"gpus: given {self.gpus} with {self.per_node} a node; needs a multiple of {self.per_node}"
            )

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return max(1, self.gpus // self.per_node)


@dataclass(frozen=True)
class StepPlan:
    """A training step on each GPU, by arithmetic."""

    memory: Mapping[str, float]
    """bytes by kind"""
    in_node_bytes: float
    """that a GPU sends within its node"""
    across_bytes: float
    """that a GPU's port sends to other nodes"""
    compute_seconds: float
    traffic_seconds: float
    """of both kinds of traffic, one after the other"""

    @property
    def total_memory(self) -> float:
        """Bytes of a GPU."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a step, if traffic is hidden behind computation, and if none of it is."""
        return max(self.compute_seconds, self.traffic_seconds), self.compute_seconds + self.traffic_seconds


def measure_network(backbone: Backbone, spec: Spec) -> NetworkCost:
    """Count parameters, FLOPs and activations of a backbone's denoiser, on the device ``meta``."""
    from torch.utils.flop_counter import FlopCounterMode  # lazy: slow to import

    with torch.device("meta"):
        net = backbone.denoiser(spec)
        x, t, cond = torch.randn(1, *spec.shape), torch.rand(1), blank_conditions(spec)
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    kept: dict[int, int] = {}

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return saved

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved)
    with FlopCounterMode(display=False) as counter, hooks:
        net(x, t, cond).sum().backward()
    return NetworkCost(count_parameters(net), largest_block(net), counter.get_total_flops(), float(sum(kept.values())))


def blank_conditions(spec: Spec) -> Cond:
    """Classes of one sample. ``ValueError`` for other conditions."""
    if other := [name for name, kind in spec.cond.items() if not isinstance(kind, Label)]:
        raise ValueError(f"plan: knows classes as conditions; given {other[0]}")
    return {name: torch.zeros(1, dtype=torch.long) for name in spec.cond}


def largest_block(net: nn.Module) -> int:
    """Parameters of the largest block that FSDP gathers at once; of the network, if it declares none."""
    return max((count_parameters(block) for block in shard_blocks(net)), default=count_parameters(net))


def plan_step(
    cost: NetworkCost,
    cluster: Cluster,
    parallel: Parallel,
    batch: int,
    averages: int = 1,
    half: bool = True,
) -> StepPlan:
    """The memory, traffic and time of a training step with ``batch`` samples over all GPUs, in one micro-batch.

    DDP and HSDP reduce gradients as a ring in the node and then across nodes; FSDP gathers weights twice and reduces
    gradients once, over all GPUs (Rajbhandari et al. 2020, sections 5 and 7). ``half``: activations of bf16.
    ``ValueError`` if the GPUs cannot share the batch.
    """
    if batch % cluster.gpus:
        raise ValueError(f"batch: given {batch} on {cluster.gpus} GPUs; needs a multiple of {cluster.gpus}")
    local, group = batch // cluster.gpus, min(cluster.gpus, cluster.per_node)
    shards = {"ddp": 1, "fsdp": cluster.gpus, "hsdp": group}[parallel]
    weights = FLOAT * cost.params
    memory = {
        "weights": weights / shards,
        "gradients": weights / shards,
        "AdamW": 2 * weights / shards,
        "averages": averages * weights / shards,
        "gathered": 0.0
        if shards == 1
        else 2 * 2 * FLOAT * cost.block_params,  # this block and the next, with gradients
        "activations": local * cost.activation_bytes / (2 if half else 1),
    }
    in_node, across = traffic(weights, cluster, parallel)
    compute = local * cost.flops / (cluster.flops * cluster.utilisation)
    seconds = in_node / cluster.node_bandwidth + across / cluster.network_bandwidth
    return StepPlan(memory, in_node, across, compute, seconds)


def traffic(weights: float, cluster: Cluster, parallel: Parallel) -> tuple[float, float]:
    """Bytes that a GPU sends within its node and to other nodes in a step, for ``weights`` bytes of weights.

    A ring over n sends ``(n - 1) / n`` of the bytes for each gather or reduction. Across nodes, the GPUs of a node
    share what the node sends.
    """
    group, nodes = min(cluster.gpus, cluster.per_node), cluster.nodes
    in_ring, over_nodes = (group - 1) / group, (nodes - 1) / nodes
    passes = 2 if parallel == "ddp" else 3  # reduce and gather gradients; gather weights twice and reduce gradients
    across = 3 if parallel == "fsdp" else 2  # HSDP keeps copies, so that only gradients cross nodes
    return passes * weights * in_ring, across * weights / group * over_nodes
