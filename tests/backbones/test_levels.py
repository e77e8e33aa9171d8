"""What the U-Net says of its levels: settings that no level has are named at the start of training."""

import pytest

from genkit.backbones import MLP, UNet
from genkit.backbones.blocks import MapAttention
from genkit.cli.main import main
from genkit.config import load_yaml
from genkit.core import Spec
from tests.support.recipes import ROOT


def count(cfg, shape):
    return sum(isinstance(m, MapAttention) for m in cfg.denoiser(Spec(shape, {})).modules())


@pytest.mark.parametrize(
    ("cfg", "shape", "blocks", "words"),
    [
        (UNet(width=8), (3, 32, 32), 4, "levels   32x32, 16x16 with attention, 8x8"),
        (UNet(width=8), (1, 28, 28), 1,
         "levels   28x28, 14x14, 7x7; attention only in the middle, as no level's shorter side is 16"),
        (UNet(width=8, attention=()), (1, 28, 28), 1, "levels   28x28, 14x14, 7x7; attention only in the middle"),
        (UNet(width=8, attention=(14,)), (1, 28, 28), 4, "levels   28x28, 14x14 with attention, 7x7"),
        (UNet(width=8, attention=(14, 16)), (1, 28, 28), 4,
         "levels   28x28, 14x14 with attention, 7x7; attention at 16 has no effect"),
        (UNet(width=8, mults=(1, 2, 4, 8), attention=(8,)), (1, 8, 8), 4,
         "levels   8x8 with attention, 4x4; the last 2 of 4 mults unused, as the level would be smaller than 4"),
        (UNet(width=8, attention=()), (2, 30), 1, "levels   32, 16, 8; attention only in the middle"),
    ],
)  # fmt: skip
def test_levels(cfg, shape, blocks, words):
    assert count(cfg, shape) == blocks
    assert list(cfg.notes(Spec(shape, {}))) == [words]


def test_other_families_have_no_levels():
    assert not MLP().notes(Spec((2,), {}))


def test_training_begins_with_the_levels(tmp_path, capsys):
    argv = ["train", "--data=digits", "--backbone.width=8", "--steps=1", "--batch=8", "--workers=0", "--no-tensorboard",
            "--sample-every=0", "--device=cpu", f"--out={tmp_path}"]  # fmt: skip
    assert main(argv) == 0
    first = capsys.readouterr().out.partition("\n")[0]
    assert first.startswith("levels   8x8, 4x4; attention only in the middle")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_published_configurations_name_no_attention_that_is_not_there(path):
    """On pictures of 28x28 and on latents the default, 16, is no level's size: the files say that none is meant."""
    backbone = load_yaml(path).get("backbone") or {}
    if "fashion" in path.stem:
        assert backbone["attention"] == []
