"""diffusers: its networks as denoisers, its folders as initial weights, runs as its pipelines, each against itself."""

import json
import re
import subprocess
import sys

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from genkit.backbones import Diffusers
from genkit.backbones.diffusers import DiT2D, UNet2D, UNet2DCondition, timestep_index
from genkit.cli import main as cli
from genkit.core import Image, Label, Spec, Text, Tokens, Vector
from genkit.core.tensors import sha256
from genkit.diffusion.guidance import clamp
from genkit.diffusion.paths import VP
from genkit.diffusion.samplers import Seeds, bind, ddim, linspace, trailing, uniform
from genkit.integrations.diffusers_weights import init_defaults, init_note, remap_time_embedding
from genkit.integrations.export import export
from genkit.objectives import DDPM, Flow
from genkit.training.checkpoint import find_checkpoint
from genkit.training.run import init_from, load_run
from genkit.training.sampling import clips_by_default

SMALL = {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8}
UNET, DIT = UNet2D(**SMALL), DiT2D(num_layers=2, num_attention_heads=2, attention_head_dim=8)
CROSS = UNet2DCondition(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=2, cross_attention_dim=6)
WEIGHTS = "diffusion_pytorch_model.safetensors"
LABEL = {"label": Label(10)}
PICTURES = Spec((1, 8, 8), LABEL)
N = 3


@pytest.fixture
def x():
    return torch.randn(N, 1, 8, 8)


