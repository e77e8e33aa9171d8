"""Does anything crash on the device? Every objective and backbone, and a run from training to evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.setup import Row, Setup, train_steps
from genkit.backbones import MLP, DiT, UNet
from genkit.core import Backbone, Label, Objective, Spec
from genkit.data import InMemory
from genkit.data.codecs import Identity, Pixels
from genkit.data.pairs import InPairs
from genkit.diffusion.samplers import Seeds, bind
from genkit.evaluation import evaluate
from genkit.objectives import OBJECTIVES, VQ, Autoencoder, FirstStage
from genkit.training.checkpoint import read_tensors
from genkit.training.directory import list_checkpoints
from genkit.training.run import load_run
from genkit.training.sampling import default_steps
from genkit.training.train import train

BACKBONES: dict[str, Backbone] = {
    "mlp": MLP(width=16, depth=1),
    "unet": UNet(width=8, mults=(1, 1), attention=(4,)),
    "dit": DiT(width=16, depth=1, head_size=8),
}
IMAGE_SETTINGS = {
    "vq": VQ(latent=(8, 4, 4), codebook_size=16),
    "autoencoder": FirstStage(latent=(4, 4, 4)),
    "ae": Autoencoder(latent=(4, 4, 4)),
}
VECTOR_SETTINGS = {"vq": VQ(latent=(8,), codebook_size=16), "autoencoder": FirstStage(latent=(4,))}
FROM_TEACHER = ("guidance-distillation",)  # trains an adapter of a network that exists


def make_case(name: str, family: str) -> tuple[Objective, Any, dict[str, torch.Tensor]]:
    """An objective, random data that suit it, and their classes."""
    vectors = family == "mlp"
    shape = (2,) if vectors else (1, 8, 8)
    objective = (VECTOR_SETTINGS if vectors else IMAGE_SETTINGS).get(name) or OBJECTIVES[name]()
    label, kind = "label", Label(3)
    if name == "anchored":
        size = torch.Size(shape).numel()
        label, kind = "anchor", Label(3, centers=tuple(torch.linspace(-1, 1, 3 * size).tolist()))
    x = torch.randn(16, *shape) if vectors else torch.randint(256, (16, *shape), dtype=torch.uint8)
    codec = Identity() if vectors else Pixels()
    cond = {label: torch.arange(16) % 3}
    data: Any = InMemory(x, cond, Spec(shape, {label: kind}), codec)
    return objective, InPairs(data, torch.randn(16, *shape)) if name == "distillation" else data, cond


def check_cell(setup: Setup, name: str, family: str) -> str:
    """Train two steps and draw; "ok" if all numbers are finite."""
    objective, data, classes = make_case(name, family)
    backbone = BACKBONES[family]
    state = train_steps(setup, objective, backbone, data, steps=2, batch=8)
    if not all(bool(torch.isfinite(p).all()) for net in state.nets.values() for p in net.parameters()):
        return "weights are not finite"
    if not objective.is_generative:
        return "ok"
    steps = default_steps(objective)
    bound = bind(objective.sampler, min(steps, 3)) if objective.sampler and steps else None
    noise = Seeds(range(2), setup.device)
    cond = {k: v[:2].to(setup.device) for k, v in classes.items()}
    nets = {k: v.eval() for k, v in state.nets.items()}
    with torch.no_grad():
        x = objective.generator(nets, bound)(noise(objective.noise_shape(data.spec)), cond, noise)
    return "ok" if bool(torch.isfinite(x.float()).all()) else "samples are not finite"


def check_table(setup: Setup) -> Iterator[Row]:
    """Every objective with every backbone; in miniature each objective with one of them."""
    families = itertools.cycle(BACKBONES)
    for name in OBJECTIVES:
        if name in FROM_TEACHER:
            continue
        row = {"objective": name}
        for family in [next(families)] if setup.tiny else BACKBONES:
            try:
                row[family] = check_cell(setup, name, family)
            except Exception as e:  # every cell is tried; the page tells which ones fail
                row[family] = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        yield row


def check_run(setup: Setup) -> Iterator[Row]:
    """The digits: a run in one piece and one that is resumed half-way, samples and their metrics."""
    steps = 4 if setup.tiny else 300
    small = {"name": "dit", "width": 16, "depth": 1} if setup.tiny else {"name": "unet"}
    settings: dict[str, Any] = {
        "objective": "flow", "data": "digits", "backbone": small, "device": setup.device.type, "workers": 0,
        "sample_every": 0, "tensorboard": False, "save_every": steps // 2, "schedule": "constant",
    }  # fmt: skip
    whole = train(**settings, steps=steps, out=str(setup.folder / "whole"))
    train(**settings, steps=steps // 2, out=str(setup.folder / "parts"))
    latest = str(setup.folder / "parts" / "latest")
    resumed = train(**settings, steps=steps, out=str(setup.folder / "parts"), resume=latest)
    ends = [read_tensors(list_checkpoints(r.directory)[-1], "nets.safetensors") for r in (whole, resumed)]
    largest = max(float((ends[0][k].double() - ends[1][k].double()).abs().max()) for k in ends[0])
    yield {"what": "largest difference of weights after a resume", "value": largest}
    run = load_run(whole.directory, device=setup.device.type)
    samples = run.sample(4 if setup.tiny else 64, steps=2 if setup.tiny else None)
    yield {"what": "mean level of samples", "value": float(samples.x.double().mean())}
    quick: dict[str, Any] = (
        {"n": 16, "reference_n": 16, "steps": 2, "metrics": "kid", "features": "raw"} if setup.tiny else {"n": 1000}
    )
    card = evaluate(run, device=setup.device.type, **quick)
    for name, estimate in card.metrics.items():
        yield {"what": name, "value": estimate.value}
