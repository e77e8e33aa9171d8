"""Sharded training (FSDP) on 2 and 4 ranks: the numbers of one process, a share of its memory, and its files."""

import copy
import functools
import importlib
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

import genkit
from genkit import config
from genkit.backbones import MLP, DiT, UNet, lora
from genkit.backbones.edm2 import EDM2
from genkit.backbones.lora import LoRA
from genkit.config import load_yaml
from genkit.core import Batch, Draw, Label, Spec
from genkit.core.tensors import local_rows
from genkit.data.codecs import Identity
from genkit.training.checkpoint import (
    CheckpointWriter,
    checkpoint_files,
    checkpoint_record,
    restore,
    save_checkpoint,
    write_checkpoint,
)
from genkit.training.directory import list_checkpoints
from genkit.training.distributed import create_sharding
from genkit.training.loop import fit, initial_state
from genkit.training.settings import TrainSettings
from genkit.training.shared_files import Exchange, Piece, compare_written, lay_out, write_together
from tests.support.ranks import kill_when, on_ranks, on_two_ranks

PLANE, PICTURES = Spec((2,), {"label": Label(3)}), Spec((1, 8, 8), {"label": Label(3)})
SMALL_DIT, SMALL_UNET = DiT(width=16, depth=2, head_size=8), UNet(width=8, mults=(1, 2))
VAE = {"name": "vae", "latent": [3], "likelihood": {"name": "gaussian", "scale": "shared"}}
STAGE = {"name": "autoencoder", "latent": [2, 4, 4], "adversarial_weight": 0.5, "adversarial_start": 1}
CASES = {
    "flow": ("flow", SMALL_DIT, PICTURES),
    "gan": ("gan", MLP(width=16, depth=2), PLANE),  # penalties: second derivatives
    "spectral norm": ({"name": "gan", "spectral_norm": True}, MLP(width=16, depth=2), PLANE),
    "vae": (VAE, MLP(width=16, depth=2), PLANE),  # its scale is one number, which is not sharded
    "first stage": (STAGE, SMALL_UNET, PICTURES),
    "edm": ("edm", EDM2(width=8, mults=(1,), num_blocks=1), PICTURES),  # projects its weights; gains are scalars
    "lora": ("flow", SMALL_DIT, PICTURES),
    "flow map": ("flow-map", MLP(width=16, depth=2), PLANE),  # forward mode
    "progressive": ({"name": "progressive-distillation", "teacher_steps": 8, "round_steps": 2}, SMALL_DIT, PICTURES),
}


def start(case, parallel="ddp", accelerator=None, shard_size=None, **changes):
    """The settings, the state before the first step, and the stream of a case, in float64."""
    objective, backbone, spec = CASES[case]
    how = {"steps": 3, "batch": 8, "ema": [0.5, 0.9], "precision": "fp32", "warmup": 0, "clip": 0.1, "lr": 0.01}
    how |= {"schedule": "constant"}
    sharing = {"parallel": parallel, "shard_size": shard_size}
    settings = config.from_dict(TrainSettings, {"objective": objective, **how, **sharing, **changes})
    torch.manual_seed(0)
    nets = settings.objective.networks(backbone, spec)
    nets = {k: net.double() if any(True for _ in net.parameters()) else net for k, net in nets.items()}
    with torch.no_grad():
        for p in (p for net in nets.values() for p in net.parameters()):
            p += 0.1 * torch.randn_like(p)

    def stream(step, draw, first, last):
        rows, draws = torch.arange(first, last), Draw((4, step, draw), first, last)
        x = Draw((3, step, draw), first, last).normal(*spec.shape).double()
        if step == 1 and case == "flow":
            x[rows == 7] = math.nan  # on the last rank
        return Batch(x, {"label": rows % 3}, draw=draws, step=step)

    if case == "lora":
        lora.adapt(nets, LoRA(rank=2, layers="blocks"))
        with torch.no_grad():
            for key, p in nets["net"].named_parameters():
                p += len(key) / 100  # the change is 0 at first
    sharding = create_sharding(settings, accelerator) if accelerator else None
    return settings, initial_state(settings.objective, nets, settings, sharding), stream


def weights(state):
    """All weights of a state by name, of the networks and their averages."""
    assert state.sharding is None
    named = {"net": state.nets, **state.emas}
    return {
        f"{kind}.{name}.{key}": value.detach().clone()
        for kind, nets in named.items()
        for name, net in nets.items()
        for key, value in net.state_dict().items()
    }


