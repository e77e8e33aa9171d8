"""HalfCheetah, or Hopper: a policy learned from a medium expert, then improved by the reward of the task.

    python examples/08_finetune_mujoco.py [--seeds 0] [--env Hopper-v5] [--strip]

Needs `pip install "genkit[policy]"`. Finds a linear expert by random search and records 20 of its episodes (only if
ENV.npz is not there yet), learns a flow policy from them, improves it by PPO on its denoising steps, and draws the
return against the CPU time of the improvement: thin lines with the noise of learning, thick ones without. --strip adds
the first four seconds of an episode before and after, by a camera that goes along. What is reached stands in the head
of the configuration of finetune.
"""

import argparse
import json
import time
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from genkit import config
from genkit.cli.main import main as genkit
from genkit.core import pictures
from genkit.envs import make
from genkit.envs.gym import Gym
from genkit.rl.policies.episodes import run_episodes
from genkit.rl.policies.policy import Policy
from genkit.training.directory import find_run, read_log
from genkit.training.run import Run, load_run

CONFIGS = Path(__file__).parents[1] / "configs"
SETTINGS = {  # environment -> configurations of genkit train and genkit finetune, options of the search for an expert
    "HalfCheetah-v5": ("halfcheetah_flow.yaml", "finetune/halfcheetah.yaml", "--expert.seed=2"),
    "Hopper-v5": ("hopper_flow.yaml", "finetune/hopper.yaml", "--expert.seed=1"),
}

parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
parser.add_argument("--env", choices=SETTINGS, default="HalfCheetah-v5")
parser.add_argument("--seeds", type=int, nargs="+", default=[0])
parser.add_argument("--iterations", type=int, help="of the improvement; the configuration's where not given")
parser.add_argument("--demos", type=Path, help="the replay buffer, recorded where it is not there; ENV.npz")
parser.add_argument("--runs", default="runs")
parser.add_argument("--out", type=Path, help="the picture; ENV.png")
parser.add_argument("--json", type=Path, help="write the figures")
parser.add_argument("--strip", action="store_true", help="draw the world; needs OpenGL, without a screen through EGL")
args = parser.parse_args()
demos, out = args.demos or Path(f"{args.env}.npz"), args.out or Path(f"{args.env}.png")


def command(*argv: str) -> float:
    """CPU seconds of a command of genkit."""
    began = time.process_time()
    if genkit([*argv]):
        raise SystemExit(2)
    return time.process_time() - began


def strip(run: Run, steps: int) -> np.ndarray:
    """Eight moments of the first four seconds of an episode, side by side."""
    step = cast(Gym, make(args.env, 1)).envs[0].unwrapped.dt  # seconds
    world = make(args.env, 1, max_episode_steps=round(4 / step), camera_name="track")
    done = run_episodes(Policy.load(run, steps=steps), world, [100_000], film=1)
    moments = [f.resize((160, 160)) for f in done.frames[0][:: max(1, len(done.frames[0]) // 8)][:8]]
    return np.concatenate([np.asarray(f) for f in moments], 1)


train, finetune = (str(CONFIGS / name) for name in SETTINGS[args.env][:2])
if not demos.is_file():
    command("demo", args.env, "--expert=ars", *SETTINGS[args.env][2:], "--episodes=20", f"--out={demos}")
rows, curves, strips = [], [], []
for seed in args.seeds:
    common = [f"--seed={seed}", f"--out={args.runs}"]
    learning = command(
        "train", "--config", train, f"--data.root={demos}", "--device=cpu", "--tensorboard=false", *common
    )
    base = find_run(Path(args.runs) / "latest")
    length = [f"--iterations={args.iterations}"] if args.iterations else []
    command("finetune", str(base), "--config", finetune, *length, *common)
    run = find_run(Path(args.runs) / "latest")
    log = read_log(run)
    before, after = (json.loads((run / f"{when}.json").read_text())["return"] for when in ("before", "after"))
    improving = max(r.get("cpu_seconds", 0) for r in log)
    rows.append({"seed": seed, "before": before, "after": after, "train_cpu_seconds": round(learning),
                 "finetune_cpu_seconds": round(improving), "iterations": max(r["step"] for r in log)})  # fmt: skip
    spent = {0: 0.0, **{r["step"]: r["cpu_seconds"] for r in log if "cpu_seconds" in r}}
    quiet = [(spent[r["step"]], r[k]) for r in log for k in ("before/return", "checkpoint/return") if k in r]
    curves.append(([(r["cpu_seconds"], r["return"]) for r in log if "return" in r], quiet))
    if args.json:
        said = f"python examples/08_finetune_mujoco.py --env {args.env} --seeds {' '.join(map(str, args.seeds))}"
        said += f" --iterations {args.iterations}" if args.iterations else ""
        args.json.write_text(json.dumps({"command": said, "seeds": rows}, indent=1) + "\n")
    if args.strip and not strips:
        steps = config.load_yaml(run / "finetune.yaml")["steps"]
        strips = [strip(load_run(path, device="cpu"), steps) for path in (base, run)]


def draw(axes):
    for i, (row, (noisy, quiet)) in enumerate(zip(rows, curves, strict=True)):
        axes.plot(*zip(*noisy, strict=True), lw=0.6, alpha=0.4, color=f"C{i}")
        after = f"{row['before']['value']:.0f} to {row['after']['value']:.0f}"
        axes.plot(*zip(*quiet, strict=True), "o-", color=f"C{i}", label=f"seed {row['seed']}, without noise: {after}")
    axes.set(xlabel="CPU seconds", ylabel="return of an episode", title=args.env)
    axes.legend()


picture = pictures.draw_figure(draw, (12.8, 5) if strips else (7, 4))
if strips:
    wide = strips[0].shape[1]
    curve = np.asarray(picture.convert("RGB").resize((wide, round(picture.height * wide / picture.width))))
    picture = Image.fromarray(np.concatenate([curve, *strips]))
print("| seed | before | after | improvement, CPU s |\n|---|---|---|---|")
for seed, before, after, _, took, _ in (row.values() for row in rows):
    print(f"| {seed} | {before['value']:.0f} | {after['value']:.0f} | {took} |")
print(pictures.save_image(picture, out))
