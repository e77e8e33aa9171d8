"""Two ways to learn from rewards, on the task of four ways: what holds a regression, and a reward against a likelihood.

    python examples/09_reward_methods.py rwr [--seeds 0] [--out rwr.json]
    python examples/09_reward_methods.py mixed [--seeds 0] [--out mixed.json]

rwr: regression onto what was tried, weighted by exp(advantage), as it is and with its stabilisers (demonstrations in
every batch, weights of at most 10). mixed: the objective's own loss minus lambda times the expected reward, for some
lambda: success against the loss on demonstrations that were held out. Each run some CPU minutes.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from genkit.cli.main import main as genkit
from genkit.core import Draw
from genkit.training.directory import find_run, read_log
from genkit.training.run import Run, load_run

RWR = ["--method=rwr", "--method.lr=1e-3", "--method.batch=256"]
MIXED = ["--method=mixed", "--method.lr=3e-4"]
PLANS = {  # what is measured -> name -> settings of genkit finetune
    "rwr": {"naive": [*RWR, "--method.demo-fraction=0", "--method.max-weight=1e9"], "stabilised": RWR},
    "mixed": {f"lambda {v:g}": [*MIXED, f"--method.weight={v}"] for v in (0.0, 0.3, 1.0, 3.0, 10.0, 30.0)},
}
LEARNT = ["--data=four-ways", "--objective=flow", "--objective.prediction=x0", "--objective.loss-space=x0",
          "--objective.cond-dropout=0", "--backbone.width=128", "--backbone.depth=2", "--lr=1e-3", "--batch=256",
          "--sample-every=0", "--device=cpu", "--precision=fp32", "--tensorboard=false"]  # fmt: skip

parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
parser.add_argument("what", choices=PLANS)
parser.add_argument("--seeds", type=int, nargs="+", default=[0])
parser.add_argument("--steps", type=int, default=1000, help="of training on demonstrations")
parser.add_argument("--iterations", type=int, default=25)
parser.add_argument("--episodes", type=int, default=400, help="of each measurement")
parser.add_argument("--runs", default="runs")
parser.add_argument("--out", type=Path)
args = parser.parse_args()


def command(*argv: str) -> float:
    """CPU seconds of a command of genkit."""
    began = time.process_time()
    if genkit([*argv]):
        raise SystemExit(2)
    return time.process_time() - began


@torch.no_grad()
def held_out(run: Run, rows: int = 4000) -> float:
    """The objective's loss on demonstrations that nothing was trained on, a mean over the numbers of a chunk."""
    data = run.config.data.load("test")
    batch = data.codec.encode(data.batch(torch.arange(rows) % len(data), Draw((0,), 0, rows)))
    torch.manual_seed(0)
    return float(run.objective.loss(run.objective.phases[0].name, run.nets, batch).per_sample.mean())


rows = []
for seed in args.seeds:
    command("train", *LEARNT, f"--steps={args.steps}", f"--seed={seed}", f"--out={args.runs}")
    base = find_run(Path(args.runs) / "latest")
    before = held_out(load_run(base, device="cpu"))
    for name, how in PLANS[args.what].items():
        more = [f"--iterations={args.iterations}", "--num-envs=50", f"--eval-episodes={args.episodes}"]
        took = command("finetune", str(base), *how, *more, f"--seed={seed}", f"--out={args.runs}")
        run = find_run(Path(args.runs) / "latest")
        found = [json.loads((run / f"{when}.json").read_text()) for when in ("before", "after")]
        log = read_log(run)
        rows.append({
            "seed": seed,
            "name": name,
            "settings": " ".join(how),
            "success": [v["success"]["value"] for v in found],
            "bits": [v["mode_entropy_bits"] for v in found],
            "held_out_loss": [before, held_out(load_run(run, device="cpu"))],
            "success_by_iteration": [round(r["success"], 3) for r in log if "success" in r],
            "cpu_seconds": round(took),
        })  # fmt: skip

print("| seed | run | success | bits of 2 | held-out loss | CPU s |\n|---|---|---|---|---|---|")
for row in rows:
    spans = [f"{row[k][0]:.3f} to {row[k][1]:.3f}" for k in ("success", "bits", "held_out_loss")]
    print(f"| {row['seed']} | {row['name']} | {' | '.join(spans)} | {row['cpu_seconds']} |")
if args.out:
    said = f"--seeds {' '.join(map(str, args.seeds))} --steps {args.steps} --iterations {args.iterations} "
    said += f"--episodes {args.episodes}"
    record = {"command": f"python examples/09_reward_methods.py {args.what} {said}", "rows": rows}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
