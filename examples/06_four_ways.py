"""Four ways past two obstacles: where regression fails, and what each objective makes of the same demonstrations.

    python examples/06_four_ways.py [--seed 0] [--episodes 400] [--only flow anchored] [--out four_ways.png]

Trains a policy of each on 200 demonstrations (under a minute of CPU time each), lets it act from unseen starts, prints
success and how evenly the four ways are taken (2 bits: alike), and draws the ways as four bundles.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from PIL import Image

from genkit.cli.main import main as genkit
from genkit.core import pictures
from genkit.envs.four_ways import FourWays, expert_episodes
from genkit.rl.policies.episodes import run_episodes
from genkit.rl.policies.policy import Policy

CLEAN = ["--objective.prediction=x0", "--objective.loss-space=x0", "--objective.cond-dropout=0"]
POLICIES = {  # name -> (settings of genkit train, steps of the sampler)
    "regression": (["--objective=regression"], 1),
    "ddpm": (["--objective=ddpm", *CLEAN], 16),
    "flow": (["--objective=flow", *CLEAN], 16),
    "anchored": (["--objective=anchored", "--data.anchors=32", *CLEAN[1:]], 1),
}

parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=2500)
parser.add_argument("--episodes", type=int, default=400)
parser.add_argument("--only", nargs="+", choices=POLICIES, default=list(POLICIES))
parser.add_argument("--runs", default="runs")
parser.add_argument("--out", type=Path, default=Path("four_ways.png"))
args = parser.parse_args()

world = FourWays(min(200, args.episodes))
panels = [world.draw([obs for obs, *_ in expert_episodes(80, args.seed)], title="80 of the demonstrations")]
rows = []
for name in args.only:
    how, steps = POLICIES[name]
    common = ["--data=four-ways", "--backbone.width=128", f"--steps={args.steps}", "--batch=256", "--sample-every=0"]
    out = ["--device=cpu", "--tensorboard=false", f"--out={args.runs}", f"--name=four-ways-{name}"]
    began = time.process_time()
    if genkit(["train", *how, *common, *out, f"--seed={args.seed}"]):
        raise SystemExit(2)
    took = time.process_time() - began
    policy = Policy.load(Path(args.runs) / "latest", steps=steps)
    done = run_episodes(policy, world, range(100_000, 100_000 + args.episodes))
    good = done.info["success"].astype(bool)
    rows.append((name, steps, float(good.mean()), done.mode_entropy_bits or 0.0, took))
    shown = slice(0, 80)
    colours = [f"C{m}" if ok else "0.6" for m, ok in zip(done.info["mode"][shown], good[shown], strict=True)]
    title = f"{name}, {steps} step{'s' * (steps > 1)}: success {good.mean():.2f}, {rows[-1][3]:.2f} bits"
    panels.append(world.draw(done.paths[shown], colours, title))

print("\n| policy | sampling steps | success | bits of 2 | training, CPU s |\n|---|---|---|---|---|")
for name, steps, success, bits, took in rows:
    print(f"| {name} | {steps} | {success:.3f} | {bits:.2f} | {took:.0f} |")
wide = 2 if len(panels) > 1 else 1
blank = Image.new("RGB", panels[0].size, "white")
panels += [blank] * (-len(panels) % wide)
tiles = [np.concatenate([np.asarray(p) for p in panels[i : i + wide]], 1) for i in range(0, len(panels), wide)]
print(pictures.save(Image.fromarray(np.concatenate(tiles)), args.out))
