"""fp16: the loss scale follows torch's, agrees with the guard of training, and is resumed exactly."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from genkit.core import Batch, Draw, Loss, Objective, Phase, Spec
from genkit.data.codecs import Identity
from genkit.training import precision
from genkit.training.checkpoint import read_tensors
from genkit.training.directory import list_checkpoints, read_log, read_state
from genkit.training.loop import Diverged, fit, initial_state
from genkit.training.loss_scale import LossScale
from genkit.training.schedules import ConstantRate
from genkit.training.settings import TrainSettings
from genkit.training.train import train
from tests.support.ranks import on_two_ranks

CPU = torch.device("cpu")
TINY = {
    "objective": "flow", "data": "moons", "backbone": {"name": "mlp", "width": 16, "depth": 2}, "batch": 64,
    "sample_every": 0, "tensorboard": False, "device": "cpu", "workers": 0, "log_every": 1, "warmup": 3,
}  # fmt: skip


def test_it_follows_torchs_rule():
    """``GradScaler`` on the same gradients, finite and not: the same scale after every step, and the same steps."""
    net, scale = nn.Linear(1, 1, bias=False), LossScale(CPU)
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    peer = torch.amp.GradScaler("cpu", init_scale=LossScale.START, growth_interval=3)
    scale.INTERVAL = 3
    for bad in (1, 0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1):
        optimizer.zero_grad()
        x = torch.full((1, 1), torch.inf if bad else 1.0)
        peer.scale(net(x).sum()).backward()
        peer.step(optimizer)
        peer.update()
        scale.update(torch.tensor(float(bad)))
        assert float(scale.scale) == peer.get_scale()


class Product(nn.Module):
    """``w x`` in the precision of autocast."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 1), 3.0))

    def forward(self, x):
        return x @ self.weight


class Small(Objective):
    """A loss whose gradient is ``size``: too small for fp16 below 6e-8."""

    sampler = None
    phases = (Phase("fit", ("net",)),)
    size: float = 2.0**-30

    def networks(self, backbone, spec):
        return {"net": Product()}

    def loss(self, phase, nets, batch):
        return Loss((nets["net"](batch.x).float() * self.size).flatten(1).mean(1), {})

    def generator(self, nets, sampling=None):
        raise NotImplementedError


def settings_of(name="fp16", **changes):
    defaults = {
        "steps": 1,
        "batch": 4,
        "warmup": 0,
        "schedule": ConstantRate(),
        "lr": 0.5,
        "clip": 0.0,
        "save_every": 10**9,
    }
    return TrainSettings(precision=name, log_every=10**9, sample_every=0, **{**defaults, **changes})


class One:
    """An accelerator of one process."""

    device, num_processes, process_index = CPU, 1, 0

    def prepare_model(self, net):
        return net

    def backward(self, loss):
        loss.backward()

    def reduce(self, x, how):
        return x


def ones(step, draw, first, last):
    return Batch(torch.ones(last - first, 1), draw=Draw((0, step), first, last))


def trained(objective, settings, stream=ones, **state):
    nets = objective.networks(None, Spec((1,)))
    start = replace(initial_state(objective, nets, replace(settings, ema=())), **state)
    fit(objective, start, stream, Identity(), settings, One())
    return start


def test_small_gradients_survive():
    """Adam divides by the size of the gradient, so a step is the rate wherever the gradient is not rounded to 0."""
    objective = Small()
    step = 0.5 * 2**-30 / (2**-30 + 1e-8)
    assert float(trained(objective, settings_of()).nets["net"].weight.detach()) == pytest.approx(3 - step, abs=1e-4)
    unscaled = trained(objective, settings_of(), loss_scales={"fit": {"scale": 1.0, "finite_steps": 0.0}})
    assert float(unscaled.nets["net"].weight.detach()) == 3.0


def test_overflow_skips_lowers_the_scale_and_is_not_divergence():
    """A gradient of 16 at the scale 2^16 exceeds 65504 five times: steps that are counted and change nothing."""
    objective = Small()
    objective.size = 16.0
    five, eight = (trained(objective, settings_of(steps=n, max_nonfinite_steps=2)) for n in (5, 8))
    assert five.skipped == eight.skipped == 5
    assert eight.loss_scales["fit"] == {"scale": 2.0**11, "finite_steps": 3.0}
    assert float(five.nets["net"].weight.detach()) == 3.0
    assert float(eight.nets["net"].weight.detach()) == pytest.approx(3 - 3 * 0.5)


def test_data_that_are_not_finite_still_end_training():
    nan = lambda step, draw, first, last: Batch(torch.full((last - first, 1), torch.nan))  # noqa: E731
    with pytest.raises(Diverged, match="the data"):
        trained(Small(), settings_of(steps=40, max_nonfinite_steps=2), nan)


def test_training_in_fp16_is_close_to_fp32_and_resumes_exactly(tmp_path):
    whole = train(**TINY, steps=12, precision="fp16", out=str(tmp_path / "a"), save_every=6, schedule="constant")
    exact = train(**TINY, steps=12, precision="fp32", out=str(tmp_path / "b"), schedule="constant")
    train(**TINY, steps=6, precision="fp16", out=str(tmp_path / "c"), schedule="constant")
    resumed = train(**TINY, steps=12, precision="fp16", out=str(tmp_path / "c"), schedule="constant",
                    resume=str(tmp_path / "c" / "latest"))  # fmt: skip
    ends = [list_checkpoints(run.directory)[-1] for run in (whole, resumed, exact)]
    states = [read_state(end) for end in ends]
    assert states[0]["loss_scales"] == states[1]["loss_scales"] == {"denoise": {"scale": 2.0**16, "finite_steps": 12.0}}
    assert "loss_scales" not in states[2]
    a, b, c = (read_tensors(end, "nets.safetensors") for end in ends)
    assert all(torch.equal(a[key], b[key]) for key in a)
    shift = max(float((a[key] - c[key]).abs().max()) for key in a)
    assert 0 < shift < 2e-3
    losses = [[line["denoise/loss"] for line in read_log(run.directory)] for run in (whole, exact)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=5e-3, atol=0)


def test_a_device_without_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "has_autocast", lambda dtype, device: dtype != torch.float16)
    with pytest.raises(ValueError, match="precision: given fp16, which torch does not have on cpu here; take fp32"):
        train(**TINY, steps=2, precision="fp16", out=str(tmp_path))


def scale_of_ranks(accelerator):
    """The scale after steps in which the second rank's rows overflow."""
    objective = Small()
    objective.size = 1.0
    rows = lambda step, draw, first, last: Batch(torch.arange(first, last)[:, None] * 1e4)  # noqa: E731
    nets = objective.networks(None, Spec((1,)))
    settings = settings_of(steps=6, save_every=6)
    start = initial_state(objective, nets, replace(settings, ema=()))
    fit(objective, start, rows, Identity(), settings, accelerator)
    return json.dumps([start.loss_scales, start.skipped, float(nets["net"].weight.detach())])


@pytest.mark.slow
def test_ranks_skip_together():
    first, second = on_two_ranks(scale_of_ranks)
    assert first == second
    assert json.loads(first)[1] > 0
