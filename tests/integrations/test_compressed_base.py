"""A LoRA on frozen weights in fewer bits: it trains, resumes exactly, and is merged into the full weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genkit.backbones.compressed import PACKAGES, WeightFormat, compress, compressed_formats
from genkit.cli import main as cli
from genkit.training.checkpoint import find_checkpoint
from genkit.training.run import load_run
from genkit.training.train import train
from tests.support.pipelines import largest, our_picture

pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]
TRAINED = ("--lora.rank=4", "--lr=1e-3", "--steps=4", "--warmup=0", "--schedule=constant")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sd3", "flux-dev", "pixart", "sana", "sdxl"])
def test_bf16_and_int8_networks_are_near_the_full_one(run_of, name):
    """Relative error of the network's output."""
    run = load_run(run_of(name), device="cpu")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *run.spec.shape, generator=generator)
    t = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        full = run.nets["net"](x, t)
        kinds = ["bf16", *(["int8"] if has_package("int8") and name == "sd3" else [])]
        for kind in kinds:
            other = load_run(run_of(name), device="cpu")
            compress(other.nets, WeightFormat(kind) if kind == "bf16" else WeightFormat(quantize=kind))
            assert compressed_formats(other.nets) == [kind]
            out = other.nets["net"](x, t)
            assert out.dtype == torch.float32
            error = float((out - full).norm() / full.norm())
            assert 1e-5 < error <= 0.01, kind


def has_package(kind):
    import importlib.util

    return importlib.util.find_spec(PACKAGES[kind]) is not None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "int8", "nf4"])
def test_an_adapter_is_trained_on_a_compressed_base_and_merged_into_the_full_one(run_of, tmp_path, kind, capsys):
    option = "--base-dtype=bf16" if kind == "bf16" else f"--quantize={kind}"
    if kind in PACKAGES:
        pytest.importorskip(PACKAGES[kind])
    plain, run = run_of("sd3", *TRAINED), run_of("sd3", *TRAINED, option)
    stored = [load_file(find_checkpoint(r) / "nets.safetensors") for r in (plain, run)]
    assert stored[0].keys() == stored[1].keys(), "more than the adapter is stored"
    a, b = (torch.cat([v.flatten() for k, v in sorted(s.items()) if "lora_B" in k]) for s in stored)
    assert float(torch.cosine_similarity(a, b, 0)) > (0.7 if kind == "nf4" else 0.95)
    merged = load_run(run, device="cpu")
    assert compressed_formats(merged.nets) == [], "merged into the compressed weights"
    assert largest(our_picture(merged), our_picture(load_run(plain, device="cpu"))) < 0.02
    capsys.readouterr()
    assert cli.main(["info", str(run)]) == 0
    assert f"trained on frozen weights in {'bf16' if kind == 'bf16' else f'{kind} and fp32'}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_on_a_compressed_base_is_resumed_exactly(run_of, tmp_path):
    whole = run_of("sd3", *TRAINED, "--base-dtype=bf16", "--save-every=2")
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    resumed = train(resume=tmp_path / "run", step=2, progress=None)
    ours, theirs = (load_file(find_checkpoint(r) / "nets.safetensors") for r in (resumed.directory, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_options_without_an_adapter_are_refused(pipeline_folder, photos, tmp_path, capsys):
    args = ["train", f"--init=diffusers:{pipeline_folder('ddim')}", f"--data={photos}", f"--out={tmp_path}"]
    assert cli.main([*args, "--base-dtype=bf16"]) == 2
    assert "base_dtype: given bf16, which is for frozen weights under an adapter" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_in_several_files_are_read_and_their_checksum_is_of_all(pipeline_folder, photos, tmp_path, capsys):
    import diffusers

    folder = tmp_path / "p"
    shutil.copytree(pipeline_folder("ddim"), folder)
    net = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    net.save_pretrained(folder / "unet", max_shard_size="100KB")
    shards = sorted((folder / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    args = [f"--init=diffusers:{folder}", f"--data={photos}", "--data.size=16", f"--out={tmp_path}/runs", "--batch=2",
            "--steps=1", "--no-tensorboard", "--sample-every=0", "--workers=0", "--device=cpu"]  # fmt: skip
    assert cli.main(["train", *args, "--lora.rank=2"]) == 0
    run = tmp_path / "runs" / "latest"
    ours = load_run(run, device="cpu").nets["net"].model.state_dict()
    assert all(torch.allclose(ours[k], v, atol=1e-2) for k, v in net.state_dict().items())
    content = bytearray(shards[1].read_bytes())
    content[-1] ^= 1
    shards[1].write_bytes(content)
    capsys.readouterr()
    assert cli.main(["sample", str(run), "--n=1"]) == 2
    assert "has changed since" in capsys.readouterr().err
    shards[1].write_bytes(content[:-50])
    assert cli.main(["train", *args]) == 2
    assert "cannot be read" in capsys.readouterr().err


MEASURED = """
import sys, torch, diffusers, re
from pathlib import Path
from genkit.backbones import BACKBONES
from genkit.backbones.compressed import WeightFormat, compress
from genkit.backbones.diffusers import Diffusers, without_weights
from genkit.core import Spec
from genkit.integrations.diffusers_weights import init_defaults, init_from, open_model

folder, base = sys.argv[1:]
network = open_model(folder).network
settings = {k: v for k, v in open_model(folder).settings.items() if not k.startswith("_")}
family = Diffusers(network.from_config(settings))
spec = Spec((3, 16, 16))
torch.nn.Linear(8, 8)(torch.zeros(1, 8))  # whatever is loaded at first use

def status(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = status("VmRSS")
with without_weights():
    nets = {"net": family.denoiser(spec)}
compress(nets, WeightFormat(base))
init_from(nets, folder)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("base", "factor"), [("fp32", 1.05), ("bf16", 0.9)])
def test_importing_holds_the_weights_once(tmp_path, base, factor):
    """A copy more would add 1 to the factor; the constant is what the libraries take."""
    import diffusers

    net = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(256, 512), layers_per_block=2, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    net.save_pretrained(tmp_path)
    size = (tmp_path / "diffusion_pytorch_model.safetensors").stat().st_size
    assert size > 120e6
    out = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path), base], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert int(out.stdout) <= factor * size + 30e6, f"{int(out.stdout) / size:.2f} x the file"
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UNet2DModel"
