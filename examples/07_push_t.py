"""Push a T into place: policies from 206 human demonstrations, evaluated from unseen starts.

    python examples/07_push_t.py --data pusht_lowdim.npz [--seeds 0] [--starts 200] [--only flow] [--no-mirror]

Needs `pip install -e ".[policy]"`. Trains each policy (some minutes of CPU time) on the demonstrations and their mirror
images, prints the means of an episode's best reward (coverage / 0.95, at most 1: what Chi et al. 2023 report) and
largest coverage, and success (coverage above 0.95), and draws one episode of each policy from the same start (the first
of the last seed).
"""

import argparse
import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from genkit import rollout, train
from genkit.cli.scripts import ScriptParser, run_script
from genkit.core import pictures

MATCHING = {"loss_space": "x0", "cond_dropout": 0.0}  # the loss is taken on actions, which always see the observation
POLICIES: Mapping[str, tuple[Any, Mapping[str, Any], int]] = {  # objective, settings of the data, sampler steps
    "regression": ("regression", {}, 1),
    "ddpm": ({"name": "ddpm", "prediction": "x0", **MATCHING}, {}, 10),
    "flow": ({"name": "flow", "prediction": "x0", **MATCHING}, {}, 4),
    "anchored": ({"name": "anchored", **MATCHING}, {"anchors": 64}, 1),
}
SIDE, MOMENTS, MARGIN = 128, 8, 18  # of the picture, in pixels and frames


def parse_args() -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("--data", required=True, help="the replay buffer, .npz or .zarr")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=8000, help="of training")
    parser.add_argument("--starts", type=int, default=200, help="episodes of the evaluation")
    parser.add_argument("--first-start", type=int, default=300_000, help="seed of the first of them")
    parser.add_argument("--only", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--mirror", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--runs", default="runs", help="the folder of the runs")
    parser.add_argument("--json", type=Path, help="write the results")
    parser.add_argument("--film", type=Path, help="a GIF of the first start, by the last policy")
    parser.add_argument("--out", type=Path, default=Path("push_t.png"), help="the picture")
    return parser.parse_args()


def train_and_evaluate(name: str, seed: int, args: argparse.Namespace) -> tuple[dict[str, Any], list[Image.Image]]:
    """The results of one policy, and the frames of its first episode."""
    objective, data, sampler_steps = POLICIES[name]
    start = time.process_time()
    run = train(
        objective=objective,
        data={"name": "pusht", "root": args.data, "scaling": "standardize", "mirror": args.mirror, **data},
        steps=args.steps,
        batch=256,
        seed=seed,
        sample_every=0,
        save_every=2000,
        tensorboard=False,
        device="cpu",
        out=args.runs,
        name=f"push-t-{name}",
    )
    seconds = round(time.process_time() - start)
    rollouts = rollout(run, steps=sampler_steps, episodes=args.starts, seed=args.first_start, film=1)
    summary = rollouts.summary()
    row = {"policy": name, "sampler_steps": sampler_steps, "seed": seed}
    row |= {key: summary[key] for key in ("best_reward", "coverage", "success")}
    return {**row, "train_cpu_seconds": seconds}, rollouts.episodes.frames[0]


def draw(episodes: Mapping[str, list[Image.Image]]) -> Image.Image:
    """One row for each policy: moments of its episode, equally spaced from the first to the last step."""
    sheet = Image.new("RGB", (MOMENTS * SIDE, len(episodes) * (SIDE + MARGIN)), "white")
    for i, (name, frames) in enumerate(episodes.items()):
        top, last = i * (SIDE + MARGIN), len(frames) - 1
        ImageDraw.Draw(sheet).text((4, top + 2), f"{name}: {last} steps of the first episode", "black", font_size=13)
        for k in range(MOMENTS):
            frame = frames[round(k * last / (MOMENTS - 1))].convert("RGB").resize((SIDE, SIDE))
            sheet.paste(frame, (k * SIDE, top + MARGIN))
    return sheet.quantize(128)


def main() -> None:
    args = parse_args()
    command = f"python examples/07_push_t.py --data {Path(args.data).name} --seeds {' '.join(map(str, args.seeds))}"
    command += f" --steps {args.steps} --starts {args.starts}"
    command += f" --first-start {args.first_start} --only {' '.join(args.only)}"
    command += "" if args.mirror else " --no-mirror"
    rows: list[dict[str, Any]] = []
    episodes: dict[str, list[Image.Image]] = {}
    for seed, name in itertools.product(args.seeds, args.only):
        row, frames = train_and_evaluate(name, seed, args)
        rows.append(row)
        episodes[name] = frames
        if args.film:
            pictures.save_gif([frame.resize((128, 128)) for frame in frames[::3]], args.film, 90)
        if args.json:  # after each policy, so that a run that is cut short leaves what it has
            args.json.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")

    print("\n| policy | sampler steps | seed | best reward | coverage | success | training, CPU s |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        estimates = [row[key] for key in ("best_reward", "coverage", "success")]
        spans = [f"{e['value']:.3f} ({e['low']:.3f} to {e['high']:.3f})" for e in estimates]
        cells = [row["policy"], row["sampler_steps"], row["seed"], *spans, row["train_cpu_seconds"]]
        print(f"| {' | '.join(map(str, cells))} |")
    print(pictures.save_image(draw(episodes), args.out, optimize=True))


if __name__ == "__main__":
    run_script(main)
