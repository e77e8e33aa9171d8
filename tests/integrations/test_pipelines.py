"""``--init diffusers:P`` of a pipeline: the run draws the pipeline's own picture, by the real commands."""

from __future__ import annotations

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from safetensors.torch import load_file, save_file

from genkit import config
from genkit.cli import main as cli
from genkit.core import Batch, Draw
from genkit.data import text
from genkit.data.codecs import Standardize
from genkit.integrations.diffusers_scheduler import SOLVERS
from genkit.integrations.diffusers_weights import NOT_SERVED, Blocks, open_model, time_distribution
from genkit.integrations.export import export
from genkit.objectives import DDPM, Flow
from genkit.training.run import load_run
from genkit.training.sampling import Sampling
from genkit.training.settings import TrainSettings
from tests.support.pipelines import CAPTIONS, PROMPTS, QUICK, STEPS, largest, our_picture, their_picture
from tests.support.refusals import refuses


# ---------------------------------------------------------------------------------------------------------- the picture
@pytest.mark.parametrize("name", ["sd", "sd-v"])
def test_a_run_draws_the_picture_of_its_pipeline(pipeline_folder, run_of, name, tmp_path):
    folder, run = pipeline_folder(name), run_of(name)
    theirs, loaded = their_picture(folder), load_run(run, device="cpu")
    ours = our_picture(loaded)
    assert largest(ours, theirs) < 1e-5
    assert float(theirs.std()) > 0.1, "the pictures show nothing"
    scaling = json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"]
    assert loaded.codec.scaling.std == (1 / scaling,) * 4
    # the command draws the same, to the byte that rounding can move
    for i, prompt in enumerate(PROMPTS):
        assert cli.main(["sample", str(run), "--prompt", prompt, "--n=1", f"--seed={i}", f"--steps={STEPS}",
                         "--guidance=5", "--format=npz", f"--out={tmp_path}/{i}.npz", "--device=cpu"]) == 0  # fmt: skip
        drawn = torch.from_numpy(np.load(tmp_path / f"{i}.npz")["arr_0"]).movedim(-1, 1)
        assert drawn.shape == (1, 3, 16, 16)
        assert largest(drawn.float(), (theirs[i : i + 1] * 255).round()) <= 1


@pytest.mark.parametrize(
    "fault", ["other words", "time off by one", "no scaling factor", "uniform grid", "zeros as null"]
)
def test_the_picture_depends_on_each_thing_that_the_network_is_told(pipeline_folder, run_of, fault, monkeypatch):
    run, prompts, sampling = load_run(run_of("sd"), device="cpu"), PROMPTS, {}
    if fault == "other words":
        prompts = ["two blue 9", "k"]
    elif fault == "time off by one":
        net = run.nets["net"]
        inner = net.model.forward
        monkeypatch.setattr(net.model, "forward", lambda x, n, *args, **options: inner(x, n - 1, *args, **options))
    elif fault == "no scaling factor":
        monkeypatch.setattr(run.codec, "scaling", Standardize((0.0,) * 4, (1.0,) * 4))
    elif fault == "uniform grid":
        sampling = {"grid": "uniform"}
    else:
        run.nets["net"].sequences.null_tokens.zero_()
    assert largest(our_picture(run, prompts, **sampling), their_picture(pipeline_folder("sd"))) > 5e-3


