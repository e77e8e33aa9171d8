"""Straighter with each reflow: one Euler step of 1-, 2- and 3-rectified flow, and of the last one distilled.

    genkit bench reflow [--seeds 3] [--only plane] [--plane-steps N] [--digits-steps N] [--out FILE.json]

Liu et al. 2023, "Flow Straight and Fast" (section 2.2 and table 1a): k-rectified flow is trained on the pairs
(noise, sample) of the (k-1)th, from whose weights it starts here; distillation learns the one step from the last pairs.

"plane": eight Gaussians, the 2-Wasserstein distance to held-out points, perceptrons of three hidden layers of 64.
"digits": scikit-learn's, by class; the Fréchet distance to the held-out ones in the ten class scores of an SVM that was
trained on the real ones; an ``MLP`` backbone, 192 wide. "many" is Heun's method with 25 steps. The last row is what the
real training data would get.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from benchmarks.stack import Record, Stack, mean_sd, rows, train
from genkit.backbones import MLP
from genkit.core import NO_COND, Batch, Draw, Generator, Objective
from genkit.data.standard_images import Digits
from genkit.data.toy import EightGaussians
from genkit.diffusion.samplers import bind
from genkit.evaluation.metrics import Moments, frechet_distance
from genkit.evaluation.metrics import wasserstein2 as w2
from genkit.objectives.matching.couplings import GivenPairs
from genkit.objectives.matching.distillation import Distillation
from genkit.objectives.matching.flow import Flow

HEUN, ROUNDS = 25, 3
TEST = {"plane": 1024, "digits": 1000}
PAIRS = {"plane": 20_000, "digits": 20_000}
LR = {"plane": 2e-3, "digits": 1e-3}

Sampler = Callable[[int], Batch]
Judge = Callable[[Generator], list[float]]


def ladder(
    net: nn.Module, data: Sampler, pairs: Callable[[Generator], Sampler], judge: Judge, rounds: int = ROUNDS, **how: Any
) -> dict[str, dict[str, list[float]]]:
    """Train, reflow ``rounds - 1`` times and distil ``net``; what ``judge`` says of one step and of many."""
    found: dict[str, dict[str, list[float]]] = {}
    objective, sample = Flow(), data
    for k in range(1, rounds + 1):
        train(objective, net, sample, **how)
        many = objective.generator({"net": net}, bind("heun", HEUN))
        found[f"{k}-RF"] = {
            "one": judge(objective.generator({"net": net}, bind("ddim", 1))),
            "many": judge(many),
        }
        objective, sample = Flow(coupling=GivenPairs()), pairs(many)
    train(Distillation(), net, sample, **how)
    found[f"{rounds}-RF distilled"] = {"one": judge(Distillation().generator({"net": net}))}
    return found


# -------------------------------------------------------------------------------------------------------- the plane
def plane(
    seeds: int,
    steps: int,
    progress: Callable[[int], None] = lambda step: None,
    test: int = TEST["plane"],
    pairs: int = PAIRS["plane"],
) -> dict[str, Any]:
    """All seeds at once, as a :class:`Stack`; each judged by W2 and reflowed on its own pairs."""
    shape, n = EightGaussians(), test
    held_out, data = shape.load("test").x, shape.load("train").x
    torch.manual_seed(0)
    net = Stack(seeds, 2, 64, 3, F.silu)
    z = torch.randn(seeds * n, 2, generator=torch.Generator().manual_seed(1))

    def judge(generate: Generator) -> list[float]:
        with torch.no_grad():
            parts = generate(z, NO_COND).chunk(seeds)
        return [w2(p, held_out[i * n : (i + 1) * n]) for i, p in enumerate(parts)]

    def made(generate: Generator) -> Sampler:
        x1 = torch.randn(seeds * pairs, 2)
        with torch.no_grad():
            x = generate(x1, NO_COND)
        first = torch.arange(seeds)[:, None] * pairs  # of each seed's own pairs

        def sample(count: int) -> Batch:
            i = (first + torch.randint(pairs, (seeds, count // seeds))).flatten()
            return Batch(x[i], x1=x1[i])

        return sample

    found = ladder(net, rows(data), made, judge, steps=steps, batch=128 * seeds, lr=LR["plane"], progress=progress)
    real = [w2(data[i * n : (i + 1) * n], held_out[i * n : (i + 1) * n]) for i in range(seeds)]
    return found | {"real": {"one": real}}


# ------------------------------------------------------------------------------------------------------- the digits
def digits(seeds: int, steps: int, progress: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
    """One seed after the other, by class."""
    from sklearn.svm import SVC

    def everything(split: Any) -> Batch:
        data = Digits().load(split)
        return data.codec.encode(data.batch(torch.arange(len(data)), Draw((0,), 0, len(data))))

    def pixels(x: Tensor) -> Any:
        return (x.flatten(1) + 1).mul(8).numpy()  # 0..16, as scikit-learn has them

    def scores(x: Tensor) -> Moments:
        return Moments.of(torch.from_numpy(svm.decision_function(pixels(x))))

    real, held_out = everything("train"), everything("test")
    svm = SVC(gamma=0.001).fit(pixels(real.x), real.cond["label"].numpy())  # pyright: ignore[reportArgumentType]
    goal = scores(held_out.x)
    n, many = TEST["digits"], PAIRS["digits"]

    def labels(count: int) -> Mapping[str, Tensor]:
        return {"label": torch.arange(count) % 10}

    def judge(generate: Generator) -> list[float]:
        z = torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            return [frechet_distance(scores(generate(z, labels(n))), goal)]

    def data(count: int) -> Batch:
        i = torch.randint(len(real), (count,))
        return Batch(real.x[i], {"label": real.cond["label"][i]})

    def pairs(generate: Generator) -> Sampler:
        x1, cond = torch.randn(many, 1, 8, 8), labels(many)
        with torch.no_grad():
            x = generate(x1, cond)

        def sample(count: int) -> Batch:
            i = torch.randint(many, (count,))
            return Batch(x[i], {"label": cond["label"][i]}, x1=x1[i])

        return sample

    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        objective: Objective = Flow()
        net = objective.networks(MLP(width=192, depth=4), Digits().load("train").spec)["net"]
        one = ladder(net, data, pairs, judge, steps=steps, batch=64, lr=LR["digits"], seed=seed, progress=progress)
        for row, values in one.items():
            for key, v in values.items():
                found.setdefault(row, {}).setdefault(key, []).extend(v)
    return found | {"real": {"one": [frechet_distance(scores(real.x), goal)]}}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="genkit bench reflow", description=str(__doc__).splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="models of each row")
    parser.add_argument("--plane-steps", type=int, default=1000, help="training steps of each stage, in the plane")
    parser.add_argument("--digits-steps", type=int, default=1000, help="the same, on the digits")
    parser.add_argument("--only", choices=("plane", "digits"), help="one of the two")
    parser.add_argument("--out", type=Path, help="JSON; a part that is there is not measured again")
    args = parser.parse_args(argv)
    for name, most in (("seeds", 100), ("plane_steps", 10**7), ("digits_steps", 10**7)):
        if not 1 <= getattr(args, name) <= most:
            raise ValueError(f"{name.replace('_', '-')}: given {getattr(args, name)}; allowed 1 to {most}")
    torch.set_num_threads(1)
    console = Console()
    settings = {"seeds": args.seeds, "plane_steps": args.plane_steps, "digits_steps": args.digits_steps}
    settings |= {"pairs": PAIRS, "lr": LR, "heun": HEUN, "test": TEST}
    record = Record(args.out, settings, ["reflow", *argv])
    jobs = {"plane": (plane, args.plane_steps, 1), "digits": (digits, args.digits_steps, args.seeds)}
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        for part, (run, steps, times) in jobs.items():
            if part in record or args.only not in (None, part):
                continue
            task = bar.add_task(part, total=(ROUNDS + 1) * steps * times)
            begin = time.process_time()
            found = run(args.seeds, steps, lambda step, task=task: bar.advance(task))
            record.add(part, {"rows": found, "seconds": round(time.process_time() - begin, 1)})
    for part, what in (("plane", "eight Gaussians, W2"), ("digits", "digits, Fréchet distance")):
        if part in record:
            show(console, what, record.cells[part]["rows"])
    if args.out:
        console.print(args.out)
    return 0


def show(console: Console, what: str, found: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    table = Table("", "one step", f"Heun, {HEUN} steps", title=what)
    for row, values in found.items():
        table.add_row(row, mean_sd(values["one"]), mean_sd(values["many"]) if "many" in values else "")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