def shaken(net):
    """Move all weights, because many of them start at zero."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval().requires_grad_(False)


def denoiser(model, spec=PICTURES, **settings):
    return shaken(Diffusers(model=model, **settings).denoiser(spec))


# ------------------------------------------------------------------------------------------------------------ the time
@pytest.mark.parametrize("timesteps", [1000, 50])
def test_our_time_is_their_index_exactly(timesteps):
    t = torch.arange(1, timesteps + 1) / timesteps
    assert torch.equal(timestep_index(t, timesteps), torch.arange(float(timesteps)))
    between = torch.tensor([0.12345, 0.9])
    assert torch.allclose(timestep_index(between), 1000 * between - 1)


@pytest.mark.parametrize("model", [UNET, DIT, CROSS])
def test_a_shifted_time_embedding_gives_the_same(model, x):
    """The rotation behind the sinusoids: the changed network at n + 1 equals the old one at n, for any n."""
    net = denoiser(model, Spec((1, 8, 8)))
    n, extra = torch.tensor([0.0, 12.5, 998.0]), net.sequences(x, {}) if net.sequences else {}
    old = model.call(net.model, x, n, None, extra)
    net.model.load_state_dict(net.model.state_dict() | remap_time_embedding(net.model, 1.0))
    assert torch.allclose(model.call(net.model, x, n + 1, None, extra), old, atol=2e-4)
    assert not torch.allclose(model.call(net.model, x, n, None, extra), old, atol=1e-2)


# ------------------------------------------------------------------------------------------------------ the conditions
@pytest.mark.parametrize("model", [UNET, DIT, CROSS])
def test_classes_are_theirs_and_the_null_class_is_the_row_after_the_last(model, x):
    net, t = denoiser(model), torch.tensor([0.1, 0.5, 1.0])
    label, n = torch.tensor([3, 0, 9]), torch.tensor([99.0, 499.0, 999.0])
    extra = net.sequences(x, {}) if net.sequences else {}
    assert torch.equal(net(x, t, {"label": label}), model.call(net.model, x, n, label, extra))
    null = model.call(net.model, x, n, torch.full((N,), 10), extra)
    assert torch.equal(net(x, t, {}), null)
    keep = torch.tensor([True, False, True])
    for name in ("keep", "keep.label"):
        mixed = net(x, t, {"label": label, name: keep})
        assert torch.allclose(mixed[1], null[1], atol=1e-5)
        assert torch.allclose(mixed[::2], net(x, t, {"label": label})[::2], atol=1e-5)
    assert not torch.allclose(null, net(x, t, {"label": label}), atol=1e-2)


def test_conditions_are_dropped_by_our_draws_only(x):
    """diffusers' DiT would drop classes in training itself, by torch's generator."""
    net = denoiser(DIT).train()
    label, t = {"label": torch.zeros(N, dtype=torch.long)}, torch.full((N,), 0.5)
    assert all(torch.equal(net(x, t, label), net(x, t, label)) for _ in range(30))


def test_tokens_go_to_cross_attention_with_their_mask(x):
    net, t = denoiser(CROSS, Spec((1, 8, 8), {"words": Tokens(6)})), torch.full((N,), 0.5)
    words, mask = torch.randn(N, 4, 6), torch.arange(4).expand(N, -1) < 2
    out = net(x, t, {"words": words, "mask": mask})
    other = torch.where(mask[..., None], words, 7.0)
    assert torch.allclose(net(x, t, {"words": other, "mask": mask}), out, atol=1e-5), "hidden tokens were seen"
    assert torch.allclose(out, net(x, t, {"words": words[:, :2]}), atol=1e-5)
    assert not torch.allclose(out, net(x, t, {"words": words}), atol=1e-3)
    theirs = net.model(x, torch.full((N,), 499.0), words[:, :2]).sample
    assert torch.allclose(out, theirs, atol=1e-5), "tokens do not reach diffusers' network as they are"
    nobody = torch.zeros(N, dtype=torch.bool)
    assert torch.allclose(net(x, t, {"words": words, "keep": nobody}), net(x, t, {}), atol=1e-5)


def test_learned_sigma_is_carried_along_and_not_used(x):
    net = denoiser(DIT, learned_sigma=True)
    t, label = torch.full((N,), 0.5), torch.tensor([1, 2, 3])
    both = net.model(x, torch.full((N,), 499.0), class_labels=label).sample
    assert both.shape == (N, 2, 8, 8)
    assert torch.equal(net(x, t, {"label": label}), both[:, :1])


@pytest.mark.parametrize(
    ("model", "spec", "words"),
    [
        (UNET, Spec((2,)), "allowed (C, H, W)"),
        (UNET, Spec((1, 9, 8)), "multiples of 2"),
        (DIT, Spec((1, 8, 4)), "square"),
        (UNET, Spec((1, 8, 8), {"obs": Vector((2,))}), "takes one Label; condition 'obs' is of kind Vector"),
        (DIT, Spec((1, 8, 8), {"a": Label(2), "b": Label(3)}), "'b' is of kind Label"),
        (UNET, Spec((1, 8, 8), {"w": Text(9)}), "of kind Text"),
        (CROSS, Spec((1, 8, 8), {"w": Tokens(7)}), "--backbone.model.cross-attention-dim 7"),
        (CROSS, Spec((1, 8, 8), {"p": Image(1)}), "of kind Image"),
        (UNet2D(block_out_channels=(30, 30), norm_num_groups=4), PICTURES, "UNet2DModel cannot be made"),
    ],
)
def test_unsupported_data_are_refused_in_one_line(model, spec, words):
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        Diffusers(model=model).denoiser(spec)
    assert "\n" not in str(refused.value)


def test_missing_cuts_and_unknown_settings_are_refused():
    for cut in ("encoder", "decoder"):
        with pytest.raises(ValueError, match=f"has no {cut}, only denoiser; choose another --backbone"):
            getattr(Diffusers(), cut)(PICTURES, (2,))
    for more, words in (("a", "name=JSON"), ("in_channels=1", "follows from the data"),
                        ('time_embedding_type="fourier"', "positional")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            UNet2D(more=(more,))


@pytest.mark.parametrize("model", [UNET, DIT, CROSS])
def test_their_config_json_makes_the_same_network(model):
    """Settings without a field of ours are kept in ``more``; those that the data decide are left out."""
    odd = {"norm_eps": 1e-6, "attention_bias": False} if model is DIT else {"norm_eps": 1e-6, "downsample_padding": 0}
    settings = {**model.settings(), **odd, "in_channels": 3, "_class_name": "x", "unheard_of": 1}
    settings["attention_head_dim"] = [2, 2] if model is CROSS else settings["attention_head_dim"]
    read = type(model).from_config(json.loads(json.dumps(settings)))
    kept = read.settings()
    assert {k: kept[k] for k in odd} == odd
    assert kept["attention_head_dim"] == settings["attention_head_dim"]
    assert "in_channels" not in kept
    assert "unheard_of" not in kept
    assert type(model).from_config({}).more == (), "a default was kept as if it were a choice"


def test_diffusers_is_imported_only_where_a_network_is_made():
    code = "import sys, genkit.cli.commands.train, genkit.cli.commands.export\n"
    code += "print({'diffusers', 'peft'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# ------------------------------------------------------------------------------------------ their folders as beginnings
def unet(**settings):
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **{**SMALL, **settings},
    )  # fmt: skip
    return shaken(net)


@pytest.mark.parametrize(
    ("scheduler", "same"),
    [
        ({}, {"betas": "linear", "prediction": "eps"}),
        ({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, {"betas": "scaled-linear"}),
        (
            {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
            {"betas": "cosine", "prediction": "v"},
        ),
        ({"num_train_timesteps": 100, "prediction_type": "sample"}, {"timesteps": 100, "prediction": "x0"}),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, {"zero_snr": True}),
    ],
)
def test_a_pipelines_scheduler_is_the_objective(tmp_path, scheduler, same):
    """The path passes through every number of the scheduler's table of alphas."""
    theirs = diffusers.DDPMScheduler(**scheduler)
    diffusers.DDPMPipeline(unet(), theirs).save_pretrained(tmp_path / "p")
    defaults = init_defaults(str(tmp_path / "p"))
    block = {k: v for k, v in defaults["objective"].items() if k != "name"}
    path = DDPM(**block).path
    assert isinstance(path, VP)
    t = torch.arange(1, path.timesteps + 1, dtype=torch.float64) / path.timesteps
    assert torch.allclose(path.alpha(t) ** 2, theirs.alphas_cumprod.double(), rtol=2e-4, atol=1e-7)
    assert same.items() <= defaults["objective"].items()
    assert defaults["backbone"]["timesteps"] == path.timesteps
    assert init_note(str(tmp_path / "p"), DDPM(**block)) is None