SCHEDULERS = {
    "EulerDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "DDIMScheduler": {"timestep_spacing": "trailing", "set_alpha_to_one": True},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_other_schedulers_of_the_pipeline_draw_the_same(pipeline_folder, run_of, name, tmp_path):
    """The scheduler's JSON in the run decides sampler and grid."""

    def scheduler(config):
        return getattr(diffusers, name).from_config(config, **SCHEDULERS[name])

    run = tmp_path / "run"
    shutil.copytree(run_of("sd"), run)
    record = json.loads((run / "pipeline.json").read_text())
    settings = scheduler(record["scheduler"]).config
    changed = {**record, "scheduler": dict(settings) | {"_class_name": name}, "sampler": SOLVERS[name].sampler}
    (run / "pipeline.json").write_text(json.dumps(changed, default=list))
    ours = our_picture(load_run(run, device="cpu"))
    assert largest(ours, their_picture(pipeline_folder("sd"), scheduler=scheduler)) < 1e-5


def test_plms_is_replaced_by_ddim_with_a_note(pipeline_folder, photos, tmp_path, capsys):
    folder = tmp_path / "p"
    shutil.copytree(pipeline_folder("sd"), folder)
    settings = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    pndm = diffusers.PNDMScheduler.from_config(settings, skip_prk_steps=True)
    pndm.save_pretrained(folder / "scheduler")
    init = f"--init=diffusers:{folder}"
    assert cli.main(["train", init, f"--data={photos}", f"--out={tmp_path}/runs", *QUICK, CAPTIONS]) == 0
    assert "sampled by PNDMScheduler: PLMS is not among the samplers" in capsys.readouterr().out
    run = load_run(tmp_path / "runs" / "latest", device="cpu")
    assert Sampling().sampler_for(run) == "ddim"
    times = Sampling().times(run, STEPS)
    assert len(times) == STEPS + 1
    assert bool((times.diff() < 0).all())


# ------------------------------------------------------------------------------------------------------- what is kept
def test_exports_and_further_training_keep_the_scheduler_and_the_scale(pipeline_folder, run_of, photos, tmp_path):
    run = run_of("sd")
    theirs = their_picture(pipeline_folder("sd"))
    export(run, tmp_path / "out", to="run")
    assert largest(our_picture(load_run(tmp_path / "out", device="cpu")), theirs) < 1e-5
    codec, words = (f"diffusers:{pipeline_folder('sd')}" for _ in range(2))
    again = [
        "train",
        f"--init={run}",
        f"--codec={codec}",
        f"--data={photos}",
        f"--data.encoder={words}",
        *QUICK,
        CAPTIONS,
    ]
    assert cli.main([*again, f"--out={tmp_path}/runs"]) == 0
    assert largest(our_picture(load_run(tmp_path / "runs" / "latest", device="cpu")), theirs) < 1e-5
    assert cli.main([*again, f"--out={tmp_path}/flows", "--objective=flow"]) == 0
    assert load_run(tmp_path / "flows" / "latest").pipeline is None, "the scheduler's times are those of another path"


def test_a_first_stage_is_measured_for_new_weights(pipeline_folder, photos, tmp_path):
    """Its own scale is that of pretrained weights only."""
    codec = f"--codec=diffusers:{pipeline_folder('sd')}"
    net = ["--objective=flow", "--backbone=mlp", "--backbone.width=8"]
    assert cli.main(["train", codec, f"--data={photos}", f"--out={tmp_path}", *net, *QUICK]) == 0
    run = load_run(tmp_path / "latest", device="cpu")
    assert run.codec.measured
    assert len({round(s, 4) for s in run.codec.scaling.std}) == 4


# ------------------------------------------------------------------------------------------------------ what is refused
def refused(args, capsys):
    assert cli.main(args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_swapped_encoder_and_a_damaged_first_stage_are_refused(pipeline_folder, photos, tmp_path, capsys):
    folder = tmp_path / "p"
    shutil.copytree(pipeline_folder("sd"), folder)
    train = ["train", f"--init=diffusers:{folder}", f"--data={photos}", f"--out={tmp_path}/runs", *QUICK, CAPTIONS]
    assert cli.main(train) == 0
    run = str(tmp_path / "runs" / "latest")
    capsys.readouterr()
    text.open_encoder.cache_clear()
    weights = load_file(folder / "text_encoder" / "model.safetensors")
    save_file(
        {k: v + 0.01 for k, v in weights.items()}, folder / "text_encoder" / "model.safetensors", {"format": "pt"}
    )
    assert "restore the former" in refused(["sample", run, "--prompt=red", "--n=1", "--device=cpu"], capsys)
    text.open_encoder.cache_clear()
    stage = next((tmp_path / "runs").glob("*/codec/first-stage.safetensors"))
    stage.write_bytes(stage.read_bytes()[:-100])
    assert "its sha256 is not the recorded one" in refused(["sample", run, "--prompt=red", "--n=1"], capsys)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    assert "vae cannot be read" in refused(train, capsys)


def test_pipelines_that_are_not_served_are_refused(pipeline_folder, photos, tmp_path, capsys):
    folder = tmp_path / "p"
    shutil.copytree(pipeline_folder("sd"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "OddPipeline"}))
    train = ["train", f"--init=diffusers:{folder}", f"--data={photos}", f"--out={tmp_path}/runs", *QUICK, CAPTIONS]
    assert "is a OddPipeline; allowed: StableDiffusionPipeline" in refused(train, capsys)
    error = refused([*train, "--data.encoder=diffusers:nobody/nothing"], capsys)
    assert "encoder: there is no folder nobody/nothing" in error
    assert "is there a network?" in error
    assert "codec: there is no folder nobody/nothing" in refused(
        [*train, f"--data.encoder=diffusers:{pipeline_folder('sd')}", "--codec=diffusers:nobody/nothing"], capsys
    )


@pytest.mark.parametrize("name", NOT_SERVED)
def test_networks_that_are_like_others_are_refused_with_the_reason(tmp_path, name):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"_class_name": name}))
    refuses(lambda: open_model(str(tmp_path)), name, NOT_SERVED[name])


