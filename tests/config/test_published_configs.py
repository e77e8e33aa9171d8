"""The configurations of published results: the loss of each on tensors without numbers, at full size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from genkit import config
from genkit.core import Batch, Draw, Label, Spec
from genkit.training.settings import TrainSettings
from tests.support.commands import read_head

ROOT = Path(__file__).parents[2]
CLASSES = {"label": Label(1000)}
PUBLISHED = {  # file: layout of a sample, millions of parameters
    "cifar10_ddpm": (Spec((3, 32, 32)), 35.7),
    "cifar10_edm": (Spec((3, 32, 32)), 55.7 + 2.4),  # the latter for what tells of the augmentation
    "cifar10_otcfm": (Spec((3, 32, 32)), 35.7),
    "imagenet256_dit_xl": (Spec((4, 32, 32), CLASSES), 675),
    "imagenet256_sit_xl": (Spec((4, 32, 32), CLASSES), 675),
    "imagenet256_jit_b": (Spec((3, 256, 256), CLASSES), 131),
}


def count_parameters(name):
    """Run the loss on tensors without numbers; millions of parameters."""
    spec, _ = PUBLISHED[name]
    settings = config.parse(TrainSettings, ["--config", str(ROOT / "configs" / f"{name}.yaml")])
    objective = settings.objective
    if name == "cifar10_otcfm":  # whose plan needs numbers
        objective = config.override(objective, coupling="independent")
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective.setup(spec)
        nets = objective.networks(settings.backbone, spec)
        x = torch.zeros(2, *spec.shape)
        cond = {"label": torch.zeros(2, dtype=torch.long)} if spec.cond else {}
        loss = objective.loss(objective.phases[0].name, nets, Batch(x, cond, draw=Draw((0,), 0, 2)))
        assert loss.per_sample.shape == (2,)
        assert loss.per_sample.requires_grad
    return sum(p.numel() for net in nets.values() for p in net.parameters()) / 1e6


@pytest.mark.slow
def test_the_loss_runs_at_full_size():
    """In a process of its own: such tensors start threads of autograd, after which other tests could not fork."""
    code = f"import json; from {__name__} import *; print(json.dumps({{n: count_parameters(n) for n in PUBLISHED}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {name: pytest.approx(millions, rel=0.005) for name, (_, millions) in PUBLISHED.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_head_says_that_it_was_not_run(name):
    """Hardware, time and result are those of the paper or of arithmetic, and say so."""
    head = "\n".join(read_head(ROOT / "configs" / f"{name}.yaml"))
    for key in ("hardware", "minutes", "expect"):
        section = head.split(f"{key}:")[1].split("\nminutes:")[0].split("\nexpect:")[0]
        assert "not run here" in section.lower(), key
    assert "FID" in head
    assert "one gpu" in head.lower()
