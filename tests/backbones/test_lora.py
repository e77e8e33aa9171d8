"""LoRA: the change against its formula, what is trained and saved, resuming, merging, bases that are gone."""

import copy
import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genkit.backbones import Diffusers, DiT, UNet
from genkit.backbones.diffusers import UNet2D
from genkit.backbones.lora import LoRA, adapt, merge
from genkit.cli import main as cli
from genkit.core import Label, Spec
from genkit.core.links import set_link
from genkit.core.tensors import sha256, to_tensors
from genkit.diffusion.samplers import Seeds
from genkit.training.loop import copy_for_ema
from genkit.training.run import load_run, open_reference
from genkit.training.sampling import Sampling

pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]
SPEC, N = Spec((1, 8, 8), {"label": Label(10)}), 3
FAMILIES = {
    "unet": UNet(width=8, mults=(1, 2), attention=(4,), head_size=8),
    "dit": DiT(width=16, depth=1, head_size=8),
    "diffusers": Diffusers(model=UNet2D(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=8)),
}


def networks(family):
    net = FAMILIES[family].denoiser(SPEC)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return {"net": net.eval()}


def asked(nets):
    torch.manual_seed(1)
    x, t = torch.randn(N, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    return nets["net"](x, t, {"label": torch.tensor([1, 5, 9])})


def changed(nets):
    """The adapter moved away from no change."""
    with torch.no_grad():
        for p in nets["net"].parameters():
            p.add_(0.1 * torch.randn_like(p))
    return nets


# ---------------------------------------------------------------------------------------------------------- the change
@pytest.mark.parametrize("layers", [None, "."])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_changes_nothing_at_first_and_alone_is_trained_and_saved(family, layers):
    nets = networks(family)
    before, base = asked(nets), {k: v.clone() for k, v in nets["net"].state_dict().items()}
    adapt(nets, LoRA(rank=2, layers=layers))
    assert torch.equal(asked(nets), before)
    names = [k for k, _ in nets["net"].named_parameters()]
    assert names
    assert all("lora_" in k for k in names)
    assert list(nets["net"].state_dict()) == names
    assert not torch.allclose(asked(changed(nets)), before, atol=1e-2)
    held = {k.replace(".base_layer", ""): b for k, b in nets["net"].named_buffers()}
    assert all(torch.equal(held[k], v) for k, v in base.items()), "the base was moved"
    asked(nets).sum().backward()
    assert all(p.grad is not None for p in nets["net"].parameters()), "DistributedDataParallel needs all of them"


def test_the_change_is_that_of_the_paper():
    """Hu et al. 2022, eq. 3: h = W x + (alpha / r) B A x, by hand on one layer; ``strength`` multiplies it."""
    layer = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Linear(4, 3))
    x, how = torch.randn(7, 5), LoRA(rank=2, alpha=6.0, layers=r"\.0$")
    nets = {"net": copy.deepcopy(layer)}
    adapt(nets, how)
    stored = to_tensors(changed(nets))
    assert set(stored) == {"net.0.lora_A.default.weight", "net.0.lora_B.default.weight"}
    a, b = (stored[f"net.0.lora_{k}.default.weight"] for k in "AB")
    wanted = layer[1](layer[0](x) + 3.0 * x @ a.T @ b.T)
    assert torch.allclose(nets["net"](x), wanted, atol=1e-6)
    for strength in (1.0, 0.5, 0.0):
        whole = {"net": copy.deepcopy(layer)}
        merge(whole, how, stored, Path("there"), strength)
        wanted = layer[1](layer[0](x) + strength * 3.0 * x @ a.T @ b.T)
        assert torch.allclose(whole["net"](x), wanted, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_merged_is_a_network_as_before(family):
    """The same names in the same order, all of them parameters; the same answers as with the adapter beside it."""
    nets = networks(family)
    whole, how = copy.deepcopy(nets), LoRA(rank=2, layers=".")
    names = [k for k, _ in nets["net"].named_parameters()]
    adapt(nets, how)
    merge(whole, how, to_tensors(changed(nets)), Path("there"))
    assert [k for k, _ in whole["net"].named_parameters()] == names
    assert torch.allclose(asked(whole), asked(nets), atol=2e-5)


def test_averages_share_the_base_and_not_the_change():
    nets = networks("unet")
    adapt(nets, LoRA(rank=2))
    other = copy_for_ema(nets["net"])
    mine = dict(nets["net"].named_buffers())
    assert all(b is mine[k] for k, b in other.named_buffers() if k in mine and "base_layer" in k)
    assert not any(p is q for p, q in zip(other.parameters(), nets["net"].parameters(), strict=True))
    assert set(nets["net"]._ddp_params_and_buffers_to_ignore) <= set(mine)
    assert any("base_layer" in k for k in nets["net"]._ddp_params_and_buffers_to_ignore)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (lambda: LoRA(rank=0), "rank: given 0"),
        (lambda: LoRA(alpha=2.0), "alpha: has no effect without a rank"),
        (lambda: LoRA(rank=1, layers="("), "no regular expression"),
        (lambda: adapt(networks("unet"), LoRA(rank=1, layers="nowhere")), "no layer has a name with 'nowhere' in it"),
    ],
)
def test_settings_that_make_no_sense_are_refused(how, words):
    with pytest.raises(ValueError, match=words) as refused:
        how()
    assert "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------------------------------ the runs
