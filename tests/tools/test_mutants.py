"""The list of planted faults has not rotted: each still finds its line, and changes it. tools/mutants.py plants
them."""

import re

import pytest

from tools.mutants import ROOT, load_faults

FAULTS = load_faults()


def test_there_are_enough():
    assert len(FAULTS) >= 40
    assert len(set(FAULTS)) == len(FAULTS)


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "mutants").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_file_has_one_list_of_faults(path):
    """Of two with the same heading YAML keeps the last, without a word."""
    headings = re.findall(r"^(\S+):$", path.read_text(), re.MULTILINE)
    assert len(headings) == len(set(headings))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f[0]}: {f[1][:30]}")
def test_fault_still_applies(fault):
    file, old, new, tests = fault
    assert old in (ROOT / file).read_text()
    assert old != new
    assert all((ROOT / t).is_file() for t in tests.split() if t.startswith("tests/"))
