"""HalfCheetah or Hopper: a policy learned from a medium expert, then improved by the reward of the task.

    python examples/08_finetune_mujoco.py [--seeds 0] [--env Hopper-v5] [--strip]

Needs `pip install -e ".[policy]"`. Each seed searches its own linear expert and records 20 of its episodes (unless
ENV-SEED.npz exists), learns a flow policy from them, improves it by PPO on its denoising steps, and plots the return
against CPU time: thin lines with exploration noise, thick lines without. An expert is taken as the search finds it: the
first policy that reaches the return in genkit.envs.ars.TARGETS. If that takes more than SEARCH_ROUNDS rounds, the
search begins again with the seed ten higher. --strip adds the first four seconds of an episode before and after, by a
camera that moves along. The heads of configs/finetune/*.yaml say what to expect.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image

import genkit
from genkit import config
from genkit.cli.scripts import ScriptParser, run_script
from genkit.core import pictures
from genkit.core.arrays import open_npz
from genkit.envs import make
from genkit.envs.ars import LinearPolicy
from genkit.envs.gym import Gym
from genkit.envs.recording import ARS, DemoSettings, record_demonstrations
from genkit.rl.policies.episodes import run_episodes
from genkit.training.directory import read_log

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = {"HalfCheetah-v5": "halfcheetah", "Hopper-v5": "hopper"}  # of the configurations
SEARCH_ROUNDS, SEARCHES = 300, 10


class Curve(NamedTuple):
    """``(CPU seconds, return)`` during fine-tuning."""

    noisy: Sequence[tuple[float, float]]  # of every iteration, with exploration noise
    quiet: Sequence[tuple[float, float]]  # of the checkpoints, without


def parse_args() -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("--env", choices=NAMES, default="HalfCheetah-v5")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--iterations", type=int, help="of fine-tuning; default: the configuration's")
    parser.add_argument("--demos", type=Path, default=Path("."), help="the folder of the replay buffers")
    parser.add_argument("--runs", default="runs", help="the folder of the runs")
    parser.add_argument("--out", type=Path, help="the picture; default: ENV.png")
    parser.add_argument("--json", type=Path, help="write the results")
    parser.add_argument(
        "--strip", action="store_true", help="draw the world; needs OpenGL, without a screen through EGL"
    )
    args = parser.parse_args()
    args.out = args.out or Path(f"{args.env}.png")
    return args


def find_demonstrations(args: argparse.Namespace, seed: int) -> tuple[Path, dict[str, Any]]:
    """The demonstrations of a seed's own expert, and what is known of it."""
    path, start = args.demos / f"{args.env}-{seed}.npz", time.process_time()
    for search_seed in range(seed, seed + 10 * SEARCHES, 10):
        if path.is_file():
            break
        expert = ARS(seed=search_seed, rounds=SEARCH_ROUNDS)
        settings = DemoSettings(env=args.env, expert=expert, episodes=20, seed=1000 * seed)  # other starts, too
        try:
            record_demonstrations(settings, path)
        except ValueError as e:
            if search_seed == seed + 10 * (SEARCHES - 1):
                raise
            print(e)
    with open_npz(path) as demos:
        returns = [float(part.sum()) for part in np.split(demos["reward"], demos["episode_ends"][:-1])]
    return path, {
        "origin": LinearPolicy.load(path.with_suffix(".expert.json")).origin,
        "mean": float(np.mean(returns)),
        "smallest": min(returns),
        "largest": max(returns),
        "cpu_seconds": round(time.process_time() - start),  # 0 if it was recorded before
    }


def imitate(args: argparse.Namespace, demos: Path, seed: int) -> tuple[genkit.Run, int]:
    """A policy learned from the demonstrations, and the CPU seconds of its training."""
    settings = config.load_yaml(CONFIGS / f"{NAMES[args.env]}_flow.yaml")
    settings["data"] = {**settings["data"], "root": str(demos)}
    start = time.process_time()
    run = genkit.train(**settings, seed=seed, out=args.runs, device="cpu", tensorboard=False)
    return run, round(time.process_time() - start)


def improve(args: argparse.Namespace, base: genkit.Run, seed: int) -> tuple[genkit.FinetunedRun, Mapping[str, Any]]:
    """The policy after fine-tuning by reward, and the settings that it was fine-tuned with."""
    settings = config.load_yaml(CONFIGS / "finetune" / f"{NAMES[args.env]}.yaml")
    if args.iterations:
        settings["iterations"] = args.iterations
    return genkit.finetune(base, **settings, seed=seed, out=args.runs), settings


