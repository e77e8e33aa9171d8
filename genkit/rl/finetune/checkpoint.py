"""Checkpoints of fine-tuning: ordinary ones, plus the state needed to resume, and the choice of the best one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from genkit.rl.finetune.learner import Learner
from genkit.training.checkpoint import read_tensors, restore, save_checkpoint
from genkit.training.run import Run

EXTRA = "finetune.safetensors"
KEEP = 3  # newest checkpoints


@dataclass
class BestCheckpoint:
    """The checkpoint with the largest mean return so far."""

    step: int = 0
    """its iteration; 0: the start"""
    value: float = -math.inf
    """its mean return; -inf: none was evaluated"""
    worse: int = 0
    """evaluated checkpoints since"""

    def update(self, step: int, value: float | None) -> None:
        """Compare the checkpoint of ``step``; a return of None is never better."""
        if value is not None and value > self.value:
            self.step, self.value, self.worse = step, value, 0
        else:
            self.worse += 1

    @property
    def chosen(self) -> int | None:
        """The iteration of the best checkpoint; None if none was evaluated."""
        return None if self.value == -math.inf else self.step

    def is_stale(self, patience: int | None) -> bool:
        """Whether ``patience`` checkpoints (None: any number) have not been better."""
        return patience is not None and self.worse >= patience


def save_finetuning(directory: Path, learner: Learner, base: Run, best: BestCheckpoint) -> None:
    """Write a checkpoint, plus the state that only fine-tuning has: the critic, learned noise, their optimizers.

    ``latest`` points at the best checkpoint, if they are evaluated; a resumed run continues from the newest one anyway.
    """
    extra = {
        "draws": torch.tensor(learner.draws),
        "reward_std": torch.tensor(learner.reward_std, dtype=torch.float64),
        "best": torch.tensor([best.step, best.value, best.worse], dtype=torch.float64),
    }
    for name, (net, optimizer) in learner.auxiliary.items():
        extra |= auxiliary_tensors(name, net, optimizer)
    save_checkpoint(
        directory,
        learner.state,
        learner.objective,
        base.spec,
        base.codec,
        seed=learner.seed,
        keep=KEEP,
        extra={EXTRA: extra},
        best=best.chosen,
    )


def auxiliary_tensors(name: str, net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A network's weights, ``NAME.KEY``, and its optimizer's state, ``NAME-adam.PARAMETER.KEY``, on the CPU."""
    tensors = {f"{name}.{k}": v.cpu().clone() for k, v in net.state_dict().items()}
    for i, p in enumerate(net.parameters()):
        tensors |= {f"{name}-adam.{i}.{k}": v.cpu().clone() for k, v in optimizer.state.get(p, {}).items()}
    return tensors


def restore_finetuning(checkpoint: Path, learner: Learner, best: BestCheckpoint) -> None:
    """Load a checkpoint, whose checksums have been compared, into ``learner`` and ``best``, in place."""
    restore(checkpoint, learner.state, learner.objective)
    stored = read_tensors(checkpoint, EXTRA, verify=False)
    learner.draws, learner.reward_std = int(stored["draws"]), float(stored["reward_std"])
    step, best.value, worse = stored["best"].tolist()
    best.step, best.worse = int(step), int(worse)
    for name, (net, optimizer) in learner.auxiliary.items():
        net.load_state_dict({k.partition(".")[2]: v for k, v in stored.items() if k.startswith(f"{name}.")})
        for i, p in enumerate(net.parameters()):
            state = {k.split(".", 2)[2]: v for k, v in stored.items() if k.startswith(f"{name}-adam.{i}.")}
            if state:
                # Adam's step count stays on the CPU
                optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}
