"""Generated command lines end as they should: no traceback, no hang, one line for each mistake (tools/fuzz.py)."""

import json
import subprocess
import sys

import pytest

from tools import fuzz


@pytest.mark.parametrize(("configurations", "commands", "seed"), [
    (150, 0, 1),
    pytest.param(2000, 60, 2, marks=pytest.mark.slow),
])  # fmt: skip
def test_generated_command_lines(tmp_path, configurations, commands, seed):
    file = tmp_path / "fuzz.json"
    argv = [f"--configurations={configurations}", f"--commands={commands}", f"--seed={seed}", f"--json={file}"]
    # in a process of its own: it forks, which the threads of autograd do not survive
    done = subprocess.run([sys.executable, fuzz.__file__, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {name: part["counts"] for name, part in json.loads(file.read_text()).items() if isinstance(part, dict)}
    parsed = counts["configurations"]
    assert parsed["accepted"] + parsed["refused"] == configurations
    assert min(parsed.values()) > configurations / 10, "the generator makes nearly only valid, or wrong, lines"
    if commands:
        assert sum(counts["commands"].values()) == commands
        assert counts["commands"]["exit code 0"] > commands / 10


def test_a_failure_is_found(tmp_path, monkeypatch):
    def broken(cls, argv, prog):
        raise KeyError("a bug")

    monkeypatch.setattr(fuzz, "parse", broken)
    assert fuzz.main(["--configurations=3", "--commands=0", f"--json={tmp_path / 'x'}"]) == 1
    assert len(json.loads((tmp_path / "x").read_text())["configurations"]["failures"]) == 3
