"""Plans for many GPUs: what is counted is what real networks and trainings have, what follows is arithmetic."""

from dataclasses import asdict, replace

import pytest
import torch

from genkit.backbones import DiT
from genkit.core import Label, Spec, Vector
from genkit.objectives import Flow
from genkit.training.loop import initial_state, optimizer_step
from genkit.training.plan import FLOAT, Cluster, NetworkCost, measure_network, plan_step
from genkit.training.settings import TrainSettings
from genkit.training.sharding import shard_blocks

SMALL, SPEC = DiT(width=32, depth=2, head_size=16), Spec((4, 8, 8), {"label": Label(10)})
COST = NetworkCost(params=1_000_000, block_params=100_000, flops=1e9, activation_bytes=1e6)


def test_counts_are_those_of_a_real_network():
    """On real numbers: parameters, and the bytes that the backward pass keeps."""
    cost, net = measure_network(SMALL, SPEC), SMALL.denoiser(SPEC)
    weights, kept = {p.untyped_storage().data_ptr() for p in net.parameters()}, {}

    def keep(saved):
        if saved.untyped_storage().data_ptr() not in weights:
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        net(torch.randn(1, 4, 8, 8), torch.rand(1), {"label": torch.zeros(1, dtype=torch.long)})
    assert cost.params == sum(p.numel() for p in net.parameters())
    assert cost.block_params == max(sum(p.numel() for p in block.parameters()) for block in shard_blocks(net))
    assert cost.activation_bytes == pytest.approx(sum(kept.values()), rel=0.1)


def test_flops_are_those_of_the_formula():
    """A block of width d multiplies 12 n d^2 + 2 n^2 d numbers for n tokens, each two FLOPs; backward costs twice as
    much. For DiT-B/2 that is the published 23 GMAC (Peebles & Xie 2023). adaLN and the ends are the rest."""
    tokens, width, depth = 64, 256, 4
    cost = measure_network(DiT(width=width, depth=depth), Spec((4, 16, 16)))
    blocks = 3 * depth * (24 * tokens * width**2 + 4 * tokens**2 * width)
    assert blocks < cost.flops < 1.1 * blocks


def test_memory_of_one_gpu_is_that_of_a_real_training():
    objective = Flow()
    nets = objective.networks(SMALL, SPEC)
    state = initial_state(objective, nets, replace(TrainSettings(), ema=(0.9, 0.99)))
    for p in nets["net"].parameters():
        p.grad = torch.zeros_like(p)
    size = FLOAT * sum(p.numel() for p in nets["net"].parameters())
    optimizer_step(state.optimizers["denoise"], list(nets["net"].parameters()), 1e-3, 1.0)
    slots = [v for slot in state.optimizers["denoise"].state.values() for v in slot.values() if v.ndim]
    plan = plan_step(measure_network(SMALL, SPEC), Cluster(1), "ddp", 4, averages=2)
    assert plan.memory["weights"] == plan.memory["gradients"] == size
    assert plan.memory["AdamW"] == sum(v.numel() * v.element_size() for v in slots)
    averaged = [p for ema in state.emas.values() for p in ema["net"].parameters()]
    assert plan.memory["averages"] == sum(p.numel() * p.element_size() for p in averaged)
    assert (plan.in_node_bytes, plan.across_bytes) == (0, 0)


def test_shards_and_traffic_by_hand():
    """4 MB of weights. A ring of 8 sends 7/8 of what it passes on; a node of 16 and 2 nodes send half of it."""
    one, many = Cluster(8), Cluster(16)
    ddp, fsdp, hsdp = (plan_step(COST, many, kind, 32) for kind in ("ddp", "fsdp", "hsdp"))
    assert (ddp.memory["weights"], fsdp.memory["weights"], hsdp.memory["weights"]) == (4e6, 4e6 / 16, 4e6 / 8)
    assert (ddp.memory["gathered"], fsdp.memory["gathered"]) == (0, 4 * 4e5)
    assert (ddp.in_node_bytes, fsdp.in_node_bytes, hsdp.in_node_bytes) == (7e6, 10.5e6, 10.5e6)
    assert (ddp.across_bytes, fsdp.across_bytes, hsdp.across_bytes) == (0.5e6, 0.75e6, 0.5e6)
    assert plan_step(COST, one, "fsdp", 8) == plan_step(COST, one, "hsdp", 8)
    assert ddp.memory["activations"] == 2 * 1e6 / 2
    assert sum(asdict(ddp)["memory"].values()) == ddp.total_memory


def test_time_is_between_hidden_and_not_hidden_traffic():
    plan = plan_step(
        COST, Cluster(16, flops=1e12, utilisation=0.5, node_bandwidth=7e6, network_bandwidth=5e5), "ddp", 32
    )
    assert plan.compute_seconds == pytest.approx(2 * 1e9 / 0.5e12)
    assert plan.traffic_seconds == pytest.approx(2.0)
    assert plan.seconds == pytest.approx((2.0, 2.004))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: Cluster(12), "gpus: given 12 with 8 a node; needs a multiple of 8"),
    (lambda: plan_step(COST, Cluster(8), "ddp", 9), "batch: given 9 on 8 GPUs; needs a multiple of 8"),
    (lambda: measure_network(SMALL, Spec((4, 8, 8), {"v": Vector((3,))})), "plan: knows classes as conditions"),
])  # fmt: skip
def test_what_cannot_be_planned_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
