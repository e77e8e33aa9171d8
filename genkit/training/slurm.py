"""Ranks that Slurm's ``srun`` started, by the names that torch reads."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

PORTS = range(20_000, 40_000)  # of the first rank, by the number of the job, so that jobs on one machine differ


def adopt_slurm_ranks() -> None:
    """Set ``RANK``, ``WORLD_SIZE`` and the rest from what ``srun`` says, unless a launcher such as torchrun has.

    Raises ``ValueError`` if it does not say where the first rank is.
    """
    os.environ.update(slurm_ranks(os.environ))


def slurm_ranks(env: Mapping[str, str]) -> dict[str, str]:
    """The variables of this rank; none outside of a step of several tasks, and under another launcher."""
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")  # a batch script, which is one process, has no such number
    if "WORLD_SIZE" in env or "SLURM_PROCID" not in env or tasks == "1":
        return {}
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or ""
    address = env.get("MASTER_ADDR") or first_host(nodes)
    if not address:
        raise ValueError(f"srun: started {tasks} tasks and names no node; set MASTER_ADDR to the node of the first one")
    job = int(env.get("SLURM_JOB_ID", "0")) + int(env.get("SLURM_STEP_ID", "0"))
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE", tasks)
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(expand_counts(per_node)[int(env.get("SLURM_NODEID", "0"))]),
        "MASTER_ADDR": address,
        "MASTER_PORT": env.get("MASTER_PORT") or str(PORTS[job % len(PORTS)]),
    }


def first_host(nodes: str) -> str:
    """The first host of a list such as ``gpu[03-05,09],login1``: gpu03."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def expand_counts(text: str) -> list[int]:
    """Tasks of each node: ``4(x2),3`` is [4, 4, 3]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]