def test_an_unknown_schedule_is_reported(tmp_path):
    betas = torch.linspace(0.001, 0.3, 1000) ** 3
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(trained_betas=betas.numpy())).save_pretrained(tmp_path / "p")
    assert "objective" not in init_defaults(str(tmp_path / "p"))
    assert "does not have; continuing with flow" in (init_note(str(tmp_path / "p"), Flow()) or "")
    unet().save_pretrained(tmp_path / "bare")
    assert "no scheduler" in (init_note(str(tmp_path / "bare"), Flow()) or "")


QUICK = ["--steps=1", "--lr=1e-9", "--batch=4", "--sample-every=0", "--workers=0", "--no-tensorboard", "--device=cpu",
         "--data.labels=false", "--precision=fp32"]  # fmt: skip


def trained(folder, *args):
    """Train by the command line, and return the run's directory."""
    assert cli.main(["train", *QUICK, f"--out={folder}", *args]) == 0
    return (folder / "latest").resolve()


def test_training_starts_from_a_pipeline_and_does_not_need_it_afterwards(tmp_path, x, capsys):
    """Settings and weights are read; the objective is that of its scheduler; the run does not need it afterwards."""
    net = unet()
    diffusers.DDIMPipeline(net, diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(
        tmp_path / "p"
    )
    run = trained(tmp_path / "runs", f"--init=diffusers:{tmp_path}/p")
    assert "note" not in capsys.readouterr().out
    (tmp_path / "p").rename(tmp_path / "gone")
    loaded = load_run(run)
    assert loaded.objective == DDPM(betas="cosine", loss_space="eps")
    assert f"init: diffusers:{tmp_path}/p" in (run / "config.yaml").read_text()
    ours = loaded.nets["net"](x, torch.tensor([0.001, 0.5, 1.0]))
    assert torch.allclose(ours, net(x, torch.tensor([0, 499, 999])).sample, atol=1e-5)


def test_another_objective_is_reported(tmp_path, capsys):
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path / "p")
    trained(tmp_path / "runs", f"--init=diffusers:{tmp_path}/p", "--objective=flow")
    output = capsys.readouterr().out
    note = r"note .*was trained with name ddpm.*prediction eps.*; continuing with name flow, prediction"
    assert re.search(note, output)


