"""Continuing a run: what may change, what is compared, what a damaged or killed run does."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from genkit.cli.main import main
from genkit.core.files import atomic_directory, atomic_write, sweep
from genkit.core.links import set_link
from genkit.core.messages import warn_once
from genkit.core.tensors import sha256
from genkit.data import DataSource
from genkit.training import checkpoint
from genkit.training.checkpoint import find_checkpoint
from genkit.training.directory import find_run, list_checkpoints, read_log, read_state
from genkit.training.lock import RunLock
from genkit.training.resume import continued_settings, find_resumable
from genkit.training.run import load_run
from genkit.training.settings import TrainSettings, stored_settings
from genkit.training.train import train as train_in_python
from tests.support.runs import saved_tensors

SMALL = ["--data=moons", "--data.n=64", "--backbone.width=8", "--batch=16", "--workers=0", "--no-tensorboard",
         "--sample-every=0", "--device=cpu", "--log-every=4"]  # fmt: skip


def train(out, *argv, code=0):
    assert main(["train", *SMALL, f"--out={out}", *argv]) == code
    return (out / "latest").resolve()


def resume(run, *argv):
    return main(["train", "--resume", str(run), *argv])


def same(a, b):
    return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def without_clocks(record):
    return {k: v for k, v in record.items() if k not in ("seconds", "samples_per_s")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Ten steps, with checkpoints at 3, 6, 9 and 10."""
    return train(tmp_path_factory.mktemp("trained"), "--steps=10", "--save-every=3", "--keep-checkpoints=4")


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(trained, tmp_path / "runs" / trained.name, symlinks=True)
    return tmp_path / "runs" / trained.name


# ----------------------------------------------------------------------------------------------- what may change
OTHER = {  # another value for every setting
    "objective": "ddpm", "backbone": "--backbone.width=16", "data": "8gaussians", "steps": 12, "batch": 8,
    "micro_batch": 8, "lr": 0.01, "warmup": 7, "schedule": "constant", "weight_decay": 0.1,
    "optimizer": "sgd", "decay": "all", "phase_settings": ("denoise.lr=2e-3",), "betas": (0.8, 0.9),
    "clip": 2.0, "ema": (0.9,), "precision": "bf16", "compile": True, "seed": 3, "device": "auto", "threads": 2,
    "parallel": "fsdp", "shard_size": 2, "rank_timeout": "1h", "power_ema": (0.1,), "power_ema_every": 7,
    "power_ema_keep": 64,
    "out": "elsewhere", "name": "other", "save_every": 7, "sample_every": 9, "eval_every": 5, "eval_n": 10,
    "eval_metrics": "mmd", "eval_steps": 3, "eval_features": "raw", "eval_weights": "w", "log_every": 3,
    "rollout_every": 4, "rollout_episodes": 7, "rollout_steps": 3, "rollout_max_steps": 9,
    "rollout_conditions": ("skill=1",), "val_every": 4, "val_n": 7, "keep_best": "val/loss",
    "patience": 2, "max_time": "1h", "keep_checkpoints": 9,
    "workers": 1, "max_nonfinite_steps": 3, "tensorboard": True,
    "trackers": ("wandb",), "tracker_project": "mine", "codec": "run",
    "codec_posterior": "mean", "init": "run", "lora": "--lora.rank=2", "base_dtype": "bf16", "quantize": "int8",
    "prior": "--prior.preserve=1", "sample_prompts": "prompts.txt", "sample_guidance": 2.0, "val_levels": (0.5,),
}  # fmt: skip


