"""``--init diffusers:P+FILE``: a pipeline with other weights of its network, or with a LoRA."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from genkit.cli import main as cli
from genkit.training.run import load_run
from tests.support.pipelines import CAPTIONS, QUICK, largest, our_picture, their_picture

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def lora_file(pipeline_folder, tmp_path_factory):
    """A LoRA of Stable Diffusion, rank 4, that moves the picture, in diffusers' layout."""
    stored = load_file(pipeline_folder("sd") / "unet" / "diffusion_pytorch_model.safetensors")
    torch.manual_seed(5)
    tensors = {}
    for name, weight in stored.items():
        if name.endswith(("to_q.weight", "to_v.weight")):
            layer = name.removesuffix(".weight")
            tensors[f"unet.{layer}.lora_A.weight"] = 0.15 * torch.randn(4, weight.shape[1])
            tensors[f"unet.{layer}.lora_B.weight"] = 0.15 * torch.randn(weight.shape[0], 4)
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    save_file(tensors, file, {"format": "pt"})
    return file


def start(folder, file, photos, out, *more):
    return cli.main(["train", f"--init=diffusers:{folder}+{file}", f"--data={photos}", "--data.size=16",
                     f"--out={out}", *QUICK, CAPTIONS, *more])  # fmt: skip


@pytest.mark.slow
def test_a_lora_is_added_to_the_weights_of_the_pipeline(pipeline_folder, photos, tmp_path, lora_file, capsys):
    folder = pipeline_folder("sd")
    theirs = their_picture(folder, lora=lora_file)
    assert largest(theirs, their_picture(folder)) > 0.02
    more = ("--lora.rank=2", "--base-dtype=bf16")
    assert start(folder, lora_file, photos, tmp_path / "runs", *more) == 0
    run = tmp_path / "runs" / "latest"
    assert largest(our_picture(load_run(run, device="cpu")), theirs) < 1e-5
    content = load_file(lora_file)
    moved = tmp_path / "moved.safetensors"
    save_file({k: 2 * v for k, v in content.items()}, moved, {"format": "pt"})
    record = run / "base.json"
    record.write_text(record.read_text().replace(f'"adapter": "{lora_file}"', f'"adapter": "{moved}"'))
    capsys.readouterr()
    assert cli.main(["sample", str(run), "--n=1", "--prompt=a"]) == 2
    assert "began with the LoRA" in capsys.readouterr().err


def test_a_single_file_replaces_the_weights_of_the_network(pipeline_folder, photos, tmp_path):
    """Those of another pipeline of the same family, in float16."""
    source = pipeline_folder("sd") / "unet" / "diffusion_pytorch_model.safetensors"
    torch.manual_seed(1)
    stored = {k: (v + 0.02 * torch.randn_like(v)).half() for k, v in load_file(source).items()}
    save_file(stored, tmp_path / "unet.safetensors", {"format": "pt"})
    assert start(pipeline_folder("sd"), tmp_path / "unet.safetensors", photos, tmp_path / "runs") == 0
    run = load_run(tmp_path / "runs" / "latest", device="cpu")
    assert run.pipeline is not None
    ours = run.nets["net"].model.state_dict()
    assert all(torch.allclose(ours[k], v.float(), atol=1e-6) for k, v in stored.items())


def test_files_that_do_not_fit_are_refused_in_one_line(pipeline_folder, photos, tmp_path, lora_file, capsys):
    sd, other = pipeline_folder("sd"), pipeline_folder("dit")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(lora_file.read_bytes()[:-20])
    foreign = tmp_path / "foreign.safetensors"
    save_file({"model.diffusion_model.out.weight": torch.zeros(2)}, foreign)
    for folder, file, words in (
        (sd, cut, "cannot be read"),
        (sd, tmp_path / "none.safetensors", "there is no file"),
        (sd, other / "transformer" / "diffusion_pytorch_model.safetensors", "does not fit, first at"),
        (sd, foreign, "by from_single_file of diffusers"),
        (pipeline_folder("sd3"), lora_file, "has no change of transformer, only of unet"),
    ):
        capsys.readouterr()
        assert start(folder, file, photos, tmp_path / "runs") == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
