"""Ways to learn from rewards on four ways: what keeps a regression stable, a reward against a likelihood, all methods.

    python examples/09_reward_methods.py rwr [--seeds 0] [--out rwr.json]
    python examples/09_reward_methods.py mixed [--seeds 0] [--out mixed.json]
    python examples/09_reward_methods.py all [--seeds 0 1 2] [--out all.json]

rwr: regression onto the policy's own episodes, weighted by exp(advantage), naive and with its stabilisers
(demonstrations in every batch, weights of at most 10). mixed: the objective's own loss minus lambda times the expected
reward, for several lambda: success against the loss on held-out demonstrations. all: every method that learns from
episodes, with the number of iterations as the only thing in common: success, variety, KL divergence, CPU seconds.
Each run takes some CPU minutes.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import genkit
from genkit.cli.scripts import ScriptParser, run_script
from genkit.core import Draw
from genkit.training.directory import read_log

RWR = {"name": "rwr", "lr": 1e-3, "batch": 256}
METHODS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {  # experiment -> name -> the method's settings
    "rwr": {"naive": {**RWR, "demo_fraction": 0.0, "max_weight": 1e9}, "stabilised": RWR},
    "all": {
        "dppo": {"name": "dppo", "lr": 3e-4},
        "ddpo": {"name": "ddpo", "lr": 3e-4},
        "mixed": {"name": "mixed", "lr": 3e-4},
        "rwr": RWR,
        "nft": {"name": "nft", "lr": 1e-3, "bc_coef": 0.5},
    },
    "mixed": {f"lambda {v:g}": {"name": "mixed", "lr": 3e-4, "weight": v} for v in (0.0, 0.3, 1.0, 3.0, 10.0, 30.0)},
}


def imitate(seed: int, steps: int, out: str) -> genkit.Run:
    """A policy of the demonstrations."""
    return genkit.train(
        objective={"name": "flow", "prediction": "x0", "loss_space": "x0", "cond_dropout": 0.0},
        data="four-ways",
        backbone={"width": 128, "depth": 2},
        steps=steps,
        batch=256,
        lr=1e-3,
        seed=seed,
        sample_every=0,
        tensorboard=False,
        precision="fp32",
        device="cpu",
        out=out,
    )


@torch.no_grad()
def held_out_loss(run: genkit.Run, rows: int = 4000) -> float:
    """The objective's loss on demonstrations that nothing was trained on, a mean over the numbers of a chunk."""
    data = run.config.data.load("test")
    batch = data.codec.encode(data.batch(torch.arange(rows) % len(data), Draw((0,), 0, rows)))
    torch.manual_seed(0)
    return float(run.objective.loss(run.objective.phases[0].name, run.nets, batch).per_sample.mean())


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("experiment", choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=1000, help="of training on demonstrations")
    parser.add_argument("--iterations", type=int, default=25)
    parser.add_argument("--episodes", type=int, default=400, help="of each evaluation")
    parser.add_argument("--runs", default="runs", help="the folder of the runs")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        base = imitate(seed, args.steps, args.runs)
        loss_before = held_out_loss(base)
        for name, method in METHODS[args.experiment].items():
            start = time.process_time()
            run = genkit.finetune(
                base,
                method=method,
                iterations=args.iterations,
                num_envs=50,
                eval_episodes=args.episodes,
                seed=seed,
                out=args.runs,
            )
            seconds = round(time.process_time() - start)
            log = read_log(run.directory)
            options = " ".join(f"--method.{key.replace('_', '-')}={value}" for key, value in method.items())
            rows.append(
                {
                    "seed": seed,
                    "name": name,
                    "settings": options.replace("--method.name", "--method"),
                    "success": [results["success"]["value"] for results in (run.before, run.after)],
                    "bits": [results["mode_entropy_bits"]["value"] for results in (run.before, run.after)],
                    "held_out_loss": [loss_before, held_out_loss(run)],
                    "kl": next((r["kl_reference"] for r in reversed(log) if "kl_reference" in r), None),
                    "success_by_iteration": [round(record["success"], 3) for record in log if "success" in record],
                    "cpu_seconds": seconds,
                }
            )

    print("| seed | run | success | mode entropy, bits | held-out loss | CPU s |\n|---|---|---|---|---|---|")
    for row in rows:
        spans = [f"{row[key][0]:.3f} to {row[key][1]:.3f}" for key in ("success", "bits", "held_out_loss")]
        print(f"| {row['seed']} | {row['name']} | {' | '.join(spans)} | {row['cpu_seconds']} |")
    if args.out:
        command = f"python examples/09_reward_methods.py {args.experiment} --seeds {' '.join(map(str, args.seeds))}"
        command += f" --steps {args.steps} --iterations {args.iterations} --episodes {args.episodes}"
        args.out.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
