"""Four ways past two obstacles: where regression fails, and what each objective makes of the same demonstrations.

    python examples/06_four_ways.py [--seed 0] [--episodes 400] [--only flow anchored] [--out four_ways.png]

Trains a policy with each objective on 200 demonstrations (under a minute of CPU time each), lets it act from unseen
starts, prints success and how evenly the four ways are taken (2 bits: equally often), and draws the trajectories.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from genkit import rollout, train
from genkit.cli.scripts import ScriptParser, run_script
from genkit.core import pictures
from genkit.envs.four_ways import FourWays, expert_episodes

MATCHING = {"loss_space": "x0", "cond_dropout": 0.0}  # the loss is taken on actions, which always see the observation
POLICIES: Mapping[str, tuple[Mapping[str, Any], int]] = {  # settings of training, sampler steps
    "regression": ({"objective": "regression"}, 1),
    "ddpm": ({"objective": {"name": "ddpm", "prediction": "x0", **MATCHING}}, 16),
    "flow": ({"objective": {"name": "flow", "prediction": "x0", **MATCHING}}, 16),
    "anchored": ({"objective": {"name": "anchored", **MATCHING}, "data": {"name": "four-ways", "anchors": 32}}, 1),
}


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2500, help="of training")
    parser.add_argument("--episodes", type=int, default=400)
    parser.add_argument("--only", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--runs", default="runs", help="the folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("four_ways.png"))
    args = parser.parse_args()

    world = FourWays(1)
    panels = [world.draw([obs for obs, *_ in expert_episodes(80, args.seed)], title="80 of the demonstrations")]
    rows = []
    for name in args.only:
        objective, sampler_steps = POLICIES[name]
        start = time.process_time()
        run = train(
            **{"data": "four-ways", **objective},
            backbone={"width": 128},
            steps=args.steps,
            batch=256,
            seed=args.seed,
            sample_every=0,
            tensorboard=False,
            device="cpu",
            out=args.runs,
            name=f"four-ways-{name}",
        )
        seconds = time.process_time() - start
        rollouts = rollout(run, steps=sampler_steps, episodes=args.episodes, num_envs=min(200, args.episodes))
        episodes = rollouts.episodes
        success = episodes.info["success"].astype(bool)
        bits = episodes.mode_entropy_bits or 0.0
        rows.append(f"| {name} | {sampler_steps} | {success.mean():.3f} | {bits:.2f} | {seconds:.0f} |")

        # the first 80 episodes, coloured by the way they took; failures are grey
        ways = zip(episodes.info["mode"][:80], success[:80], strict=True)
        colours = [f"C{int(way)}" if successful else "0.6" for way, successful in ways]
        plural = "s" if sampler_steps > 1 else ""
        title = f"{name}, {sampler_steps} step{plural}: success {success.mean():.2f}, {bits:.2f} bits"
        panels.append(world.draw(episodes.paths[:80], colours, title))

    print("\n| policy | sampler steps | success | mode entropy, bits | training, CPU s |\n|---|---|---|---|---|")
    print("\n".join(rows))
    print(pictures.save_image(tile(panels), args.out))


def tile(panels: list[Image.Image]) -> Image.Image:
    """The panels in rows of two, on white."""
    width, height = panels[0].size
    columns = min(2, len(panels))
    sheet = Image.new("RGB", (columns * width, -(-len(panels) // columns) * height), "white")
    for i, panel in enumerate(panels):
        sheet.paste(panel, (i % columns * width, i // columns * height))
    return sheet


if __name__ == "__main__":
    run_script(main)
