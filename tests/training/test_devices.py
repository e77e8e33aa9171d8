"""No step of training mixes devices, or lets the host wait for the device: every objective, backbone and option."""

from dataclasses import replace

import pytest
import torch

from genkit.backbones import BACKBONES, lora
from genkit.core import Batch, Draw, Label, Spec, Vector
from genkit.data import DATA
from genkit.data.codecs import Pixels
from genkit.data.pairs import InPairs
from genkit.diffusion.parametrization import PARAMETRIZATIONS
from genkit.diffusion.paths import PATHS, VE
from genkit.integrations.diffusers_stage import DiffusersStage
from genkit.objectives import (
    DDPM,
    EDM,
    GAN,
    OBJECTIVES,
    VAE,
    VQ,
    AnchoredFlow,
    Autoencoder,
    Distillation,
    FirstStage,
    Flow,
    FlowMap,
    GuidanceDistillation,
    Regression,
)
from genkit.objectives.adversarial.losses import GAN_LOSSES
from genkit.objectives.autoencoders.first_stage import VectorQuantizer
from genkit.objectives.autoencoders.likelihoods import LIKELIHOODS
from genkit.objectives.autoencoders.perceptual import RandomFilterDistance
from genkit.objectives.flow_map.rules import RULES
from genkit.objectives.matching.couplings import COUPLINGS, OptimalTransport, SchrodingerBridge
from genkit.objectives.matching.sources import DatasetSource
from genkit.objectives.matching.times import TIME_DISTRIBUTIONS
from genkit.objectives.matching.weights import LOSS_WEIGHTS
from genkit.training.first_stage import LatentCodec, LatentData, RunStage
from tests.support.backbones import KINDS, TINY, conditions, small
from tests.support.devices import latents, pictures, points, waits_of_a_step
from tests.support.pretended_device import CUDA, PretendedDevice

TINY_MLP = TINY["mlp"]
CENTRES = {"anchor": Label(3, centers=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0))}


def pairs():
    data = points()
    return InPairs(data, data.x.flip(1))


def anchored_points():
    return points(cond={"anchor": torch.arange(16) % 3}, kinds=CENTRES)


def four_ways(**how):
    return DATA["four-ways"](n=8, **how).load("train")


SPECIAL = {  # objectives that need other data or settings than the rest
    "anchored": (AnchoredFlow(), anchored_points),
    "distillation": (Distillation(), pairs),
    "vq": (VQ(latent=(8,)), points),
    "autoencoder": (FirstStage(latent=(4,)), points),
}
CHOICES = {  # name -> objective, on points in the plane
    **{f"path {k}": Flow(path=path()) for k, path in PATHS.items()},
    **{f"prediction {k}": Flow(path=PATHS["vp"](), prediction=k, sigma_data=0.5 if k == "karras" else None)
       for k in PARAMETRIZATIONS},
    **{f"times {k}": Flow(time_distribution=times()) for k, times in TIME_DISTRIBUTIONS.items()},
    **{f"weight {k}": Flow(path=VE(), prediction="x0", loss_weight=weight()) for k, weight in LOSS_WEIGHTS.items()},
    **{f"rule {k}": FlowMap(rule=rule()) for k, rule in RULES.items()},
    **{f"gan {k}": GAN(gan_loss=loss()) for k, loss in GAN_LOSSES.items()},
    "guidance as an input": FlowMap(guidance=4.0),
    "conditions dropped one by one": Flow(cond_dropout_each=0.1),
    "zero-terminal-SNR": DDPM(zero_snr=True, prediction="v"),
    "edm": EDM(),
    "discrete loss-aware": DDPM(time_distribution=TIME_DISTRIBUTIONS["loss-aware"]()),
}  # fmt: skip
ALLOWED = {  # the plan is computed on the host; the stopping rule is read every tenth round; the data set is there
    "ot": (Flow(coupling=OptimalTransport()), 2),
    "sb": (Flow(coupling=SchrodingerBridge()), 4),
    "source data": (Flow(source=DatasetSource()), 1),
}
PICTURES = {  # name -> (objective, backbone, data, settings), with a U-Net or a transformer
    "gan, augmented": (GAN(augment=("color", "translation", "cutout"), spectral_norm=True), "dit", pictures, {}),
    **{f"vae {k}": (VAE(likelihood=kind()), "dit", pictures, {}) for k, kind in LIKELIHOODS.items()},
    "learned variance": (DDPM(learn_variance=True), "dit", pictures, {}),
    "first stage, adversarial": (FirstStage(adversarial_weight=0.5, adversarial_start=0), "dit", pictures, {}),
    "first stage, codes": (
        FirstStage(adversarial_weight=0.5, adversarial_start=0, bottleneck=VectorQuantizer(codebook_size=16)),
        "dit", pictures, {},
    ),
    "first stage, filters": (FirstStage(perceptual=RandomFilterDistance()), "dit", pictures, {}),
    "vq": (VQ(latent=(8, 4, 4), codebook_size=16), "dit", pictures, {}),
    "latents": (Flow(), "dit", latents, {}),
    "mirrored": (Flow(), "dit", lambda: replace(pictures(), flip=True), {}),
    "micro-batches": (Flow(), "dit", pictures, {"micro_batch": 4}),
    "bf16": (Flow(), "unet", pictures, {"precision": "bf16"}),
    "two averages": (Flow(), "dit", pictures, {"ema": (0.9, 0.99)}),
}  # fmt: skip


@pytest.mark.parametrize("name", [k for k in OBJECTIVES if k != "guidance-distillation"])
def test_no_objective_lets_the_host_wait(name):
    objective, data = SPECIAL.get(name) or (OBJECTIVES[name](), points)
    assert not waits_of_a_step(objective, TINY_MLP, data())


