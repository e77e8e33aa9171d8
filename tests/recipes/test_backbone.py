"""docs/contributing/backbone.md, executed: a new backbone is one file and one line."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genkit.backbones import BACKBONES
from genkit.cli.main import main
from tests.recipes.backbone import ResNet
from tests.support import backbones as contract
from tests.support.recipes import page_shows

DIGITS = ["--data=digits", "--steps=3", "--batch=8", "--workers=0", "--no-tensorboard", "--device=cpu",
          "--backbone.width=8", "--backbone.depth=1"]  # fmt: skip


@pytest.fixture
def _resnet(monkeypatch):
    monkeypatch.setitem(BACKBONES, "resnet", ResNet)
    monkeypatch.setitem(contract.TINY, "resnet", ResNet(width=8, depth=1))


def test_the_page_shows_this_recipe():
    page_shows("backbone")


@pytest.mark.usefixtures("_resnet")
def test_a_backbone_is_one_file_and_one_line(monkeypatch):
    contract.check_all("resnet", monkeypatch)

    @settings(max_examples=12, deadline=None)
    @given(data=st.data())
    def shapes_and_gradients(data):
        contract.check_shapes_and_gradients("resnet", "denoiser", data)

    shapes_and_gradients()


@pytest.mark.usefixtures("_resnet")
@pytest.mark.parametrize("name", ["resnet", "tests.recipes.backbone:ResNet"])
def test_the_command_line_knows_it(name, tmp_path):
    """By its name, and without any line, from outside the package."""
    assert main(["train", *DIGITS, f"--backbone={name}", f"--out={tmp_path}"]) == 0
    out = tmp_path / "digits.npz"
    assert main(["sample", str(tmp_path / "latest"), "--n=4", "--steps=3", "--format=npz", f"--out={out}"]) == 0
    with np.load(out) as arrays:
        assert arrays["arr_0"].shape[0] == 4


@pytest.mark.usefixtures("_resnet")
def test_a_missing_cut_is_refused_in_one_line(tmp_path, capsys):
    assert main(["train", *DIGITS, "--backbone=resnet", "--objective=vae", f"--out={tmp_path}"]) == 2
    assert "ResNet: has no encoder, only denoiser; choose another --backbone" in capsys.readouterr().err
