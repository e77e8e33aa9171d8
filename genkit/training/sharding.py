"""Sharded training: each rank keeps a share of every weight, gradient, average and optimizer state (FSDP).

The engine is PyTorch's own, ``torch.distributed.fsdp.fully_shard``, without Accelerate: that prepares one model with
one optimizer, and an objective may have several of both. Hooks gather the weights of a block for its forward and
backward passes, and reduce its gradient to shares of the mean over the ranks.

Everything beside the passes works on the shares as plain tensors: the fused optimizers, whose flag of a non-finite
gradient torch does not take beside a ``DTensor``, the averages, and checkpoints.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial

from genkit.core.tensors import copy_to_cpu, local_rows, unsaved_buffers
from genkit.training.settings import Parallel
from genkit.training.shared_files import Exchange, Piece

Networks = Mapping[str, nn.Module]


@dataclass
class Sharding:
    """How the ranks share networks: all ranks each one (FSDP), or the ranks of a group, and groups alike (HSDP)."""

    mesh: DeviceMesh
    """of one axis, the shares, or two: groups with the same content, and the shares of a group"""
    exchange: Exchange
    """the ranks, as they write checkpoints together"""
    skeletons: dict[str, nn.Module] = field(default_factory=dict)
    """the networks as they were before, without weights"""
    shares: dict[int, nn.Parameter] = field(default_factory=dict)
    """this rank's share of a parameter, by the id of the parameter: what an optimizer steps"""
    stay_whole: bool = False
    """whether weights that a pass has gathered stay until :meth:`take_gradients`, for every objective"""

    @classmethod
    def create(cls, parallel: Parallel, shard_size: int | None, accelerator: Accelerator) -> Sharding:
        """The sharding of ``fsdp`` or ``hsdp``. ``ValueError`` for a ``shard_size`` that does not divide the ranks."""
        world, device = accelerator.num_processes, accelerator.device.type
        if parallel == "fsdp":
            return cls(init_device_mesh(device, (world,), mesh_dim_names=("share",)), Exchange(world))
        size = shard_size or int(os.environ.get("LOCAL_WORLD_SIZE") or world)
        if world % size:
            raise ValueError(f"shard_size: given {size} on {world} ranks; needs a divisor of {world}")
        mesh = init_device_mesh(device, (world // size, size), mesh_dim_names=("copy", "share"))
        return cls(mesh, Exchange(size))

    # ------------------------------------------------------------------------------------------------ the shares
    @property
    def share(self) -> tuple[int, int]:
        """The number of this rank's share, and of all shares."""
        axis = self.mesh["share"]
        return axis.get_local_rank(), axis.size()

    def rows(self, shape: Sequence[int]) -> tuple[int, int]:
        """The rows ``(start, stop)`` of a tensor of this shape that are this rank's share, as ``torch.chunk`` cuts."""
        number, count = self.share
        size = -(-shape[0] // count)
        return min(number * size, shape[0]), min((number + 1) * size, shape[0])

    def split(self, nets: Networks, averages: Iterable[Networks], stay_whole: bool) -> None:
        """Shard networks and their averages, in place. A network without parameters stays as it is.

        With ``stay_whole``, or ``self.stay_whole``, the weights that a pass has gathered stay until
        :meth:`take_gradients`, and so do gradients.
        """
        stay_whole = stay_whole or self.stay_whole
        for name, net in nets.items():
            if any(True for _ in net.parameters()):
                self.skeletons[name] = without_weights(net)
        for networks in (nets, *averages):
            for net in networks.values():
                self.split_network(net)
        for module in sharded_modules(nets):
            module.set_reshard_after_forward(not stay_whole, recurse=False)
            module.set_reshard_after_backward(not stay_whole, recurse=False)
            module.set_requires_gradient_sync(not stay_whole, recurse=False)

    def split_network(self, net: nn.Module) -> None:
        """Shard one network, in place: each of its blocks for itself, and all else as one."""
        if not any(True for _ in net.parameters()):
            return
        scalars = {p for p in net.parameters() if p.ndim == 0}  # torch shards none of them
        for module in (*shard_blocks(net), net):
            module.register_forward_hook(own_memory)
            # also of the root, for the weights may be changed between this pass and the next
            fully_shard(module, mesh=self.mesh, reshard_after_forward=True, ignored_params=scalars)
        for p in net.parameters():
            if isinstance(p, DTensor):
                with torch.no_grad():
                    self.shares[id(p)] = nn.Parameter(p.to_local(), requires_grad=p.requires_grad)

    def compile_network(self, net: nn.Module) -> None:
        """Let torch compile each block when it is first called, or a network without blocks. Only ``forward`` is
        compiled, as PyTorch advises for ``fully_shard``: the hooks that gather weights stay outside of it."""
        for module in shard_blocks(net) or [net]:
            module.forward = torch.compile(module.forward)

    def share_of(self, p: nn.Parameter) -> nn.Parameter:
        """What the optimizer steps of a parameter: this rank's share of it, or a scalar itself."""
        return self.shares.get(id(p), p)

    @torch.no_grad()
    def copies_agree(self, nets: Networks) -> bool:
        """Whether this rank's rows are those of the same ranks of the other groups, to the last bit."""
        if self.mesh.ndim == 1:
            return True
        total = torch.stack([local_rows(p).double().sum() for net in nets.values() for p in net.parameters()])
        sums = [torch.empty_like(total) for _ in range(self.mesh["copy"].size())]
        dist.all_gather(sums, total, group=self.mesh["copy"].get_group())
        return all(torch.equal(sums[0], other) for other in sums)

    # ----------------------------------------------------------------------------------------------- checkpoints
    def piece(self, value: Tensor, like: Tensor) -> Piece:
        """The part of a checkpoint that this rank has of ``value``, a tensor of the parameter or buffer ``like``."""
        if isinstance(like, DTensor) and value.ndim:
            return Piece(copy_to_cpu(value), tuple(like.shape), self.rows(like.shape)[0])
        return Piece(copy_to_cpu(value), tuple(value.shape))

    def own_rows(self, value: Tensor, like: Tensor) -> Tensor:
        """This rank's rows of a whole ``value``."""
        return value[slice(*self.rows(like.shape))] if isinstance(like, DTensor) and value.ndim else value

    @torch.no_grad()
    def load(self, nets: Networks, stored: Mapping[str, Tensor]) -> None:
        """Copy this rank's rows of whole tensors ``{"net.conv.weight": ...}`` into networks."""
        for name, net in nets.items():
            for key, value in net.state_dict().items():
                local_rows(value).copy_(self.own_rows(stored[f"{name}.{key}"], value))

    # --------------------------------------------------------------------------------------------------- passes
    @torch.no_grad()
    def take_gradients(self, nets: Networks, trained: Sequence[str]) -> tuple[list[nn.Parameter], Tensor]:
        """Give what the optimizer steps of the ``trained`` networks its gradients, means over the ranks, and drop the
        weights that passes have gathered. Returns what is stepped, and the norm of the whole gradient.

        A gradient that is whole on each rank is reduced here: those of networks that stay whole for the length of a
        step, and those of scalars.
        """
        here = [p.grad for name in trained for p in nets[name].parameters()]
        for p in (p for name in trained for p in nets[name].parameters()):
            p.grad = None
        self.drop_gathered(nets)
        parameters = [p for name in trained for p in nets[name].parameters()]
        own, common, shares = [], [], [self.share_of(p) for p in parameters]
        for p, share, gradient in zip(parameters, shares, here, strict=True):
            if gradient is None:
                continue
            share.grad = self.reduce_gradient(p, gradient)
            (own if isinstance(p, DTensor) else common).append(share.grad)
        return shares, self.norm(own, common, shares[0].device)

    def drop_gathered(self, nets: Networks) -> None:
        """Drop the weights that passes have gathered, so that parameters are shares again."""
        for module in sharded_modules(nets):
            module.reshard()

    def reduce_gradient(self, p: nn.Parameter, gradient: Tensor) -> Tensor:
        """This rank's share of the mean gradient of a parameter."""
        if isinstance(gradient, DTensor):  # reduced by the hooks
            return gradient.to_local()
        if isinstance(p, DTensor):
            parts = DTensor.from_local(gradient / dist.get_world_size(), self.mesh, [Partial()] * self.mesh.ndim)
            return parts.redistribute(placements=p.placements).to_local()
        dist.all_reduce(gradient)
        return gradient / dist.get_world_size()

    def norm(self, own: Sequence[Tensor], common: Sequence[Tensor], device: torch.device) -> Tensor:
        """The norm of tensors of which ``own`` are this rank's shares, and ``common`` are the same on all ranks."""
        total = nn.utils.get_total_norm(own).square() if own else torch.zeros((), device=device)
        dist.all_reduce(total, group=self.mesh["share"].get_group())
        if common:
            total = total + nn.utils.get_total_norm(common).square()
        return total.sqrt()

    # ----------------------------------------------------------------------------------------------- whole again
    @torch.no_grad()
    def gather_networks(self, nets: Networks) -> dict[str, nn.Module]:
        """Copies of sharded networks with all their weights, on every rank; all ranks call it. Buffers that are not
        saved are shared with the originals, and so are networks without parameters."""
        return {name: self.gather_network(name, net) for name, net in nets.items()}

    def gather_network(self, name: str, net: nn.Module) -> nn.Module:
        """The copy of one network."""
        if name not in self.skeletons:
            return net
        skeleton = self.skeletons[name]
        copied = copy.deepcopy(skeleton, unsaved_buffers(skeleton))
        tensors = {k: v.full_tensor() if isinstance(v, DTensor) else v.clone() for k, v in net.state_dict().items()}
        copied.load_state_dict(tensors, assign=True)
        requires = {k: p.requires_grad for k, p in net.named_parameters()}
        for key, p in copied.named_parameters():
            p.requires_grad_(requires[key])
        return copied.train(net.training)


def shard_blocks(net: nn.Module) -> list[nn.Module]:
    """The modules of a network that are gathered one by one: those that its parts declare by a method
    ``shard_blocks()``, which are called as modules and whose weights nothing else reads; none for other networks."""
    declared = [m for m in net.modules() if hasattr(m, "shard_blocks")]
    return [block for m in declared for block in cast(Any, m).shard_blocks()]


def own_memory(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """A hook: an output that is a view, copied. A change of a view in place would lose the hook that gathers weights
    in the backward pass, of which torch warns."""
    return output.clone() if isinstance(output, Tensor) and output._base is not None else output


def without_weights(net: nn.Module) -> nn.Module:
    """A copy whose parameters have a shape only."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in net.parameters()}
    return copy.deepcopy(net, {**unsaved_buffers(net), **empty})


def sharded_modules(nets: Networks) -> Iterator[FSDPModule]:
    """The modules that are gathered one by one, and the networks themselves."""
    for net in nets.values():
        yield from (module for module in net.modules() if isinstance(module, FSDPModule))
