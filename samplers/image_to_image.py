"""Train a small flow from one kind of image to another, by concatenation, and draw several answers for each.

    python samplers/image_to_image.py --task enlarge --steps 600 --out translated.png
    python samplers/image_to_image.py --task complete --data my/folder

The corrupted image is the model's condition, as further channels (Saharia et al. 2022, "Palette"): its kind is
``Image``, and nothing else changes. Rows of the picture: held-out originals, their corrupted versions, and --answers
samples. The default takes about a minute on one core.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from editing import rms_error
from torch import Tensor, nn

from genkit import Batch, Flow, Image, Spec, UNet, bind, classifier_free, uniform
from genkit.cli.scripts import ScriptParser, run_script
from genkit.core import Data, Draw, pictures
from genkit.data import DATA, Stream, find_source
from genkit.diffusion.inverse_problems import Average
from genkit.diffusion.samplers import Seeds


def coarsen(x: Tensor) -> Tensor:
    """Replace blocks of 2x2 pixels by their means."""
    return Average(2).enlarge(Average(2).forward(x))


def cut(x: Tensor) -> Tensor:
    """Set the right half to 0."""
    return x * (torch.arange(x.shape[-1], device=x.device) < x.shape[-1] // 2)


TASKS: Mapping[str, Callable[[Tensor], Tensor]] = {"enlarge": coarsen, "complete": cut}


def train(
    flow: Flow, data: Data, corrupt: Callable[[Tensor], Tensor], steps: int, seed: int
) -> Mapping[str, nn.Module]:
    """The networks of a flow whose condition is the corrupted image."""
    torch.manual_seed(seed)
    stream = Stream(data, 64, seed)
    nets = flow.networks(UNet(), Spec(data.spec.shape, {"image": Image(data.spec.shape[0])}))
    optimizer = torch.optim.AdamW(nets["net"].parameters(), lr=2e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    for step in range(steps):
        x = data.codec.encode(stream(step, 0, 0, 64)).x
        loss = flow.loss("denoise", nets, Batch(x, {"image": corrupt(x)})).per_sample.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}", flush=True)
    return nets


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--data", default="digits", help="a name of genkit.data.DATA, a folder, .zip or .npz")
    parser.add_argument("--task", default="enlarge", choices=TASKS)
    parser.add_argument("--steps", type=int, default=600, help="number of training steps")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--n", type=int, default=10, help="number of held-out images")
    parser.add_argument("--answers", type=int, default=3, help="samples for each image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("translated.png"))
    args = parser.parse_args()

    name, fields = find_source(args.data)
    data, test = (DATA[name](**fields).load(split) for split in ("train", "test"))
    if len(data.spec.shape) != 3 or min(args.n, args.answers) < 1:
        raise ValueError(f"given {args.n} x {args.answers} of {data.spec.shape}; needs pictures [C, H, W], 1 or more")
    if args.n > len(test):
        raise ValueError(f"n: given {args.n}; there are {len(test)} held-out images, of which none is taken twice")
    Average(2).output_shape(data.spec.shape)  # refuses odd sizes
    corrupt, flow = TASKS[args.task], Flow()
    nets = train(flow, data, corrupt, args.steps, args.seed)

    rows = torch.linspace(0, len(test) - 1, args.n).long()
    x0 = test.codec.encode(test.batch(rows, Draw((0,), 0, args.n))).x
    generate = flow.generator(nets, bind("heun", uniform(20), classifier_free(args.guidance)))
    first_seeds = [args.seed + i * args.n for i in range(args.answers)]
    answers = [generate(Seeds(range(s, s + args.n))(x0.shape[1:]), {"image": corrupt(x0)}) for s in first_seeds]
    images = (corrupt(x0), *answers, torch.stack(answers).mean(0))
    print("error of the corrupted image, of each answer, of their mean:", *(f"{rms_error(x, x0):.3f}" for x in images))
    names = ["original", "corrupted", *(f"answer {i}" for i in range(1, args.answers + 1))]
    grid = pictures.make_grid(test.codec.decode(torch.cat([x0, corrupt(x0), *answers])), args.n, captions=names)
    print(pictures.save_image(grid, args.out))


if __name__ == "__main__":
    run_script(main)
