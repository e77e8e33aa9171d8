"""With dropout too, training does not depend on how a batch is cut."""

import pytest
import torch

from genkit.backbones.dropout import Dropout
from genkit.objectives import OBJECTIVES
from genkit.training.directory import read_log
from tests.support.runs import saved_tensors
from tests.training.test_train import in_process, some_pairs

STEPS = ["--steps=3", "--lr=1e-3", "--precision=fp32", "--log-every=1"]
TOGETHER = ("drift", "guidance-distillation")  # a loss between the samples of a batch; an adapter without dropout


def assert_close(a, b):
    a, b = saved_tensors(a), saved_tensors(b)
    assert a.keys() == b.keys()
    for key in a:
        if "nets.safetensors" in key:
            assert torch.allclose(a[key], b[key], atol=2e-5), (key, float((a[key] - b[key]).abs().max()))


ALONE = [name for name in OBJECTIVES if name not in TOGETHER]
DEFAULT = ("flow", "gan", "flow-map")  # the others are marked slow


@pytest.mark.parametrize("objective", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in ALONE])
def test_micro_batches_equal_one_batch_with_dropout(tmp_path, objective):
    paired = ["--data=pairs", f"--data.root={some_pairs(tmp_path)}", "--backbone=mlp"]
    anchored = ["--data=four-ways", "--data.n=8", "--data.anchors=4"]
    data = paired if OBJECTIVES[objective]().needs_pairs else anchored if objective == "anchored" else []
    if OBJECTIVES[objective].starts_from:  # it learns from another run
        data = ["--init", str(in_process(tmp_path / "base", "--steps=2"))]
    args = [f"--objective={objective}", "--backbone.dropout=0.3", *STEPS, *data]
    whole = in_process(tmp_path / "whole", *args)
    cut = in_process(tmp_path / "cut", *args, "--micro-batch=5")
    norms = [[v for k, v in read_log(run)[0].items() if k.endswith(("loss", "norm"))] for run in (whole, cut)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    if objective != "gan":  # AdamW enlarges the rounding of its gradient penalty
        assert_close(whole, cut)
    if objective == "flow":
        with pytest.raises(AssertionError):
            assert_close(whole, in_process(tmp_path / "bare", *args, "--backbone.dropout=0"))


UNET = ["--data=digits", "--backbone=unet", "--backbone.width=8", "--backbone.dropout=0.3"]
BACKBONES = {
    "unet": UNET,
    "checkpoint": [*UNET, "--backbone.checkpoint"],
    "dit": ["--data=digits", "--backbone=dit", "--backbone.width=32", "--backbone.depth=2", "--backbone.dropout=0.3"],
}


@pytest.mark.parametrize("name", BACKBONES)
def test_micro_batches_equal_one_batch_on_every_backbone(tmp_path, name):
    args = ["--batch=12", *STEPS, *BACKBONES[name]]
    assert_close(in_process(tmp_path / "whole", *args), in_process(tmp_path / "cut", *args, "--micro-batch=5"))
    if name == "checkpoint":
        plain = [a for a in args if a != "--backbone.checkpoint"]
        assert_close(in_process(tmp_path / "plain", *plain), tmp_path / "whole/runs/latest")


def test_adapters_drop_by_row(tmp_path):
    pytest.importorskip("peft")
    base = in_process(tmp_path / "base", "--steps=1")
    args = ["--init", str(base), "--lora.rank=2", "--lora.dropout=0.5", *STEPS, "--warmup=0"]
    assert_close(in_process(tmp_path / "whole", *args), in_process(tmp_path / "cut", *args, "--micro-batch=5"))


def test_every_step_batch_and_row_has_masks_of_its_own(tmp_path):
    keys = []

    def record(module, inputs, output):
        if isinstance(module, Dropout) and module.training and module.p:
            keys.append(module.keys.tolist())

    hook = torch.nn.modules.module.register_module_forward_hook(record)
    try:
        in_process(tmp_path, "--objective=gan", "--batch=8", "--backbone.dropout=0.3", *STEPS)
    finally:
        hook.remove()
    drawn = {tuple(row) for row in keys}
    assert len(drawn) == 6  # 3 steps, 2 phases
    assert len(set().union(*drawn)) == 48