@pytest.mark.parametrize("rows", [None, 10, 11, 4])
def test_new_classes_start_as_reported(tmp_path, x, rows):
    net = unet(num_class_embeds=rows)
    net.save_pretrained(tmp_path / "m")
    notes = []
    ours = Diffusers(model=UNET).denoiser(PICTURES).eval()
    init_from({"net": ours}, f"diffusers:{tmp_path}/m", notes.append)
    t, label = torch.full((N,), 0.5), torch.tensor([1, 2, 9])
    null, some = ours(x, t), ours(x, t, {"label": label})
    ask = lambda labels: net(x, 499, class_labels=labels).sample  # noqa: E731
    if rows is None:
        assert torch.allclose(some, net(x, 499).sample, atol=1e-5)
    elif rows == 4:
        assert torch.allclose(some, null, atol=1e-5)
    else:
        assert torch.allclose(some, ask(label), atol=1e-5)
    if rows == 11:
        assert torch.allclose(null, ask(torch.full((N,), 10)), atol=1e-5)
    assert len(notes) == (rows != 11)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda m: (m / WEIGHTS).rename(m / "diffusion_pytorch_model.bin"),
            "is a pickle",
        ),
        (lambda m: (m / WEIGHTS).unlink(), "holds no safetensors"),
        (lambda m: (m / WEIGHTS).write_bytes(b"no"), "cannot be read"),
        (lambda m: (m / "config.json").unlink(), "holds no config.json"),
        (lambda m: (m / "config.json").write_text("{"), "not valid JSON"),
        (
            lambda m: (m / "config.json").write_text('{"_class_name": "Odd"}'),
            "holds a Odd, which genkit cannot call; allowed",
        ),
        (lambda m: m.rename(m.with_name("away")), "there is no folder"),
    ],
)
def test_unusable_folders_are_refused_in_one_line(tmp_path, spoil, words, capsys):
    unet().save_pretrained(tmp_path / "m")
    spoil(tmp_path / "m")
    assert cli.main(["train", *QUICK, f"--out={tmp_path}/runs", f"--init=diffusers:{tmp_path}/m"]) == 2
    output = capsys.readouterr().err
    assert words in output
    assert output.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_name_of_the_hub_without_a_network_is_refused_in_one_line(tmp_path, capsys):
    """HF_HUB_OFFLINE is set for the tests."""
    assert cli.main(["train", *QUICK, f"--out={tmp_path}/runs", "--init=diffusers:nobody/nothing"]) == 2
    assert "is there a network?" in capsys.readouterr().err


def test_weights_that_do_not_fit_are_refused(tmp_path, capsys):
    unet(num_class_embeds=4).save_pretrained(tmp_path / "m")
    init = f"--init=diffusers:{tmp_path}/m"
    for args, words in (((init,), "keep the data's labels"), ((init, "--data.channels=3"), "--data.channels=1"),
                        ((init, "--backbone=unet"), "needs --backbone=diffusers")):  # fmt: skip
        assert cli.main(["train", *QUICK, f"--out={tmp_path}/runs", *args]) == 2
        assert words in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- our runs as theirs
TINY = ["--backbone=diffusers", "--backbone.model.block-out-channels", "8", "16",
        "--backbone.model.norm-num-groups=4", "--backbone.model.attention-head-dim=8"]  # fmt: skip


def model_of(folder, *args):
    """A run whose weights and averages are far from their initial values."""
    run = trained(folder, *args)
    step = find_checkpoint(run)
    record = json.loads((step / "state.json").read_text())
    torch.manual_seed(3)
    for file in ("nets.safetensors", "ema-0.999.safetensors"):
        stored = {k: v + 0.03 * torch.randn_like(v) for k, v in load_file(step / file).items()}
        save_file(stored, step / file)
        record["sha256"][file] = sha256(step / file)
    (step / "state.json").write_text(json.dumps(record))
    return run


def exported(run, out, *args):
    assert cli.main(["export", str(run), "--to", "diffusers", str(out), *args]) == 0
    return out


def picture(run, grid, label=None):
    """Samples of genkit by ddim with seeds 0 .. N - 1, in the model's numbers and in [0, 1]."""
    noise, cond = Seeds(range(N)), {} if label is None else {"label": torch.full((N,), label)}
    with torch.no_grad():
        x = bind("ddim", grid)(load_run(run).denoiser)(noise((1, 8, 8)), cond, noise)
    return x, (x / 2 + 0.5).clamp(0, 1)