def trained(case, parallel="ddp", accelerator=None, shard_size=None, **changes):
    """The whole state after training, its log, and the share of all numbers that this rank kept."""
    settings, state, stream = start(case, parallel, accelerator, shard_size, log_every=1, **changes)
    logged = []
    fit(settings.objective, state, stream, Identity(), settings, accelerator or Accelerator(cpu=True),
        log=logged.append)  # fmt: skip
    kept = [p for net in state.nets.values() for p in net.parameters()]
    share = sum(local_rows(p).numel() for p in kept) / sum(p.numel() for p in kept)
    slots = [v for optimizer in state.optimizers.values() for s in optimizer.state.values() for v in s.values()]
    trains = {k for phase in settings.objective.phases for k in phase.trains}
    numbers = sum(p.numel() for k in trains for p in state.nets[k].parameters())
    optimizer_share = sum(v.numel() for v in slots if v.ndim) / (2 * numbers)
    names = [k for k in logged[0] if k == "skipped" or k.endswith(("loss", "grad_norm"))]
    told = [{k: -1.0 if r[k] is None else r[k] for k in names} for r in logged]  # None: not finite
    return weights(state.gather()), told, (share, optimizer_share)


def require_equal(mine, whole):
    for key, value in mine.items():
        assert torch.allclose(value.double(), whole[key].double(), atol=1e-6, rtol=0), key


def compare(cases, num, parallel, shares, shard_size=None, **changes):
    """Ranks against one process, which has the batch in one piece."""
    for module in ("genkit.training.sharding", "torch._dynamo"):  # what each rank would import for itself
        importlib.import_module(module)
    ranks = on_ranks(num, lambda a: {c: trained(c, parallel, a, shard_size, **changes) for c in cases})
    for case in cases:
        whole, told, _ = trained(case)
        assert told[-1]["skipped"] == (1 if case == "flow" else 0)
        for answer in ranks:
            mine, its_log, share = answer[case]
            require_equal(mine, whole)
            for record, expected in zip(its_log, told, strict=True):
                assert record == pytest.approx(expected, rel=1e-5)  # of gradients, which are then clipped
            assert share == pytest.approx((1 / shares, 1 / shares), rel=0.3)


def test_two_ranks_with_half_of_everything_are_one_process():
    compare(["flow", "gan"], 2, "fsdp", 2, micro_batch=2)


@pytest.mark.slow
def test_two_ranks_are_one_process_for_every_kind_of_loss():
    compare([case for case in CASES if case != "lora"], 2, "fsdp", 2)


@pytest.mark.slow
def test_adapters_of_two_ranks_are_those_of_one_process():
    pytest.importorskip("peft")
    compare(["lora"], 2, "fsdp", 2)


@pytest.mark.slow
def test_compiled_blocks_of_two_ranks_are_one_process(monkeypatch):
    """Graphs are captured and differentiated by AOTAutograd, but not turned into C++, which takes minutes."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    importlib.import_module("genkit.training.sharding")

    def job(accelerator):
        counters.clear()
        found = trained("flow", "fsdp", accelerator, compile=True)[0]
        return found, counters["stats"]["unique_graphs"]

    whole = trained("flow")[0]
    for mine, graphs in on_two_ranks(job):
        assert graphs > 0
        require_equal(mine, whole)


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "shares", "shard_size"), [("fsdp", 4, None), ("hsdp", 2, 2)])
def test_four_ranks_are_one_process(parallel, shares, shard_size):
    compare(["flow", "gan", "first stage"], 4, parallel, shares, shard_size)


def test_settings_that_do_not_fit_are_refused():
    accelerator = Accelerator(cpu=True)
    given = config.from_dict(TrainSettings, {"objective": "flow", "shard_size": 2})
    with pytest.raises(ValueError, match="shard_size: given 2 with --parallel ddp, which has no groups; give hsdp"):
        create_sharding(given, accelerator)
    assert create_sharding(config.override(given, parallel="hsdp"), accelerator) is None  # one rank shares nothing


@pytest.mark.slow
def test_buffers_of_the_first_rank_are_sent_to_the_others():
    """With DDP running statistics differ by the last step's rows only: they are sent before each forward pass."""

    def job(accelerator):
        settings, state, stream = start("vae", "ddp", accelerator)
        net, seen = state.nets["encoder"], []
        net.register_buffer("total", torch.zeros((), dtype=torch.double))
        for ema in state.emas.values():
            ema["encoder"].register_buffer("total", torch.zeros((), dtype=torch.double))

        def count(module, args):
            seen.append((float(module.total), float(args[0].sum())))
            module.total.add_(args[0].detach().sum())

        net.register_forward_pre_hook(count)
        fit(settings.objective, state, stream, Identity(), settings, accelerator)
        return seen

    first, second = on_two_ranks(job)
    assert first[-1][0] != 0
    assert first[-1][1] != second[-1][1]
    assert second[-1][0] == first[-1][0]


