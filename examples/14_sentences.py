"""Four ways, asked for by a sentence: a policy that reads bytes, and follows wordings that it has never seen.

    python examples/14_sentences.py [--seeds 0 1 2] [--json sentences.json]

Each way has 36 wordings ("first under it, after that over the other"), of which 9 are held out of training. Measured
are episodes with wordings of training and with the others: whether they succeed, and whether they succeed by the way
that was asked for. Each seed trains for about three CPU minutes.
"""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import genkit
from genkit import config
from genkit.cli.scripts import ScriptParser, run_script
from genkit.data.text import encode_prompts
from genkit.envs import make
from genkit.evaluation.metrics.estimate import proportion
from genkit.rl.policies.episodes import run_episodes

CONFIG = Path(__file__).parents[1] / "configs" / "four_ways_text.yaml"


def measure(run: genkit.Run, split: Any, args: Any) -> dict[str, Any]:
    """Episodes that are asked for by the wordings of a split in turn, each way equally often."""
    texts = run.config.data.task_texts(split)  # type: ignore[attr-defined]  # of demonstrations
    asked = [i % len(texts) for i in range(args.episodes)]
    wordings = [texts[way][i // len(texts) % len(texts[way])] for i, way in enumerate(asked)]
    policy = genkit.Policy.load(run, steps=args.sampler_steps, conditions={"text": wordings[0]})
    policy = replace(policy, conditions=encode_prompts(run.spec, wordings))  # a sentence for each row
    info = run_episodes(policy, make("four-ways", args.episodes), range(args.first, args.first + args.episodes)).info
    obeyed = info["success"].astype(bool) & (info["mode"] == asked)
    return {
        "wordings": len(set(wordings)),
        "success": proportion(int(info["success"].sum()), args.episodes)._asdict(),
        "as_asked": proportion(int(obeyed.sum()), args.episodes)._asdict(),
    }


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="of training; default: those of the config")
    parser.add_argument("--sampler-steps", type=int, default=16)
    parser.add_argument("--episodes", type=int, default=400, help="of each split")
    parser.add_argument("--first", type=int, default=200_000, help="the seed of the first start")
    parser.add_argument("--runs", default="runs", help="the folder of the runs")
    parser.add_argument("--json", type=Path, help="write the results")
    args = parser.parse_args()
    command = f"python examples/14_sentences.py --seeds {' '.join(map(str, args.seeds))} --first {args.first}"
    command += f" --sampler-steps {args.sampler_steps}" + (f" --steps {args.steps}" if args.steps else "")

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        settings = config.load_yaml(CONFIG) | {"seed": seed, "out": args.runs}
        start = time.process_time()
        run = genkit.train(**settings | ({"steps": args.steps} if args.steps else {}), tensorboard=False, device="cpu")
        seconds = round(time.process_time() - start)
        for split in ("train", "test"):
            rows.append({"seed": seed, "split": split, **measure(run, split, args), "train_cpu_seconds": seconds})
            asked, success = rows[-1]["as_asked"], rows[-1]["success"]
            print(f"seed {seed}, {rows[-1]['wordings']} wordings of {split}: success {success['value']:.3f}, "
                  f"as asked {asked['value']:.3f} ({asked['low']:.3f} to {asked['high']:.3f})", flush=True)  # fmt: skip
        if args.json:
            args.json.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main)
