"""``genkit bench scale`` in miniature: its numbers, and the pages that show them."""

import json

import pytest

from benchmarks.scale import command, main
from benchmarks.scale.files import measure_decoding, measure_folder, measure_memory
from benchmarks.scale.ranks import measure_ranks
from benchmarks.scale.steps import PLANE, measure_step


def test_parts_that_are_not_run_stay_in_the_file(tmp_path, monkeypatch, capsys):
    out = tmp_path / "scale.json"
    out.write_text('{"folder": [{"files": 1}]}')
    monkeypatch.setitem(command.PARTS, "decode", lambda: [{"size": 64, "images_per_s": 500.0}])
    assert main(["--only", "decode", "--out", str(out)]) == 0
    stored = json.loads(out.read_text())
    assert stored["folder"] == [{"files": 1}]
    assert stored["decode"] == [{"size": 64, "images_per_s": 500.0}]
    assert "500.00" in capsys.readouterr().out


def test_a_step_is_its_passes_and_the_rest():
    row = measure_step("flow", PLANE, 30)
    assert 0 < row["passes_ms"] < row["step_ms"]
    assert row["passes_ms"] + row["overhead_ms"] == pytest.approx(row["step_ms"], rel=0.3)


def test_a_folder_is_listed_and_not_decoded():
    (row,) = measure_folder(600, 3)
    assert 0 < row["list_s"] < row["first_batch_s"]


@pytest.mark.slow
def test_data_and_ranks_are_measured():
    assert [row["size"] for row in measure_decoding(64)] == [64, 256]
    small, large = measure_memory((1, 2), 50)
    assert large["latents_MB"] == pytest.approx(2 * small["latents_MB"], rel=1e-3)
    rows = measure_ranks(64, 16)
    assert [row["what"] for row in rows] == ["encode", "sample"]
    assert all(row["identical"] for row in rows)
