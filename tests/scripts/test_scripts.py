"""The scripts in samplers/ and examples/ run as a person would run them, and the shipped configurations parse."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from genkit.cli import main as cli
from genkit.core.grids import GAP, MIN_SIDE

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    argv = ["--data=digits", "--backbone.width=16", "--steps=2", "--batch=8", "--tensorboard=false", "--device=cpu"]
    assert cli.main(["train", "--objective=flow", *argv, f"--out={out}"]) == 0
    return out / "latest"


def python(script, *args):
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sample_grid(run, tmp_path):
    out = tmp_path / "grid.png"
    assert str(out) in python("samplers/sample_grid.py", run, "--steps", 3, "--n", 4, "--out", out)
    width, height = Image.open(out).size
    assert height == 4 * (MIN_SIDE + GAP) + GAP
    assert width > 4 * (MIN_SIDE + GAP) + GAP + 40  # the names of the samplers


def test_interpolate(run, tmp_path):
    out = tmp_path / "walk.png"
    python("samplers/interpolate.py", run, "--steps", 3, "--rows", 2, "--columns", 5, "--out", out)
    width, height = Image.open(out).size
    assert height == 2 * (MIN_SIDE + GAP) + GAP
    assert width > 5 * (MIN_SIDE + GAP) + GAP


def test_slerp_keeps_the_norm():
    import importlib.util

    import torch

    spec = importlib.util.spec_from_file_location("interpolate", ROOT / "samplers/interpolate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    a, b = torch.randn(2, 1, 8, 8)
    b = b * a.norm() / b.norm()
    assert torch.allclose(module.slerp(a, b, 0.0), a, atol=1e-5)
    assert torch.allclose(module.slerp(a, b, 1.0), b, atol=1e-5)
    assert float(module.slerp(a, b, 0.4).norm()) == pytest.approx(float(a.norm()), rel=1e-4)


def test_exact_mixture_shows_the_orders():
    orders = re.findall(r"(ddim|heun|dpmpp_2m) .* ([\d.]+)$", python("examples/01_exact_mixture.py"), re.M)
    assert len(orders) == 6
    for name, order in orders:
        assert float(order) == pytest.approx(1 if name == "ddim" else 2, abs=0.2)


@pytest.mark.slow
def test_flow_in_40_lines_learns(tmp_path):
    out = tmp_path / "moons.png"
    printed = python("examples/02_flow_in_40_lines.py", "--steps", 501, "--out", out)
    first, last = (float(v) for v in re.findall(r"loss ([\d.]+)", printed))
    assert last < 0.85 * first
    assert Image.open(out).size[0] > 100


def test_scripts_are_short():
    for script in (ROOT / "samplers").glob("*.py"):
        assert len(script.read_text().splitlines()) <= 100, script


def refusal(script, *args):
    """What a script says to a mistake as it ends: one line, no traceback. In this process: six starts take a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, args)])
        patch.syspath_prepend(str(ROOT / "samplers"))  # where python itself looks for the module that scripts share
        printed = io.StringIO()
        with pytest.raises(SystemExit) as ended, contextlib.redirect_stderr(printed):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert ended.value.code == 2
    message = printed.getvalue()
    assert message.count("\n") == 1
    return message


LONGER = [pytest.param(script, marks=pytest.mark.slow) for script in ("inpaint", "super_resolve", "deblur")]


@pytest.mark.parametrize("script", LONGER)
def test_restorations(run, tmp_path, script):
    out = tmp_path / "restored.png"
    options = ("--steps", 3, "--n", 4, "--noise", 0.05, "--sampler", "ancestral", "--out", out)
    printed = python(f"samplers/{script}.py", run, *options)
    assert len(re.findall(r"^(pigdm|dps) +error .*?\d\.\d+", printed, re.M)) == 2
    width, height = Image.open(out).size
    assert height == 4 * (MIN_SIDE + GAP) + GAP
    assert width > 4 * (MIN_SIDE + GAP) + GAP + 40  # the names of the samplers


def test_no_picture_is_taken_twice(run, tmp_path):
    out = tmp_path / "restored.png"
    assert "n: given 400; there are 359 images" in refusal("samplers/inpaint.py", run, "--n", 400, "--out", out)


def test_restores_pictures_from_a_folder(run, tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        Image.new("L", (8, 8), 80 * i).save(tmp_path / "pictures" / f"{i}.png")
    out = tmp_path / "restored.png"
    options = ("--images", tmp_path / "pictures", "--hide", "box", "--methods", "dps", "--steps", 2)
    python("samplers/inpaint.py", run, *options, "--out", out)
    picture = Image.open(out)
    tile = MIN_SIDE + GAP
    assert picture.height == 3 * tile + GAP
    right = picture.width - tile // 2
    assert picture.getpixel((right, tile // 2)) == 160  # the last original; below it, what is hidden is grey
    assert picture.getpixel((right, tile + tile // 2)) in (127, 128)


@pytest.mark.slow
def test_sdedit(run, tmp_path):
    out = tmp_path / "variations.png"
    options = ("--strengths", 0.2, 0.9, "--label", 3, "--guidance", 2, "--steps", 4, "--n", 5, "--out", out)
    near, far = (float(d) for d in re.findall(r"originals ([\d.]+)", python("samplers/sdedit.py", run, *options)))
    assert near < far
    width, height = Image.open(out).size
    assert height == 3 * (MIN_SIDE + GAP) + GAP
    assert width > 5 * (MIN_SIDE + GAP) + GAP + 40  # the strengths


@pytest.mark.slow
def test_image_to_image(tmp_path):
    out = tmp_path / "translated.png"
    options = ("--task", "complete", "--steps", 2, "--n", 4, "--answers", 2, "--out", out)
    python("samplers/image_to_image.py", *options)
    width, height = Image.open(out).size
    assert height == 4 * (MIN_SIDE + GAP) + GAP
    assert width > 4 * (MIN_SIDE + GAP) + GAP + 40  # the names of the samplers


def test_editing_scripts_refuse_in_one_line(run, tmp_path):
    assert "factor: given 3" in refusal("samplers/super_resolve.py", run, "--factor", 3)
    assert "sigma_y: given -1" in refusal("samplers/inpaint.py", run, "--noise", -1)
    assert "width: given 0" in refusal("samplers/deblur.py", run, "--width", 0)
    assert "strength: given 2" in refusal("samplers/sdedit.py", run, "--strengths", 2)
    assert "needs pictures" in refusal("samplers/image_to_image.py", "--data", "moons")
    assert "given 10 x 0" in refusal("samplers/image_to_image.py", "--answers", 0)
    assert "n: given 0; there are " in refusal("samplers/sdedit.py", run, "--n", 0)
    Image.new("L", (5, 5)).save(tmp_path / "small.png")
    assert "the model draws (1, 8, 8)" in refusal("samplers/inpaint.py", run, "--images", tmp_path)
