"""The notebooks are stored as they were executed, and their code runs on today's package."""

import json
import re
from pathlib import Path

import matplotlib as mpl
import pytest

ROOT = Path(__file__).parents[2]
SMALL = {"two_moons": "STEPS, RESOLUTION = 3, 6", "every_sampler": "STEPS, SAMPLES, WIDTH = 3, 20, 8"}
NOTEBOOKS = sorted((ROOT / "examples/notebooks").glob("*.ipynb"))


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_stored_executed(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run(path, tmp_path, monkeypatch):
    """Every cell that is not tagged slow, with the small settings of SMALL in place of the notebook's own."""
    monkeypatch.chdir(tmp_path)
    cells = [source(cell) for cell in code_cells(path) if "slow" not in cell["metadata"].get("tags", [])]
    cells[0] = re.sub(r"^STEPS.*", SMALL[path.stem], cells[0], flags=re.MULTILINE)
    with mpl.rc_context({"backend": "agg"}):
        names = {}
        for cell in cells:
            exec(cell, names)
    assert names["STEPS"] == 3
