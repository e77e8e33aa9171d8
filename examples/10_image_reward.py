"""DDPO on images: a model that draws threes learns to draw what a classifier calls an eight, and what that costs.

    python examples/10_image_reward.py [--run runs/latest] [--label 3] [--seeds 0] [--kl 0.05] [--out image_reward.png]

Trains a flow on scikit-learn's digits unless a run is given (two CPU minutes), then improves the images of one label by
the classifier's log-probability of "8" (half a CPU minute a seed). It prints the reward before and after in standard
deviations of the first iteration, the Fréchet distances in the classifier's features to all real digits, to the nearest
class and to real eights, and draws samples before and after beside the reward against the KL divergence from the
pretrained model.
"""

import argparse
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import genkit
from genkit.cli.scripts import ScriptParser, run_script
from genkit.core import Draw
from genkit.core.pictures import save_image
from genkit.data import DATA
from genkit.evaluation.metrics import Moments, frechet_distance
from genkit.evaluation.metrics.features import Classifier, Extractor
from genkit.training.directory import read_log

WIDTH, HEIGHT, CAPTION = 7 * 66 + 2, 3 * 66 + 2, 24  # three rows of seven samples; a tile of a run's grid is 66 wide


def parse_args() -> argparse.Namespace:
    parser = ScriptParser(__doc__)
    parser.add_argument("--run", help="a run on the digits; default: train one")
    parser.add_argument("--reward", default="genkit.rl.finetune.image_rewards:eight")
    parser.add_argument("--label", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kl", type=float, default=0.05, help="price of a nat, in deviations of the first rewards")
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--runs", default="runs", help="the folder of the runs")
    parser.add_argument("--out", type=Path, default=Path("image_reward.png"))
    return parser.parse_args()


def real_eights() -> tuple[Extractor, Moments]:
    """The classifier of the digits, and the moments of the real eights in its features."""
    data = DATA["digits"]().load("train")
    extract = Classifier().load("cpu", data)
    batch = data.batch(torch.arange(len(data)), Draw((0,), 0, len(data)))
    return extract, Moments.of(extract(batch.x[batch.cond["label"] == 8]).features)


def improve(base: genkit.Run, seed: int, args: argparse.Namespace) -> genkit.FinetunedRun:
    return genkit.finetune(
        base,
        reward=args.reward,
        label=args.label,
        method={"name": "ddpo", "kl": args.kl},
        exploration_noise="sde",
        min_std=0.1,
        steps=5,
        ema=0.9,
        iterations=args.iterations,
        samples=args.samples,
        seed=seed,
        out=args.runs,
        name=f"image-reward-seed{seed}",
    )


def table_row(seed: int, run: genkit.FinetunedRun, distances: tuple[float, float], seconds: float) -> str:
    """One line of the printed table; ``distances`` are to the real eights, before and after."""
    before, after = run.before, run.after
    rise = (after["reward"]["value"] - before["reward"]["value"]) / before["reward_std"]
    kl = [record["kl_reference"] for record in read_log(run.directory) if "kl_reference" in record][-1]
    reward, nearest, precision = (
        f"{before[name]['value']:.{digits}f} to {after[name]['value']:.{digits}f}"
        for name, digits in (("reward", 2), ("frechet_class", 1), ("precision", 2))
    )
    cells = [seed, reward, f"{rise:.1f}", f"{kl:.1f}", f"{distances[0]:.1f} to {distances[1]:.1f}", nearest, precision]
    return f"| {' | '.join(map(str, cells))} | {seconds:.0f} |"


def draw(run: genkit.Run, label: int) -> Image.Image:
    """Samples before and after, and the reward against the divergence, of one run."""
    sheet = Image.new("RGB", (WIDTH + 790, 2 * (HEIGHT + CAPTION)), "white")
    for i, name in enumerate(("before", "after")):
        top = i * (HEIGHT + CAPTION)
        ImageDraw.Draw(sheet).text((4, top + 6), f"{name}, samples of label {label}", fill="black", font_size=14)
        tiles = Image.open(run.directory / "samples" / f"{name}.png").convert("RGB").crop((0, 0, WIDTH, HEIGHT))
        sheet.paste(tiles, (0, top + CAPTION))
    curve = Image.open(run.directory / "reward-kl.png").convert("RGB").resize((770, 440))
    sheet.paste(curve, (WIDTH + 20, 4))
    return sheet.quantize(192)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    extract, eights = real_eights()

    def distance_to_eights(run: genkit.Run) -> float:
        samples = run.sample(500, label=args.label, seed=100_000, sampler="ddim", steps=5)
        return frechet_distance(Moments.of(extract(samples.x).features), eights)

    if args.run is None:
        base = genkit.train(objective="flow", data="digits", sample_every=0, out=args.runs)
    else:
        base = genkit.load(args.run)
    rows: list[str] = []
    runs: list[genkit.Run] = []
    for seed in args.seeds:
        start = time.process_time()
        run = improve(base, seed, args)
        seconds = time.process_time() - start
        rows.append(table_row(seed, run, (distance_to_eights(base), distance_to_eights(run)), seconds))
        runs.append(run)

    print("\n| seed | reward | in deviations | nats | Fréchet to eights | to the nearest class | precision | CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    print(save_image(draw(runs[0], args.label), args.out, optimize=True))


if __name__ == "__main__":
    run_script(main)
