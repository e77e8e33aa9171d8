"""One way of four by rewards that were recorded: the best of 16 chunks by an offline Q, without the world.

    python examples/15_offline_q.py [--seeds 0 1 2] [--json offline-q.json]

200 demonstrations go all four ways. Recorded is a reward of 1 when an obstacle is passed above. It depends on what the
policy observes, its position; a reward at the end for the whole way would not, since the position after the first
obstacle does not tell on which side it was passed, so that no Q of it could prefer one. Each seed takes 2 CPU minutes.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import genkit
from genkit.cli.scripts import ScriptParser, run_script
from genkit.envs.four_ways import OBSTACLES, expert_episodes
from genkit.evaluation.metrics.estimate import proportion

ABOVE_BOTH = 3  # the number of the way that gets all rewards
CHOICES: dict[str, dict[str, Any]] = {
    "the policy": {},
    "best of 16": {"offline_q": True, "best_of": 16, "expectile": 0.8, "gamma": 0.98},
}


def record(file: Path, episodes: int, seed: int) -> None:
    """Demonstrations of all four ways, with the rewards."""
    recorded = expert_episodes(episodes, seed)
    rewards = []
    for obs, _, _, _, last in recorded:
        x, y = np.concatenate([obs, last[None]]).T
        above = [(x[:-1] < cx) & (x[1:] >= cx) & (y[1:] > cy) for cx, cy in OBSTACLES]
        rewards.append(np.sum(above, 0, dtype=float))
    ends = np.cumsum([len(r) for r in rewards])
    np.savez(file, obs=np.concatenate([e[0] for e in recorded]), action=np.concatenate([e[1] for e in recorded]),
             reward=np.concatenate(rewards), episode_ends=ends)  # fmt: skip


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--demonstrations", type=int, default=200)
    parser.add_argument("--steps", type=int, default=1500, help="of training")
    parser.add_argument("--episodes", type=int, default=400)
    parser.add_argument("--first", type=int, default=200_000, help="the seed of the first start")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of the runs")
    parser.add_argument("--json", type=Path, help="write the results")
    args = parser.parse_args()

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        args.runs.mkdir(parents=True, exist_ok=True)
        file = args.runs / f"four-ways-{seed}.npz"
        record(file, args.demonstrations, seed)
        run = genkit.train(
            data={"name": "replay", "root": str(file), "reward": "reward", "env": "four-ways", "obs_steps": 1},
            objective={"name": "flow", "prediction": "x0", "loss_space": "x0", "cond_dropout": 0.0},
            backbone={"name": "mlp", "width": 128}, steps=args.steps, batch=256, lr=1e-3, sample_every=0, seed=seed,
            device="cpu", tensorboard=False, out=str(args.runs),
        )  # fmt: skip
        for choice, settings in CHOICES.items():
            start = time.process_time()
            rollouts = genkit.rollout(run, episodes=args.episodes, seed=args.first, steps=8, **settings)
            info = rollouts.episodes.info
            rewarded = info["success"].astype(bool) & (info["mode"] == ABOVE_BOTH)
            row = {"seed": seed, "choice": choice, "success": rollouts.summary()["success"]}
            row["rewarded_way"] = proportion(int(rewarded.sum()), args.episodes)._asdict()
            rows.append({**row, "cpu_seconds": round(time.process_time() - start)})
            e = row["rewarded_way"]
            print(f"seed {seed}, {choice}: success {row['success']['value']:.3f}, by the rewarded way {e['value']:.3f} "
                  f"({e['low']:.3f} to {e['high']:.3f})", flush=True)  # fmt: skip
        if args.json:
            command = f"python examples/15_offline_q.py --seeds {' '.join(map(str, args.seeds))} --steps {args.steps} "
            command += f"--demonstrations {args.demonstrations} --episodes {args.episodes} --first {args.first}"
            args.json.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