def test_texts_that_the_pipeline_would_cut_are_refused(pipeline_folder):
    encoder = text.open_encoder(f"diffusers:{pipeline_folder('sd')}")
    with pytest.raises(ValueError, match=r"given 82 tokens .* reads 77"):
        encoder.encode(["a" * 80])
    states = encoder.encode(["", "a" * 75])["text"]
    assert states.shape == (2, 77, 32)
    assert torch.equal(states[0], encoder.null["text"][0])


def test_other_words_than_the_pipelines_are_reported(pipeline_folder, photos, tmp_path, capsys):
    args = [f"--init=diffusers:{pipeline_folder('sd')}", f"--data={photos}", f"--out={tmp_path}", *QUICK]
    assert cli.main(["train", *args]) == 0
    assert "trained with the words of its own encoders" in capsys.readouterr().out
    assert cli.main(["train", *args, CAPTIONS]) == 0
    assert "note" not in capsys.readouterr().out


def test_the_grid_of_a_pipeline_needs_one(tmp_path):
    run = load_run(make_flow(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="began from no pipeline; allowed: uniform"):
        run.sample(2, grid="pipeline", steps=2)


def make_flow(folder):
    tiny = ["--data=moons", "--data.n=50", "--backbone.width=8", "--steps=1", "--batch=4", "--no-tensorboard",
            "--workers=0", "--sample-every=0", "--device=cpu"]  # fmt: skip
    assert cli.main(["train", f"--out={folder}", *tiny]) == 0
    return folder / "latest"


# ----------------------------------------------------------------------------------------------------------- the losses
def test_v_prediction_trains_the_loss_of_diffusers():
    """The mean squared error of v at every discrete time, also at the noisy end."""
    settings = {"betas": "scaled-linear", "beta_min": 0.00085, "beta_max": 0.012, "prediction": "v"}
    objective = DDPM(**settings).decide(lambda: 1.0)
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction"
    )
    x0 = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    net = torch.nn.Conv2d(4, 4, 3, padding=1)
    with torch.no_grad():
        sample = objective.sample_path(Batch(x0, {}, draw=Draw((1,), 0, 64)), {})
        out, n = net(sample.x), (sample.t * 1000 - 1).round().long()
        theirs = (out - scheduler.get_velocity(x0, sample.x1, n)).square().flatten(1).mean(1)
        assert torch.allclose(objective.squared_error(sample, out) / theirs, torch.ones(64), atol=1e-5)
    assert TrainSettings(objective=objective).objective.space == "v"


def test_times_of_flow_matching_are_those_of_their_trainer():
    """SD3's: a logit-normal sample of the shifted grid is a logit-normal of another mean."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    block = time_distribution(dict(scheduler.config) | {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    objective = config.from_dict(Blocks, {"objective": {"name": "flow", "time_distribution": block}}).objective
    assert isinstance(objective, Flow)
    num = 200_000
    ours = objective.sample_times(Batch(torch.zeros(num, 1), {}, draw=Draw((0,), 0, num)))
    torch.manual_seed(0)
    u = compute_density_for_timestep_sampling("logit_normal", num, 0.0, 1.0, 1.29)
    deciles = torch.linspace(0.1, 0.9, 9)
    assert torch.allclose(ours.quantile(deciles), scheduler.sigmas[(u * 1000).long()].quantile(deciles), atol=0.01)