def from_theirs(run, grid, label=None):
    """The same from noise z itself, as diffusers' pipelines start; genkit starts with sigma(1) z, which on linear betas
    is 2e-5 of it apart, and an untrained network multiplies that."""
    run, cond = load_run(run), {} if label is None else {"label": torch.full((N,), label)}
    guidance = clamp() if clips_by_default(run.objective, run.codec) else None
    denoise = guidance(run.denoiser) if guidance else run.denoiser
    with torch.no_grad():
        x = ddim(denoise, Seeds(range(N))((1, 8, 8)), grid(denoise.path), cond)
    return x, (x / 2 + 0.5).clamp(0, 1)


def relative_error(a, b, x):
    """Relative to the size of the samples: those of an untrained network are not within [-1, 1]."""
    return float((a - b).abs().max() / max(1.0, float(x.abs().max())))


def seeds(n=N):
    return [torch.Generator().manual_seed(i) for i in range(n)]


@pytest.mark.parametrize(
    "objective",
    [
        [],
        ["--objective.betas=cosine", "--objective.prediction=v"],
        ["--objective.betas=scaled-linear", "--objective.prediction=x0"],
        ["--objective.timesteps=50", "--backbone.timesteps=50", "--objective.zero-snr", "--objective.prediction=v"],
    ],
)
def test_a_stock_pipeline_draws_the_same_picture_as_a_ddpm(tmp_path, objective):
    run = model_of(tmp_path / "runs", "--objective=ddpm", *TINY, *objective)
    pipe = diffusers.DiffusionPipeline.from_pretrained(exported(run, tmp_path / "out"))
    assert type(pipe) is diffusers.DDIMPipeline
    pipe.set_progress_bar_config(disable=True)
    clipped = {} if objective else {"use_clipped_model_output": True}
    assert pipe.scheduler.config.clip_sample == bool(clipped)
    theirs = pipe(batch_size=N, generator=seeds(), num_inference_steps=10, output_type="pt", **clipped).images
    grid = trailing(10, load_run(run).objective.timesteps)
    x, ours = from_theirs(run, grid)
    assert relative_error(ours, theirs, x) < 1e-5
    if "--objective.prediction=v" in objective:  # whose path ends in pure noise: both start from it
        assert float((picture(run, grid)[1] - theirs).abs().max()) < 1e-4
    assert float(ours.std()) > 0.05, "the pictures show nothing"


def test_a_stock_pipeline_draws_the_same_picture_as_a_flow(tmp_path):
    """diffusers' own grid of 28 steps is our linspace; with its scheduler alone any number of uniform steps is ours."""
    run = model_of(tmp_path / "runs", "--objective=flow", *TINY)
    pipe = diffusers.DiffusionPipeline.from_pretrained(exported(run, tmp_path / "out"))
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(batch_size=N, generator=seeds(), num_inference_steps=28, output_type="pt").images
    _, ours = picture(run, linspace(28))
    assert float((ours - theirs).abs().max()) < 1e-4
    assert float(ours.std()) > 0.05
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in seeds()])
    pipe.scheduler.set_timesteps(sigmas=[1 - i / 7 for i in range(7)])
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.unet(x, t).sample.detach(), t, x).prev_sample
    assert float((picture(run, uniform(7))[0] - x).abs().max()) < 1e-4


@pytest.fixture(scope="module")
def classy(tmp_path_factory):
    return model_of(tmp_path_factory.mktemp("runs"), "--objective=ddpm", "--data.labels=true", *TINY)


def test_one_class_is_a_pipeline_and_all_are_a_network_with_a_loop(tmp_path, classy, capsys):
    x, ours = from_theirs(classy, trailing(10), label=7)
    alone = diffusers.DiffusionPipeline.from_pretrained(exported(classy, tmp_path / "one", "--to.label=7"))
    alone.set_progress_bar_config(disable=True)
    theirs = alone(batch_size=N, generator=seeds(), num_inference_steps=10, output_type="pt",
                   use_clipped_model_output=True).images  # fmt: skip
    assert relative_error(ours, theirs, x) < 1e-5
    capsys.readouterr()
    pipe = diffusers.DiffusionPipeline.from_pretrained(exported(classy, tmp_path / "all"))
    assert "class_labels=labels  # 10 is the null class" in capsys.readouterr().out
    y = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in seeds()])
    pipe.scheduler.set_timesteps(10)
    for t in pipe.scheduler.timesteps:
        out = pipe.unet(y, t, class_labels=torch.full((N,), 7)).sample.detach()
        y = pipe.scheduler.step(out, t, y, use_clipped_model_output=True).prev_sample
    assert relative_error(x, y, x) < 1e-5


