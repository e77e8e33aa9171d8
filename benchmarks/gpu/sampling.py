"""Drawing on the device: precisions with their differences, compiled networks, and what guidance costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from benchmarks.gpu.setup import NEEDS_CUDA, Row, Setup, conditions, shaken_network
from genkit.core import Guidance
from genkit.diffusion.guidance import classifier_free, within
from genkit.diffusion.samplers import bind
from genkit.objectives import Flow
from genkit.training.precision import Precision, with_networks

PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16", "fp16")


def measure_precisions(setup: Setup) -> Iterator[Row]:
    """DiT-XL/2, ten steps of ddim: milliseconds a step, and how far the samples are from those in fp32."""
    n, steps = (2, 2) if setup.tiny else (64, 10)
    nets, (z, cond) = shaken_network(setup, setup.large), conditions(setup, n)
    generate, exact = Flow().generator(nets, bind("ddim", steps)), None
    for compiled in (False, True):
        for precision in PRECISIONS if not compiled else ("bf16",):
            row = {"precision": precision, "compiled": compiled}
            if (precision == "tf32" or compiled) and not setup.is_cuda:
                yield {**row, "step_ms": NEEDS_CUDA}
                continue
            draw = with_networks(generate, nets, precision, setup.device, compiled)
            with torch.no_grad():
                x: Tensor = draw(z, cond)
                seconds = setup.seconds(lambda d=draw: d(z, cond), repeats=1, warmup=1)
            exact = x if exact is None else exact
            difference = (x - exact).abs()
            yield {**row, "step_ms": 1e3 * seconds / steps, "images_per_s_of_250_steps": n / seconds * steps / 250,
                   "largest_difference": float(difference.max()), "mean_difference": float(difference.mean()),
                   "std_of_samples": float(exact.std())}  # fmt: skip


def measure_guidance(setup: Setup) -> Iterator[Row]:
    """DiT-B/2, ten steps of ddim: what classifier-free guidance costs."""
    n, steps = (2, 2) if setup.tiny else (64, 10)
    nets, (z, cond) = shaken_network(setup, setup.base), conditions(setup, n)
    rules: Mapping[str, Guidance | None] = {
        "none": None,
        "together": classifier_free(2.0),
        "apart": classifier_free(2.0, passes="apart"),
        "on half of the levels": within(0.25, 0.75, classifier_free(2.0)),
    }
    plain = None
    precision: Precision = "fp32" if setup.tiny else "bf16"
    for name, rule in rules.items():
        generate = with_networks(Flow().generator(nets, bind("ddim", steps, rule)), nets, precision, setup.device)
        with torch.no_grad():
            seconds = setup.seconds(lambda g=generate: g(z, cond), repeats=2, warmup=1)
        plain = seconds if plain is None else plain
        yield {"guidance": name, "step_ms": 1e3 * seconds / steps, "times": seconds / plain}
