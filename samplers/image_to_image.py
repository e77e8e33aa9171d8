"""Train a small flow from one kind of picture to another, by concatenation, and draw several answers to each question.

    python samplers/image_to_image.py --task enlarge --steps 600 --out translated.png
    python samplers/image_to_image.py --task complete --data my/folder

The model sees the corrupted picture beside the noisy one, as further channels (Saharia et al. 2022, "Palette"): the
condition is of the kind ``Image``, and nothing else changes. Rows of the picture: held-out originals, what the model is
given, and ``--answers`` samples. The default takes about a minute on one core.
"""

import argparse
import sys
from pathlib import Path

import torch

from genkit.backbones import UNet
from genkit.core import Batch, Draw, Image, Spec, pictures
from genkit.data import DATA, Stream, find_source
from genkit.diffusion.guidance import classifier_free
from genkit.diffusion.inverse_problems import Average
from genkit.diffusion.samplers import Seeds, bind, uniform
from genkit.objectives import Flow

TASKS = {
    "enlarge": lambda x: Average(2).enlarge(Average(2).forward(x)),
    "complete": lambda x: x * (torch.arange(x.shape[-1], device=x.device) < x.shape[-1] // 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", default="digits", help="a name of genkit.data.DATA, a folder, .zip or .npz")
    parser.add_argument("--task", default="enlarge", choices=TASKS)
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--n", type=int, default=10, help="how many held-out pictures")
    parser.add_argument("--answers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("translated.png"))
    args = parser.parse_args()

    name, fields = find_source(args.data)
    train, test = (DATA[name](**fields).load(split) for split in ("train", "test"))
    if len(train.spec.shape) != 3 or min(args.n, args.answers) < 1:
        raise ValueError(f"given {args.n} x {args.answers} of {train.spec.shape}; needs pictures [C, H, W], 1 or more")
    task, spec = TASKS[args.task], Spec(train.spec.shape, {"image": Image(train.spec.shape[0])})
    Average(2).measured(spec.shape)  # refuses odd sizes
    torch.manual_seed(args.seed)
    flow, stream = Flow(), Stream(train, 64, args.seed)
    nets = flow.networks(UNet(), spec)
    optimizer = torch.optim.AdamW(nets["net"].parameters(), lr=2e-3, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, args.steps))
    for step in range(args.steps):
        x = train.codec.encode(stream(step, 0, 0, 64)).x
        loss = flow.loss("denoise", nets, Batch(x, {"image": task(x)})).per_sample.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {float(loss.detach()):.4f}", flush=True)

    spread = torch.linspace(0, len(test) - 1, args.n).long()
    x0 = test.codec.encode(test.batch(spread, Draw((0,), 0, args.n))).x
    generate = flow.generator(nets, bind("heun", uniform(20), classifier_free(args.guidance)))
    seeds = [range(s, s + args.n) for s in range(args.seed, args.seed + args.n * args.answers, args.n)]
    drawn = [generate(Seeds(s)(spec.shape), {"image": task(x0)}) for s in seeds]
    shown = (task(x0), *drawn, torch.stack(drawn).mean(0))
    errors = [float((x.clamp(-1, 1) - x0).square().mean().sqrt()) for x in shown]
    print("error of what is given, of each answer, of their mean:", *(f"{e:.3f}" for e in errors))
    images = test.codec.decode(torch.cat([x0, task(x0), *drawn]))
    print(pictures.save_image(pictures.make_grid(images, args.n), args.out))


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(f"image_to_image: {e}")