@pytest.mark.parametrize("field", dataclasses.fields(TrainSettings), ids=lambda f: f.name)
def test_how_long_how_often_and_how_fast_may_change_and_nothing_else(run, field):
    """Every setting, also one that is added later: it has to be listed here."""
    if field.name in ("resume", "step", "dry_run", "note", "tags"):  # config.yaml never holds them
        return
    old = stored_settings(run)
    value = OTHER[field.name]
    if field.name in ("objective", "backbone", "data", "lora", "optimizer", "schedule", "prior"):
        from genkit.config import override

        block = {"backbone": {"width": 16}, "lora": {"rank": 2}, "prior": {"preserve": 1.0}}.get(field.name, value)
        new = override(old, **{field.name: block})
    else:
        new = dataclasses.replace(old, **{field.name: value})
    notes = []
    if field.metadata.get("changeable"):
        assert getattr(continued_settings(run, new, notes.append), field.name) == getattr(new, field.name)
        assert len(notes) == 1
        assert field.name in notes[0]
    else:
        with pytest.raises(ValueError, match=rf"^{field.name}(\.\w+)*: given .* was trained with .*--init") as e:
            continued_settings(run, new, notes.append)
        assert "\n" not in str(e.value)


def test_a_refused_change_leaves_the_run_as_it_was(run, capsys):
    before = (run / "config.yaml").read_text()
    assert resume(run, "--objective=ddpm", "--steps=12") == 2
    assert "was trained with flow" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == before
    assert find_checkpoint(run).name == "step-0000010"


def test_a_change_is_said_and_the_old_settings_are_kept(run, capsys):
    assert resume(run, "--steps=12", "--lr=0.01") == 0
    out = capsys.readouterr().out
    assert "steps: 10 -> 12" in out
    assert "lr: 0.001 -> 0.01" in out
    assert "the learning rate at step 10 is" in out
    assert "steps: 10\n" in (run / "config-10.yaml").read_text()
    assert "steps: 12\n" in (run / "config.yaml").read_text()


# ---------------------------------------------------------------------------------------------------- the data
def test_data_of_other_classes_are_refused_and_other_content_is_said(tmp_path, capsys):
    from PIL import Image

    folder = tmp_path / "pictures"
    for i, name in enumerate(["b", "c"]):
        (folder / name).mkdir(parents=True)
        for k in range(6):
            Image.new("L", (8, 8), 40 * i + k).save(folder / name / f"{k}.png")
    argv = [
        f"--data={folder}",
        "--data.size=8",
        "--data.held-out=0",
        *SMALL[3:],
        "--backbone=mlp",
        f"--out={tmp_path}/runs",
        "--steps=4",
    ]
    assert main(["train", *argv, "--batch=4"]) == 0
    run = (tmp_path / "runs" / "latest").resolve()
    Image.new("L", (8, 8), 200).save(folder / "c" / "new.png")
    capsys.readouterr()
    assert resume(run, "--steps=5") == 0
    assert "12 samples when the run was saved, 13 now" in capsys.readouterr().out
    os.rename(folder / "b", folder / "zz")
    assert resume(run, "--steps=6") == 2
    assert "label was ['b', 'c'], and is ['c', 'zz'] now" in capsys.readouterr().err


def test_data_may_move(tmp_path, capsys):
    from PIL import Image

    (tmp_path / "here").mkdir()
    for k in range(6):
        Image.new("L", (8, 8), 30 * k).save(tmp_path / "here" / f"{k}.png")
    argv = [f"--data={tmp_path}/here", *SMALL[3:], "--backbone=mlp", f"--out={tmp_path}/runs", "--steps=4", "--batch=4"]
    assert main(["train", *argv]) == 0
    os.rename(tmp_path / "here", tmp_path / "there")
    run = (tmp_path / "runs" / "latest").resolve()
    assert resume(run, "--steps=5", f"--data.root={tmp_path}/there") == 0
    assert "data: " in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- checkpoints
def test_an_earlier_checkpoint_leads_to_the_same_weights_and_keeps_the_later_ones(run, trained):
    assert resume(run, "--step=6") == 0
    assert same(saved_tensors(run), saved_tensors(trained))
    assert {p.name for p in (run / "checkpoints" / "superseded").iterdir()} == {"step-0000009", "step-0000010"}
    assert resume(run, "--step=5") == 2


