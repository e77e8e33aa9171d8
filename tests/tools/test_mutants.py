"""The list of planted faults has not rotted: each still finds its line, and changes it. tools/mutants.py plants
them."""

import pytest

from tools.mutants import ROOT, load_faults

FAULTS = load_faults()


def test_there_are_enough():
    assert len(FAULTS) >= 40
    assert len(set(FAULTS)) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f[0]}: {f[1][:30]}")
def test_fault_still_applies(fault):
    file, old, new, tests = fault
    assert old in (ROOT / file).read_text()
    assert old != new
    assert all((ROOT / t).is_file() for t in tests.split() if t.startswith("tests/"))
