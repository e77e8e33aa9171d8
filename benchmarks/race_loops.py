"""The contenders of :mod:`benchmarks.race`: loops of other libraries, as their examples write them, and genkit.

Each library's own network, noise schedule, loss and deterministic sampler. What they share, so that none is handicapped
by it in a short race: the batch, the labels, clipping to norm 1, and an average of the weights that follows them at
first, ``min(0.999, (1 + i) / (10 + i))``. Their examples' averages of 0.9999 would still hold the initial weights.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timed_training import QUIET, run_timed, step_seconds
from genkit.core import Draw as Keys
from genkit.data import DATA
from genkit.training.run import load_run

Draw = Callable[[int], tuple[Tensor, Tensor]]
"""a number of rows to pictures in [-1, 1] ``[B, C, H, W]`` and classes ``[B]``, at random"""
Sample = Callable[[Tensor, int, int], Tensor]
"""classes ``[B]``, a seed and a number of evaluations to pictures uint8 ``[B, C, H, W]``"""

BATCH, CLASSES = 64, 10
EMA = 0.999
PILOT = 4, 13  # steps between which genkit's own time of a step is measured


@dataclass(frozen=True)
class RaceData:
    """What all contenders get."""

    data: Mapping[str, Any]
    """the data source, as genkit's settings name it"""
    pixels: Tensor
    """uint8 ``[N, C, H, W]``"""
    labels: Tensor
    device: torch.device

    def clock(self) -> float:
        """CPU seconds of this process; seconds on a GPU, after all of its work is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def drawer(self, seed: int) -> Draw:
        """Random rows by ``seed``."""
        g = torch.Generator().manual_seed(seed)

        def draw(count: int) -> tuple[Tensor, Tensor]:
            rows = torch.randint(len(self.pixels), (count,), generator=g)
            return self.pixels[rows].to(self.device).float() / 127.5 - 1, self.labels[rows].long().to(self.device)

        return draw


@dataclass
class Snapshot:
    """A model at some time of its training."""

    seconds: float
    steps: int
    sample: Sample


@dataclass
class Loop:
    """A training loop of another library."""

    net: nn.Module
    step: Callable[[Tensor, Tensor], Tensor]
    """an optimizer step on pictures and classes; its loss"""
    sample: Sample
    """with the weights that ``net`` has now"""
    batch: int = BATCH


def to_uint8(x: Tensor) -> Tensor:
    """Pictures in [-1, 1] as bytes."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def diffusers_loop(race: RaceData) -> Loop:
    """diffusers' unconditional training example with classes: UNet2DModel, DDPM with 1,000 steps, AdamW at 4e-4."""
    from diffusers.models.unets.unet_2d import UNet2DModel  # lazy: of this contender
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler  # lazy: of this contender
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler  # lazy: of this contender

    channels, side = race.pixels.shape[1:3]
    model: Any = UNet2DModel(
        sample_size=side, in_channels=channels, out_channels=channels, layers_per_block=1, num_class_embeds=CLASSES,
        block_out_channels=(32, 64, 96), down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3,
        attention_head_dim=8,
    )  # fmt: skip
    net = model.to(race.device)
    noise: Any = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-4, betas=(0.95, 0.999), weight_decay=1e-6)

    def step(x: Tensor, y: Tensor) -> Tensor:
        eps, t = torch.randn_like(x), torch.randint(1000, (len(x),), device=x.device)
        loss = F.mse_loss(net(noise.add_noise(x, eps, t), t, class_labels=y).sample, eps)
        return apply_step(loss, net, optimizer)

    def sample(y: Tensor, seed: int, evaluations: int) -> Tensor:
        scheduler = DDIMScheduler.from_config(noise.config)
        return draw_ddim(scheduler, lambda x, t: net(x, t, class_labels=y.to(race.device)).sample, y, race, seed,
                         evaluations)  # fmt: skip

    return Loop(net, step, sample)


