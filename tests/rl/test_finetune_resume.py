"""Fine-tuning that is killed, damaged or started twice, and the start as the best checkpoint."""

import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from genkit import config
from genkit.cli.commands.finetune import main as finetune
from genkit.rl.finetune import loop
from genkit.rl.finetune.loop import refuse_changes, stored_finetuning
from genkit.rl.finetune.settings import FinetuneSettings
from genkit.rl.finetune.setup import default_name
from genkit.training.checkpoint import find_checkpoint
from genkit.training.directory import find_run, list_checkpoints, read_log
from genkit.training.lock import RunLock
from genkit.training.run import load_run
from genkit.training.train import train

TINY = ["--num-envs", "4", "--num-steps", "2", "--eval-episodes", "4", "--method.batch", "32", "--method.warmup", "0",
        "--save-every", "1", "--no-tensorboard", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(policy, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    finetune([str(policy), "--iterations", "3", "--out", str(out), *TINY])
    return find_run(out / "latest")


def assert_same_run(a: Path, b: Path):
    first, second = find_checkpoint(a), find_checkpoint(b)
    assert first.name == second.name
    for file in ("nets.safetensors", "ema-0.99.safetensors", "optim.safetensors", "finetune.safetensors"):
        x, y = load_file(first / file), load_file(second / file)
        assert all(torch.equal(x[k], y[k]) for k in x), file
    assert log_without_clocks(a) == log_without_clocks(b)


def log_without_clocks(run: Path):
    clocks = ("seconds", "cpu_seconds")
    return [{k: v for k, v in r.items() if "ms_per" not in k and k not in clocks} for r in read_log(run)]


KILLED = {  # what is running when the process dies
    "before the first evaluation": ("evaluate", 0),
    "in the first iteration": ("iterate", 0),
    "in the last evaluation": ("conclude", 0),
    "at the second checkpoint": ("save_checkpoint", 1),
}


@pytest.mark.parametrize(("method", "calls"), KILLED.values(), ids=KILLED)
def test_a_killed_run_continues_as_if_it_had_not_been(policy, whole, tmp_path, monkeypatch, method, calls):
    original, count = getattr(loop.FineTuning, method), []

    def killed(self, *args):
        count.append(1)
        if len(count) > calls:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(loop.FineTuning, method, killed)
    with pytest.raises(KeyboardInterrupt):
        finetune([str(policy), "--iterations", "3", "--out", str(tmp_path), *TINY])
    monkeypatch.undo()
    run = next(p for p in tmp_path.iterdir() if p.is_dir() and not p.is_symlink())
    finetune(["--resume", str(run)])
    assert_same_run(whole, run)


def test_a_run_that_is_cut_by_the_clock_again_and_again_is_the_same(policy, whole, tmp_path, capsys):
    """No further checkpoint fits into the limit, so each process does one iteration."""
    finetune([str(policy), "--iterations", "3", "--out", str(tmp_path), "--max-time", "0.01s", *TINY])
    run = find_run(tmp_path / "latest")
    out = capsys.readouterr().out
    assert f"stopped at iteration 1 for --max-time 0.01s, saved; continue with: genkit finetune --resume {run}" in out
    assert not (run / "after.json").exists()
    finetune(["--resume", str(run)])
    assert "stopped at iteration 2" in capsys.readouterr().out
    finetune(["--resume", str(run)])
    assert "next     genkit rollout" in capsys.readouterr().out
    assert_same_run(whole, run)


def test_results_are_logged_once_however_often_a_run_is_resumed(whole):
    before = read_log(whole)
    finetune(["--resume", str(whole)])
    finetune(["--resume", str(whole)])
    assert [r["step"] for r in read_log(whole)] == [r["step"] for r in before]
    assert sum("after/return" in r for r in read_log(whole)) == 1


@pytest.mark.parametrize("change", ["--reward=progress", "--seed=9", "--method.lr=1", "--num-envs=9", "--method=rwr"])
def test_a_run_is_not_continued_as_another_one(whole, change):
    before = (whole / "finetune.yaml").read_text()
    with pytest.raises(ValueError, match="a resumed run keeps its"):
        finetune(["--resume", str(whole), "--iterations", "4", change])
    assert (whole / "finetune.yaml").read_text() == before


OTHER = {  # another value for every setting
    "conditions": ["skill=1"], "lora": {"rank": 2},
    "reward": "progress", "method": "rwr", "exploration_noise": "learned", "min_std": 0.5, "steps": 3, "grid":
    "karras", "iterations": 9, "env": "pusht", "env_args": ["a=1"], "mode": 1, "num_envs": 9, "workers": 2,
    "num_steps": 9,
    "act_steps": 2, "terminate_out_of_range": 2.0, "samples": 9, "group": 2, "ema": 0.5, "label": 1,
    "unconditional": True, "max_kl": 2.0, "eval_episodes": 9, "eval_samples": 9, "eval_seed": 9,
    "checkpoint_eval_episodes": 9, "patience": 9, "save_every": 9, "seed": 9, "device": "auto", "threads": 2,
    "precision": "bf16", "micro_batch": 9, "tensorboard": True, "trackers": ["wandb"], "tracker_project": "x",
    "parallel": "fsdp", "shard_size": 2, "max_time": "1h", "out": "x", "name": "x", "note": "x", "tags": ["x"],
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER)
def test_what_may_change_is_marked_in_the_settings_and_nothing_else_may(whole, name):
    """One function refuses for training and for fine-tuning, and both mark their fields in the same way."""
    all_fields = {f.name: f for f in fields(FinetuneSettings)}
    assert all_fields.keys() - OTHER.keys() == {"run", "resume"}
    stored = config.from_dict(FinetuneSettings, stored_finetuning(whole))
    changed = config.override(stored, **{name: OTHER[name]})
    if all_fields[name].metadata.get("changeable"):
        refuse_changes(whole, changed)
    else:
        with pytest.raises(ValueError, match=rf"^{name}(\.\w+)*: given .*a resumed run keeps its {name}"):
            refuse_changes(whole, changed)


def test_a_run_is_continued_from_the_run_that_it_improves(policy, whole, tmp_path):
    stored = config.from_dict(FinetuneSettings, stored_finetuning(whole))
    copy = tmp_path / "copy"
    shutil.copytree(policy, copy)
    with pytest.raises(ValueError, match=r"run: given .*copy, but"):
        refuse_changes(whole, replace(stored, run=str(copy)))
    refuse_changes(whole, replace(stored, run=f"{policy}/../{policy.name}"))


@pytest.mark.parametrize(("base", "name"), [
    ("0002", "dppo"), ("0002-", "dppo"), ("0002-moons-flow", "moons-flow-dppo"), ("best", "best-dppo"),
    ("my-run", "my-run-dppo"),
])  # fmt: skip
def test_the_name_of_a_fine_tuned_run(base, name):
    assert default_name(FinetuneSettings(), Path(base)) == name


def test_training_does_not_continue_a_fine_tuned_run(whole):
    with pytest.raises(ValueError, match="genkit finetune --resume"):
        train(resume=whole, steps=99)


def test_a_damaged_newest_checkpoint_is_passed_over(policy, whole, tmp_path, caplog):
    caplog.set_level("INFO", logger="genkit")
    finetune([str(policy), "--iterations", "3", "--out", str(tmp_path), *TINY])
    run = find_run(tmp_path / "latest")
    newest = list_checkpoints(run)[-1] / "finetune.safetensors"
    newest.write_bytes(newest.read_bytes()[:-3])
    finetune(["--resume", str(run)])
    assert "step-0000003 is damaged (finetune.safetensors); it is skipped" in caplog.text
    assert_same_run(whole, run)


def test_one_process_at_a_time_and_no_file_is_written_in_place(policy, tmp_path, monkeypatch):
    names, original = [], Path.write_text
    monkeypatch.setattr(Path, "write_text", lambda self, *a, **k: (names.append(self.name), original(self, *a, **k))[1])
    finetune([str(policy), "--iterations", "1", "--out", str(tmp_path), *TINY])
    run = find_run(tmp_path / "latest")
    assert not {"config.yaml", "finetune.yaml", "env.json", "before.json", "after.json"} & set(names)
    assert not (run / ".lock-owner").exists()
    lock = RunLock(run)
    with pytest.raises(ValueError, match=r"is being trained by process \d+"):
        finetune(["--resume", str(run)])
    lock.release()


def test_a_refusal_gives_the_run_back(whole, monkeypatch):
    """Also while the error, and with it the frames that it passed, is kept."""

    def refuse(*args, **kwargs):
        raise ValueError("this does not fit")

    monkeypatch.setattr(loop, "build_learner", refuse)
    with pytest.raises(ValueError, match="this does not fit") as error:
        loop.finetune(resume=whole)
    RunLock(whole).release()
    assert error.value


@pytest.mark.parametrize(("returns", "chosen"), [((3, 2, 1, 0), 0), ((1, 0, 3, 2), 2), ((1, 2, 3, 4), 3)])
def test_the_start_is_a_candidate(policy, tmp_path, monkeypatch, returns, chosen):
    left = list(returns)
    monkeypatch.setattr(loop, "evaluate_policy", lambda *args: {"return": {"value": float(left.pop(0))}})
    finetune([str(policy), "--iterations", "3", "--checkpoint-eval-episodes", "4", "--method.lr", "0.01",
              "--out", str(tmp_path), *TINY, "--eval-episodes", "0"])  # fmt: skip
    run, old = load_run(tmp_path / "latest"), load_run(policy)
    assert run.step == chosen
    pairs = zip(run.nets["net"].parameters(), old.nets["net"].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) == (chosen == 0)


def test_a_model_that_leaves_its_origin_is_mentioned_once(policy, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="genkit")
    monkeypatch.setattr(loop, "WARN_KL", -1.0)
    finetune([str(policy), "--iterations", "2", "--out", str(tmp_path), *TINY])
    assert caplog.text.count("warning  kl_reference is") == 1
