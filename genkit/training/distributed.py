"""Several ranks (processes), also on a machine without GPUs.

On such a machine `accelerate launch --num_processes N` starts a single process, because it leaves CPU ranks to MPI. The
environment of that process has a master address but no rank. genkit then replaces itself by `torchrun` with N
processes, which communicate over gloo.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    KwargsHandler,
)
from torch import Tensor, nn

from genkit.core.durations import parse_duration
from genkit.training.slurm import adopt_slurm_ranks

if TYPE_CHECKING:
    from genkit.training.settings import TrainSettings
    from genkit.training.sharding import Sharding


def missing_ranks() -> int:
    """Return how many processes `accelerate launch` should have started; 1 if it started them all."""
    env = os.environ
    if "WORLD_SIZE" in env or not {"MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"} <= env.keys():
        return 1
    if torch.cuda.is_available():
        return 1
    parent = psutil.Process().parent()
    words = parent.cmdline() if parent else []
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name in ("--num_processes", "--num-processes"):
            return int(value or after)
    raise ValueError(
        "accelerate launch: starts one process on a machine without GPUs; give --num_processes N on its command line, "
        "or use torchrun --nproc-per-node N -m genkit train ..."
    )


def join_ranks(device: torch.device, timeout: str | None = None) -> Accelerator:
    """Join the process group. It is left before the interpreter exits, where threads of gloo could abort it.

    ``timeout`` is the longest time that a rank waits for the others in a collective call, as ``30m``; None: 10 minutes
    on NCCL, 30 on gloo. Gradients of DDP share the memory of its buckets.

    Raises:
        ValueError: The ranks of this process have joined on another kind of device.
    """
    adopt_slurm_ranks()
    leave_device(device)
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count() if device.type == "cuda" else 0
    if count and local >= count:  # srun may show each task its own device only
        os.environ["LOCAL_RANK"] = str(local % count)
    handlers: list[KwargsHandler] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if timeout is not None:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(seconds=parse_duration(timeout))))
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no", kwargs_handlers=handlers)
    if torch.distributed.is_initialized():  # also of one rank, by torchrun
        atexit.register(leave_ranks)
    return accelerator


def leave_device(device: torch.device) -> None:
    """Make Accelerate forget the device that it keeps for the whole process, if it is of another kind than ``device``.

    Else a run on a GPU after one on the CPU would train on the CPU without a word, and one on the CPU after one on a
    GPU would be refused.
    """
    if not is_initialized():
        return
    state = AcceleratorState()
    if state.device.type == device.type and getattr(state, "_cpu", None) == (device.type == "cpu"):
        return
    if state.num_processes > 1:
        raise ValueError(
            f"device: given {device.type}; the ranks of this process are on {state.device.type}; start another process"
        )
    AcceleratorState._reset_state(reset_partial_state=True)


def is_main_process() -> bool:
    """Return whether this is the process that writes and prints for all ranks."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def create_sharding(settings: TrainSettings, accelerator: Accelerator) -> Sharding | None:
    """How the ranks share networks; None if each has them whole, as one rank alone does. ``ValueError`` for settings
    that do not fit together, or the ranks."""
    parallel, size = settings.parallel, settings.shard_size
    if size is not None and parallel != "hsdp":
        raise ValueError(f"shard_size: given {size} with --parallel {parallel}, which has no groups; give hsdp")
    if parallel == "ddp" or accelerator.num_processes == 1:
        return None
    from genkit.training.sharding import Sharding  # lazy: it takes most of a second

    return Sharding.create(parallel, size, accelerator)


def leave_ranks() -> None:
    """Leave the process group, if there is one. Networks that refer to it are freed, so that its threads end too."""
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


@torch.no_grad()
def sum_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace every gradient by its sum over the ranks, for losses that do not pass through DDP.

    A missing gradient counts as 0.
    """
    if accelerator.num_processes == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), "sum")
    assert isinstance(total, Tensor)
    for p, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.reshape(p.shape).clone()


def start_ranks(num: int, command: str, argv: list[str]) -> None:
    """Replace this process by `torchrun` with ``num`` ranks of ``genkit command argv``."""
    env = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT")}
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num)))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}"]
    sys.stdout.flush()
    os.execve(sys.executable, [*run, "-m", "--", "genkit", command, *argv], env)
