"""No step of a sampler mixes devices, or lets the host wait: samplers, guidance, editing, likelihoods."""

import pytest
import torch

from genkit.diffusion.guidance import (
    RULES,
    autoguidance,
    by_classifier,
    clamp,
    classifier_free,
    compose,
    scale_input,
    within,
)
from genkit.diffusion.inverse_problems import Average, Blur, Dense, Mask, dps, measure, pigdm, sdedit
from genkit.diffusion.paths import shared_time
from genkit.diffusion.samplers import FLOW_MAP_SAMPLERS, SAMPLERS, Seeds, bind, invert, log_prob, variational_bound
from genkit.diffusion.samplers.grids import uniform
from genkit.diffusion.value_guidance import value_guidance
from genkit.objectives import DDPM, EDM, GAN, OBJECTIVES, VAE, Classifier, Drift, Flow, FlowMap, Regression
from genkit.objectives.flow_map.rules import Consistency
from tests.support.backbones import TINY
from tests.support.devices import pictures, points, waits_of_sampling
from tests.support.pretended_device import CUDA, Pretended, PretendedDevice

MLP, DIT = TINY["mlp"], TINY["dit"]
ADAPTIVE = {"dopri5": 400}  # it reads each step's error, and torchdiffeq the times of its stages
MODELS = {"flow": Flow(), "ddpm": DDPM(), "edm": EDM()}


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("model", ["flow", *(pytest.param(k, marks=pytest.mark.slow) for k in ("ddpm", "edm"))])
def test_no_sampler_lets_the_host_wait(sampler, model):
    waits = waits_of_sampling(MODELS[model], MLP, points(), sampler)
    assert sum(waits.values()) <= ADAPTIVE.get(sampler, 0), waits


@pytest.mark.parametrize("sampler", FLOW_MAP_SAMPLERS)
@pytest.mark.parametrize("guidance", [None, classifier_free(2.0)], ids=["plain", "guided"])
def test_no_flow_map_lets_the_host_wait(sampler, guidance):
    objective = FlowMap(rule=Consistency()) if sampler == "consistency" else FlowMap()
    assert not waits_of_sampling(objective, MLP, points(), sampler, guidance)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "churn", "restart"])
def test_seeds_of_each_sample_cost_no_wait(sampler):
    """They are drawn on the host, and sent while the device is at work."""
    with PretendedDevice():
        noise = Seeds(range(3), CUDA)
    assert not waits_of_sampling(DDPM(), MLP, points(), sampler, noise=noise)
    torch.testing.assert_close(Seeds([4])((2,)), torch.randn(1, 2, generator=torch.Generator().manual_seed(4)))


def test_many_steps_cost_no_waits():
    """More times than the cache of them keeps."""
    with PretendedDevice() as device:
        times = [shared_time(k / 300, 3, torch.float32, CUDA) for k in range(300)]
    assert not device.waits
    assert all(isinstance(t, Pretended) for t in times)
    assert times[75].inner.tolist() == [0.25] * 3


GUIDANCE = {
    **{f"rule {k}": classifier_free(2.0, rule()) for k, rule in RULES.items()},
    "two passes": classifier_free(2.0, passes="apart"),
    "null alone": classifier_free(0.0),
    "interval": within(0.1, 0.7, classifier_free(2.0)),
    "clamped": compose(classifier_free(2.0), clamp()),
    "value": value_guidance(lambda x, cond: x.flatten(1).sum(1), 0.5),
}


@pytest.mark.parametrize("name", GUIDANCE)
def test_no_guidance_lets_the_host_wait(name):
    assert not waits_of_sampling(Flow(), MLP, points(), "heun", GUIDANCE[name])


def device_nets(objective, backbone, data):
    nets = objective.networks(backbone, data.spec)
    return {k: v.to(CUDA).eval().requires_grad_(False) for k, v in nets.items()}


@pytest.mark.parametrize("kind", ["classifier", "weak", "scale"])
def test_no_second_network_lets_the_host_wait(kind):
    objective = FlowMap(guidance=4.0) if kind == "scale" else Flow()
    with PretendedDevice():
        guidance = {
            "classifier": lambda: by_classifier(Classifier().classify(device_nets(Classifier(), MLP, points()))),
            "weak": lambda: autoguidance(Flow().denoiser(device_nets(Flow(), MLP, points())["net"]), 2.0),
            "scale": lambda: scale_input(3.0, 1.0, 4.0),
        }[kind]()
    assert not waits_of_sampling(objective, MLP, points(), "heun", guidance)