def lucidrains_loop(race: RaceData) -> Loop:
    """denoising-diffusion-pytorch: Unet and GaussianDiffusion with classes, Adam at 4e-4.

    Its own DDIM fails at a scale of guidance of 1, so diffusers' draws, with its noise schedule.
    """
    from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet  # lazy: optional
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler  # lazy: of this contender

    channels, side = race.pixels.shape[1:3]
    net = Unet(dim=32, num_classes=CLASSES, dim_mults=(1, 2, 2), channels=channels, cond_drop_prob=0.1).to(race.device)
    diffusion = GaussianDiffusion(net, image_size=side, timesteps=1000).to(race.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-4, betas=(0.9, 0.99))

    def sample(y: Tensor, seed: int, evaluations: int) -> Tensor:
        scheduler = DDIMScheduler(trained_betas=diffusion.betas.cpu().numpy(), prediction_type="epsilon")
        classes = y.to(race.device)
        return draw_ddim(scheduler, lambda x, t: net(x, t.to(x.device).expand(len(x)), classes, cond_drop_prob=0.0), y,
                         race, seed, evaluations)  # fmt: skip

    return Loop(net, lambda x, y: apply_step(diffusion((x + 1) / 2, classes=y), net, optimizer), sample)


def torchcfm_loop(race: RaceData) -> Loop:
    """torchcfm's example: its UNetModelWrapper and ConditionalFlowMatcher, Adam at 1e-3 and batch 128, Euler."""
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher  # lazy: optional
    from torchcfm.models.unet.unet import UNetModelWrapper

    shape = tuple(race.pixels.shape[1:])
    net = UNetModelWrapper(dim=shape, num_channels=32, num_res_blocks=1, num_classes=CLASSES, class_cond=True)
    net = net.to(race.device)
    matcher = ConditionalFlowMatcher(sigma=0.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)

    def step(x: Tensor, y: Tensor) -> Tensor:
        t, between, velocity = matcher.sample_location_and_conditional_flow(torch.randn_like(x), x)
        return apply_step(F.mse_loss(net(t, between, y), velocity), net, optimizer)

    def sample(y: Tensor, seed: int, evaluations: int) -> Tensor:
        x, y = seeded_noise(y, race, seed), y.to(race.device)
        for i in range(evaluations):
            t = torch.full((len(x),), i / evaluations, device=race.device)
            x = x + net(t, x, y) / evaluations
        return to_uint8(x)

    return Loop(net, step, sample, batch=2 * BATCH)


def draw_ddim(scheduler: Any, eps: Any, y: Tensor, race: RaceData, seed: int, evaluations: int) -> Tensor:
    """Pictures by diffusers' DDIM of a network ``eps(x, t)`` that predicts the noise."""
    scheduler.set_timesteps(evaluations)
    x = seeded_noise(y, race, seed)
    for t in scheduler.timesteps:
        x = scheduler.step(eps(x, t), t, x).prev_sample
    return to_uint8(x)


