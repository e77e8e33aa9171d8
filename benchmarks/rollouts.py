"""Steps of an environment that a policy takes in a second, in one process and in several.

    genkit bench rollouts RUN [--env pusht] [--workers 0 2] [--out FILE.json]

The same episodes in the same rows, in seconds by the clock, so nothing else should be running. Each number of processes
takes its turn in each round; the median of the rounds is reported, and how it compares with the first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch

from benchmarks.results import make_console, make_table
from genkit import __version__
from genkit.cli.scripts import ScriptParser
from genkit.core.files import write_text
from genkit.rl.policies.episodes import run_episodes
from genkit.rl.policies.policy import Policy

FIRST_START = 100_000


def main(argv: list[str]) -> int:
    """Run the episodes and print their speed; the exit code."""
    parser = ScriptParser(__doc__, "genkit bench rollouts")
    parser.add_argument("run", type=Path, nargs="?", help="the run of a policy")
    parser.add_argument("--env", help="default: that of the run's demonstrations")
    parser.add_argument("--steps", type=int, help="sampler steps of a chunk; default: the run's")
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--num-envs", type=int, default=50, help="rows of the environment, default 50")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of processes, default 0 2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args(argv)
    if args.run is None:
        raise ValueError("run: not given; needs the run of a policy: genkit bench rollouts runs/latest")
    torch.set_num_threads(1)  # the other cores are for the environments
    policy = Policy.load(args.run, steps=args.steps)
    speeds = measure(policy, args)
    table = make_table("processes", "steps a second", "compared with the first")
    first = statistics.median(speeds[args.workers[0]])
    for workers, values in speeds.items():
        median = statistics.median(values)
        table.add_row(str(workers or "this one"), f"{median:,.0f}", f"{median / first:.2f}x")
    make_console().print(table)
    if args.out:
        rows = [{"workers": workers, "steps_per_second": values} for workers, values in speeds.items()]
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "out"}
        result = {"settings": settings, "cores": os.cpu_count(), "rows": rows, "genkit": __version__}
        write_text(args.out, json.dumps(result, indent=1) + "\n")
    return 0


def measure(policy: Policy, args: argparse.Namespace) -> dict[int, list[float]]:
    """Steps a second of each number of processes, one number for every round."""
    envs = {workers: policy.make_env(args.num_envs, args.env, workers=workers) for workers in args.workers}
    speeds: dict[int, list[float]] = {workers: [] for workers in args.workers}
    for _ in range(args.rounds):
        for workers, env in envs.items():
            start = time.perf_counter()
            episodes = run_episodes(policy, env, range(FIRST_START, FIRST_START + args.episodes))
            speeds[workers].append(int(episodes.lengths.sum()) / (time.perf_counter() - start))
    return speeds
