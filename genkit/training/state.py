"""The state of training: everything that changes from step to step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from genkit.core.tensors import copy_to_cpu
from genkit.training.power_ema import slowest_key
from genkit.training.shared_files import Piece

if TYPE_CHECKING:
    from genkit.training.sharding import Sharding


@dataclass
class State:
    """Everything that a checkpoint holds: networks, their averages, an optimizer per phase, and the progress."""

    nets: dict[str, nn.Module]
    emas: dict[float | str, dict[str, nn.Module]]  # by decay, or power-WIDTH
    optimizers: dict[str, torch.optim.Optimizer]
    step: int = 0
    skipped: int = 0  # steps skipped because a gradient was not finite
    meter: dict[str, Any] = field(default_factory=dict)  # the unfinished line of the log, as Meter.dump returns it
    sharding: Sharding | None = None  # how the ranks share the networks; None: each rank has them whole
    loss_scales: dict[str, dict[str, float]] = field(default_factory=dict)  # of fp16, as LossScale.dump returns them

    @property
    def slowest(self) -> float | str | None:
        """The key of the average to sample from: the largest decay, else the widest power function."""
        return slowest_key([*self.emas])

    @property
    def slowest_average(self) -> dict[str, nn.Module]:
        """The networks to sample from: the slowest average, or the raw ones if there are no averages."""
        return self.nets if self.slowest is None else self.emas[self.slowest]

    def gather(self, all_averages: bool = False) -> State:
        """The state with whole networks, of the averages the slowest or all; itself if they are not sharded.

        All ranks call it. Optimizers are left out of a copy.
        """
        if self.sharding is None:
            return self
        gather = self.sharding.gather_networks
        emas = {key: gather(nets) for key, nets in self.emas.items() if all_averages or key == self.slowest}
        return State(gather(self.nets), emas, {}, self.step, self.skipped)

    def compile_network(self, net: nn.Module) -> None:
        """Let torch compile a network when it is first called; of a sharded one its blocks, each for itself."""
        if self.sharding:
            self.sharding.compile_network(net)
        else:
            net.compile()

    def share_of(self, p: nn.Parameter) -> nn.Parameter:
        """What an optimizer steps of a parameter: this rank's share, if it is sharded."""
        return self.sharding.share_of(p) if self.sharding else p

    def piece(self, value: Tensor, like: Tensor) -> Piece:
        """A copy on the CPU of ``value``, a tensor of the parameter or buffer ``like``, or of this rank's rows."""
        return self.sharding.piece(value, like) if self.sharding else Piece(copy_to_cpu(value), tuple(value.shape))

    def own_rows(self, value: Tensor, like: Tensor) -> Tensor:
        """What this rank has of a whole ``value`` of the parameter or buffer ``like``."""
        return self.sharding.own_rows(value, like) if self.sharding else value