FAST = {"path vp", "times log-normal", "times loss-aware", "rule improved", "rule consistency", "gan wasserstein",
        "guidance as an input", "zero-terminal-SNR"}  # fmt: skip


def by_speed(names, fast):
    """Names for a parametrised test, slow unless they are ``fast``."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", by_speed(CHOICES, FAST))
def test_no_choice_lets_the_host_wait(name):
    assert not waits_of_a_step(CHOICES[name], TINY_MLP, points())


@pytest.mark.parametrize("name", ALLOWED)
def test_exceptions_are_these(name):
    """Their number is stated: a further wait is a fault."""
    objective, allowed = ALLOWED[name]
    waits = waits_of_a_step(objective, TINY_MLP, points())
    assert 0 < sum(waits.values()) <= allowed, waits


def test_given_pairs():
    assert not waits_of_a_step(Flow(coupling=COUPLINGS["given"]()), TINY_MLP, pairs())


FAST_PICTURES = {"first stage, codes", "latents", "bf16", "micro-batches"}


@pytest.mark.parametrize("name", by_speed(PICTURES, FAST_PICTURES))
def test_no_training_of_pictures_lets_the_host_wait(name):
    objective, family, data, settings = PICTURES[name]
    assert not waits_of_a_step(objective, TINY[family], data(), **settings)


@pytest.mark.parametrize("kind", list(lora.LORA))
def test_no_adapter_lets_the_host_wait(kind):
    pytest.importorskip("peft")
    objective = Flow() if kind == "lora" else GuidanceDistillation()

    def adapt(nets):
        lora.adapt(nets, lora.LORA[kind](rank=2))

    assert not waits_of_a_step(objective, TINY_MLP, points(), adapt=adapt)


@pytest.mark.parametrize("objective", [Flow(), Regression(), AnchoredFlow()], ids=lambda o: type(o).__name__)
def test_no_policy_lets_the_host_wait(objective):
    data = four_ways(anchors=4) if isinstance(objective, AnchoredFlow) else four_ways()
    assert not waits_of_a_step(objective, TINY["dit"], data)


def conditioned(kinds):
    """Pictures with these conditions."""
    data = pictures(n=16, cond={}, kinds={})
    spec = replace(data.spec, cond=kinds)
    cond = {k: v for k, v in conditions(spec, batch=16).items() if k != "mask"}
    return replace(data, spec=spec, cond=cond)


@pytest.mark.parametrize("name", list(KINDS))
def test_no_condition_lets_the_host_wait(name):
    if name == "number":
        pytest.skip("an input of objectives, not a condition of data")
    assert not waits_of_a_step(Flow(cond_dropout_each=0.1), TINY["dit"], conditioned({name: KINDS[name]}))


@pytest.mark.parametrize("family", [k for k in BACKBONES if k != "mlp"])
def test_no_backbone_lets_the_host_wait(family):
    if family == "diffusers":
        pytest.importorskip("diffusers")
    backbone = small(family)
    for option in ("dropout", "checkpoint"):
        if hasattr(backbone, option):
            backbone = replace(backbone, **{option: {"dropout": 0.1, "checkpoint": True}[option]})
    assert not waits_of_a_step(Flow(), backbone, pictures())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["unet", "dit"])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_no_pair_of_objective_and_backbone_lets_the_host_wait(name, family):
    objective = {"vq": VQ(latent=(8, 4, 4)), "autoencoder": FirstStage(), "ae": Autoencoder(latent=(4, 4, 4))}.get(name)
    data, adapt = pictures(), None
    if name == "anchored":
        centres = tuple(torch.linspace(-1, 1, 3 * 64).tolist())
        data = pictures(cond={"anchor": torch.arange(16) % 3}, kinds={"anchor": Label(3, centers=centres)})
    if name == "distillation":
        data = InPairs(data, torch.randn(16, 1, 8, 8))
    if name == "guidance-distillation":

        def adapt(nets):
            lora.adapt(nets, lora.GuidanceLoRA(rank=2))

    assert not waits_of_a_step(objective or OBJECTIVES[name](), TINY[family], data, adapt=adapt)


def first_stage(kind):
    """An untrained first stage on the device, of genkit or of diffusers."""
    if kind == "run":
        objective, spec = VAE(latent=(4, 4, 4)), Spec((1, 8, 8))
        nets = objective.networks(TINY["dit"], spec)
        return RunStage("vae", objective, TINY["dit"], spec, Pixels(), nets).to(CUDA)
    from diffusers.models import AutoencoderKL

    net = AutoencoderKL(1, 1, block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    return DiffusersStage("kl", "AutoencoderKL", {}, (1, 8, 8), net).to(CUDA)


@pytest.mark.parametrize("kind", ["run", "diffusers"])
def test_no_first_stage_lets_the_host_wait(kind):
    if kind == "diffusers":
        pytest.importorskip("diffusers")
    with PretendedDevice() as device:
        stage = first_stage(kind)
        codec = LatentCodec(stage, (0.0,) * 4, (1.0,) * 4)
        data = pictures()
        spec = replace(data.spec, shape=stage.latent)
        batch = Batch(data.x[:4].to(CUDA), draw=Draw((0,), 0, 4, CUDA))
        codec.decode(codec.encode(batch).x)
        device.waits.clear()
        assert codec.decode(codec.encode(batch).x).device == CUDA
        assert not device.waits
    assert not waits_of_a_step(Flow(), TINY["dit"], LatentData(data, spec, codec))


def test_a_vector_condition_is_scaled_on_the_device():
    data = points(cond={"state": torch.randn(16, 3)}, kinds={"state": Vector((3,), (0.0,) * 3, (1.0,) * 3, 5.0)})
    assert not waits_of_a_step(Flow(), TINY_MLP, data)
