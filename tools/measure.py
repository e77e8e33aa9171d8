"""Measure the structure of the code: rooms, import contracts, length of functions, documentation, depth of call chains.

    python tools/measure.py [--out FILE]      # docs/results/structure.json, from which tools/tables.py makes a table

A hop is a frame of genkit on the stack between `genkit.cli.main.main` and the
innermost function, which is counted too: Matching.loss (or an override) for training, the network's denoiser for
sampling, a metric's function for evaluation. Tiny runs are made in a temporary folder.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PACKAGE = Path(__file__).resolve().parents[1] / "genkit"
TRAIN = ["train", "--data=digits", "--backbone.width=8", "--backbone.mults", "1", "2", "--steps=1", "--batch=8"]
QUIET = ["--tensorboard=false", "--device=cpu", "--workers=0", "--sample-every=0"]


def functions() -> Iterator[tuple[Path, ast.FunctionDef, bool]]:
    """``(file, function, public)`` of every function and method of the package, nested ones excluded."""
    for file in sorted(PACKAGE.rglob("*.py")):
        waiting: list[tuple[ast.AST, bool]] = [(ast.parse(file.read_text()), True)]
        while waiting:
            scope, public = waiting.pop()
            for node in ast.iter_child_nodes(scope):
                if isinstance(node, ast.ClassDef):
                    waiting.append((node, public and not node.name.startswith("_")))
                elif isinstance(node, ast.FunctionDef):
                    yield file, node, public and not node.name.startswith("_")


def lengths() -> list[int]:
    return sorted((node.end_lineno or node.lineno) - node.lineno + 1 for _, node, _ in functions())


def module_functions_documented() -> tuple[int, int]:
    """How many public functions of modules have a docstring, and how many there are."""
    documented, total = 0, 0
    for file in PACKAGE.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                total += 1
                documented += ast.get_docstring(node) is not None
    return documented, total


def broken_contracts() -> int:
    """1 if import-linter finds a broken contract, else 0; its layers exclude import cycles between rooms."""
    text = subprocess.run(["lint-imports"], capture_output=True, text=True, cwd=PACKAGE.parent).stdout
    return 0 if ", 0 broken" in text else 1


class Reached(Exception):
    """Raised by the innermost function, with the names of the functions that led to it."""


def chain(argv: list[str], owner: Any, name: str) -> list[str]:
    """Functions of genkit from the command line to ``owner.name``, which is replaced while the command runs."""
    from genkit.cli.main import main

    original = getattr(owner, name)

    def stop(*args: Any, **kwargs: Any) -> Any:
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)]
        place = owner.__name__.rpartition(".")[2]
        raise Reached(*(f"{Path(frame.filename).stem}.{frame.name}" for frame in frames), f"{place}.{name}")

    setattr(owner, name, stop)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            main(argv)
    except Reached as reached:
        return list(reached.args)
    finally:
        setattr(owner, name, original)
    raise RuntimeError(f"{' '.join(argv)} never called {name}")


def measure_chains() -> dict[str, list[str]]:
    from genkit.backbones.unet import UNetDenoiser
    from genkit.cli.main import main
    from genkit.evaluation.metrics import kernel
    from genkit.objectives.matching.flow import Flow

    with tempfile.TemporaryDirectory() as folder:
        train = [*TRAIN, *QUIET, "--name=tiny", f"--out={folder}"]
        with contextlib.redirect_stdout(io.StringIO()):
            assert main(train) == 0
        run = f"{folder}/0000-tiny"
        targets: dict[str, tuple[list[str], Any, str]] = {
            "train to the loss": (train, Flow, "loss"),
            "sample to the network": (["sample", run, "--n=2", "--steps=2", "--label=1"], UNetDenoiser, "forward"),
            "eval to the metric": (
                ["eval", run, "--n=64", "--metrics=kid", "--features=raw", "--steps=1"],
                kernel,
                "kid",
            ),
        }
        return {label: chain(*target) for label, target in targets.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=PACKAGE.parent / "docs" / "results" / "structure.json")
    args = parser.parse_args()
    chains = measure_chains()
    sizes = lengths()
    documented, total = module_functions_documented()
    modules = [len(file.read_text().splitlines()) for file in PACKAGE.rglob("*.py")]
    rows = {
        "rooms": len(list(PACKAGE.glob("*/__init__.py"))),
        "broken import contracts": broken_contracts(),
        **{f"hops, {label}": len(names) for label, names in chains.items()},
        "lines of a function: median, 99th percentile, longest": f"{statistics.median(sizes):.0f}, "
        f"{sizes[int(0.99 * len(sizes))]}, {sizes[-1]}",
        "longest module, lines": max(modules),
        "public functions of modules with a docstring": f"{100 * documented / total:.0f} %",
    }
    result = {"command": "python tools/measure.py", "measures": rows, "chains": chains}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, value in rows.items():
        print(f"{name:<55} {value}")
    print(args.out)


if __name__ == "__main__":
    main()
