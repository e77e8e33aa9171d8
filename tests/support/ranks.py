"""Processes that train together over gloo."""

import os
import socket
import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

import psutil
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState

T = TypeVar("T")


def on_two_ranks(job: Callable[[Accelerator], T]) -> list[T]:
    """What ``job(accelerator)`` returns on each of two ranks, which are forked from this process."""
    return on_ranks(2, job)


def on_ranks(num: int, job: Callable[[Accelerator], T]) -> list[T]:
    """What ``job(accelerator)`` returns on each of ``num`` ranks, which are forked from this process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        answers = manager.dict()
        mp.start_processes(_rank, (num, port, job, answers), nprocs=num, start_method="fork")
        return [answers[i] for i in range(num)]


def kill_when(process: subprocess.Popen, begun: Callable[[], object]) -> None:
    """Kill a launcher and all its ranks as soon as ``begun()`` is true; they may not have ended before."""
    while not begun():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    agent = psutil.Process(process.pid)
    for each in (agent, *agent.children(recursive=True)):
        each.kill()
    process.communicate()


def _rank(number: int, num: int, port: int, job: Callable, answers: dict) -> None:
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(num), MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == num
    answers[number] = job(accelerator)
