"""LoRA under reward: the adapter alone is trained and stored, the run that it adapts stays as it is."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft")

from genkit.backbones.lora import GuidanceLoRA
from genkit.cli.commands.finetune import main as finetune
from genkit.cli.commands.train import main as train
from genkit.rl.finetune.loop import finetune as improve
from genkit.training.checkpoint import find_checkpoint
from genkit.training.directory import find_run, read_log
from genkit.training.run import load_run
from tests.support.refusals import refuses

SMALL = ["--num-envs", "8", "--num-steps", "4", "--eval-episodes", "8", "--method.batch", "64", "--method.warmup", "1",
         "--method.lr", "1e-2", "--save-every", "2", "--no-tensorboard", "--device", "cpu"]  # fmt: skip
RANK, ALPHA = 2, 6.0


def checkpoint(out: Path) -> Path:
    return find_checkpoint(find_run(out / "latest"))


@pytest.fixture(scope="module")
def adapted(policy, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapted")
    finetune([str(policy), "--iterations", "4", "--lora.rank", str(RANK), "--lora.alpha", str(ALPHA), "--out", str(out),
              *SMALL])  # fmt: skip
    return out


def test_the_change_of_each_layer_is_the_product_of_the_adapter(policy, adapted):
    """W + (alpha / r) B A (Hu et al. 2022, eq. 3); all else is what it was, and is not stored again."""
    stored = load_file(checkpoint(adapted) / "ema-0.99.safetensors")
    assert stored
    assert all("lora_" in k for k in stored)
    before, after = (dict(load_run(run).nets["net"].named_parameters()) for run in (policy, adapted / "latest"))
    assert before.keys() == after.keys()
    changed = []
    for key, weight in after.items():
        layer = f"net.{key.removesuffix('.weight')}"
        if f"{layer}.lora_A.default.weight" in stored:
            b, a = stored[f"{layer}.lora_B.default.weight"], stored[f"{layer}.lora_A.default.weight"]
            assert a.shape[0] == RANK
            torch.testing.assert_close(weight, before[key] + ALPHA / RANK * b @ a)
            changed.append(not torch.equal(weight, before[key]))
        else:
            assert torch.equal(weight, before[key]), key
    assert len(changed) > 2
    assert all(changed)
    log = [r for r in read_log(find_run(adapted / "latest")) if "kl_reference" in r]
    assert log[0]["kl_reference"] == log[1]["kl_reference"] == 0 < log[-1]["kl_reference"]


@pytest.mark.parametrize("adapter", [["--lora.rank", "2"], []])
def test_it_resumes_as_if_it_had_not_stopped_although_its_base_went_on_and_moved(tmp_path, adapter):
    base = tmp_path / "base"
    tiny = "--data=four-ways --data.n 20 --objective.prediction x0 --backbone.width 16 --backbone.depth 1 --batch 16"
    usual = "--sample-every 0 --no-tensorboard --device cpu --precision fp32 --workers 0"
    train([*tiny.split(), *usual.split(), "--steps", "4", "--out", str(base)])
    parts = {}
    for name, iterations in (("whole", 4), ("part", 2)):
        parts[name] = tmp_path / name
        finetune([str(base / "latest"), "--iterations", str(iterations), *adapter, "--out", str(parts[name]), *SMALL])
    train(["--resume", str(base / "latest"), "--steps", "6"])
    moved = find_run(base / "latest").rename(tmp_path / "moved")
    finetune([str(moved), "--resume", str(parts["part"] / "latest"), "--iterations", "4"])
    kl = [[r["kl_reference"] for r in read_log(find_run(parts[k] / "latest")) if "kl_reference" in r] for k in parts]
    assert kl[0] == kl[1]
    for file in ("nets.safetensors", "ema-0.99.safetensors", "optim.safetensors", "finetune.safetensors"):
        a, b = (load_file(checkpoint(parts[k]) / file) for k in ("whole", "part"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), file


def test_only_the_layers_that_are_named_are_adapted(moons, tmp_path):
    settings = {"reward": "tests.rl.test_finetune:first_number", "samples": 32, "iterations": 1, "eval_samples": 0,
                "device": "cpu", "out": str(tmp_path)}  # fmt: skip
    run = improve(moons, **settings, lora={"rank": 1, "layers": "last"}, method={"name": "ddpo", "lr": 0.1})
    old = load_run(moons)
    names = [k for k, p in run.nets["net"].named_parameters() if not torch.equal(p, old.nets["net"].get_parameter(k))]
    assert names
    assert all("last" in name for name in names)
    refuses(lambda: improve(moons, **settings, lora={"rank": 1, "layers": "nowhere"}), "no layer has a name", "nowhere")


def test_adapters_that_mean_nothing_here_are_refused(moons, tmp_path):
    settings = {"reward": "tests.rl.test_finetune:first_number", "device": "cpu", "out": str(tmp_path)}
    refuses(lambda: improve(moons, **settings, lora={"rank": 2, "dropout": 0.1}), "lora.dropout: given 0.1")
    refuses(lambda: improve(moons, **settings, lora={"name": "guidance", "rank": 2}), "no adapter of guidance")
    run = load_run(moons)
    next(run.nets["net"].parameters()).add_(1.0)
    refuses(lambda: improve(run, **settings, lora={"rank": 2}), "is not what", "export it")
    assert GuidanceLoRA(rank=2).active
