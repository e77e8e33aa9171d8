"""A training step on the device: speed, memory, launches, waits, layouts, and saving."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from benchmarks.gpu.setup import NEEDS_CUDA, Row, Setup, conditions, shaken_network, train_steps
from benchmarks.speed.command import Machine
from benchmarks.speed.contenders import Factory
from benchmarks.speed.measuring import draw_batch, load_images
from genkit.backbones import UNet
from genkit.backbones.blocks import group_norm, num_groups
from genkit.core.memory import peak_memory, reset_peak_memory
from genkit.core.tensors import sha256
from genkit.diffusion.guidance import classifier_free
from genkit.diffusion.samplers import bind
from genkit.objectives import Flow
from genkit.training.checkpoint import checkpoint_files, save_checkpoint
from genkit.training.loop import State
from genkit.training.precision import has_fast_bf16


def step_precision(setup: Setup) -> str:
    """bf16 where it is fast."""
    return "bf16" if has_fast_bf16(setup.device) and not setup.tiny else "fp32"


def count_step_flops(setup: Setup) -> int:
    """FLOPs of the forward and backward pass of one image (multiplications and additions counted separately)."""
    from torch.utils.flop_counter import FlopCounterMode  # lazy: slow to import

    net, (x, cond) = shaken_network(setup, setup.base)["net"].requires_grad_(True), conditions(setup, 1)
    with FlopCounterMode(display=False) as counter:
        net(x, torch.full((1,), 0.5, device=setup.device), cond).sum().backward()
    return counter.get_total_flops()


def measure_steps(setup: Setup) -> Iterator[Row]:
    """DiT-B/2 on latents of 4x32x32: samples a second, MFU and memory, by batch, compiled and with checkpointing."""
    flops, peak = count_step_flops(setup), Machine.of(setup.device).peak
    yield {"batch": 1, "kind": "GFLOP of an image, forward and backward", "value": flops / 1e9}
    steps, warmup = (4, 2) if setup.tiny else (60, 20)
    batches = (4,) if setup.tiny else (64, 256)
    cells = [(kind, batch) for kind in ("plain", "checkpoint") for batch in batches]
    for kind, batch in [*cells, ("compiled", batches[-1])]:  # which takes a minute, so it comes last
        row: dict[str, Any] = {"batch": batch, "kind": kind}
        if kind == "compiled" and not setup.is_cuda:
            yield {**row, "samples_per_s": NEEDS_CUDA}
        else:
            yield row | measure_loop(setup, kind, batch, steps, warmup, flops, peak)


def measure_loop(
    setup: Setup, kind: str, batch: int, steps: int, warmup: int, flops: int, peak: float | None
) -> dict[str, Any]:
    """Train some steps, and time those after the first ``warmup`` together."""
    backbone = type(setup.base)(**{**vars(setup.base), "checkpoint": kind == "checkpoint"})
    marks: dict[int, float] = {}
    reset_peak_memory(setup.device)

    def mark(step: int) -> None:
        if step in (1, warmup, steps):
            setup.synchronize()
            marks[step] = time.perf_counter()

    began = time.perf_counter()
    train_steps(setup, Flow(), backbone, setup.latents(), mark, steps=steps, batch=batch,
                precision=step_precision(setup), compile=kind == "compiled")  # fmt: skip
    seconds = (marks[steps] - marks[warmup]) / (steps - warmup)
    row = {"precision": step_precision(setup), "step_ms": 1e3 * seconds, "samples_per_s": batch / seconds,
           "first_step_s": marks[1] - began, "peak_GB": peak_memory(setup.device) / 1e9}  # fmt: skip
    row["mfu"] = flops * batch / seconds / peak if peak else "peak unknown"
    return row


# ------------------------------------------------------------------------------------------------ launches and waits
def profile_steps(setup: Setup) -> Iterator[Row]:
    """Kernels of five steps by ``torch.profiler``: how long the device is busy, and which take the longest."""
    from torch.profiler import ProfilerActivity, profile  # lazy: slow to import

    first, last = (2, 3) if setup.tiny else (10, 15)
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setup.is_cuda else [])]
    profiler, marks = profile(activities=kinds), {}

    def watch(step: int) -> None:
        if step in (first, last):
            setup.synchronize()
            marks[step] = time.perf_counter()
            (profiler.start if step == first else profiler.stop)()

    train_steps(setup, Flow(), setup.base, setup.latents(), watch, steps=last, batch=4 if setup.tiny else 256,
                precision=step_precision(setup))  # fmt: skip
    attribute = "self_device_time_total" if setup.is_cuda else "self_cpu_time_total"
    found = [e for e in profiler.key_averages() if not setup.is_cuda or e.device_type.name == "CUDA"]
    events = sorted((e for e in found if not e.is_user_annotation), key=lambda e: -getattr(e, attribute))
    steps, busy = last - first, sum(getattr(e, attribute) for e in events) / 1e3
    wall = 1e3 * (marks[last] - marks[first])
    yield {"what": "a step, wall time with the profiler", "ms": wall / steps}
    yield {"what": "device busy" if setup.is_cuda else "operations on the CPU", "ms": busy / steps,
           "share": busy / wall if setup.is_cuda else NEEDS_CUDA}  # fmt: skip
    for event in events[:10]:
        ms = getattr(event, attribute) / 1e3
        yield {"what": event.key, "ms": ms / steps, "share": ms / busy, "calls": event.count / steps}


def wait_row(what: str, seen: list[warnings.WarningMessage]) -> Row:
    """The warnings of ``torch.cuda.set_sync_debug_mode``, counted."""
    texts = [str(w.message) for w in seen if "called a synchronizing" in str(w.message)]
    return {"what": what, "waits": len(texts), "first": texts[0][:200] if texts else ""}


def count_waits(setup: Setup) -> Iterator[Row]:
    """Waits for the device in one training step and in drawing, which must be none."""
    mode = torch.cuda.set_sync_debug_mode
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        train_steps(setup, Flow(), setup.base, setup.latents(), lambda step: mode("warn" if step == 2 else "default"),
                    steps=4, batch=8 if setup.tiny else 64)  # fmt: skip
    yield wait_row("a training step", seen)
    nets, (z, cond) = shaken_network(setup, setup.base), conditions(setup, 8)
    for name, guidance in {"heun": None, "heun, guided": classifier_free(2.0)}.items():
        generate = Flow().generator(nets, bind("heun", 5, guidance))
        with torch.no_grad(), warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            generate(z, cond)
            mode("warn")
            try:
                generate(z, cond)
            finally:
                mode("default")
        yield wait_row(f"5 steps of {name}", seen)


# ------------------------------------------------------------------------------------------------ layouts of a U-Net
def measure_layouts(setup: Setup) -> Iterator[Row]:
    """A training step of a U-Net of 128 channels at 32x32: NCHW, channels_last, and with cudnn.benchmark."""
    size, batch = (8, 2) if setup.tiny else (32, 128)
    cfg = UNet(width=8, mults=(1,), attention=()) if setup.tiny else UNet(width=128, mults=(1, 2, 2, 2), num_blocks=2)
    images, _ = load_images(None, size)
    rows = draw_batch(images, batch, torch.Generator().manual_seed(0), setup.device)
    factory = Factory(cfg, (3, size, size), setup.device, 1e-4)
    bf16 = step_precision(setup) == "bf16"
    for benchmark in (False, True):
        for channels_last in (False, True):
            row = {"channels_last": channels_last, "cudnn_benchmark": benchmark}
            if benchmark and not setup.is_cuda:
                yield {**row, "step_ms": NEEDS_CUDA}
                continue
            torch.backends.cudnn.benchmark = benchmark
            try:
                contender = factory.genkit("unet", bf16, channels_last=channels_last)
                seconds = setup.seconds(lambda c=contender: c.step(*rows), repeats=20, warmup=5)
            finally:
                torch.backends.cudnn.benchmark = False
            yield {**row, "step_ms": 1e3 * seconds}
    x = torch.randn(batch, 16 if setup.tiny else 128, size, size, device=setup.device)
    ones = torch.ones(x.shape[:2], device=setup.device)
    norms = {
        "F.group_norm": lambda: F.group_norm(x, num_groups(x.shape[1]), ones[0], ones[0]),
        "blocks.group_norm": lambda: group_norm(x, ones, ones),
    }
    for name, norm in norms.items():
        yield {"kernel": name, "ms": 1e3 * setup.seconds(norm, repeats=50)}


# ------------------------------------------------------------------------------------------------ saving
def measure_saving(setup: Setup) -> Iterator[Row]:
    """A checkpoint of DiT-XL/2 with AdamW and one average: seconds of copying, writing and hashing."""
    objective, data = Flow(), setup.latents()
    state: State = train_steps(setup, objective, setup.large, data, steps=1, batch=4)
    began = time.perf_counter()
    files = checkpoint_files(state, objective)
    size = sum(piece.num_bytes for pieces in files.values() for piece in pieces.values())
    yield {"what": "copy to the host", "s": time.perf_counter() - began, "GB": size / 1e9}
    began = time.perf_counter()
    paths = [setup.folder / name for name in files]
    for path, pieces in zip(paths, files.values(), strict=True):
        save_file({key: piece.rows for key, piece in pieces.items()}, path)
    yield {"what": "write", "s": time.perf_counter() - began, "GB": size / 1e9}
    began = time.perf_counter()
    for path in paths:
        sha256(path)
    yield {"what": "checksums", "s": time.perf_counter() - began, "GB": size / 1e9}
    files.clear()
    for path in paths:
        path.unlink()
    began = time.perf_counter()
    save_checkpoint(setup.folder / "run", state, objective, data.spec, data.codec, seed=0, keep=1)
    yield {"what": "save_checkpoint", "s": time.perf_counter() - began, "GB": size / 1e9}
