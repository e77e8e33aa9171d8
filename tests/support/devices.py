"""Training and sampling on the pretended device."""

from contextlib import nullcontext
from types import SimpleNamespace

import torch

from genkit.core import Label, Spec
from genkit.data import InMemory, Stream
from genkit.data.codecs import Pixels, Standardize
from genkit.diffusion.samplers import bind
from genkit.training.loop import fit, initial_state
from genkit.training.settings import TrainSettings
from tests.support.pretended_device import CUDA, Pretended, PretendedDevice

ROWS = 8
ACCELERATOR = SimpleNamespace(
    device=CUDA,
    num_processes=1,
    process_index=0,
    prepare_model=lambda net: net,
    no_sync=lambda net: nullcontext(),
    backward=lambda loss: loss.backward(),
    reduce=lambda x, how: x,
)


def pictures(channels=1, cond=None, kinds=None, n=16):
    """Random pictures of 8 x 8 with classes, or other conditions."""
    cond = {"label": torch.arange(n) % 3} if cond is None else cond
    kinds = {"label": Label(3)} if kinds is None else kinds
    x = torch.randint(256, (n, channels, 8, 8), dtype=torch.uint8)
    return InMemory(x, cond, Spec((channels, 8, 8), kinds), Pixels())


def latents(n=16):
    """Numbers in the shape of latents, scaled by a codec with constants."""
    codec = Standardize((0.0,) * 4, (1.0,) * 4)
    return InMemory(
        torch.randn(n, 4, 8, 8), {"label": torch.arange(n) % 3}, Spec((4, 8, 8), {"label": Label(3)}), codec
    )


def points(n=16, cond=None, kinds=None):
    """Points in the plane."""
    cond = {"label": torch.arange(n) % 3} if cond is None else cond
    kinds = {"label": Label(3)} if kinds is None else kinds
    return InMemory(torch.randn(n, 2), cond, Spec((2,), kinds), Standardize((0.0, 0.0), (1.0, 1.0)))


def waits_of_a_step(objective, backbone, data, stream=None, adapt=None, **settings):
    """What the host waits for in the third step of a real training: ``{(what, where): times}``.

    A mismatch of devices raises. The first steps fill caches, and the last one writes the log.
    """
    defaults = {"batch": ROWS, "warmup": 0, "save_every": 1000, "log_every": 1000, "sample_every": 0, "workers": 0}
    settings = TrainSettings(
        objective=objective, backbone=backbone, steps=4, **{"precision": "fp32", **defaults, **settings}
    )
    marks = []
    with PretendedDevice() as device:
        nets = {k: v.to(CUDA) for k, v in objective.networks(backbone, data.spec).items()}
        if adapt:
            adapt(nets)
        state = initial_state(objective, nets, settings)
        stream = stream or Stream(data, settings.batch, 0, CUDA, workers=0)
        fit(objective, state, stream, data.codec, settings, ACCELERATOR,
            progress=lambda step, loss: marks.append(device.waits.copy()))  # fmt: skip
    assert all(isinstance(p, Pretended) for net in nets.values() for p in net.parameters())
    return marks[2] - marks[1]


def waits_of_sampling(objective, backbone, data, sampler=None, guidance=None, steps=4, noise=None, n=3, **options):
    """What the host waits for while it draws ``n`` samples a second time."""
    with PretendedDevice() as device:
        nets = {k: v.to(CUDA).eval().requires_grad_(False) for k, v in objective.networks(backbone, data.spec).items()}
        bound = bind(sampler, steps, guidance, **options) if sampler else None
        generate = objective.generator(nets, bound)
        cond = {k: v[:n].to(CUDA) for k, v in data.cond.items()}
        z = torch.randn(n, *objective.noise_shape(data.spec), device=CUDA)
        generate(z, cond, noise)
        before = device.waits.copy()
        assert isinstance(generate(z, cond, noise), Pretended)
        return device.waits - before
