"""The training loop and the run directory: exact resume, kills, ranks, micro-batches, what a phase may touch."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from genkit import config
from genkit.backbones import MLP
from genkit.cli.commands.train import main
from genkit.core import Batch, Loss, Objective, Phase, Spec, mean_flat, spec_from_dict, spec_to_dict
from genkit.core.links import set_link
from genkit.data import Stream
from genkit.data.codecs import Identity
from genkit.data.pairs import save_pairs
from genkit.objectives import DDPM, OBJECTIVES, Flow
from genkit.training.averages import Average
from genkit.training.best import read_best
from genkit.training.checkpoint import read_tensors
from genkit.training.directory import read_log, rewind_log
from genkit.training.loop import Diverged, fit, initial_state, require_same
from genkit.training.optimizers.groups import phase_parameters
from genkit.training.run import load_run
from genkit.training.schedules import ConstantRate, CosineDecay, learning_rate
from genkit.training.settings import TrainSettings
from genkit.training.state import State
from tests.support.runs import saved_tensors

SMALL = ["--data=moons", "--backbone.width=32", "--batch=32", "--tensorboard=false", "--device=cpu", "--warmup=5",
         "--log-every=5", "--sample-every=0", "--save-every=1000"]  # fmt: skip
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def genkit(*args, cwd, check=True, **options):
    done = subprocess.run(
        [sys.executable, "-m", "genkit", *args],
        cwd=cwd,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def in_process(tmp_path, *args):
    """`genkit train` without a new process; the run directory."""
    assert main([*SMALL, f"--out={tmp_path}/runs", *args]) == 0
    return (tmp_path / "runs" / "latest").resolve()


def same(a, b):
    a, b = saved_tensors(a), saved_tensors(b)
    assert a.keys() == b.keys()
    return [k for k in a if not torch.equal(a[k], b[k])]


def some_pairs(tmp_path):
    x = torch.randn(100, 2)
    return save_pairs(tmp_path / "pairs.npz", x, x.flip(1), {}, Spec((2,)), Identity(), {})


# ------------------------------------------------------------------------------------------------- resuming
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_resume_is_bit_identical(tmp_path, objective):
    paired = ["--data=pairs", f"--data.root={some_pairs(tmp_path)}", "--backbone=mlp"]
    anchored = ["--data=four-ways", "--data.n=8", "--data.anchors=4"]
    data = paired if OBJECTIVES[objective]().needs_pairs else anchored if objective == "anchored" else []
    adapter = ["--lora=guidance", "--lora.rank=2"] if objective == "guidance-distillation" else []
    if adapter or OBJECTIVES[objective].starts_from:  # it learns from another run
        data = ["--init", str(in_process(tmp_path / "base", "--steps=2")), *adapter]
    args = [f"--objective={objective}", "--steps=14", "--ema", "0.9", "0.99", *data]
    uncut = in_process(tmp_path / "a", *args)
    half = in_process(tmp_path / "b", *args, "--save-every=6")
    # go back to step 6, as a kill at step 13 would leave it
    set_link(half / "latest", "checkpoints/step-0000006")
    for step in ("0000012", "0000014"):
        os.rename(half / "checkpoints" / f"step-{step}", half / f"gone-{step}")
    moved = [] if "--init" in data else data
    resumed = in_process(tmp_path / "b", "--resume", str(half), *moved)
    assert resumed == half
    assert same(uncut, half) == []
    steps = [r["step"] for r in read_log(half)]
    assert steps == sorted(set(steps)), "a line of the log was written twice"
    losses = [[v for r in read_log(run)[1:] for k, v in r.items() if k.endswith("/loss")] for run in (uncut, half)]
    assert losses[0][-1] == losses[1][-1]


def test_resume_of_the_unet_is_bit_identical(tmp_path):
    args = ["--data=digits", "--backbone.width=16", "--batch=8", "--backbone.dropout=0.1", "--save-every=2"]
    uncut = in_process(tmp_path / "a", *args, "--steps=5")
    cut = in_process(tmp_path / "b", *args, "--steps=5")
    for step in ("0000004", "0000005"):
        os.rename(cut / "checkpoints" / f"step-{step}", cut / f"gone-{step}")
    assert main(["--resume", str(cut)]) == 0
    assert same(uncut, cut) == []


def test_a_resumed_run_can_go_further(tmp_path):
    run = in_process(tmp_path, "--steps=4")
    in_process(tmp_path, "--resume", str(run), "--steps=6")
    assert load_run(run).step == 6
    assert len(list((tmp_path / "runs").glob("0*"))) == 1


SLOW = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGUSR1)]


@pytest.mark.parametrize("number", [signal.SIGINT, *SLOW])
def test_a_signal_saves_and_prints_the_command_that_resumes(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-m", "genkit", "train", *SMALL, "--steps=100000"],
        cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(tmp_path / "runs/latest/log.jsonl", process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    command = re.search(r"genkit train --resume (\S+)", out)
    assert command, out
    step = load_run(tmp_path / "runs/latest").step
    assert step > 0
    genkit("train", "--resume", command[1], f"--steps={step + 3}", cwd=tmp_path)
    assert load_run(tmp_path / "runs/latest").step == step + 3


def wait_for(path, process):
    for _ in range(600):
        if path.exists() and path.stat().st_size:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"{path} never came")


def test_kill_at_any_moment_leaves_a_run_that_loads_and_resumes(tmp_path):
    """Checkpoints are written without pause, so the kill falls into one."""
    process = subprocess.Popen(
        [sys.executable, "-m", "genkit", "train", *SMALL, "--steps=100000", "--save-every=1", "--backbone.width=128"],
        cwd=tmp_path, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(tmp_path / "runs/latest/log.jsonl", process)
    process.kill()
    process.wait()
    run = load_run(tmp_path / "runs/latest")
    for checkpoint in (tmp_path / "runs/latest/checkpoints").glob("step-*"):
        read_tensors(checkpoint, "nets.safetensors")
    x, _ = run.sample(4, steps=2)
    assert x.shape == (4, 2)
    genkit("train", "--resume", "runs/latest", f"--steps={run.step + 2}", "--save-every=1000", cwd=tmp_path)
    assert load_run(tmp_path / "runs/latest").step == run.step + 2


# ---------------------------------------------------------------------------------------------------- ranks
def launch(tmp_path, *args):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "-m", "genkit",
               "train", *SMALL, *args]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return (tmp_path / "runs" / "latest").resolve()


def test_two_ranks_equal_one(tmp_path):
    """Global batch 64 on 2 ranks is 64 on one, to float tolerance: same data, same noise, mean gradient."""
    (tmp_path / "two").mkdir()
    args = ["--batch=64", "--steps=12", "--backbone.dropout=0.1", "--sample-every=12"]
    args += ["--val-every=6", "--val-n=90", "--keep-best=val/loss"]
    two = launch(tmp_path / "two", *args, "--micro-batch=16")
    one = in_process(tmp_path / "one", *args)
    a, b = saved_tensors(two), saved_tensors(one)
    assert a.keys() == b.keys()
    for key in a:
        if "nets.safetensors" in key:
            assert torch.allclose(a[key], b[key], atol=2e-5), key
    for name in ("denoise/loss", "val/loss", "val/raw/loss"):
        last = [[r[name] for r in read_log(run) if name in r][-1] for run in (two, one)]
        assert last[0] == pytest.approx(last[1], rel=1e-4), name
    assert read_best(two).step == read_best(one).step == 12
    assert json.loads((two / "env.json").read_text())["world_size"] == 2
    assert (two / "samples/step-0000012.png").exists()
    assert len(list((tmp_path / "two/runs").glob("0*"))) == 1, "both ranks made a directory"


def test_ranks_whose_weights_differ_are_refused():
    class Two:
        num_processes = 2

        def gather(self, sums):
            return torch.cat([sums, sums + drift])

    state = State({"net": nn.Linear(2, 2)}, {}, {})
    drift = 0.0
    require_same(Two(), state)
    drift = 1e-12
    with pytest.raises(AssertionError, match="drifted apart"):
        require_same(Two(), state)


def test_micro_batches_equal_one_batch(tmp_path):
    uncut = in_process(tmp_path / "a", "--steps=8")
    cut = in_process(tmp_path / "b", "--steps=8", "--micro-batch=5")
    a, b = saved_tensors(uncut), saved_tensors(cut)
    for key in a:
        if "nets.safetensors" in key:
            assert torch.allclose(a[key], b[key], atol=2e-5), key


@pytest.mark.slow
def test_compiled_training_gives_the_same_weights_and_tensorboard_events(tmp_path):
    plain = in_process(tmp_path / "a", "--steps=6")
    compiled = in_process(tmp_path / "b", "--steps=6", "--compile", "--tensorboard")
    a, b = saved_tensors(plain), saved_tensors(compiled)
    assert a.keys() == b.keys()
    for key in a:
        if "nets.safetensors" in key:
            assert torch.allclose(a[key], b[key], atol=2e-5), key
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(compiled / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("denoise/loss")] == [5, 6]


def test_a_batch_that_the_ranks_cannot_share_is_refused():
    accelerator = Accelerator(cpu=True)

    class Three:
        num_processes, process_index, device = 3, 0, accelerator.device

    cfg = replace(TrainSettings(), batch=64)
    with pytest.raises(ValueError, match="multiple of 3"):
        fit(Flow(), State({}, {}, {}), None, Identity(), cfg, Three())


# ------------------------------------------------------------------------------------------------- the loop
@dataclass(frozen=True)
class Duel(Objective):
    """Two networks that pull a number to different targets: an objective of two phases."""

    sampler = None
    repeats: int = 2

    @property
    def phases(self):
        return (Phase("a", ("first",), repeats=self.repeats), Phase("b", ("second",), every=2))

    def networks(self, backbones, spec):
        return {"first": nn.Linear(2, 1), "second": nn.Linear(2, 1)}

    def loss(self, phase, nets, batch):
        out = nets["first"](batch.x) + nets["second"](batch.x) - (1.0 if phase == "a" else -1.0)
        return Loss(mean_flat(out**2), {"seen": batch.x[:, 0].mean()})

    def generator(self, nets, sampling=None):
        return lambda z, cond, noise=None: nets["first"](z)


def toy(objective, steps=4, **changes):
    cfg = replace(
        TrainSettings(), steps=steps, batch=16, precision="fp32", warmup=0, log_every=1, ema=(0.9,), **changes
    )
    torch.manual_seed(0)
    data = config.from_dict(TrainSettings, {"data": "moons"}).data.load("train")
    state = initial_state(objective, objective.networks(MLP(), data.spec), cfg)
    return cfg, data, state


def test_a_phase_trains_only_its_own_networks_at_its_own_steps():
    cfg, data, state = toy(Duel(), steps=1)
    steps = {"first": [], "second": []}
    for k in range(4):
        before = {n: net.weight.clone() for n, net in state.nets.items()}
        fit(Duel(), state, Stream(data, 16, 0), Identity(), replace(cfg, steps=k + 1), Accelerator(cpu=True))
        for n, net in state.nets.items():
            steps[n].append(not torch.equal(before[n], net.weight))
    assert steps["first"] == [True] * 4
    assert steps["second"] == [True, False, True, False]
    counts = {
        n: int(state.optimizers[p].state[state.nets[n].weight]["step"]) for n, p in [("first", "a"), ("second", "b")]
    }
    assert counts == {"first": 8, "second": 2}
    assert all(p.grad is None for net in state.nets.values() for p in net.parameters())


def test_repeats_see_different_data():
    cfg, data, state = toy(Duel(), steps=1)
    batches = []
    stream = Stream(data, 16, 0)
    spy = lambda *a: batches.append(stream(*a)) or batches[-1]  # noqa: E731
    fit(Duel(), state, spy, Identity(), cfg, Accelerator(cpu=True))
    assert len(batches) == 3
    assert not torch.equal(batches[0].x, batches[1].x)
    assert not torch.equal(batches[0].normal(), batches[1].normal())


@dataclass(frozen=True)
class Poisoned(Flow):
    """Flow whose gradient is NaN at the named steps."""

    at: tuple[int, ...] = ()
    count: ClassVar[list[int]] = []

    def loss(self, phase, nets, batch: Batch):
        loss = super().loss(phase, nets, batch)
        Poisoned.count.append(0)
        bad = len(Poisoned.count) - 1 in self.at
        return Loss(loss.per_sample * (float("nan") if bad else 1.0), loss.logs)


def test_a_step_without_a_finite_gradient_is_skipped_and_counted():
    Poisoned.count.clear()
    cfg, data, state = toy(Poisoned(at=(2,)), steps=2)
    run = lambda steps: fit(  # noqa: E731
        Poisoned(at=(2,)), state, Stream(data, 16, 0), Identity(), replace(cfg, steps=steps), Accelerator(cpu=True)
    )
    run(2)
    before = {k: v.clone() for k, v in state.nets["net"].state_dict().items()}
    moments = {id(p): s["exp_avg"].clone() for p, s in state.optimizers["denoise"].state.items()}
    run(3)
    assert all(torch.equal(before[k], v) for k, v in state.nets["net"].state_dict().items())
    assert all(torch.equal(moments[id(p)], s["exp_avg"]) for p, s in state.optimizers["denoise"].state.items())
    assert state.skipped == 1
    run(5)
    assert state.skipped == 1
    assert any(not torch.equal(before[k], v) for k, v in state.nets["net"].state_dict().items())


def test_only_bad_steps_in_a_row_end_a_run():
    Poisoned.count.clear()
    objective = Poisoned(at=(0, 1, 3, 4, 6))
    cfg, data, state = toy(objective, steps=8, max_nonfinite_steps=3)
    assert fit(objective, state, Stream(data, 16, 0), Identity(), cfg, Accelerator(cpu=True))
    assert state.skipped == 5


@dataclass(frozen=True)
class Dice(Flow):
    """Flow that notes what torch's own generator, which drives dropout, would give next."""

    rolled: ClassVar[list[float]] = []

    def loss(self, phase, nets, batch: Batch):
        self.rolled.append(float(torch.rand(())))
        return super().loss(phase, nets, batch)