def read_curve(run: genkit.Run) -> Curve:
    log = read_log(run.directory)
    seconds = {0: 0.0, **{record["step"]: record["cpu_seconds"] for record in log if "cpu_seconds" in record}}
    noisy = [(record["cpu_seconds"], record["return"]) for record in log if "return" in record]
    quiet = [
        (seconds[record["step"]], record[key])
        for record in log
        for key in ("before/return", "checkpoint/return")
        if key in record
    ]
    return Curve(noisy, quiet)


def draw_strip(args: argparse.Namespace, run: genkit.Run, sampler_steps: int) -> np.ndarray:
    """Eight moments of the first four seconds of an episode, side by side."""
    seconds_per_step = cast(Gym, make(args.env, 1)).envs[0].unwrapped.dt
    world = make(args.env, 1, max_episode_steps=round(4 / seconds_per_step), camera_name="track")
    frames = run_episodes(genkit.Policy.load(run, steps=sampler_steps), world, [100_000], film=1).frames[0]
    moments = [frame.resize((160, 160)) for frame in frames[:: max(1, len(frames) // 8)][:8]]
    return np.concatenate([np.asarray(moment) for moment in moments], axis=1)


def draw(
    env: str, rows: Sequence[Mapping[str, Any]], curves: Sequence[Curve], strips: Sequence[np.ndarray]
) -> Image.Image:
    """The curves of all seeds, above the strips of the first."""

    def plot(axes: Any) -> None:
        for i, (row, curve) in enumerate(zip(rows, curves, strict=True)):
            label = f"seed {row['seed']}, without noise: {row['before']['value']:.0f} to {row['after']['value']:.0f}"
            axes.plot(*zip(*curve.noisy, strict=True), lw=0.6, alpha=0.4, color=f"C{i}")
            axes.plot(*zip(*curve.quiet, strict=True), "o-", color=f"C{i}", label=label)
        axes.set(xlabel="CPU seconds", ylabel="return of an episode", title=env)
        axes.legend()

    picture = pictures.draw_figure(plot, (12.8, 5) if strips else (7, 4))
    if not strips:
        return picture
    width = strips[0].shape[1]
    plot_pixels = np.asarray(picture.convert("RGB").resize((width, round(picture.height * width / picture.width))))
    return Image.fromarray(np.concatenate([plot_pixels, *strips]))


def main() -> None:
    args = parse_args()
    command = f"python examples/08_finetune_mujoco.py --env {args.env} --seeds {' '.join(map(str, args.seeds))}"
    command += f" --iterations {args.iterations}" if args.iterations else ""
    rows: list[dict[str, Any]] = []
    curves: list[Curve] = []
    strips: list[np.ndarray] = []
    for seed in args.seeds:
        demos, expert = find_demonstrations(args, seed)
        base, train_seconds = imitate(args, demos, seed)
        run, settings = improve(args, base, seed)
        log = read_log(run.directory)
        rows.append(
            {
                "seed": seed,
                "expert": expert,
                "before": run.before["return"],
                "after": run.after["return"],
                "train_cpu_seconds": train_seconds,
                "finetune_cpu_seconds": round(max(record.get("cpu_seconds", 0) for record in log)),
                "iterations": max(record["step"] for record in log),
            }
        )
        curves.append(read_curve(run))
        if args.json:  # after each seed, so that a run that is cut short leaves what it has
            args.json.write_text(json.dumps({"command": command, "seeds": rows}, indent=1) + "\n")
        if args.strip and not strips:
            strips = [draw_strip(args, policy, settings["steps"]) for policy in (base, run)]

    print("| seed | expert | before | after | fine-tuning, CPU s |\n|---|---|---|---|---|")
    for row in rows:
        returns = [row["expert"]["mean"], row["before"]["value"], row["after"]["value"]]
        cells = [str(row["seed"]), *[f"{value:.0f}" for value in returns], str(row["finetune_cpu_seconds"])]
        print(f"| {' | '.join(cells)} |")
    print(pictures.save_image(draw(args.env, rows, curves, strips), args.out))


if __name__ == "__main__":
    run_script(main)