def apply_step(loss: Tensor, net: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """Backward, clipping to norm 1, and a step."""
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def seeded_noise(y: Tensor, race: RaceData, seed: int) -> Tensor:
    """Noise of the shape of the pictures, the same for all contenders that start from it."""
    return torch.randn(len(y), *race.pixels.shape[1:], generator=torch.Generator().manual_seed(seed)).to(race.device)


LOOPS: Mapping[str, Callable[[RaceData], Loop]] = {
    "diffusers": diffusers_loop,
    "lucidrains": lucidrains_loop,
    "torchcfm": torchcfm_loop,
}
PACKAGES = {"lucidrains": "denoising-diffusion-pytorch", "torchcfm": "torchcfm"}


def train_loop(name: str, race: RaceData, marks: Sequence[float], seed: int) -> list[Snapshot]:
    """Train a loop, and return its averaged weights at each of the ``marks``, in seconds. Copies are not timed."""
    torch.manual_seed(seed)
    try:
        loop = LOOPS[name](race)
    except ImportError as e:
        package = PACKAGES.get(name, name)
        raise ValueError(f"contenders: {name} needs {package} ({e}); pip install it, or leave {name} out") from None
    parameters, draw = list(loop.net.parameters()), race.drawer(seed)
    average = [p.detach().clone() for p in parameters]
    used, steps, snapshots = 0.0, 0, []
    for mark in marks:
        while used < mark:
            begun = race.clock()
            loop.step(*draw(loop.batch))
            steps += 1
            with torch.no_grad():
                for mean, p in zip(average, parameters, strict=True):
                    mean.lerp_(p, 1 - min(EMA, (1 + steps) / (10 + steps)))
            used += race.clock() - begun
        kept = [a.clone() for a in average]
        snapshots.append(Snapshot(used, steps, with_weights(loop, parameters, kept)))
    return snapshots


def with_weights(loop: Loop, parameters: Sequence[nn.Parameter], kept: Sequence[Tensor]) -> Sample:
    """The loop's sampler with the weights ``kept``."""

    @torch.no_grad()
    def sample(y: Tensor, seed: int, evaluations: int) -> Tensor:
        for p, value in zip(parameters, kept, strict=True):
            p.copy_(value)
        loop.net.eval()
        return loop.sample(y, seed, evaluations)

    return sample


# ----------------------------------------------------------------------------------------------------------- genkit
NETWORK = {"name": "unet", "width": 32, "mults": [1, 2, 3], "attention": []}  # of configs/fashion_flow.yaml
GENKIT: Mapping[str, Mapping[str, Any]] = {
    "genkit": {},
    "genkit-recipe": {"optimizer": "muon", "schedule": "constant"},
}
WARMUPS = {"genkit": 0.1, "genkit-recipe": 0.03}  # share of the steps


def train_genkit(name: str, race: RaceData, marks: Sequence[float], seed: int) -> list[Snapshot]:
    """Train a flow by ``genkit.train`` for the last of the ``marks``, in seconds, with checkpoints at the others.

    All that a training does between steps is timed, checkpoints too.
    """
    options = {
        "data": race.data, "objective": "flow", "backbone": NETWORK, "batch": BATCH, "seed": seed, "log_every": 50,
        "device": race.device.type, "threads": 1, **QUIET, **GENKIT[name],
    }  # fmt: skip
    cost = step_seconds({**options, "warmup": 1}, PILOT, race.clock)
    with tempfile.TemporaryDirectory() as folder:
        steps = max(len(marks), int(marks[-1] / cost))
        at = sorted({max(1, round(steps * mark / marks[-1])) for mark in marks})
        if len(at) < len(marks):
            raise ValueError(f"seconds: given {marks[-1]:g}, in which {name} takes {steps} steps; {len(marks)} marks "
                             "need more")  # fmt: skip
        every = at[0]
        budget = {"steps": steps, "warmup": max(1, round(WARMUPS[name] * steps)), "save_every": every}
        run, times = run_timed({**options, **budget, "keep_checkpoints": steps, "out": folder}, race.clock)
        begun = times[1] - cost  # what comes before the first step is not timed, as for the others
        snapshots = []
        saved = [int(p.name[5:]) for p in sorted((run.directory / "checkpoints").glob("step-*"))]
        for step in at:
            nearest = min(saved, key=lambda s: abs(s - step))
            loaded = load_run(run.directory, step=nearest, device=race.device.type)
            snapshots.append(Snapshot(times[nearest] - begun, nearest, genkit_sampler(loaded)))
    return snapshots


def genkit_sampler(run: Any) -> Sample:
    """Samples by a multistep solver with one evaluation a step."""

    def sample(y: Tensor, seed: int, evaluations: int) -> Tensor:
        return run.sample(len(y), label=y, seed=seed, sampler="dpmpp_2m", steps=evaluations, batch=256).x

    return sample


def train_contender(name: str, race: RaceData, marks: Sequence[float], seed: int) -> list[Snapshot]:
    """The models of a contender at the ``marks``."""
    return (train_genkit if name in GENKIT else train_loop)(name, race, marks, seed)


CONTENDERS = (*LOOPS, *GENKIT)
TITLES = {
    **{name: PACKAGES.get(name, name) for name in LOOPS},
    "genkit": "genkit, defaults",
    "genkit-recipe": "genkit, Muon at a constant rate",
}


def source_of(name: str, root: Path) -> Any:
    """A data set of genkit; the digits are embedded."""
    kind: Any = DATA[name]
    return kind() if name == "digits" else kind(root=str(root))


def data_of(
    name: str, root: Path, limit: int | None, device: torch.device, split: Literal["train", "test"] = "train"
) -> RaceData:
    """The pictures of a data set of genkit with ten classes; the first ``limit`` of them (None: all)."""
    data = source_of(name, root).load(split)
    rows = torch.arange(len(data) if limit is None else min(limit, len(data)))
    batch = data.batch(rows, Keys((0,), 0, len(rows)))
    settings = {"name": name} if name == "digits" else {"name": name, "root": str(root)}
    return RaceData(settings, batch.x, batch.cond["label"], device)
