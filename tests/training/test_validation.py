"""Losses of held-out samples, the best checkpoint by them, early stop and a limit of time."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import genkit
from genkit import config
from genkit.cli.main import main
from genkit.core import Spec
from genkit.data import InMemory
from genkit.data.codecs import Identity
from genkit.data.pairs import save_pairs
from genkit.objectives import OBJECTIVES
from genkit.training.best import BestCheckpoint, choose_metric, read_best
from genkit.training.directory import list_checkpoints, read_log, step_of
from genkit.training.loop import initial_state
from genkit.training.run import load_run
from genkit.training.session import Session
from genkit.training.settings import TrainSettings
from genkit.training.validation import Validation
from tests.support.runs import saved_tensors

QUICK = ["--backbone.width=8", "--batch=16", "--workers=0", "--no-tensorboard", "--sample-every=0", "--device=cpu",
         "--log-every=4"]  # fmt: skip
MOONS = ("--data=moons", "--data.n=64")


def train(out, *argv, data=MOONS):
    assert main(["train", *QUICK, *data, f"--out={out}", *argv]) == 0
    return (out / "latest").resolve()


def validations(run):
    records = [r for r in read_log(run) if "val/loss" in r]
    return [{k: v for k, v in r.items() if k == "step" or k.startswith("val/")} for r in records]


def make_validation(rows=4000, objective="flow"):
    """An untrained flow on two moons, and its validation."""
    data = {"name": "moons", "n": rows}
    settings = {"objective": objective, "data": data, "precision": "fp32", "val_every": 1, "val_n": rows}
    settings = config.from_dict(TrainSettings, settings)
    training = settings.data.load("train")
    torch.manual_seed(0)
    nets = settings.objective.networks(settings.backbone, training.spec)
    validation = Validation.create(settings, training, training.codec, Accelerator(cpu=True))
    return initial_state(settings.objective, nets, settings), validation


# ------------------------------------------------------------------------------------------------ the numbers
def test_the_loss_of_a_network_that_predicts_zero_is_the_second_moment_of_the_velocity():
    """``E |x1 - x0|^2 / D = 1 + E |x0|^2 / D`` over the held-out samples, which are not those of training."""
    state, validation = make_validation()
    second = validation.data.x.square().mean().item()
    assert validation(state)["val/loss"] == pytest.approx(1 + second, abs=0.1)


class ExactNet(torch.nn.Module):
    """What a network of the path and prediction outputs for data that are one Gaussian of variance s^2."""

    def __init__(self, objective, variance):
        super().__init__()
        self.objective, self.variance = objective, variance

    def forward(self, x, label, cond):
        path, parametrization = self.objective.path, self.objective.parametrization
        labels = torch.linspace(0, 1, 1001, dtype=torch.float64)
        known = parametrization.inputs(path, torch.zeros(1001, 2), labels)[1]
        t = labels[(known[None] - label[:, None].double()).abs().argmin(1)].float()
        alpha, sigma = (v[:, None] for v in (path.alpha(t), path.sigma(t)))
        total = alpha**2 * self.variance + sigma**2
        return parametrization.target(path, alpha * self.variance * x / total, sigma * x / total, t)


LEVELS = (0.2, 0.5, 0.8)


def level_values(objective, seed=0, variance=0.49, n=4000):
    settings = config.from_dict(TrainSettings, {"objective": objective, "data": {"name": "moons", "n": 10}})
    x = variance**0.5 * torch.randn(n, 2, generator=torch.Generator().manual_seed(1))
    data = InMemory(x, {}, Spec((2,)), Identity())
    validation = Validation(settings.objective, data, data.codec, n, n, seed, "fp32", Accelerator(cpu=True), LEVELS)
    return validation.measure({"net": ExactNet(settings.objective, variance)}, "val")


def test_errors_at_noise_levels_are_those_of_the_exact_velocity_for_every_path_prediction_and_seed():
    """``E |v - E[v | u]|^2 = s^2 / ((1 - tau)^2 s^2 + tau^2)`` on the chart, for a Gaussian of variance s^2."""
    exact = {level: 0.49 / ((1 - level) ** 2 * 0.49 + level**2) for level in LEVELS}
    flow = level_values("flow")
    for level in LEVELS:
        assert flow[f"val/velocity_{level:g}"] == pytest.approx(exact[level], rel=0.05)
    assert flow["val/velocity"] == pytest.approx(sum(flow[f"val/velocity_{level:g}"] for level in LEVELS) / 3)
    for other in (
        {"name": "flow", "path": "cosine", "prediction": "x0", "time_distribution": "logit-normal"},
        {"name": "ddpm", "loss_weight": "min-snr"},
        {"name": "ddpm", "prediction": "v", "cond_dropout": 0.5},
    ):
        values = level_values(other, seed=7)
        for level in LEVELS:  # discrete times miss a level by up to half of a thousandth
            assert values[f"val/velocity_{level:g}"] == pytest.approx(flow[f"val/velocity_{level:g}"], rel=3e-3), other
        assert values["val/loss"] != pytest.approx(flow["val/loss"], rel=0.05)
    with pytest.raises(ValueError, match="val_levels: VAE has no noise levels"):
        Validation.create(
            config.from_dict(
                TrainSettings, {"objective": "vae", "data": {"name": "moons", "n": 10}, "val_levels": [0.5]}
            ),
            None,
            None,
            Accelerator(cpu=True),
        )


def test_it_is_a_function_of_seed_and_row_however_it_is_cut_and_shared():
    state, validation = make_validation(100)
    whole = validation(state)
    assert validation(state) == whole
    assert replace(validation, block=7)(state) == pytest.approx(whole, rel=1e-6)
    assert replace(validation, seed=1)(state) != whole
    shares = []
    for rank in range(3):
        fake = SimpleNamespace(process_index=rank, num_processes=3, device=torch.device("cpu"), reduce=lambda x, _: x)
        shares.append(replace(validation, accelerator=fake)(state)["val/loss"])
    assert sum(shares) == pytest.approx(whole["val/loss"], rel=1e-12)


def test_loss_aware_times_do_not_change_what_is_compared():
    state, validation = make_validation(200, objective={"name": "flow", "time_distribution": "loss-aware"})
    before = validation(state)
    history = state.nets["history"]
    history.mean.copy_(torch.linspace(1, 9, len(history.mean)))
    history.num_losses.fill_(100)
    buffers = {k: v.clone() for k, v in history.named_buffers()}
    assert validation.measure(state.nets, "val")["val/loss"] == before["val/raw/loss"]
    assert all(torch.equal(v, buffers[k]) for k, v in history.named_buffers())


def test_metrics_of_a_vae_are_its_bound_and_of_a_classifier_its_accuracy(tmp_path):
    vae = train(tmp_path / "a", "--objective=vae", "--steps=2", "--val-every=2")
    (record,) = validations(vae)
    assert record["val/neg_elbo"] == pytest.approx(2 * record["val/loss"], rel=1e-6)  # beta 1, two dimensions
    classifier = train(tmp_path / "b", "--objective=classifier", "--steps=2", "--val-every=2")
    (record,) = validations(classifier)
    assert record["val/accuracy"] * 64 == pytest.approx(round(record["val/accuracy"] * 64), abs=1e-9)


FIRST_STAGE = ("--data=digits", "--data.labels=false", "--objective.latent", "4", "4", "4", "--backbone=mlp",
               "--objective.adversarial-weight=0.5", "--objective.adversarial-start=1")  # fmt: skip
DATA = {"anchored": ("--data=four-ways", "--data.n=8", "--data.anchors=4"), "autoencoder": FIRST_STAGE}
VALIDATED = [n for n, kind in OBJECTIVES.items() if kind.validation_metrics and "distillation" not in n]


@pytest.mark.parametrize("objective", VALIDATED)
def test_validation_changes_nothing(tmp_path, objective):
    """Weights, averages, optimizers and the training log are the same to the last bit with and without it."""
    args, data = [f"--objective={objective}", "--steps=6"], DATA.get(objective, MOONS)
    plain = train(tmp_path / "a", *args, data=data)
    watched = train(tmp_path / "b", *args, "--val-every=2", "--val-n=20", data=data)
    a, b = saved_tensors(plain), saved_tensors(watched)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    losses = [[r[k] for r in read_log(run) for k in r if k.endswith("/loss") and "val" not in k]
              for run in (plain, watched)]  # fmt: skip
    assert losses[0] == losses[1]
    assert [r["step"] for r in validations(watched)] == [2, 4, 6]
    numbers = OBJECTIVES[objective].validation_metrics
    assert {f"{p}/{n}" for p in ("val", "val/raw") for n in numbers} | {"step"} == set(validations(watched)[0])


def test_what_cannot_be_validated_is_refused_in_one_line(tmp_path, capsys):
    x = torch.randn(100, 2)
    pairs = save_pairs(tmp_path / "pairs.npz", x, x.flip(1), {}, Spec((2,)), Identity(), {})
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("L", (8, 8), i).save(tmp_path / f"images/{i}.png")
    for argv, message in [
        ([*MOONS, "--objective=gan"], "val_every: given 5, but GAN has no loss that means anything on held-out"),
        ([f"--data={tmp_path}/images", "--data.held-out=0"], "val_every: needs held-out samples: .*no test split"),
        (["--data=pairs", f"--data.root={pairs}", "--objective=distillation", "--backbone=mlp"],
         "pairs.npz: has no test split"),
        ([*MOONS, "--keep-best=fid"], "keep_best: given fid, which is never measured; give --eval-every"),
        ([*MOONS, "--keep-best=val/los"], "keep_best: given 'val/los'; measured: val/loss, .*did you mean val/loss"),
        ([*MOONS, "--patience=3"], "patience: given 3, but no metric to improve; give --keep-best"),
        ([*MOONS, "--max-time=soon"], "--max-time: .* is no length of time; allowed: 90s, 10m, 2h30m"),
    ]:  # fmt: skip
        assert main(["train", *QUICK, f"--out={tmp_path}/runs", "--val-every=5", *argv]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert re.search(message, error), error
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------ resuming
def test_validations_of_a_resumed_run_are_those_of_one_that_never_stopped(tmp_path):
    args = ["--steps=12", "--val-every=3", "--save-every=6", "--keep-best=val/loss"]
    uncut = train(tmp_path / "a", *args)
    cut = train(tmp_path / "b", *args)
    for path in list_checkpoints(cut):
        if step_of(path) > 6:
            shutil.rmtree(path)
    # a signal at step 6 ends training before what is due there
    records = [json.dumps(r) for r in read_log(cut) if not (r["step"] == 6 and "val/loss" in r)]
    (cut / "log.jsonl").write_text("\n".join(records) + "\n")
    (cut / "best.json").unlink()
    assert main(["train", "--resume", str(cut)]) == 0
    assert validations(cut) == validations(uncut)
    assert read_best(cut) == read_best(uncut)
    a, b = saved_tensors(uncut), saved_tensors(cut)
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


# ------------------------------------------------------------------------------------------------ the best one
def test_the_best_is_that_of_the_log_in_the_direction_of_the_metric():
    values = [(1, 3.0), (2, 2.0), (3, None), (4, 2.0), (5, float("nan")), (6, 2.5)]
    low, high = BestCheckpoint("m", "lower"), BestCheckpoint("m", "higher")
    for best in (low, high):
        best.replay([{"step": s, "m": v} for s, v in values] + [{"step": 9, "other": 0.0}])
    assert (low.step, low.value, low.worse) == (2, 2.0, 4)
    assert (high.step, high.value, high.worse) == (1, 3.0, 5)
    assert low.is_stale(4)
    assert not low.is_stale(5)
    assert not low.is_stale(None)
    assert choose_metric("fid", {"eval/fid": "lower"}, {"eval": 5}).metric == "eval/fid"
    assert choose_metric("val/accuracy", {"val/accuracy": "higher"}, {"val": 5}).direction == "higher"


def test_the_best_checkpoint_is_kept_loaded_and_shown_and_training_stops_without_a_better_one(tmp_path, capsys):
    """A learning rate that destroys the network: the first validation stays the best."""
    args = ["--steps=40", "--lr=1", "--warmup=0", "--clip=0", "--schedule=constant", "--ema=0.5", "--val-every=2",
            "--save-every=5", "--keep-checkpoints=1", "--log-every=2", "--keep-best=val/loss"]  # fmt: skip
    run = train(tmp_path, *args, "--patience=4")
    out = capsys.readouterr().out
    values = [r["val/loss"] for r in validations(run)]
    best = 2 * (1 + values.index(min(values)))
    last = best + 8
    assert last < 40
    assert f"stopped at step {last}, saved: val/loss has not improved in 4 evaluations" in out
    assert f"--resume {run} --patience 8" in out
    assert [step_of(p) for p in list_checkpoints(run)] == [best, last]
    assert load_run(run).step == last
    assert load_run(run, step="best").step == best
    assert main(["info", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"step {best}, val/loss" in out
    assert re.search(rf"last log line\s+step {last}, denoise/loss", out)  # not the line of the last validation
    assert main(["sample", str(run), "--step=best", "--n=2", "--device=cpu"]) == 0
    # it stays stopped, unless more patience is given
    assert main(["train", "--resume", str(run)]) == 0
    assert load_run(run).step == last
    assert main(["train", "--resume", str(run), "--patience=7"]) == 0
    assert load_run(run).step > last
    assert load_run(run, step="best").step <= best


def test_a_metric_of_samples_chooses_too(tmp_path):
    run = train(tmp_path, "--steps=6", "--eval-every=2", "--eval-n=50", "--eval-steps=2", "--keep-best=w2",
                "--keep-checkpoints=1")  # fmt: skip
    values = {r["step"]: r["eval/w2"] for r in read_log(run) if "eval/w2" in r}
    best = min(values, key=values.get)
    assert read_best(run).step == best
    assert load_run(run, step="best").step == best


def test_a_run_without_a_best_checkpoint_says_how_to_get_one(tmp_path, capsys):
    run = train(tmp_path, "--steps=2")
    assert main(["sample", str(run), "--step=best"]) == 2
    assert "chose no best checkpoint; train with --val-every 100 --keep-best val/loss" in capsys.readouterr().err
    assert main(["sample", str(run), "--step=bset"]) == 2


# ------------------------------------------------------------------------------------------------ time
def test_a_limit_of_time_stops_saves_and_prints_how_to_go_on(tmp_path, capsys):
    run = train(tmp_path, "--steps=1000000", "--max-time=1.5s", "--save-every=1000000")
    out = capsys.readouterr().out
    step = load_run(run).step
    assert 0 < step < 1_000_000
    assert f"stopped at step {step} after --max-time 1.5s, saved; continue with: genkit train --resume {run}" in out
    assert main(["train", "--resume", str(run), f"--steps={step + 2}"]) == 0
    assert load_run(run).step == step + 2


# ------------------------------------------------------------------------- killed or stopped before a measurement
OPTIONS = {"objective": "flow", "data": {"name": "moons", "n": 64}, "backbone": {"name": "mlp", "width": 8},
           "batch": 16, "workers": 0, "tensorboard": False, "sample_every": 0, "device": "cpu"}  # fmt: skip


class Killed(BaseException):
    """What ends a process here."""


def killed_before_validation(monkeypatch, step, **options):
    """The directory of a run that was killed when it had saved ``step`` and was about to validate."""
    validate = Session.validate

    def kill(self, state):
        if state.step == step:
            self.writer.wait()
            raise Killed
        validate(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "validate", kill)
        with pytest.raises(Killed):
            genkit.train(**OPTIONS, **options)
    return (Path(options["out"]) / "latest").resolve()


@pytest.mark.parametrize(("optimizer", "step", "val_every"), [
    ("adamw", 8, 4), ("adamw", 12, 5), ("schedule-free", 12, 4), ("tests.training.test_optimizers:Doubled", 8, 4),
])  # fmt: skip
def test_a_run_that_was_killed_before_a_validation_takes_it_when_it_is_resumed(
    optimizer, step, val_every, tmp_path, monkeypatch
):
    """Also one of the last step, where nothing is left to train, and with the weights of evaluation."""
    if optimizer == "schedule-free":
        pytest.importorskip("pytorch_optimizer")
    options = {"steps": 12, "val_every": val_every, "save_every": 4, "keep_best": "val/loss", "optimizer": optimizer}
    whole = genkit.train(**OPTIONS, **options, out=str(tmp_path / "whole"))
    run = killed_before_validation(monkeypatch, step, **options, out=str(tmp_path / "killed"))
    assert step not in [r["step"] for r in validations(run)]
    resumed = genkit.train(resume=run)
    assert validations(run) == validations(whole.directory)
    assert (resumed.best, read_best(run)) == (whole.best, read_best(whole.directory))
    assert genkit.train(resume=run).step == 12  # finished now
    assert validations(run) == validations(whole.directory)


def test_the_trained_model_has_the_weights_of_its_file(tmp_path):
    """Of an optimizer that trains at other weights than it evaluates at too, after training and of a finished run."""
    options = {**OPTIONS, "optimizer": "tests.training.test_optimizers:Doubled"}
    run = genkit.train(**options, steps=3, ema=[], out=str(tmp_path))
    loaded, again = load_run(run.directory, trust=True), genkit.train(resume=run.directory)
    for name, value in loaded.nets["net"].state_dict().items():
        assert torch.equal(value, run.nets["net"].state_dict()[name])
        assert torch.equal(value, again.nets["net"].state_dict()[name])
