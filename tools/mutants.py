"""Planted faults: one-line mistakes that the tests must catch.

    python tools/mutants.py [--only paths] [--first 0] [--last 20]

`tests/mutants/ROOM.yaml` lists them: a file, the original text (`old`), its replacement (`new`), and the tests that
must detect it. Each is planted in a copy of the tree, and its tests run until one fails. Survivors, and faults whose
tests do not exist, are printed, and the exit code is their number. A fault takes about half a minute, so this is not
part of the test run; `tests/tools/test_mutants.py` checks that the line of each fault still exists.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]


class Fault(NamedTuple):
    """One planted mistake."""

    file: str
    old: str
    new: str
    tests: str
    """arguments of pytest"""


def load_faults() -> list[Fault]:
    """All planted faults, room by room."""
    rooms = (yaml.safe_load(path.read_text()) for path in sorted((ROOT / "tests" / "mutants").glob("*.yaml")))
    return [Fault(file, **fault) for room in rooms for file, faults in room.items() for fault in faults]


def outcome(tree: Path, fault: Fault) -> str:
    """`caught` if a test fails with the fault planted in `tree`, else `SURVIVED`, or `NO TEST` if pytest ran none."""
    file, old, new, tests = fault
    path = tree / file
    original = path.read_text()
    path.write_text(original.replace(old, new, 1))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n0", "-p", "no:cacheprovider", *shlex.split(tests)]
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, timeout=600)
        return {0: "SURVIVED", 4: "NO TEST", 5: "NO TEST"}.get(done.returncode, "caught")
    except subprocess.TimeoutExpired:
        return "caught"  # an endless loop
    finally:
        path.write_text(original)


def main() -> int:
    faults = load_faults()
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", default="", help="faults in files whose path holds this")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=len(faults))
    args = parser.parse_args()
    chosen = [f for f in faults[args.first : args.last] if args.only in f.file]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns("runs", ".git", ".venv", "__pycache__", "*.egg-info"))
        for i, fault in enumerate(chosen):
            said = outcome(tree, fault)
            survivors += said != "caught"
            print(
                f"{i + 1}/{len(chosen)} {said}  {fault.file}: {fault.old!r} -> {fault.new!r}",
                flush=True,
            )
    print(f"{len(chosen) - survivors} of {len(chosen)} caught")
    return survivors


if __name__ == "__main__":
    sys.exit(main())
