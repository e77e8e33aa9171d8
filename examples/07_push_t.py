"""Push a T into place: policies from 206 human demonstrations, tried from unseen starts.

    python examples/07_push_t.py --data pusht_lowdim.npz [--seeds 0] [--starts 200] [--only flow] [--no-mirror]

Needs `pip install "genkit[policy]"`. Trains each policy (some minutes of CPU time) on the demonstrations and on what
they are in a mirror, prints the means of an episode's largest reward (coverage over 0.95, at most 1: what Chi et al.
2023 report) and largest coverage, and success (coverage above 0.95), and draws an episode of each policy from the same
start (the first of the last seed).
"""

import argparse
import itertools
import json
import time
from pathlib import Path

from PIL import Image, ImageDraw

from genkit.cli.main import main as genkit
from genkit.core import pictures
from genkit.envs import make
from genkit.rl.policies.episodes import run_episodes
from genkit.rl.policies.policy import Policy

CLEAN = ["--objective.prediction=x0", "--objective.loss-space=x0", "--objective.cond-dropout=0"]
POLICIES = {  # name -> (settings of genkit train, steps of the sampler)
    "regression": (["--objective=regression"], 1),
    "ddpm": (["--objective=ddpm", *CLEAN], 10),
    "flow": (["--objective=flow", *CLEAN], 4),
    "anchored": (["--objective=anchored", "--data.anchors=64", *CLEAN[1:]], 1),
}

parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
parser.add_argument("--data", required=True, help="the replay buffer, .npz or .zarr")
parser.add_argument("--seeds", type=int, nargs="+", default=[0])
parser.add_argument("--steps", type=int, default=8000)
parser.add_argument("--starts", type=int, default=200)
parser.add_argument("--only", nargs="+", choices=POLICIES, default=list(POLICIES))
parser.add_argument("--mirror", action=argparse.BooleanOptionalAction, default=True)
parser.add_argument("--runs", default="runs")
parser.add_argument("--json", type=Path, help="write the figures")
parser.add_argument("--film", type=Path, help="a GIF of the first start, by the last policy")
parser.add_argument("--out", type=Path, default=Path("push_t.png"), help="the picture")
args = parser.parse_args()

rows: list[dict] = []
episodes: dict[str, list] = {}  # policy -> pictures of one
for seed, name in itertools.product(args.seeds, args.only):
    how, steps = POLICIES[name]
    data = ["--data=pusht", f"--data.root={args.data}", "--data.scaling=standardize", f"--data.mirror={args.mirror}"]
    common = ["--batch=256", "--sample-every=0", "--save-every=2000", "--device=cpu", "--tensorboard=false"]
    named = [f"--seed={seed}", f"--out={args.runs}", f"--name=push-t-{name}", f"--steps={args.steps}"]
    began = time.process_time()
    if genkit(["train", *how, *data, *common, *named]):
        raise SystemExit(2)
    took = time.process_time() - began
    policy = Policy.load(Path(args.runs) / "latest", steps=steps)
    done = run_episodes(policy, make("pusht", min(50, args.starts)), range(100_000, 100_000 + args.starts), film=1)
    episodes[name] = done.frames[0]
    said = {k: done.summary()[k] for k in ("best_reward", "coverage", "success")}
    rows.append({"policy": name, "sampler_steps": steps, "seed": seed, **said, "train_cpu_seconds": round(took)})
    if args.film:
        pictures.save_gif([f.resize((128, 128)) for f in done.frames[0][::3]], args.film, 90)
    if args.json:
        told = f"python examples/07_push_t.py --data {Path(args.data).name} --seeds {' '.join(map(str, args.seeds))}"
        told += f" --steps {args.steps} --starts {args.starts} --only {' '.join(args.only)}"
        told += "" if args.mirror else " --no-mirror"
        args.json.write_text(json.dumps({"command": told, "rows": rows}, indent=1) + "\n")

print("\n| policy | steps | seed | best reward | coverage | success | training, CPU s |\n|---|---|---|---|---|---|---|")
for policy, steps, seed, *estimates, took in (row.values() for row in rows):
    spans = [f"{e['value']:.3f} ({e['low']:.3f} to {e['high']:.3f})" for e in estimates]
    print(f"| {policy} | {steps} | {seed} | {' | '.join(spans)} | {took} |")

SIDE, MOMENTS, MARGIN = 128, 8, 18
sheet = Image.new("RGB", (MOMENTS * SIDE, len(episodes) * (SIDE + MARGIN)), "white")
for i, (name, frames) in enumerate(episodes.items()):
    top, last = i * (SIDE + MARGIN), len(frames) - 1
    ImageDraw.Draw(sheet).text((4, top + 2), f"{name}: {last} steps of the first episode", fill="black", font_size=13)
    for k in range(MOMENTS):
        frame = frames[round(k * last / (MOMENTS - 1))].convert("RGB").resize((SIDE, SIDE))
        sheet.paste(frame, (k * SIDE, top + MARGIN))
print(pictures.save(sheet.quantize(128), args.out, optimize=True))
