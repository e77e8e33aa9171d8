"""LoRA files out and in: diffusers' own pipeline with the file draws the picture of the run, and the reverse."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from genkit.cli import main as cli
from genkit.core.tensors import sha256
from genkit.integrations.export import export
from genkit.training.checkpoint import find_checkpoint
from genkit.training.run import load_run
from tests.support.pipelines import largest, our_picture, their_picture

pytest.importorskip("peft")
GUIDANCE = {"flux-dev": 3.5}
SIDES = {"lumina2": 64}  # whose pipeline assumes an autoencoder by 8
FAMILIES = ("sd", "sdxl", "sd3", "flux-dev")
ADAPTER = ("--lora.rank=4", "--lora.alpha=6", "--lora.layers=to_(q|k|v|out)|proj_in|proj_out|conv1")


@pytest.fixture(scope="module")
def lora_run(run_of):
    """A LoRA run of a pipeline whose adapter is far from no change."""
    made = {}

    def make(name):
        if name in made:
            return made[name]
        made[name] = run = run_of(name, *ADAPTER)
        step = find_checkpoint(run)
        record = json.loads((step / "state.json").read_text())
        torch.manual_seed(5)
        for file in ("nets.safetensors", "ema-0.999.safetensors"):
            stored = {k: 0.15 * torch.randn_like(v) for k, v in load_file(step / file).items()}
            save_file(stored, step / file)
            record["sha256"][file] = sha256(step / file)
        (step / "state.json").write_text(json.dumps(record))
        return run

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_has_the_adapter_alone(lora_run, name):
    stored = load_file(find_checkpoint(lora_run(name)) / "nets.safetensors")
    assert stored
    assert all(".lora_A." in key or ".lora_B." in key for key in stored)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, "diffusers") for name in FAMILIES),
        *(pytest.param(name, "diffusers", marks=pytest.mark.slow) for name in ("chroma", "auraflow", "lumina2")),
        ("sd", "kohya"),
        ("sdxl", "kohya"),
    ],
)
def test_a_lora_goes_out_and_comes_in(pipeline_folder, run_of, lora_run, tmp_path, name, layout):
    guidance, file = GUIDANCE.get(name, 5.0), tmp_path / "adapter.safetensors"
    base = our_picture(load_run(run_of(name), device="cpu"), guidance=guidance)
    ours = our_picture(load_run(lora_run(name), device="cpu"), guidance=guidance)
    assert cli.main(["export", str(lora_run(name)), "--to", "lora", str(file), "--to.layout", layout]) == 0
    theirs = their_picture(
        pipeline_folder(name), guidance, lora=file, **dict.fromkeys(("height", "width"), SIDES.get(name, 16))
    )
    assert largest(ours, theirs) < 1e-5
    assert largest(ours, base) > 0.1, "the adapter changes nothing"
    back = load_run(run_of(name), device="cpu", adapter=file)
    assert largest(our_picture(back, guidance=guidance), theirs) < 1e-5
    half = load_run(run_of(name), device="cpu", adapter=file, adapter_scale=0.5)
    assert largest(our_picture(half, guidance=guidance), theirs) > 5e-3


def test_alpha_of_a_file_is_read(pipeline_folder, run_of, lora_run, tmp_path):
    """Of kohya's layout, beside each layer: alpha 2 at rank 4 is half the change."""
    file = tmp_path / "adapter.safetensors"
    assert cli.main(["export", str(lora_run("sd")), "--to", "lora", str(file), "--to.layout", "kohya"]) == 0
    stored = load_file(file)
    assert {float(v) for k, v in stored.items() if k.endswith(".alpha")} == {4.0}
    save_file({k: v / 2 if k.endswith(".alpha") else v for k, v in stored.items()}, file, metadata={"format": "pt"})
    half = our_picture(load_run(run_of("sd"), device="cpu", adapter=file))
    assert largest(half, their_picture(pipeline_folder("sd"), lora=file)) < 1e-5


def test_a_folder_holds_the_file_of_diffusers(pipeline_folder, lora_run, tmp_path, capsys):
    assert cli.main(["export", str(lora_run("sd")), "--to", "lora", str(tmp_path / "out")]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["pytorch_lora_weights.safetensors"]
    ours = our_picture(load_run(lora_run("sd"), device="cpu"))
    assert largest(ours, their_picture(pipeline_folder("sd"), lora=tmp_path / "out")) < 1e-5


def test_changes_of_the_text_encoder_are_named(run_of, lora_run, tmp_path, caplog):
    file = tmp_path / "adapter.safetensors"
    assert cli.main(["export", str(lora_run("sd")), "--to", "lora", str(file)]) == 0
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    words = {f"{layer}.lora_A.weight": torch.ones(4, 32), f"{layer}.lora_B.weight": torch.ones(32, 4)}
    save_file({**load_file(file), **words}, file, metadata={"format": "pt"})
    with caplog.at_level("INFO", "genkit"):
        load_run(run_of("sd"), device="cpu", adapter=file)
    assert "also changes text_encoder, which genkit leaves as it is" in caplog.text


def test_files_that_do_not_fit_are_refused(run_of, lora_run, tmp_path, capsys):
    file = tmp_path / "adapter.safetensors"
    run = str(run_of("sd"))  # made here, not under the eyes of capsys
    assert cli.main(["export", str(lora_run("sdxl")), "--to", "lora", str(file)]) == 0
    capsys.readouterr()

    def refused(*args):
        assert cli.main(["sample", run, "--prompt=red", "--n=1", "--device=cpu", *args]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "does not fit this network" in refused(f"--lora={file}")
    file.write_bytes(file.read_bytes()[:-9])
    assert "does not fit this network" in refused(f"--lora={file}")
    assert "there is no file" in refused(f"--lora={tmp_path}/absent.safetensors")
    assert cli.main(["export", run, "--to", "lora", f"{tmp_path}/x.safetensors"]) == 2
    assert "is no LoRA run" in capsys.readouterr().err
    kohya = ["--to", "lora", f"{tmp_path}/x.safetensors", "--to.layout=kohya"]
    assert cli.main(["export", str(lora_run("sd3")), *kohya]) == 2
    assert "kohya's names are for a U-Net" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


def test_the_file_has_the_scale_that_was_asked_for_and_no_other_adapter(lora_run, tmp_path):
    run = lora_run("sd")
    parts = {}
    for scale in (1.0, 0.5):
        file = tmp_path / f"{scale}.safetensors"
        assert cli.main(["export", str(run), str(file), "--to", "lora", "--lora-scale", str(scale)]) == 0
        parts[scale] = load_file(file)
    for key, value in parts[1.0].items():
        torch.testing.assert_close(parts[0.5][key], value * (0.5 if ".lora_B." in key else 1.0))
    with pytest.raises(ValueError, match=r"writes the adapter of .* alone"):
        export(run, tmp_path / "further", to="lora", lora=str(tmp_path / "1.0.safetensors"))
