"""Runs that began from a pipeline, written as one: diffusers draws the picture of the run, and so does a run of it."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.cli import main as cli
from genkit.training.run import load_run
from tests.support.pipelines import QUICK, largest, our_picture, their_picture

GUIDANCE = {"flux-dev": 3.5}
FAMILIES = ("sd", "sd-v", "sdxl", "sd3", "flux-dev", "pixart", "sana")
SIZE = {"sana": 32}
MOVED = ("--lr=0.02", "--steps=6")


@pytest.fixture(scope="module")
def exported(run_of, tmp_path_factory):
    """A trained run of a pipeline, and the folder that it was exported to."""
    made = {}

    def make(name):
        if name not in made:
            run, out = run_of(name, *MOVED), tmp_path_factory.mktemp("exported") / name
            assert cli.main(["export", str(run), "--to", "diffusers", str(out)]) == 0
            made[name] = run, out
        return made[name]

    return make


def text_files(folder):
    """The files of the text encoders and tokenizers, by name."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.parent.name.startswith(("text_encoder", "tokenizer"))]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_exported_pipeline_draws_the_picture_of_the_run(pipeline_folder, exported, name):
    run, out = exported(name)
    guidance, size = GUIDANCE.get(name, 5.0), SIZE.get(name, 16)
    ours = our_picture(load_run(run, device="cpu"), guidance=guidance)
    before = their_picture(pipeline_folder(name), guidance, height=size, width=size)
    after = their_picture(out, guidance, height=size, width=size)
    assert largest(ours, after) < 1e-5
    assert largest(before, after) > 5e-3, "training did not move the picture"
    assert text_files(out) == text_files(pipeline_folder(name))
    assert len(text_files(out)) > 2


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_run_that_begins_from_the_exported_pipeline_draws_the_same(exported, photos, tmp_path, name):
    run, out = exported(name)
    args = [f"--init=diffusers:{out}", f"--data={photos}", "--data.size=16", "--data.captions=files", *QUICK]
    assert cli.main(["train", *args, f"--out={tmp_path}"]) == 0
    again = load_run(tmp_path / "latest", device="cpu")
    assert largest(our_picture(again), our_picture(load_run(run, device="cpu"))) < 1e-5


def class_pictures(folder, classes):
    """One picture a class."""
    for i in range(classes):
        (folder / f"{i:03}").mkdir(parents=True)
        Image.fromarray(np.full((16, 16, 3), i % 256, dtype=np.uint8)).save(folder / f"{i:03}" / "0.png")
    return folder


@pytest.mark.slow  # a thousand files
def test_a_pipeline_of_classes(pipeline_folder, tmp_path):
    """DiT, whose run keeps the pipeline's table of classes; with other classes it is no such pipeline."""
    base, labels = pipeline_folder("dit"), [3, 77]
    for classes in (1000, 10):
        data, out = class_pictures(tmp_path / f"data{classes}", classes), tmp_path / f"{classes}"
        args = [f"--init=diffusers:{base}", f"--data={data}", f"--out={tmp_path}/runs{classes}", *QUICK, *MOVED]
        assert cli.main(["train", *args]) == 0
        run = tmp_path / f"runs{classes}" / "latest"
        assert cli.main(["export", str(run), str(out)]) == (0 if classes == 1000 else 2)
    ours = our_picture(load_run(tmp_path / "runs1000" / "latest", device="cpu"), cond={"label": torch.tensor(labels)})
    theirs = their_picture(tmp_path / "1000", class_labels=labels)
    assert largest(ours, theirs) < 1e-5
    assert largest(their_picture(base, class_labels=labels), theirs) > 5e-3


def test_an_adapter_is_merged(pipeline_folder, run_of, tmp_path):
    pytest.importorskip("peft")
    run = run_of("sd", "--lora.rank=4", "--lr=0.05", "--steps=6")
    assert cli.main(["export", str(run), "--to", "diffusers", str(tmp_path / "out")]) == 0
    theirs = their_picture(tmp_path / "out")
    assert largest(our_picture(load_run(run, device="cpu")), theirs) < 1e-5
    assert largest(their_picture(pipeline_folder("sd")), theirs) > 5e-3


def test_a_pipeline_that_moved_is_named_by_base(pipeline_folder, run_of, photos, tmp_path, capsys):
    base = shutil.copytree(pipeline_folder("sd"), tmp_path / "base")
    args = [f"--init=diffusers:{base}", f"--data={photos}", "--data.size=16", "--data.captions=files", *QUICK]
    assert cli.main(["train", *args, f"--out={tmp_path / 'runs'}"]) == 0
    base.rename(tmp_path / "moved")
    run, out = str(tmp_path / "runs" / "latest"), str(tmp_path / "out")
    capsys.readouterr()
    assert cli.main(["export", run, "--to", "diffusers", out]) == 2
    assert f"to.base: there is no folder {base}" in capsys.readouterr().err
    assert cli.main(["export", run, "--to", "diffusers", out, "--to.base", str(tmp_path / "moved")]) == 0
    assert largest(their_picture(tmp_path / "out"), their_picture(pipeline_folder("sd"))) < 1e-5
    assert cli.main(["export", run, "--to", "diffusers", f"{out}-parts", "--to.base", "none"]) == 0
    assert sorted(p.name for p in (tmp_path / "out-parts").iterdir()) == ["README.md", "scheduler", "unet"]


def swap_encoder(base):
    (base / "tokenizer" / "tokenizer_config.json").write_text("{}")


def swap_scheduler(base):
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"steps_offset": 0}))


def remove_index(base):
    (base / "model_index.json").unlink()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("sd", swap_encoder, "the text encoders in"),
        ("sd", swap_scheduler, "is not that of the run; give the pipeline that the run began from"),
        ("sd", remove_index, "holds no model_index.json"),
        ("sd3", lambda base: None, "is a SD3Transformer2DModel, the run's a UNet2DConditionModel"),
    ],
)
def test_another_pipeline_is_refused_and_nothing_is_written(
    pipeline_folder, exported, tmp_path, name, change, words, capsys
):
    base = shutil.copytree(pipeline_folder(name), tmp_path / "base")
    change(base)
    capsys.readouterr()
    assert cli.main(["export", str(exported("sd")[0]), str(tmp_path / "out"), "--to.base", str(base)]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_run_that_means_something_else_is_no_such_pipeline(run_of, photos, tmp_path, capsys):
    v_net = run_of("sd", "--objective.prediction=v")
    vae = ["--objective=vae", "--objective.latent", "4", "8", "8", "--backbone.width=8", f"--data={photos}"]
    assert cli.main(["train", *vae, "--data.size=16", f"--out={tmp_path / 'vae'}", *QUICK]) == 0
    own_stage = run_of("sd", f"--codec={(tmp_path / 'vae' / 'latest').resolve()}")
    for run, words in (
        (v_net, "the run predicts v, its pipeline expects eps"),
        (own_stage, "another first stage than"),
    ):
        capsys.readouterr()
        assert cli.main(["export", str(run), str(tmp_path / "out")]) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