def test_an_exported_model_initialises_a_run_that_draws_the_same(tmp_path):
    """A round trip, also of a flow, whose times are shifted in between."""
    for objective in ("ddpm", "flow"):
        run = model_of(tmp_path / objective, f"--objective={objective}", *TINY)
        again = trained(tmp_path / "again", f"--init=diffusers:{exported(run, tmp_path / f'{objective}-out')}")
        a, b = load_run(run), load_run(again)
        assert type(a.objective) is type(b.objective)
        ours, theirs = (picture(r, trailing(5)) for r in (run, again))
        assert relative_error(ours[0], theirs[0], ours[0]) < 1e-5


def test_a_transformer_is_written_in_parts(tmp_path, capsys):
    args = ["--backbone=diffusers", "--backbone.model=dit", "--backbone.model.num-layers=1"]
    run = model_of(tmp_path / "runs", "--objective=ddpm", *args)
    out = exported(run, tmp_path / "out")
    assert "No pipeline of diffusers draws with it" in capsys.readouterr().out
    net = diffusers.DiTTransformer2DModel.from_pretrained(out / "transformer")
    scheduler = diffusers.DDIMScheduler.from_pretrained(out / "scheduler")
    x = torch.cat([torch.randn(1, 1, 8, 8, generator=g) for g in seeds()])
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps:
        label = torch.ones(N, dtype=torch.long)
        said = net(x, t.expand(N), class_labels=label).sample.detach()
        x = scheduler.step(said, t, x, use_clipped_model_output=True).prev_sample
    assert relative_error(from_theirs(run, trailing(10))[0], x, x) < 1e-5
    assert (out / "README.md").read_text().startswith(f"# {run.name}")


@pytest.mark.parametrize(
    ("args", "to", "words"),
    [
        (["--objective=edm", *TINY], [], "no scheduler that draws as EDM"),
        (["--objective=flow", "--objective.path=cosine", *TINY], [], "another path"),
        (["--objective=ddpm", "--objective.prediction=velocity", *TINY], [], "no prediction velocity"),
        (["--objective=ddpm", "--objective.timesteps=50", *TINY], [], "--backbone.timesteps 50"),
        (["--objective=ddpm", *TINY], ["--to.label=1"], "this network has no classes"),
        (
            ["--objective=ddpm", "--backbone.width=8"],
            [],
            "no network such as UNet; train with --backbone=diffusers;",
        ),
    ],
)
def test_unsupported_runs_are_refused_and_nothing_is_written(tmp_path, args, to, words, capsys):
    run = trained(tmp_path / "runs", *args)
    assert cli.main(["export", str(run), str(tmp_path / "out"), *to]) == 2
    assert words in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]


def test_a_standalone_run_draws_the_same(tmp_path, classy, capsys):
    out = tmp_path / "alone"
    assert cli.main(["export", str(classy), str(out), "--to", "run"]) == 0
    assert torch.equal(picture(out, trailing(3), 3)[0], picture(classy, trailing(3), 3)[0])
    assert sorted(p.name for p in (out / "latest").iterdir()) == ["nets.safetensors", "optim.safetensors", "state.json"]
    assert cli.main(["export", str(classy), str(out)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_an_export_is_a_call_that_returns_the_folder_and_prints_nothing(tmp_path, classy, capsys):
    run = load_run(classy, device="cpu")
    made = export(run, tmp_path / "out", to="run")
    assert capsys.readouterr() == ("", "")
    assert (made.path, made.run) == (tmp_path / "out", run)
    assert any(str(tmp_path / "out") in line for line in made.instructions)
    with pytest.raises(ValueError, match="is there already"):
        export(run, tmp_path / "out", to="run")
    with pytest.raises(ValueError, match="allowed: --to run, diffusers"):
        export(run, tmp_path / "other", to="onnx")
