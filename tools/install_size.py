"""Measure what each dependency of genkit adds to site-packages, in MB.

    python tools/install_size.py [--extras docs lora]

`own` counts a package's files as its RECORD lists them; `alone` is what would disappear without the requirement: the
package and those of its dependencies that nothing else brings along. Prints a table in Markdown, as it stands in
docs/contributing/dependencies.md.
"""

from __future__ import annotations

import argparse
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def canonical(name: str) -> str:
    """The normalised project name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def megabytes(name: str) -> float:
    """Size of an installed distribution's files, without byte code."""
    files = distribution(name).files or []
    paths = (Path(str(f.locate())) for f in files if f.suffix != ".pyc")
    return sum(p.stat().st_size for p in paths if p.is_file()) / 1e6


def requirements(texts: list[str], extras: frozenset[str] = frozenset()) -> list[tuple[str, frozenset[str]]]:
    """Names and extras of the requirements that hold in this environment."""
    parsed = [Requirement(text) for text in texts]
    environments = [{"extra": extra} for extra in extras or {""}]
    return [
        (canonical(r.name), frozenset(r.extras))
        for r in parsed
        if r.marker is None or any(r.marker.evaluate(environment) for environment in environments)
    ]


def closure(roots: list[tuple[str, frozenset[str]]]) -> set[str]:
    """Every installed distribution that ``roots`` need, themselves included."""
    waiting, done = list(roots), set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in done:
            continue
        try:
            wanted = distribution(name).requires or []
        except PackageNotFoundError:  # of another platform, or an extra that is not installed
            continue
        done.add((name, extras))
        waiting += requirements(wanted, extras)
    return {name for name, _ in done}


def total(names: set[str]) -> float:
    return sum(megabytes(name) for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--extras", nargs="*", default=[], help="extras to measure on top of the core")
    args = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    core = requirements(project["dependencies"])
    everything = closure(core)
    print("| package | own | alone |\n|---|---:|---:|")
    rows = []
    for root in core:
        rest = closure([other for other in core if other != root])
        rows.append((megabytes(root[0]), total(everything - rest), root[0]))
    for own, alone, name in sorted(rows, reverse=True):
        print(f"| {name} | {own:,.1f} | {alone:,.1f} |")
    print(f"| all, with what they require ({len(everything)} packages) | | {total(everything):,.0f} |")
    for extra in args.extras:
        added = closure(core + requirements(project["optional-dependencies"][extra])) - everything
        print(f"| extra `{extra}` ({len(added)} more packages) | | {total(added):,.0f} |")


if __name__ == "__main__":
    main()
