"""Opening somebody else's run runs none of their code unless it is trusted."""

from __future__ import annotations

import shutil
import sys

import pytest

import genkit
from genkit.cli.main import main
from genkit.config.trust import class_names
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
    commands = [["info", run], ["sample", run], ["eval", run], ["train", "--resume", run], ["sweep", run]]
    commands += [["train", "--init", run, *TINY], ["finetune", run], ["rollout", run], ["likelihood", run]]
    for argv in commands:
        if argv[1] == "--init" and "objective" not in text and "backbone" not in text:
            continue  # only these are taken
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert "evil_module:Boom, whose code would run" in error, argv
        assert error.count("\n") == 1
    assert main(["report", run]) == 0
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