OPERATORS = {  # of the host, for pictures of the device
    "mask": (Mask(torch.arange(64).reshape(1, 8, 8) % 2 == 0), DIT, pictures),
    "average": (Average(2), DIT, pictures),
    "blur": (Blur.gaussian(1.0), DIT, pictures),
    "dense": (Dense(torch.tensor([[1.0, 2.0]])), MLP, points),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("guide", [pigdm, dps], ids=["pigdm", "dps"])
@pytest.mark.parametrize("inner", [within(0.0, 0.9, classifier_free(2.0)), pytest.param(None, marks=pytest.mark.slow)],
                         ids=["guided", "alone"])  # fmt: skip
def test_no_inverse_problem_lets_the_host_wait(name, guide, inner):
    operator, backbone, data = OPERATORS[name]
    measured = measure(operator, torch.randn(3, *data().spec.shape), 0.1)
    guidance = guide(measured) if inner is None else compose(inner, guide(measured))
    assert not waits_of_sampling(Flow(), backbone, data(), "heun", guidance)


@pytest.mark.parametrize("name", ["one-pass vae", "one-pass gan", "drift", "regression"])
def test_no_model_of_one_pass_lets_the_host_wait(name):
    objective = {"one-pass vae": VAE(), "one-pass gan": GAN(), "drift": Drift(), "regression": Regression()}[name]
    sampler = "ddim" if objective.sampler else None
    assert not waits_of_sampling(objective, MLP, points(), sampler)


CALLS = {
    "log_prob": lambda d, x, noise: log_prob(d, x, times=uniform(4)(d.path), divergence="hutchinson", noise=noise),
    "exact log_prob": lambda d, x, noise: log_prob(d, x, times=uniform(4)(d.path)),
    "bound": lambda d, x, noise: variational_bound(d, x, times=uniform(4)(d.path), noise=noise).total,
    "inversion": lambda d, x, noise: invert(d, x, uniform(4)(d.path)),
    "sdedit": lambda d, x, noise: sdedit(d, x, uniform(4)(d.path), noise=noise),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("model", ["flow", "ddpm"])
def test_no_likelihood_or_edit_lets_the_host_wait(name, model):
    objective, data = {"flow": Flow(), "ddpm": DDPM(prediction="v")}[model], points()  # on the whole path
    with PretendedDevice() as device:
        denoise = objective.denoiser(device_nets(objective, MLP, data)["net"])
        x, noise = torch.randn(3, 2, device=CUDA), Seeds(range(3), CUDA)
        CALLS[name](denoise, x, noise)
        device.waits.clear()
        assert isinstance(CALLS[name](denoise, x, noise), Pretended)
    assert not device.waits


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["unet", "dit"])
@pytest.mark.parametrize("sampler", [k for k in SAMPLERS if k not in ADAPTIVE])
def test_no_sampler_of_pictures_lets_the_host_wait(sampler, backbone):
    for objective in (*MODELS.values(), DDPM(learn_variance=True)):
        for guidance in (None, within(0.1, 0.7, classifier_free(2.0))):
            assert not waits_of_sampling(objective, TINY[backbone], pictures(), sampler, guidance)


def test_every_generative_objective_is_above():
    """The others draw as one of these does: by a sampler, or in one pass."""
    distilled = {"distillation", "guidance-distillation", "progressive-distillation", "dmd"}
    shared = {"anchored", *distilled, "ae", "vq", "autoencoder", "classifier"}
    assert set(OBJECTIVES) - shared == {"flow", "ddpm", "edm", "flow-map", "drift", "regression", "vae", "gan"}


def test_bind_takes_times_of_the_host():
    with PretendedDevice():
        flow = Flow()
        generate = bind("ddim", torch.tensor([1.0, 0.5, 0.0]))(flow.denoiser(device_nets(flow, MLP, points())["net"]))
        assert isinstance(generate(torch.randn(2, 2, device=CUDA), {}), Pretended)