# -------------------------------------------------------------------------------------------------- checkpoints
SPEC = PICTURES


def saved(case, folder, parallel="ddp", accelerator=None, steps=2):
    """Train, and save as the session does."""
    settings, state, stream = start(case, parallel, accelerator)
    settings = config.override(settings, steps=steps)
    fit(settings.objective, state, stream, Identity(), settings, accelerator or Accelerator(cpu=True))
    files = checkpoint_files(state, settings.objective)
    record = checkpoint_record(folder, state, SPEC, Identity(), 0)
    exchange = state.sharding.exchange if state.sharding else None
    write_checkpoint(folder, files, record, keep=3, exchange=exchange)


def resumed(case, folder, parallel="ddp", accelerator=None):
    """Load the newest checkpoint, train on to step 3, and return the whole state's weights."""
    settings, state, stream = start(case, parallel, accelerator)
    restore(list_checkpoints(folder)[-1], state, settings.objective)
    fit(settings.objective, state, stream, Identity(), settings, accelerator or Accelerator(cpu=True))
    return weights(state.gather())


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(list_checkpoints(folder)[-1].glob("*.safetensors"))}


def test_ranks_write_the_files_of_one_process_to_the_byte(tmp_path):
    pieces = {f"t{i}": torch.randn(n, 3) for i, n in enumerate((1, 2, 5))} | {"é": torch.zeros(0, 4)}
    pieces |= {"b": torch.ones(2, dtype=torch.bfloat16), "half": torch.ones(3).half(), "count": torch.tensor(7)}
    save_file(pieces, tmp_path / "one.safetensors")

    def job(accelerator):
        rank = accelerator.process_index
        mine = {}
        for name, value in pieces.items():
            size = -(-len(value) // 2) if value.ndim else 0
            rows = slice(rank * size, (rank + 1) * size)
            start = min(rank * size, len(value)) if value.ndim else 0
            mine[name] = Piece(value[rows] if value.ndim else value, tuple(value.shape), start)
        write_together(tmp_path if rank == 0 else None, {"two.safetensors": mine}, Exchange(2))

    on_two_ranks(job)
    assert (tmp_path / "two.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()


def test_what_does_not_arrive_is_found(tmp_path):
    header, offsets, size = lay_out({"a": Piece(torch.ones(2), (4,))})
    (tmp_path / "f").write_bytes(header + bytes(size - len(header)))
    with pytest.raises(OSError, match="what rank 1 wrote did not arrive; all ranks need the same file system"):
        compare_written(tmp_path, [{"f": ([], 0)}, {"f": ([(offsets["a"] + 8, 8)], 12345)}])


def test_a_failure_of_one_rank_is_raised_on_all_and_leaves_the_older_checkpoint(tmp_path):
    def job(accelerator):
        settings, state, _ = start("vae", "fsdp", accelerator)
        record = checkpoint_record(tmp_path, state, SPEC, Identity(), 0)
        files = checkpoint_files(state, settings.objective)
        write_checkpoint(tmp_path, files, record, keep=3, exchange=state.sharding.exchange)
        if accelerator.process_index == 1:
            name, pieces = next(iter(files.items()))
            key = next(iter(pieces))
            files[name] = {**pieces, key: "not a piece"}
        try:
            write_checkpoint(tmp_path, files, {**record, "step": 1}, keep=3, exchange=state.sharding.exchange)
        except OSError as e:
            return str(e)
        return "no error"

    both = on_two_ranks(job)
    assert all("rank 1:" in text for text in both), both
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-0000000"]
    assert (tmp_path / "latest").resolve().name == "step-0000000"


def test_one_process_goes_on_from_two_ranks_and_two_from_one(tmp_path):
    whole = trained("flow")[0]
    on_two_ranks(lambda a: saved("flow", tmp_path / "two", "fsdp", a))
    require_equal(resumed("flow", tmp_path / "two"), whole)
    saved("flow", tmp_path / "one")
    for mine in on_two_ranks(lambda a: resumed("flow", tmp_path / "one", "fsdp", a)):
        require_equal(mine, whole)
    one, two = (contents(tmp_path / k) for k in ("one", "two"))
    assert one.keys() == two.keys()
    for name, content in one.items():
        size = 8 + int.from_bytes(content[:8], "little")  # the same header; no pickle, no zip
        assert content[:size] == two[name][:size], name
        assert len(content) == len(two[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gan", "first stage"])
def test_four_ranks_go_on_from_two(case, tmp_path):
    whole = trained(case)[0]
    on_two_ranks(lambda a: saved(case, tmp_path, "fsdp", a))
    for mine in on_ranks(4, lambda a: resumed(case, tmp_path, "fsdp", a)):
        require_equal(mine, whole)
    require_equal(resumed(case, tmp_path), whole)


# ---------------------------------------------------------------------------------------- writing in the background
def test_a_checkpoint_has_the_state_when_it_was_asked_for(tmp_path):
    settings, state, _ = start("vae")
    before = copy.deepcopy(weights(state))
    files, record = checkpoint_files(state, settings.objective), checkpoint_record(tmp_path, state, SPEC, Identity(), 0)
    with torch.no_grad():
        for p in state.nets["encoder"].parameters():
            p.zero_()
    with CheckpointWriter() as writer:
        writer.start(lambda: write_checkpoint(tmp_path, files, record, keep=1))
    stored = load_file(list_checkpoints(tmp_path)[-1] / "nets.safetensors")
    assert all(torch.equal(value, before[f"net.{key}"]) for key, value in stored.items())


def test_an_error_in_the_background_is_raised_once_by_the_next_save(tmp_path):
    done = []

    def fail():
        raise OSError("no space")

    writer = CheckpointWriter()
    writer.start(fail)
    with pytest.raises(OSError, match="no space"):
        writer.start(lambda: done.append(1))
    writer.start(lambda: done.append(2))
    writer.wait()
    assert done == [2]


def test_a_kill_in_the_background_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    settings, state, _ = start("vae")
    save_checkpoint(tmp_path, state, settings.objective, SPEC, Identity(), seed=0, keep=3)
    state.step = 1
    files, record = checkpoint_files(state, settings.objective), checkpoint_record(tmp_path, state, SPEC, Identity(), 0)
    monkeypatch.setattr("genkit.training.checkpoint.sha256", lambda path: 1 / 0)  # before state.json is written
    writer = CheckpointWriter()
    writer.start(lambda: write_checkpoint(tmp_path, files, record, keep=3))
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    assert json.loads((tmp_path / "latest" / "state.json").read_text())["step"] == 0
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-0000000"]


# ------------------------------------------------------------------------------------------- on the command line
SMALL = ["--batch=32", "--tensorboard=false", "--device=cpu", "--warmup=5", "--log-every=5", "--sample-every=10",
         "--lr=1e-4", "--steps=15"]  # fmt: skip
DIGITS = [
    "--data=digits",
    "--backbone=unet",
    "--backbone.width=8",
    "--backbone.mults",
    "1",
    "2",
    "--backbone.attention",
]
KILLED = {
    "flow": ["--objective=flow", "--data=moons", "--backbone.width=32", "--val-every=10", "--val-n=50"],
    "gan": ["--objective=gan", "--objective.gan-loss=non-saturating", "--data=moons", "--backbone.width=32"],
    "first stage": ["--objective=autoencoder", "--objective.latent", "4", "4", "4", *DIGITS],
}


def launch(folder, num, *args):
    """``genkit train`` on ``num`` ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}", "-m"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([*launcher, "genkit", "train", *args], cwd=folder, env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", KILLED)
def test_a_killed_run_goes_on_with_another_number_of_ranks(case, tmp_path):
    """A step moves a weight by up to 1e-4. Ranks round sums in another order, of which Adam moves a few weights."""
    options = [*SMALL, *KILLED[case]]
    process = launch(tmp_path, 2, *options, "--parallel=fsdp", "--save-every=1")  # so that the kill falls into a save
    kill_when(process, lambda: list((tmp_path / "runs").glob("0*/checkpoints/step-000000[5-9]")))
    (run,) = (tmp_path / "runs").glob("0*")
    assert json.loads((run / "latest/state.json").read_text())["step"] < 15
    process = launch(tmp_path, 4, "--resume=auto", *options, "--parallel=hsdp", "--shard-size=2", "--save-every=10")
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    whole = genkit.train(config.from_dict(TrainSettings, load_yaml(run / "config.yaml")), out=str(tmp_path / "one"))
    mine = genkit.load(run, device="cpu")  # one process reads what four ranks wrote
    assert mine.step == whole.step == 15
    for name, net in whole.nets.items():
        if not net.state_dict():  # a network without weights
            continue
        ours, theirs = (torch.cat([v.flatten() for v in n.state_dict().values()]) for n in (mine.nets[name], net))
        assert float((ours - theirs).abs().mean()) < 2e-6, name
    if mine.objective.is_generative:
        assert mine.sample(4).x.shape == (4, 2)
    for path in (p for p in run.rglob("*") if p.is_file()):
        assert path.suffix in (".safetensors", ".json", ".jsonl", ".yaml", ".png", ".txt"), path
        assert path.read_bytes()[:2] not in (b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK"), path  # pickles, torch.save