def test_dropout_draws_anew_at_each_step_and_the_same_again():
    for _ in range(2):
        cfg, data, state = toy(Dice(), steps=4)
        fit(Dice(), state, Stream(data, 16, 0), Identity(), cfg, Accelerator(cpu=True))
    first, again = Dice.rolled[:4], Dice.rolled[4:]
    assert first == again
    assert len(set(first)) == 4


def test_after_too_many_bad_steps_the_first_bad_layer_is_named():
    cfg, data, state = toy(Flow(), steps=50, max_nonfinite_steps=3)
    layers = [n for n, m in state.nets["net"].named_modules() if isinstance(m, nn.Linear)]
    bad = layers[len(layers) // 2]
    state.nets["net"].get_submodule(bad).register_forward_hook(lambda m, a, out: out * float("inf"))
    with pytest.raises(Diverged, match=re.escape(f"net.{bad}")):
        fit(Flow(), state, Stream(data, 16, 0), Identity(), cfg, Accelerator(cpu=True))
    assert state.step == 3
    assert all(bool(torch.isfinite(p).all()) for p in state.nets["net"].parameters())


def test_learning_rate_schedule():
    cfg = replace(TrainSettings(), steps=100, warmup=10, lr=1.0, schedule=CosineDecay())
    assert learning_rate(cfg, 0) == pytest.approx(0.1)
    assert learning_rate(cfg, 9) == pytest.approx(1.0)
    assert learning_rate(cfg, 55) == pytest.approx(0.5)
    assert learning_rate(cfg, 99) < 0.01
    constant = replace(cfg, schedule=ConstantRate())
    assert learning_rate(constant, 99) == 1.0
    assert learning_rate(replace(cfg, warmup=0), 0) == 1.0


def test_average_is_an_exponential_mean_with_a_young_phase():
    net, ema = {"n": nn.Linear(2, 2)}, {"n": nn.Linear(2, 2)}
    old, new = ema["n"].weight.clone(), net["n"].weight.clone()
    Average(0.9, ema, net).update(10_000)
    assert torch.allclose(ema["n"].weight, 0.9 * old + 0.1 * new)
    Average(0.999, ema, net).update(0)  # young: (1 + 0) / (10 + 0)
    assert torch.allclose(ema["n"].weight, 0.1 * (0.9 * old + 0.1 * new) + 0.9 * new)


def test_weights_of_samples_count():
    cfg, data, state = toy(Flow(), steps=1)
    stream = Stream(data, 16, 0)
    half = lambda *a: replace(stream(*a), weight=torch.full((a[3] - a[2],), 0.5))  # noqa: E731
    records = []
    fit(Flow(), state, stream, Identity(), cfg, Accelerator(cpu=True), log=records.append)
    _, _, again = toy(Flow(), steps=1)
    fit(Flow(), again, half, Identity(), cfg, Accelerator(cpu=True), log=records.append)
    assert records[1]["denoise/loss"] == pytest.approx(records[0]["denoise/loss"] / 2)
    assert records[1]["denoise/grad_norm"] == pytest.approx(records[0]["denoise/grad_norm"] / 2, rel=1e-4)


def test_phase_parameters_are_named_after_their_network():
    nets = Duel().networks(None, None)
    assert [n for n, _ in phase_parameters(Duel().phases[0], nets)] == ["first.weight", "first.bias"]


# ---------------------------------------------------------------------------------------------- directories
def test_a_run_loads_from_its_config_and_one_checkpoint_alone(tmp_path):
    run = in_process(tmp_path, "--steps=3", "--ema", "0.5", "0.99")
    bare = tmp_path / "bare"
    (bare / "checkpoints").mkdir(parents=True)
    os.rename(run / "config.yaml", bare / "config.yaml")
    os.rename(run / "checkpoints/step-0000003", bare / "checkpoints/step-0000003")
    loaded = load_run(bare)
    assert loaded.spec.shape == (2,)
    assert loaded.weights.endswith("ema-0.99.safetensors")
    assert load_run(bare, ema="none").weights.endswith("nets.safetensors")
    assert load_run(bare, ema="0.5").weights.endswith("ema-0.5.safetensors")
    with pytest.raises(ValueError, match=r"0\.5, 0\.99, none"):
        load_run(bare, ema="0.7")
    assert not any(p.suffix in (".pt", ".pkl", ".bin", ".ckpt") for p in bare.rglob("*"))


def test_the_config_repeats_the_run(tmp_path):
    run = in_process(tmp_path / "a", "--steps=3")
    again = in_process(tmp_path / "b", "--config", str(run / "config.yaml"), f"--out={tmp_path}/b/runs")
    assert same(run, again) == []


def test_damage_is_detected(tmp_path):
    run = in_process(tmp_path, "--steps=2")
    file = next((run / "latest").resolve().glob("ema-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{file.name}: is damaged"):
        load_run(run)


def test_old_checkpoints_are_removed_and_runs_are_numbered(tmp_path):
    first = in_process(tmp_path, "--steps=5", "--save-every=1", "--keep-checkpoints=2")
    assert sorted(p.name for p in (first / "checkpoints").iterdir()) == ["step-0000004", "step-0000005"]
    second = in_process(tmp_path, "--steps=1")
    assert first.name == "0000-moons-flow-mlp"
    assert second.name == "0001-moons-flow-mlp"
    assert load_run(first, step=4).step == 4
    with pytest.raises(ValueError, match="saved: 4, 5"):
        load_run(first, step=3)


@pytest.mark.parametrize(("path", "says"), [("nowhere", "does not exist"), (".", r"holds no config\.yaml")])
def test_what_is_not_a_run_is_refused(tmp_path, path, says):
    with pytest.raises(ValueError, match=says):
        load_run(tmp_path / path)


def test_specs_survive_the_file(tmp_path):
    from genkit.core import Image, Label, Tokens, Vector

    spec = Spec(
        (3, 4, 5), {"label": Label(2, ("a", "b")), "obs": Vector((2, 3)), "image": Image(1), "tokens": Tokens(7)}
    )
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


def test_a_log_cut_by_a_kill_is_read_up_to_there(tmp_path):
    Path(tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert read_log(tmp_path) == [{"step": 1}, {"step": 2}]
    rewind_log(tmp_path, 1)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n'


def test_sample_i_of_a_run_does_not_depend_on_the_batch(tmp_path):
    run = load_run(in_process(tmp_path, "--data=digits", "--backbone.width=16", "--steps=2", "--batch=4"))
    uncut, cond = run.sample(9, sampler="ancestral", steps=4)
    parts, _ = run.sample(9, sampler="ancestral", steps=4, batch=2)
    assert uncut.dtype == torch.uint8
    assert (uncut.int() - parts.int()).abs().max() <= 1
    later, _ = run.sample(3, sampler="ancestral", steps=4, seed=6, cond={"label": cond["label"][6:9]})
    assert (uncut[6:].int() - later.int()).abs().max() <= 1
    assert len(uncut.unique(dim=0)) == 9


def test_ddpm_is_saved_with_its_schedule(tmp_path):
    run = load_run(in_process(tmp_path, "--objective=ddpm", "--objective.timesteps=50", "--steps=1"))
    assert run.objective == DDPM(timesteps=50, loss_space="eps")


# ------------------------------------------------------------------------------------- beginning with other weights
def moved(a, b):
    """How far the weights of two runs are apart, network and average."""
    a, b = (load_file(run / "latest" / "ema-0.999.safetensors") for run in (a, b))
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def test_a_run_starts_from_the_weights_of_another(tmp_path):
    """The slowest average of it, for the network and all its own averages; said in config.yaml and env.json."""
    first = in_process(tmp_path / "a", "--steps=20", "--lr=1e-2", "--ema", "0.5", "0.999", "--seed=3")
    second = in_process(tmp_path / "b", "--steps=1", "--lr=1e-12", f"--init={tmp_path}/a/runs/latest", "--ema=0.999")
    slow = load_file(first / "latest" / "ema-0.999.safetensors")
    for file in ("nets", "ema-0.999"):
        loaded = load_file(second / "latest" / f"{file}.safetensors")
        assert all(torch.allclose(loaded[k], slow[k], atol=1e-6) for k in slow)
    fresh = in_process(tmp_path / "c", "--steps=1", "--lr=1e-12")
    assert moved(second, first) < 1e-6 < 1e-2 < moved(fresh, first)
    assert f"init: {first}" in (second / "config.yaml").read_text()
    begun = json.loads((second / "env.json").read_text())["init"]
    assert begun == {"run": str(first), "weights": "checkpoints/step-0000020/ema-0.999.safetensors"}
    assert json.loads((first / "env.json").read_text())["init"] is None


def test_resume_does_not_load_the_initial_weights_again(tmp_path, capsys):
    """Bit-identical to one that never stopped, even if the run that it began with is gone; --init is refused there."""
    first = in_process(tmp_path / "a", "--steps=3", "--lr=1e-2")
    uncut = in_process(tmp_path / "b", "--steps=6", f"--init={first}")
    cut = in_process(tmp_path / "c", "--steps=6", "--save-every=3", f"--init={first}")
    set_link(cut / "latest", "checkpoints/step-0000003")
    os.rename(cut / "checkpoints/step-0000006", cut / "gone")
    os.rename(first, tmp_path / "elsewhere")
    in_process(tmp_path / "c", "--resume", str(cut))
    assert same(uncut, cut) == []
    with pytest.raises(ValueError, match="leave --init out"):
        main(["--resume", str(cut), "--init", str(uncut)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--backbone.width=16"], r"does not fit, first at net\.\S+: \[.*\] there, \[.*\] here"),
        (["--objective=classifier"], r"does not fit, first at net\.\S+: "),
        (["--init=nowhere"], "does not exist"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, change, message):
    first = in_process(tmp_path / "a", "--steps=1")
    with pytest.raises(ValueError, match=message) as refused:
        in_process(tmp_path / "b", "--steps=1", f"--init={first}", *change)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "b").exists()


def test_missing_pairs_are_refused_before_anything_is_written(tmp_path):
    for option in ("--objective=distillation", "--objective.coupling=given"):
        with pytest.raises(ValueError, match="hold no pairs"):
            in_process(tmp_path / "b", option)
    assert not (tmp_path / "b").exists()


# ------------------------------------------------------------------------------------------- loss-aware times
AWARE = ["--objective.time-distribution=loss-aware", "--batch=128", "--steps=30"]


def test_the_memory_of_losses_is_resumed_bit_identically(tmp_path):
    uncut = in_process(tmp_path / "a", *AWARE)
    cut = in_process(tmp_path / "b", *AWARE, "--save-every=24")
    set_link(cut / "latest", "checkpoints/step-0000024")
    os.rename(cut / "checkpoints/step-0000030", cut / "gone")
    in_process(tmp_path / "b", "--resume", str(cut), *AWARE)
    assert same(uncut, cut) == []
    shares = load_run(uncut).nets["history"].probabilities()
    assert float(shares.max() / shares.min()) > 1.5, "times were still drawn alike"
    begun = in_process(tmp_path / "c", "--steps=1", f"--init={uncut}", "--objective=flow")  # without a memory
    again = in_process(tmp_path / "d", *AWARE[:2], "--steps=1", f"--init={begun}")
    assert load_run(again).nets["history"].num_losses.sum() == 128


@pytest.mark.slow
def test_the_memory_of_losses_is_that_of_all_ranks(tmp_path):
    (tmp_path / "two").mkdir()
    two, one = launch(tmp_path / "two", *AWARE, "--micro-batch=16"), in_process(tmp_path / "one", *AWARE)
    a, b = saved_tensors(two), saved_tensors(one)
    for key in a:
        if "nets.safetensors" in key:
            assert torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-4), key
