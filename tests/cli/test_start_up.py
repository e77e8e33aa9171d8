"""What a command imports before it works: the start of every command, its help and its errors."""

import json
import os
import subprocess
import sys

import pytest

from genkit.cli.main import COMMANDS

SLOW = {  # each takes a tenth of a second or more, and no command needs it to parse its options
    "torch._dynamo", "torch._inductor", "scipy", "sklearn", "matplotlib", "sympy", "tensorboard", "diffusers",
    "transformers", "torchvision", "pandas", "gymnasium", "mujoco",
}  # fmt: skip
REPORT = """
import json, sys
from genkit.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as e:
    code = e.code
print(json.dumps([code or 0, sorted(sys.modules)]), file=sys.stderr)
"""


def imported(*argv: str) -> tuple[int, set[str]]:
    """The exit code of a command in a fresh interpreter, and the modules that it imported."""
    done = subprocess.run([sys.executable, "-c", REPORT, *argv], capture_output=True, text=True, env=dict(os.environ))
    code, modules = json.loads(done.stderr.splitlines()[-1])
    return code, set(modules)


@pytest.mark.parametrize("argv", [("info", "--help"), ("eval", "nowhere"), ("train", "--batchsize", "3")])
def test_help_and_errors_import_nothing_slow(argv):
    code, modules = imported(*argv)
    assert code == (0 if "--help" in argv else 2)
    assert not SLOW & modules
    assert "torch" in modules
    assert len(modules) < 1800


def test_the_list_of_commands_imports_no_torch():
    code, modules = imported("--help")
    assert code == 0
    assert "torch" not in modules
    assert len(modules) < 200


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_starts_without_slow_modules(name):
    code, modules = imported(name, "--help")
    assert code == 0
    assert not SLOW & modules