@pytest.mark.parametrize("name", ["nets", "ema-0.999", "optim"])
@pytest.mark.parametrize("how", ["cut", "empty", "flip", "gone"])
def test_a_damaged_newest_checkpoint_is_passed_over_and_said(run, trained, capsys, name, how):
    damage(run / "checkpoints" / "step-0000010" / f"{name}.safetensors", how)
    assert resume(run) == 0
    assert "step-0000010 is damaged" in capsys.readouterr().out
    assert same(saved_tensors(run), saved_tensors(trained))


def test_damaged_checkpoints_are_set_aside_and_count_no_longer(run, trained, capsys):
    """One that stayed would be newer than what is saved next, and make it be removed."""
    damage(run / "checkpoints" / "step-0000010" / "nets.safetensors", "cut")
    assert resume(run, "--keep-checkpoints=1", "--save-every=2", "--steps=12") == 0
    assert "1 later checkpoint is set aside in" in capsys.readouterr().out
    assert [p.name for p in list_checkpoints(run)] == ["step-0000012"]
    assert [p.name for p in (run / "checkpoints" / "damaged").iterdir()] == ["step-0000010"]


def test_a_run_whose_checkpoints_are_all_damaged_begins_again(run, trained, capsys):
    for path in list_checkpoints(run):
        damage(path / "optim.safetensors", "empty")
    assert resume(run, "--step=9") == 2
    assert "has no intact checkpoint" in capsys.readouterr().err
    assert resume(run) == 0
    assert "no intact checkpoint is left: the run begins again at step 0" in capsys.readouterr().out
    assert same(saved_tensors(run), saved_tensors(trained))
    assert [*map(without_clocks, read_log(run))] == [*map(without_clocks, read_log(trained))]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"step": 10}', "\xff"])
def test_a_checkpoint_whose_record_is_damaged_is_incomplete(run, trained, content):
    (run / "checkpoints" / "step-0000010" / "state.json").write_text(content, encoding="latin-1")
    assert [p.name for p in list_checkpoints(run)] == ["step-0000003", "step-0000006", "step-0000009"]
    assert main(["info", str(run)]) == 0
    assert resume(run) == 0
    assert same(saved_tensors(run), saved_tensors(trained))


USES = {
    "info": ["info"], "sample": ["sample", "--n=1", "--steps=1"], "likelihood": ["likelihood", "--n=2", "--steps=2"],
}  # fmt: skip


@pytest.mark.parametrize("command", USES)
@pytest.mark.parametrize(
    ("name", "how"), [("state.json", "cut"), ("state.json", "gone"), ("ema-0.999.safetensors", "flip")]
)
def test_every_use_of_a_damaged_run_says_which_checkpoint_it_takes(run, capsys, command, name, how):
    damage(run / "checkpoints" / "step-0000010" / name, how)
    warn_once.cache_clear()
    assert main([USES[command][0], str(run), *USES[command][1:]]) == 0
    said = capsys.readouterr()
    assert f"step-0000010 is damaged ({name}); step-0000009 is used" in said.err
    if command == "info":
        assert ("step-0000010 (damaged)" in said.out) == (name == "state.json")
    assert main(["sample", str(run), "--step=10"]) == 2
    error = capsys.readouterr().err
    assert f"step-0000010/{name}: is damaged" in error or "saved: 3, 6, 9" in error
    assert resume(run) == 0
    assert f"step-0000010 is damaged ({name}); it is skipped" in capsys.readouterr().out


