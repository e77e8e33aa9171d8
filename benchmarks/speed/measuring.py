"""Images, clocks and measurements of the contenders."""

from __future__ import annotations

import argparse
import io
import time
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.speed.contenders import LEVELS, Contender

Batch = tuple[Tensor, Tensor, Tensor]  # x0, noise, integer time
Clock = Callable[[], float]
WARMUP_STEPS = 3
VALIDATION_IMAGES = 256
MAX_IMAGES = 10_000


def pick_clock(device: torch.device, threads: int) -> tuple[str, Clock]:
    """A clock and its description: CPU time for one thread on a CPU, else wall time."""
    if device.type == "cuda":
        return "wall, synchronised", synchronised_time
    return ("CPU time", time.process_time) if threads == 1 else ("wall", time.perf_counter)


def synchronised_time() -> float:
    """Wall time after the GPU has finished."""
    torch.cuda.synchronize()
    return time.perf_counter()


def count_flops(contender: Contender, batch: Batch) -> int:
    """FLOPs of one forward and backward pass of one image (multiplications and additions counted separately)."""
    from torch.utils.flop_counter import FlopCounterMode  # lazy: slow to import

    with FlopCounterMode(display=False) as counter:
        contender.step(*(v[:1] for v in batch))
    return counter.get_total_flops()


def draw_batch(images: Tensor, size: int, generator: torch.Generator, device: torch.device) -> Batch:
    """Random images ``[size, 3, H, W]`` in [-1, 1], noise and times."""
    index = torch.randint(len(images), (size,), generator=generator)
    x0 = images[index].float() / 127.5 - 1
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.randint(LEVELS, (size,), generator=generator)
    return x0.to(device), noise.to(device), t.to(device)


def load_images(root: str | None, size: int) -> tuple[Tensor, str]:
    """uint8 ``[N, 3, size, size]`` and their source: a zip of images, or scikit-learn's digits enlarged."""
    if root is None:
        from sklearn.datasets import load_digits  # lazy: slow to import

        digits = torch.from_numpy(load_digits(return_X_y=True)[0].reshape(-1, 8, 8)).float()[:, None] / 16
        large = F.interpolate(digits, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
        return (large * 255).round().byte(), "digits, enlarged"
    with zipfile.ZipFile(root) as z:
        names = sorted(n for n in z.namelist() if n.lower().endswith((".png", ".jpg")))[:MAX_IMAGES]
        if not names:
            raise ValueError(f"--data-root: no .png or .jpg in {root}; give a zip of images")
        images = [Image.open(io.BytesIO(z.read(n))).convert("RGB").resize((size, size)) for n in names]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous(), root


def take_turns(contenders: Sequence[Contender], steps: int, batch: Batch, clock: Clock) -> None:
    """Time ``steps`` steps of each contender, in alternating order, after some untimed ones."""
    for i in range(-WARMUP_STEPS, steps):
        for contender in contenders if i % 2 else contenders[::-1]:
            start = clock()
            contender.step(*batch)
            if i >= 0:
                contender.seconds.append(clock() - start)


def train_curve(
    contender: Contender,
    images: Tensor,
    validation: Batch,
    args: argparse.Namespace,
    clock: Clock,
    device: torch.device,
) -> list[tuple[int, float, float]]:
    """Train for ``args.quality_steps``; points of (step, seconds of training, validation loss)."""
    generator, seconds, curve = torch.Generator().manual_seed(0), 0.0, []
    contender.net.train()
    for i in range(1, args.quality_steps + 1):
        batch = draw_batch(images, args.batch, generator, device)
        start = clock()
        contender.step(*batch)
        seconds += clock() - start
        if i % max(1, args.quality_steps // 20) == 0:
            parts = [contender.predict(*(v[j : j + 64] for v in validation)) for j in range(0, VALIDATION_IMAGES, 64)]
            curve.append((i, seconds, torch.stack(parts).mean().item()))
    return curve


def time_to_quality(
    theirs: Contender, ours: Contender, images: Tensor, args: argparse.Namespace, clock: Clock, device: torch.device
) -> dict[str, Any]:
    """Train both; how long until ours reaches the validation loss that theirs ends with? None if it does not."""
    train, held_out = images[VALIDATION_IMAGES:], images[:VALIDATION_IMAGES]
    validation = draw_batch(held_out, VALIDATION_IMAGES, torch.Generator().manual_seed(1), device)
    their_curve, our_curve = (train_curve(c, train, validation, args, clock, device) for c in (theirs, ours))
    _, their_seconds, goal = their_curve[-1]
    result: dict[str, Any] = {"theirs": theirs.name, "ours": ours.name, "goal": goal, "theirs_seconds": their_seconds}
    result |= {"curve_theirs": their_curve, "curve_ours": our_curve}
    result |= {"ours_seconds": None, "ours_steps": None, "ratio": None}
    reached = next((point for point in our_curve if point[2] <= goal), None)
    if reached is not None:
        result |= {"ours_seconds": reached[1], "ours_steps": reached[0], "ratio": their_seconds / reached[1]}
    return result
