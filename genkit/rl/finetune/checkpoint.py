"""Checkpoints of fine-tuning: ordinary ones, plus the state needed to resume, and the choice of the best one."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from genkit.evaluation.metrics import Moments
from genkit.rl.finetune.learner import Learner
from genkit.training.best import BestCheckpoint
from genkit.training.checkpoint import (
    checkpoint_files,
    checkpoint_record,
    read_tensors,
    restore,
    write_checkpoint,
)
from genkit.training.run import Run

EXTRA = "finetune.safetensors"
KEEP = 3  # newest checkpoints


def save_finetuning(directory: Path, learner: Learner, base: Run, best: BestCheckpoint) -> None:
    """Write a checkpoint (all ranks do, if they share the networks), plus the state that only fine-tuning has: the
    critic, learned noise, their optimizers.

    ``latest`` points at the best checkpoint, if they are evaluated; a resumed run continues from the newest one anyway.
    """
    value = -math.inf if best.value is None else best.value
    extra = {
        "draws": torch.tensor(learner.draws),
        "reward_std": torch.tensor(learner.reward_std, dtype=torch.float64),
        "best": torch.tensor([best.step or 0, value, best.worse], dtype=torch.float64),
    }
    if learner.population is not None:
        seen = learner.population.to("cpu")
        extra |= {
            "population.n": torch.tensor(seen.n),
            "population.mean": seen.mean,
            "population.scatter": seen.scatter,
        }
    for name, (net, optimizer) in learner.auxiliary.items():
        extra |= auxiliary_tensors(name, net, optimizer)
    state = learner.state
    files = checkpoint_files(state, learner.objective, {EXTRA: extra})
    record = checkpoint_record(directory, state, base.spec, base.codec, learner.seed)
    exchange = state.sharding.exchange if state.sharding else None
    write_checkpoint(directory, files, record, keep=KEEP, best=best.step, use_best=True, exchange=exchange)


def auxiliary_tensors(name: str, net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A network's weights, ``NAME.KEY``, and its optimizer's state, ``NAME-adam.PARAMETER.KEY``, on the CPU."""
    tensors = {f"{name}.{k}": v.cpu().clone() for k, v in net.state_dict().items()}
    for i, p in enumerate(net.parameters()):
        tensors |= {f"{name}-adam.{i}.{k}": v.cpu().clone() for k, v in optimizer.state.get(p, {}).items()}
    return tensors


def restore_finetuning(checkpoint: Path, learner: Learner, best: BestCheckpoint) -> None:
    """Load a checkpoint, whose checksums have been compared, into ``learner`` and ``best``, in place."""
    restore(checkpoint, learner.state, learner.objective)
    stored = read_tensors(checkpoint, EXTRA)
    learner.draws, learner.reward_std = int(stored["draws"]), float(stored["reward_std"])
    step, value, worse = stored["best"].tolist()
    best.step, best.value = (None, None) if value == -math.inf else (int(step), value)
    best.worse = int(worse)
    if "population.n" in stored:
        mean, scatter = stored["population.mean"], stored["population.scatter"]
        learner.population = Moments(int(stored["population.n"]), mean, scatter).to(learner.device)
    for name, (net, optimizer) in learner.auxiliary.items():
        net.load_state_dict({k.partition(".")[2]: v for k, v in stored.items() if k.startswith(f"{name}.")})
        for i, p in enumerate(net.parameters()):
            state = {k.split(".", 2)[2]: v for k, v in stored.items() if k.startswith(f"{name}-adam.{i}.")}
            if state:
                # Adam's step count stays on the CPU
                optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}