QUICK = ["--batch=8", "--sample-every=0", "--workers=0", "--no-tensorboard", "--device=cpu", "--precision=fp32"]
NET = ["--backbone.width=8", "--backbone.mults", "1", "2"]
TUNED = ["--lora.rank=2", "--lora.dropout=0.1", "--lr=1e-2", "--steps=4", "--warmup=0"]


def train(folder, *args):
    assert cli.main(["train", *QUICK, f"--out={folder}", *args]) == 0
    return (folder / "latest").resolve()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return train(tmp_path_factory.mktemp("base"), "--objective=ddpm", "--lr=1e-2", "--steps=3", *NET)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, base):
    """A LoRA that says nothing of objective or backbone: those of its base."""
    return train(tmp_path_factory.mktemp("tuned"), f"--init={base}", *TUNED)


def drawn(run, **how):
    """Of two seeds, before they are pixels: those of a network that is hardly trained are black and white."""
    loaded, noise = load_run(run, **how), Seeds(range(2))
    with torch.no_grad():
        return loaded.generator(Sampling(steps=3, clip=False))(noise((1, 8, 8)), {"label": torch.tensor([3, 7])}, noise)


def weights(run, **how):
    return {k: v for k, v in load_run(run, **how).nets["net"].state_dict().items()}


def test_a_run_holds_the_change_alone_and_remembers_its_base(base, tuned):
    file = "ema-0.999.safetensors"
    small, whole = ((run / "latest" / file).stat().st_size for run in (tuned, base))
    assert small < whole / 4
    for name in ("nets.safetensors", file, "optim.safetensors"):
        assert all("lora_" in k for k in load_file(tuned / "latest" / name)), name
    said = json.loads((tuned / "base.json").read_text())
    assert said == {"run": str(base), "weights": f"checkpoints/step-0000003/{file}",
                    "sha256": sha256(base / "latest" / file)}  # fmt: skip
    run, old = load_run(tuned), load_run(base)
    assert (run.config.objective, run.config.backbone) == (old.config.objective, old.config.backbone)


def test_sampling_takes_base_and_change_and_how_much_of_it(base, tuned):
    assert torch.equal(drawn(tuned, adapter_scale=0.0), drawn(base))
    assert not torch.equal(drawn(tuned), drawn(base))
    assert torch.equal(drawn(base, adapter=tuned), drawn(tuned))
    none, half, whole = (weights(tuned, adapter_scale=s) for s in (0.0, 0.5, 1.0))
    assert any(not torch.equal(none[k], whole[k]) for k in none)
    assert all(torch.allclose(half[k], (none[k] + whole[k]) / 2, atol=1e-6) for k in none)
    twice = weights(tuned, adapter=tuned)
    assert all(torch.allclose(twice[k], 2 * whole[k] - none[k], atol=1e-5) for k in none)


def test_another_step_of_a_run_is_opened_with_the_same_adapter(base, tuned):
    """Guidance away from a model without the adapter would be guidance towards what the adapter has changed."""
    untouched = load_run(base).nets["net"].state_dict()
    for opened in (load_run(base, adapter=tuned, adapter_scale=0.5), load_run(tuned, adapter_scale=0.5)):
        own, weak = (r.nets["net"].state_dict() for r in (opened, open_reference(opened, f"step:{opened.step}")))
        assert any(not torch.equal(own[k], untouched[k]) for k in untouched)
        assert all(torch.equal(own[k], weak[k]) for k in untouched)


def test_the_command_draws_with_a_change_into_a_file_of_its_own(base, tuned, tmp_path, capsys):
    for args in ((), ("--lora", str(tuned)), ("--lora", str(tuned), "--lora-scale=0.5")):
        assert cli.main(["sample", str(base), "--n=2", "--steps=2", "--device=cpu", *args]) == 0
    files = {line for line in capsys.readouterr().out.split() if line.endswith(".png")}
    assert len(files) == 3


