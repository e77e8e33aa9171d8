"""DDPO on pictures: a model that draws threes learns to draw what a classifier calls an eight, and what that costs.

    python examples/10_image_reward.py [--run runs/latest] [--label 3] [--seeds 0] [--kl 0.05] [--out image_reward.png]

Trains a flow on scikit-learn's digits where no run is given (two CPU minutes), then improves the pictures of one label
by the classifier's log-probability of "8" (half a CPU minute a seed). It prints the reward before and after in its
first deviations, the Fréchet distances in the classifier's features to all real digits, to the nearest class and to
real eights, and draws samples before and after beside the reward against the divergence from the pretrained model.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from genkit.cli.main import main as genkit
from genkit.core import Draw
from genkit.core.pictures import save_image
from genkit.data import DATA
from genkit.evaluation.metrics import Moments, frechet_distance
from genkit.evaluation.metrics.features import Classifier
from genkit.training.directory import find_run, read_log
from genkit.training.run import load_run

parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
parser.add_argument("--run", help="a run on the digits; None: train one")
parser.add_argument("--reward", default="genkit.rl.finetune.image_rewards:eight")
parser.add_argument("--label", type=int, default=3)
parser.add_argument("--seeds", type=int, nargs="+", default=[0])
parser.add_argument("--kl", type=float, default=0.05, help="price of a nat, in deviations of the first rewards")
parser.add_argument("--iterations", type=int, default=15)
parser.add_argument("--samples", type=int, default=200)
parser.add_argument("--runs", default="runs")
parser.add_argument("--out", type=Path, default=Path("image_reward.png"))
args = parser.parse_args()
CHAIN = ["--exploration-noise=sde", "--steps=5", "--min-std=0.1"]
METHOD = ["--method=ddpo", f"--method.kl={args.kl}", "--ema=0.9"]

torch.set_num_threads(1)
data = DATA["digits"]().load("train")
see = Classifier().load("cpu", data)
batch = data.batch(torch.arange(len(data)), Draw((0,), 0, len(data)))
eights = Moments.of(see(batch.x[batch.cond["label"] == 8]).features)


def to_eights(folder: Path) -> float:
    """The Fréchet distance of 500 samples of the label to the real eights."""
    x, _ = load_run(folder, device="cpu").sample(500, label=args.label, seed=100_000, sampler="ddim", steps=5)
    return frechet_distance(Moments.of(see(x).features), eights)


TRAIN = ["train", "--objective=flow", "--data=digits", "--sample-every=0", f"--out={args.runs}"]
if args.run is None and genkit(TRAIN):
    raise SystemExit(2)
base = find_run(args.run or Path(args.runs) / "latest")
shown, rows = None, []
for seed in args.seeds:
    began = time.process_time()
    how = ["--reward", args.reward, "--label", str(args.label), *METHOD, *CHAIN, f"--seed={seed}", f"--out={args.runs}"]
    many = [f"--iterations={args.iterations}", f"--samples={args.samples}", f"--name=image-reward-seed{seed}"]
    if genkit(["finetune", str(base), *how, *many]):
        raise SystemExit(2)
    took, run = time.process_time() - began, find_run(Path(args.runs) / "latest")
    before, after = (json.loads((run / f"{name}.json").read_text()) for name in ("before", "after"))
    kl = [r["kl_reference"] for r in read_log(run) if "kl_reference" in r][-1]
    rows.append((seed, before, after, kl, to_eights(base), to_eights(run), took))
    shown = shown or run

print("\n| seed | reward | in deviations | nats | Fréchet to eights | to the nearest class | precision | CPU s |")
print("|---|---|---|---|---|---|---|---|")
for seed, a, b, kl, far, near, took in rows:
    rise = (b["reward"]["value"] - a["reward"]["value"]) / a["reward_std"]
    pair = lambda name, a=a, b=b, d=1: f"{a[name]['value']:.{d}f} to {b[name]['value']:.{d}f}"  # noqa: E731
    print(f"| {seed} | {pair('reward', d=2)} | {rise:.1f} | {kl:.1f} | {far:.1f} to {near:.1f} | "
          f"{pair('frechet_class')} | {pair('precision', d=2)} | {took:.0f} |")  # fmt: skip

assert shown is not None
WIDE, HIGH, CAPTION = 7 * 66 + 2, 3 * 66 + 2, 24  # three rows of seven samples; a tile of the run's pictures is 66 wide
sheet = Image.new("RGB", (WIDE + 790, 2 * (HIGH + CAPTION)), "white")
for i, name in enumerate(("before", "after")):
    top = i * (HIGH + CAPTION)
    ImageDraw.Draw(sheet).text((4, top + 6), f"{name}, samples of label {args.label}", fill="black", font_size=14)
    tiles = Image.open(shown / "samples" / f"{name}.png").convert("RGB").crop((0, 0, WIDE, HIGH))
    sheet.paste(tiles, (0, top + CAPTION))
sheet.paste(Image.open(shown / "reward-kl.png").convert("RGB").resize((770, 440)), (WIDE + 20, 4))
print(save_image(sheet.quantize(192), args.out, optimize=True))
