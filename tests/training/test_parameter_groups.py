"""What weight decay acts on, and adapters of one network of several."""

import pytest
import torch
from torch import nn

from genkit.backbones import MLP, DiT, UNet, lora
from genkit.cli.main import main
from genkit.core import Label, Spec, Text, Vector
from genkit.objectives import GAN, VAE, Flow
from genkit.objectives.autoencoders.likelihoods import Gaussian
from genkit.training.loop import initial_state
from genkit.training.optimizers.groups import parameter_groups
from genkit.training.run import load_run
from genkit.training.settings import TrainSettings

IMAGE = Spec((1, 8, 8), {"label": Label(10), "size": Vector((2,)), "text": Text(12)})
CLASSES = Spec((1, 8, 8), {"label": Label(10)})
CASES = [
    (Flow(), MLP(width=8), Spec((2,), {"label": Label(3)})),
    (Flow(), UNet(width=8, attention=(8,)), IMAGE),
    (Flow(), DiT(width=16, depth=1, head_size=8), IMAGE),
    (VAE(likelihood=Gaussian(scale="shared")), UNet(width=8), CLASSES),
    (GAN(), UNet(width=8), CLASSES),
]
DECAYING = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def names(objective, backbone, spec, weight_decay=0.1):
    """Which parameters decay and which do not, and the modules that they belong to."""
    nets = objective.networks(backbone, spec)
    owners = {
        f"{n}.{m}.{k}".replace("..", "."): module
        for n, net in nets.items()
        for m, module in net.named_modules()
        for k, _ in module.named_parameters(recurse=False)
    }
    of = {id(p): f"{n}.{k}" for n, net in nets.items() for k, p in net.named_parameters()}
    out = []
    for phase in objective.phases:
        groups = parameter_groups(phase, nets, weight_decay)
        out.append([[of[id(p)] for p in group["params"]] for group in groups])
        assert [group.get("weight_decay", weight_decay) for group in groups] == [weight_decay, 0.0]
    return out, owners


@pytest.mark.parametrize(("objective", "backbone", "spec"), CASES, ids=lambda v: type(v).__name__)
def test_only_matrices_and_convolutions_decay(objective, backbone, spec):
    phases, owners = names(objective, backbone, spec)
    for decayed, plain in phases:
        assert all(isinstance(owners[k], DECAYING) or "parametrizations" in k for k in decayed)
        assert not any(k.endswith(("bias", "null", "log_scale")) for k in decayed)
        weights = [k for k in plain if isinstance(owners[k], DECAYING) and k.endswith("weight")]
        assert not weights
        assert any(k.endswith("bias") for k in plain)
        if spec.cond and isinstance(objective, Flow):
            assert any(k.endswith("table.weight") for k in plain)
            assert any(k.endswith("null") for k in plain)


def test_without_decay_there_is_one_group_in_the_usual_order():
    objective, backbone, spec = CASES[1]
    nets = objective.networks(backbone, spec)
    (group,) = parameter_groups(objective.phases[0], nets, 0.0)
    assert [id(p) for p in group["params"]] == [id(p) for p in nets["net"].parameters()]


def test_a_step_without_a_gradient_shrinks_the_matrices_only():
    nets = Flow().networks(UNet(width=8), CLASSES)
    state = initial_state(Flow(), nets, TrainSettings(weight_decay=0.5, lr=0.1))
    before = {k: p.detach().clone() for k, p in nets["net"].named_parameters()}
    for p in nets["net"].parameters():
        p.grad = torch.zeros_like(p)
    state.optimizers["denoise"].step()
    for k, p in nets["net"].named_parameters():
        shrunk = p.ndim >= 2 and not k.endswith("table.weight")
        assert torch.allclose(p, before[k] * (0.95 if shrunk else 1.0)), k


def test_an_adapter_of_one_network_leaves_the_other_phase_out(tmp_path):
    """A GAN whose generator alone is adapted: the discriminator has nothing to train, and no optimizer."""
    pytest.importorskip("peft")
    tiny = ["--batch=8", "--workers=0", "--no-tensorboard", "--sample-every=0", "--device=cpu", f"--out={tmp_path}"]
    assert main(["train", "--objective=gan", "--data=digits", "--backbone.width=8", "--steps=1", *tiny]) == 0
    base = load_run(tmp_path / "latest", device="cpu")
    adapted = ["--lora.rank=2", "--lora.layers=generator", "--init", str(base.directory)]
    assert main(["train", *adapted, "--steps=2", "--save-every=1", *tiny]) == 0
    run = load_run(tmp_path / "latest", device="cpu")
    assert main(["train", "--resume", str(run.directory), "--steps=3"]) == 0
    run = load_run(run.directory, ema="none", device="cpu")
    base = load_run(base.directory, device="cpu")
    same = {n: all(torch.equal(a, b) for a, b in zip(run.nets[n].parameters(), base.nets[n].parameters(), strict=True))
            for n in run.nets}  # fmt: skip
    assert same == {"generator": False, "discriminator": True}


def test_phases_without_parameters_have_no_optimizer():
    pytest.importorskip("peft")
    nets = GAN().networks(UNet(width=8), CLASSES)
    lora.adapt(nets, lora.LoRA(rank=2, layers="discriminator"))
    state = initial_state(GAN(), nets, TrainSettings(ema=()))
    assert list(state.optimizers) == [phase.name for phase in GAN().phases if "discriminator" in phase.trains]