def damage(path, how):
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "flip":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    else:
        path.write_bytes(content[: len(content) // 2] if how == "cut" else b"")


def test_a_run_that_was_killed_before_latest_moved_is_used_from_its_newest_checkpoint(run):
    set_link(run / "latest", "checkpoints/step-0000009")
    assert resume(run) == 0
    assert find_checkpoint(run).name == "step-0000010"


def test_checkpoints_are_sorted_by_number(run):
    folder = run / "checkpoints"
    os.rename(folder / "step-0000003", folder / "step-9999500")
    os.rename(folder / "step-0000006", folder / "step-10000000")
    assert [p.name for p in list_checkpoints(run)][-2:] == ["step-9999500", "step-10000000"]


def test_a_run_without_a_checkpoint_begins_again(run, trained, capsys):
    shutil.rmtree(run / "checkpoints")
    (run / "latest").unlink()
    assert resume(run) == 0
    assert "begins again at step 0" in capsys.readouterr().out
    assert same(saved_tensors(run), saved_tensors(trained))


def test_latest_points_at_a_run_that_can_be_used(tmp_path):
    good = train(tmp_path, "--steps=2")
    assert main(["train", *SMALL, f"--out={tmp_path}", "--steps=5", "--lr=1e38", "--max-nonfinite-steps=1"]) == 2
    assert (tmp_path / "latest").resolve() == good


def test_a_users_file_called_latest_is_not_replaced(tmp_path, capsys):
    (tmp_path / "latest").write_text("precious")
    assert main(["train", *SMALL, f"--out={tmp_path}", "--steps=2"]) == 2
    assert "is in the way" in capsys.readouterr().err
    assert (tmp_path / "latest").read_text() == "precious"


@pytest.fixture
def no_links(monkeypatch):
    """A file system without symbolic links."""

    def refuse(*args, **options):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "symlink", refuse)


def test_no_symbolic_link_is_needed(no_links, tmp_path, capsys):
    """Training, resuming and every reader of `runs/latest`."""
    runs = tmp_path / "runs"
    for steps in (2, 4):
        assert main(["train", *SMALL, f"--out={runs}", f"--steps={steps}", "--save-every=2"]) == 0
    run = find_run(runs / "latest")
    assert (run.name, (runs / "latest").is_symlink()) == ("0001-moons-flow-mlp", False)
    assert find_checkpoint(run).name == "step-0000004"
    latest = f"{runs}/latest"
    for argv in (
        ["train", "--resume", latest, "--steps=6"],
        ["train", *SMALL, f"--out={runs}", "--steps=4", f"--init={latest}"],
        ["info", f"{runs}/0001-moons-flow-mlp"],
        ["sample", latest, "--n=4", "--steps=2", "--format=npz"],
        ["eval", latest, "--n=20", "--steps=2", "--metrics=w2"],
        ["eval", f"{latest}/samples/sample-step4-heun2-seed0-n4.npz", "--reference=moons", "--n=4", "--metrics=w2"],
        ["eval", "--compare", latest, latest],
        ["report", latest],
    ):
        assert main(argv) == 0, (argv, capsys.readouterr().err)
    assert find_checkpoint(run).name == "step-0000006"
    assert (find_run(latest).name, load_run(latest).step) == ("0002-moons-flow-mlp", 4)


def test_an_empty_configuration_is_damage_and_not_the_defaults(run, capsys):
    (run / "config.yaml").write_text("")
    for argv in (["train", "--resume", str(run)], ["sample", str(run)]):
        assert main(argv) == 2
        assert "is empty" in capsys.readouterr().err


def test_an_empty_text_is_no_run(capsys):
    assert main(["train", "--resume="]) == 2
    assert "given an empty text" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- log, lock
@pytest.mark.parametrize("at", [5, 6, 7])
def test_the_log_continues_as_if_nothing_had_happened(tmp_path, at):
    """Also between two lines of the log, whose means then span the interruption."""
    whole = train(tmp_path / "a", "--steps=12", f"--save-every={at}")
    cut = train(tmp_path / "b", "--steps=12", f"--save-every={at}")
    assert resume(cut, f"--step={at}") == 0
    assert [*map(without_clocks, read_log(cut))] == [*map(without_clocks, read_log(whole))]
    seconds = [r["seconds"] for r in read_log(cut)]
    assert seconds == sorted(seconds)


def test_damaged_lines_of_the_log_are_skipped_and_kept(run, capsys):
    lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text(lines[0][:20] + "\n" + "".join(lines[1:]) + '{"stop": 9}\n')
    assert resume(run, "--steps=12") == 0
    assert "2 lines of log.jsonl cannot be read" in capsys.readouterr().out
    assert [r["step"] for r in read_log(run)] == [8, 10, 12]
    assert len((run / "log.jsonl.bak").read_text().splitlines()) == 4
    (run / "log.jsonl").write_text("{\n" + (run / "log.jsonl").read_text())
    assert resume(run, "--steps=14") == 0
    assert "kept as log.jsonl.bak.1" in capsys.readouterr().out
    assert len((run / "log.jsonl.bak").read_text().splitlines()) == 4
    assert (run / "log.jsonl.bak.1").read_text().startswith("{\n")


def test_one_process_at_a_time(run, capsys):
    holder = "import sys, time; from pathlib import Path; from genkit.training.lock import RunLock; "
    holder += f"lock = RunLock(Path({str(run)!r})); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        try:
            assert resume(run, "--steps=12") == 2
            assert f"is being trained by process {process.pid} on" in capsys.readouterr().err
        finally:
            process.kill()
    assert resume(run, "--steps=12") == 0  # a lock does not outlive its process
    RunLock(run).release()
    assert not [p for p in run.iterdir() if p.name.startswith(".lock")]


@pytest.mark.parametrize("change", [{"objective": "ddpm"}, {"step": 5}, {"data": {"root": "x"}}, {"device": "cuda:99"}])
def test_a_refusal_gives_the_run_back(run, change):
    """Also while the error, and with it the frames that it passed, is kept."""
    with pytest.raises((ValueError, RuntimeError, AssertionError)) as error:
        train_in_python(resume=run, **change)
    RunLock(run).release()
    assert error.value


def test_a_resumed_checkpoint_is_hashed_once(run, monkeypatch):
    hashed = []
    monkeypatch.setattr(checkpoint, "sha256", lambda path: (hashed.append(path), sha256(path))[1])
    train_in_python(resume=run)
    folder = find_checkpoint(run)
    assert sorted(hashed) == sorted(folder.glob("*.safetensors"))


def test_what_killed_processes_left_is_swept(run):
    gone = 2**22 + 1  # above the largest process number
    for name in (f".config.yaml-{gone}.part", f".latest-{gone}"):
        (run / name).write_text("x")
    (run / "checkpoints" / f".step-0000012-{gone}.part").mkdir()
    (run / f".mine-{os.getpid()}.part").write_text("x")
    (run / ".notes-20261125").write_text("a file of the user's")
    assert resume(run, "--steps=12") == 0
    left = [p.name for folder in (run, run / "checkpoints") for p in folder.iterdir() if p.name.startswith(".")]
    assert sorted(left) == [f".mine-{os.getpid()}.part", ".notes-20261125"]


# ----------------------------------------------------------------------------------------------- requeued jobs
def test_auto_continues_the_run_that_these_settings_began(tmp_path):
    argv = ["--steps=6", "--resume=auto"]
    first = train(tmp_path, *argv)
    assert train(tmp_path, "--steps=8", "--resume=auto") == first
    other = train(tmp_path, *argv, "--seed=1")
    assert other != first
    assert len([p for p in tmp_path.iterdir() if not p.is_symlink()]) == 2
    assert find_resumable(dataclasses.replace(stored_settings(other), seed=2)) is None


@pytest.mark.parametrize(("argv", "steps"), [([], 2), (["--warmup=100"], 100)])  # decided, and once the default
def test_a_run_keeps_the_warmup_that_it_began_with(tmp_path, argv, steps):
    run = train(tmp_path, "--steps=10", *argv)
    settings = dataclasses.replace(stored_settings(run), warmup=None, steps=5000)
    assert stored_settings(run).warmup == continued_settings(run, settings, print).warmup == steps
    assert find_resumable(settings) == find_resumable(dataclasses.replace(settings, warmup=steps)) == run
    assert find_resumable(dataclasses.replace(settings, warmup=7)) is None


def test_auto_compares_paths_as_they_are_resolved(tmp_path, monkeypatch):
    """`--init runs/a` and a first stage named relative to the working directory are the same from everywhere."""
    first = train(tmp_path / "a", "--steps=2")
    monkeypatch.chdir(tmp_path)
    run = train(tmp_path / "b", "--steps=2", "--init=a/latest", "--resume=auto")
    again = train(tmp_path / "b", "--steps=3", f"--init={os.path.relpath(first)}", "--resume=auto")
    assert again == run
    assert stored_settings(run).init == str(first)


@pytest.mark.parametrize("setting", ["init", "codec"])
def test_auto_refuses_a_latest_that_it_moves_itself(tmp_path, capsys, setting):
    first = train(tmp_path, "--steps=2")
    assert main(["train", *SMALL, f"--out={tmp_path}", f"--{setting}={tmp_path}/latest", "--resume=auto"]) == 2
    assert f"name the run itself: {first}" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- killed machines
def test_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    """What a power cut can leave is an old file or a new one: fsync comes before the rename."""
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b))[1])
    with atomic_write(tmp_path / "file") as part:
        part.write_text("x")
    assert events == ["sync", "rename", "sync"]
    events.clear()
    with atomic_directory(tmp_path / "folder") as part:
        (part / "a").write_text("x")
        (part / "b").write_text("x")
    assert events == ["sync", "sync", "sync", "rename", "sync"]


