"""Opening somebody else's run runs none of their code unless it is trusted."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass

import pytest

import genkit
from genkit.cli.main import main
from genkit.config.trust import class_names
from genkit.data import DATA
from genkit.rl.policies.policy import Policy
from tests.support.data import refuses

TINY = ["--data=moons", "--backbone=mlp", "--backbone.width=8", "--steps=1", "--sample-every=0", "--workers=0"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    out = tmp_path_factory.mktemp("trust")
    assert main(["train", *TINY, "--no-tensorboard", f"--out={out}", "--name=plain"]) == 0
    return out / "0000-plain"


@pytest.fixture
def evil(plain, tmp_path, monkeypatch):
    """A run whose configuration names a module that leaves a mark."""
    run = shutil.copytree(plain, tmp_path / "run")
    (tmp_path / "evil_module.py").write_text("open('PWNED', 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("GENKIT_TRUST", raising=False)
    monkeypatch.delitem(sys.modules, "evil_module", raising=False)

    def name(text):
        (run / "config.yaml").write_text(text)
        return run

    return name


BAD = [
    "data: {name: evil_module:Boom}",
    "data: evil_module:Boom",
    "objective: {name: flow, path: {name: evil_module:Boom}}",
    "objective: {name: flow, path: evil_module:Boom}",
    "backbone: evil_module:Boom",
    "lora: evil_module:Boom",
]


@pytest.mark.parametrize("text", BAD)
def test_no_command_imports_what_a_run_names(text, evil, tmp_path, capsys):
    run = str(evil(text))
    commands = [["sample", run], ["eval", run], ["train", "--resume", run], ["sweep", run]]
    commands += [["train", "--init", run, *TINY], ["finetune", run], ["rollout", run], ["likelihood", run]]
    for argv in commands:
        if argv[1] == "--init" and "objective" not in text and "backbone" not in text:
            continue  # only these are taken
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert "evil_module:Boom, whose code would run" in error, argv
        assert error.count("\n") == 1
    assert main(["report", run]) == 0
    assert main(["info", run]) == 0
    shown = capsys.readouterr().out
    assert "evil_module:Boom, whose code would run; if you trust who made this run: --trust" in shown
    assert "samples        2, conditions: label" in shown
    assert "step-0000001" in shown
    assert text in shown
    with refuses("--trust"):
        genkit.load(run)
    assert not (tmp_path / "PWNED").exists()


def test_trust_allows_it(evil, tmp_path, monkeypatch):
    run = evil(BAD[0])
    with refuses("no such class"):
        genkit.load(run, trust=True)
    assert (tmp_path / "PWNED").exists()
    monkeypatch.setenv("GENKIT_TRUST", "0")
    assert main(["sample", str(run), "--trust"]) == 2  # the module has no such class
    monkeypatch.setenv("GENKIT_TRUST", "0")


def test_a_plain_run_needs_no_trust(plain):
    assert main(["info", str(plain)]) == 0
    assert list(class_names({"init": "a/b:c", "x": {"name": "a.b:C"}})) == [("x.name", "a.b:C")]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A policy and its fine-tuning, of genkit's own environment."""
    out = tmp_path_factory.mktemp("policy")
    argv = ["--data=four-ways", "--data.n=8", *TINY[1:], "--no-tensorboard", f"--out={out}", "--batch=8"]
    assert main(["train", *argv, "--name=policy"]) == 0
    tiny = ["--num-envs=2", "--num-steps=2", "--iterations=1", "--eval-episodes=0", "--method.warmup=0"]
    assert main(["finetune", str(out / "0000-policy"), *tiny, f"--out={out}", "--name=tuned", "--no-tensorboard"]) == 0
    return out


def replaced(run, old, new):
    assert old in run.read_text()
    run.write_text(run.read_text().replace(old, new))


def test_an_environment_that_only_a_run_names_is_trusted_or_given(policy, tmp_path, evil, capsys, monkeypatch):
    """Its module would run; the run itself is opened all the same."""
    pytest.importorskip("gymnasium")
    evil(BAD[0])
    run = shutil.copytree(policy / "0000-policy", tmp_path / "policy")
    monkeypatch.setattr(type(genkit.load(run).config.data), "environment", "evil_module:Boom-v0")
    for argv in (["rollout", str(run)], ["finetune", str(run), "--num-envs=2"]):
        assert main(argv) == 2
        assert "data.env: names evil_module:Boom-v0, whose code would run" in capsys.readouterr().err
    assert not (tmp_path / "PWNED").exists()
    assert main(["info", str(run)]) == 0
    opened = genkit.load(run, trust=True)
    with pytest.raises(ValueError, match="Boom-v0"):  # the module registers none
        Policy.load(opened).make_env(1)
    assert (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(("old", "new"), [
    ("reward: env", "reward: evil_module:boom"),
    ("env: null", "env: evil_module:Boom-v0"),
    ("name: dppo", "name: evil_module:Boom"),
])  # fmt: skip
def test_a_stored_fine_tuning_imports_nothing(policy, tmp_path, evil, capsys, old, new):
    evil(BAD[0])
    shutil.copytree(policy / "0000-policy", tmp_path / "0000-policy")
    tuned = shutil.copytree(policy / "0001-tuned", tmp_path / "0001-tuned")
    replaced(tuned / "finetune.yaml", old, new)
    assert main(["finetune", "--resume", str(tuned)]) == 2
    assert "whose code would run" in capsys.readouterr().err
    with refuses("whose code would run"):
        genkit.finetune(resume=tuned)
    assert not (tmp_path / "PWNED").exists()


def test_the_next_step_of_a_run_with_code_of_ones_own_says_trust(tmp_path, capsys):
    assert main(["train", "--data=tests.config.test_trust:Own", *TINY[1:], f"--out={tmp_path}"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("next     genkit ")
    assert line.endswith(" --trust")
    assert main(line.removeprefix("next     genkit ").split()) == 0


@dataclass(frozen=True, kw_only=True)
class Own(DATA["moons"]):
    """Data of one's own."""
