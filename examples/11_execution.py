"""A policy that takes time to decide: three ways to carry out its chunks, on four ways.

    python examples/11_execution.py [--seeds 0] [--delay 4] [--act-steps 4 8] [--out execution.json]

A chunk arrives some steps after the observation that it was drawn for. naive: the newest chunk that has arrived;
ensemble: the average of all that have; real-time: each chunk is drawn as a continuation of the one under way. The jump
is the mean change of the action where one chunk gives way to the next; within chunks it is the noise of the
demonstrations. Each policy trains for half a CPU minute. With --config configs/four_ways_anchored.yaml and
--sampler-steps 1 it is an anchored flow of one step.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import genkit
from genkit import config
from genkit.cli.scripts import ScriptParser, run_script
from genkit.envs import make
from genkit.rl.policies.episodes import run_episodes
from genkit.rl.policies.execution import DelayedPolicy

ROOT = Path(__file__).parents[1]
EXECUTIONS = ("no delay", "naive", "ensemble", "real-time")


def changes(paths: list[np.ndarray], act_steps: int, delay: int) -> tuple[float, float]:
    """The mean change of the action at the borders of chunks, and within chunks, of paths ``[T + 1, 2]``."""
    sizes = [np.linalg.norm(np.diff(path, 2, axis=0), axis=1) for path in paths]
    steps = [np.arange(1, len(size) + 1) for size in sizes]  # the step whose action differs from the one before
    size, step = np.concatenate(sizes), np.concatenate(steps)
    border = (step >= act_steps + delay) & ((step - delay) % act_steps == 0)
    return float(size[border].mean()), float(size[~border].mean())


def measure(run: genkit.Run, execution: str, args: Any, act_steps: int) -> dict[str, Any]:
    """The episodes of one way to act."""
    policy = genkit.Policy.load(run, steps=args.sampler_steps, act_steps=act_steps)
    delay = 0 if execution == "no delay" else args.delay
    actor = DelayedPolicy(policy, delay, "naive" if execution == "no delay" else execution)  # type: ignore[arg-type]  # argparse has text
    start = time.process_time()
    episodes = run_episodes(actor, make("four-ways", 100), range(args.first, args.first + args.episodes))
    seconds = time.process_time() - start
    summary = episodes.summary()
    border, within = changes(episodes.paths, act_steps, delay)
    return {
        "execution": execution,
        "act_steps": act_steps,
        "success": summary["success"],
        "bits": summary["mode_entropy_bits"]["value"],
        "jump_border": border,
        "jump_within": within,
        "cpu_ms_per_step": 1e3 * seconds / float(episodes.lengths.sum()),
    }


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--config", default="configs/four_ways_flow.yaml", help="of the policies, in this repository")
    parser.add_argument("--delay", type=int, default=4, help="steps that a decision takes")
    parser.add_argument("--act-steps", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--sampler-steps", type=int, default=16)
    parser.add_argument("--episodes", type=int, default=400)
    parser.add_argument("--first", type=int, default=200_000, help="the seed of the first episode")
    parser.add_argument("--steps", type=int, default=2500, help="of training on demonstrations")
    parser.add_argument("--runs", default="runs", help="the folder of the runs")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    print("| seed | act steps | execution | success | bits | jump at borders | within |\n|---|---|---|---|---|---|---|")
    for seed in args.seeds:
        settings = config.load_yaml(ROOT / args.config) | {"steps": args.steps, "seed": seed, "out": args.runs}
        run = genkit.train(**settings, tensorboard=False, device="cpu")
        for act_steps in args.act_steps:
            for execution in EXECUTIONS:
                row = {"seed": seed, **measure(run, execution, args, act_steps)}
                rows.append(row)
                print(f"| {seed} | {act_steps} | {execution} | {row['success']['value']:.3f} | {row['bits']:.2f} "
                      f"| {row['jump_border']:.4f} | {row['jump_within']:.4f} |", flush=True)  # fmt: skip
    if args.out:
        command = f"python examples/11_execution.py --seeds {' '.join(map(str, args.seeds))} --config {args.config}"
        command += f" --delay {args.delay}"
        command += f" --act-steps {' '.join(map(str, args.act_steps))} --sampler-steps {args.sampler_steps}"
        command += f" --episodes {args.episodes} --first {args.first} --steps {args.steps}"
        args.out.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
