"""A machine without space or memory is one line with advice and exit code 1; a bug keeps its traceback."""

import errno
import importlib
import json
import re
import resource
import subprocess
import sys

import numpy as np
import pytest
import safetensors
import torch

from genkit.cli.main import COMMANDS, command_options, is_user_error, main
from genkit.cli.shortage import OS_ERRORS, explain_shortage

TRAIN = ["train", "--data=moons", "--backbone=mlp", "--steps=4", "--workers=0", "--no-tensorboard", "--sample-every=0"]


def raised_by(work):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        work()
    return caught.value


@pytest.mark.parametrize("work", [
    lambda: torch.empty(2**62, dtype=torch.uint8),
    lambda: torch.empty(2**61),
    lambda: torch.zeros(2**45),
    lambda: torch.arange(2**50),
    lambda: torch.nn.Linear(2**30, 2**30),
    lambda: torch.empty(2**40, 2**40),
    lambda: np.empty(2**62, dtype=np.uint8),
    lambda: np.zeros((2**40, 2**40)),
    lambda: bytearray(2**60),
])  # fmt: skip
def test_what_libraries_say_without_memory_is_recognized(work):
    assert "out of memory" in (explain_shortage(raised_by(work)) or "")


def test_what_the_system_says_is_recognized_within_other_errors():
    for number in OS_ERRORS:
        full = OSError(number, "x", "/here/file")
        assert (explain_shortage(full) or "").startswith("/here/file: ")
        outer = RuntimeError("while saving")
        outer.__cause__ = full
        assert explain_shortage(outer) == explain_shortage(full)
    rust = safetensors.SafetensorError(f"I/O error: No space left on device (os error {errno.ENOSPC})")
    assert "disk is full" in (explain_shortage(rust) or "")


@pytest.mark.parametrize("e", [
    FileNotFoundError(errno.ENOENT, "No such file", "x"), PermissionError(errno.EACCES, "no", "x"), ValueError("shape"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("memory"), safetensors.SafetensorError("head"),
])  # fmt: skip
def test_other_errors_are_not(e):
    assert explain_shortage(e) is None
    assert is_user_error(e) == isinstance(e, OSError)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_device_without_memory_is_one_line_whose_options_the_command_has(name, monkeypatch, capsys):
    """``torch.OutOfMemoryError`` is what CUDA raises."""

    def run(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(importlib.import_module(COMMANDS[name].module), "main", run)
    assert main([name]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "out of memory" in line
    named = re.findall(r"--([a-z-]+)", line)
    options = command_options(name)
    assert all(option.replace("-", "_") in options for option in named), line
    if "batch" in options:
        assert {"batch", *({"micro-batch", "backbone"} if name == "train" else set())} <= set(named)


def genkit(*argv, limit=None):
    def restrict():
        if limit:
            resource.setrlimit(*limit)

    command = [sys.executable, "-m", "genkit", *argv]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=restrict)


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path):
    done = genkit(*TRAIN, f"--out={tmp_path}", limit=(resource.RLIMIT_FSIZE, (200_000, 200_000)))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "ulimit -f" in done.stderr
    assert not [p for p in tmp_path.rglob("*") if "part" in p.name or p.name.startswith("step-")], "litter"
    assert genkit(*TRAIN, f"--out={tmp_path}", "--resume=auto").returncode == 0, "with space it goes on"
    assert json.loads(next(tmp_path.rglob("step-*/state.json")).read_text())


def test_a_network_that_does_not_fit_is_one_line(tmp_path):
    done = genkit("train", "--data=moons", "--backbone=mlp", "--backbone.width=1000000", f"--out={tmp_path}")
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "out of memory" in done.stderr
    assert list(tmp_path.rglob("*")) == [], "a training that never began left something behind"