def test_a_resumed_run_is_bit_identical(tmp_path, base):
    whole = train(tmp_path / "a", f"--init={base}", *TUNED)
    cut = train(tmp_path / "b", f"--init={base}", *TUNED, "--save-every=2")
    set_link(cut / "latest", "checkpoints/step-0000002")
    os.rename(cut / "checkpoints/step-0000004", cut / "gone")
    assert cli.main(["train", "--resume", str(cut)]) == 0
    for file in ("nets", "ema-0.999", "optim"):
        a, b = (load_file(run / "latest" / f"{file}.safetensors") for run in (whole, cut))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), file


def test_a_change_of_a_changed_run(tmp_path, tuned):
    second = train(tmp_path, f"--init={tuned}", *TUNED)
    assert torch.equal(drawn(second, adapter_scale=0.0), drawn(tuned))
    assert not torch.equal(drawn(second), drawn(tuned))


def test_exported_it_needs_neither_base_nor_peft(tmp_path, tuned):
    out = tmp_path / "out"
    assert cli.main(["export", str(tuned), str(out), "--to=run"]) == 0
    assert not load_run(out).config.lora.active
    assert torch.equal(drawn(out), drawn(tuned))


def test_a_base_may_move_along_but_not_change_or_go(tmp_path, base, tuned):
    """Found by sha256 where it was, or beside the run; a resumed base, whose old weights are deleted, is said."""
    here = tmp_path / "runs"
    shutil.copytree(tuned, here / tuned.name, symlinks=True)
    shutil.copytree(base, here / f"x{base.name}", symlinks=True)
    about = json.loads((here / tuned.name / "base.json").read_text())
    gone = str(tmp_path / "gone" / f"x{base.name}")
    (here / tuned.name / "base.json").write_text(json.dumps({**about, "run": gone}))
    assert torch.equal(drawn(here / tuned.name), drawn(tuned))
    file = here / f"x{base.name}" / about["weights"]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"began from .* which has changed since"):
        load_run(here / tuned.name)
    file.unlink()
    with pytest.raises(ValueError, match="is not there any more; put it back"):
        load_run(here / tuned.name)
    (here / tuned.name / "base.json").unlink()
    with pytest.raises(ValueError, match=r"has no base\.json"):
        load_run(here / tuned.name)


def test_what_makes_no_sense_is_one_line(tmp_path, base, tuned, capsys):
    other = train(tmp_path / "other", "--objective=ddpm", "--steps=1", "--backbone=dit", "--backbone.width=8",
                  "--backbone.depth=1")  # fmt: skip
    sample = ["sample", "--n=1", "--device=cpu"]
    init = ["train", *QUICK, f"--out={tmp_path}/none", "--lora.rank=2"]
    capsys.readouterr()
    for argv, words in (
        ([*init], "name it with --init RUN"),
        ([*init, f"--init={base}", "--lora.rank=0"], "--lora.rank: given 0"),
        ([*init, f"--init={base}", "--lora.layers=nowhere"], "no layer has a name with 'nowhere'"),
        ([*init, f"--init={base}", "--backbone.width=16"], "does not fit, first at net."),
        ([*sample, str(other), "--lora", str(tuned)], "changes other layers than this model has, first at net."),
        ([*sample, str(base), "--lora", str(base)], "which is no LoRA run"),
        ([*sample, str(base), "--lora-scale=2"], "is no LoRA run; name one with --lora RUN"),
    ):
        assert cli.main(argv) == 2, argv
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_an_adapter_learns_digits_that_its_base_has_never_seen(tmp_path):
    """examples/05_lora_digits.py, with fewer steps: how many samples of the digits 5 to 9 a classifier recognises."""
    spec = importlib.util.spec_from_file_location("lora_digits", ROOT / "examples/05_lora_digits.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.write_data(tmp_path, 100)
    base, _ = example.train(tmp_path / "known", tmp_path / "base", 800)
    settings = {"init": str(base.directory), **example.METHODS["adapter, rank 8"]}
    adapter, _ = example.train(tmp_path / "few", tmp_path / "adapter", 400, **settings)
    before, after = (example.measure(run, tmp_path / "new", 0) for run in (base, adapter))
    assert before["accuracy"]["value"] < 0.45
    assert after["accuracy"]["value"] > 0.85
    assert after["fd (classifier)"]["value"] < before["fd (classifier)"]["value"] / 3
    assert after["trained_parameters"] < before["trained_parameters"] / 10