def test_a_directory_that_is_not_finished_never_has_its_name(tmp_path):
    with contextlib.suppress(KeyError), atomic_directory(tmp_path / "folder") as part:
        (part / "a").write_text("x")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    sweep(tmp_path / "absent")


@pytest.mark.slow
def test_a_signal_is_heard_while_pictures_are_drawn(tmp_path):
    """Drawing 80 samples by 20 steps of a wide network takes long; the signal ends it, and the work is saved before."""
    argv = [sys.executable, "-m", "genkit", "train", "--data=digits", "--backbone.width=96", "--batch=2", "--steps=4",
            "--save-every=2", "--sample-every=2", "--workers=0", "--device=cpu", f"--out={tmp_path}"]  # fmt: skip
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        saved = tmp_path / "0000-digits-flow-unet" / "checkpoints" / "step-0000002" / "state.json"
        while not saved.is_file():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        began = time.perf_counter()
        assert process.wait(60) == 130
    assert not list(saved.parents[2].glob("samples/*.png"))
    assert time.perf_counter() - began < 30
    assert read_state(find_checkpoint(saved.parents[2]))["step"] in (2, 3)
    assert json.loads(saved.read_text())["data"]["n"] > 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interrupted(DataSource):
    """Data whose process gets a signal while it loads them."""

    signal: int = signal.SIGTERM

    def load(self, split="train"):
        os.kill(os.getpid(), self.signal)
        time.sleep(5)
        raise AssertionError("the signal was not heard")


@pytest.fixture
def heard():
    """SIGINT is heard, which a shell's background jobs ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step_is_one_line(tmp_path, capsys, number):
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    argv = ["train", f"--data={__name__}:Interrupted", f"--data.signal={number}", f"--out={tmp_path}"]
    assert main([*argv, "--backbone=mlp"]) == 130
    assert capsys.readouterr().err == "genkit: interrupted\n"
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert list(tmp_path.iterdir()) == []


def test_configurations_are_never_written_in_place(run, monkeypatch):
    """A kill or a full disk while config.yaml is written leaves the old one."""
    write = Path.write_text

    def full(path, *args, **options):
        if "config.yaml" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, *args, **options)

    before = (run / "config.yaml").read_text()
    monkeypatch.setattr(Path, "write_text", full)
    assert resume(run, "--steps=12") == 1
    assert (run / "config.yaml").read_text() == before
