"""``genkit bench gpu`` in miniature on the CPU: every part runs, what needs CUDA is said, failures are recorded."""

import json
import math
import time
import warnings

import pytest
import torch

from benchmarks.gpu import command, training
from benchmarks.gpu.command import PARTS, Part, format_page, format_table, run_apart, run_part
from benchmarks.gpu.crashes import FROM_TEACHER
from benchmarks.gpu.setup import NEEDS_CUDA, Setup, train_steps
from genkit.cli.main import main
from genkit.objectives import OBJECTIVES, Flow
from tests.support.pretended_device import CUDA, PretendedDevice

CPU = torch.device("cpu")
STARTS = 8  # seconds that the process of a part takes to begin


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    assert main(["bench", "gpu", "--device", "cpu", "--tiny", "--out", str(out)]) == 0
    return json.loads(out.read_text()), out.with_suffix(".md").read_text()


def rows(result, part):
    return result[0]["parts"][part]["rows"]


def test_every_part_ran_and_said_what_needs_cuda(result):
    states = {name: part["state"] for name, part in result[0]["parts"].items()}
    assert states == {name: NEEDS_CUDA if part.needs_cuda else "done" for name, part in PARTS.items()}
    assert [name for name, state in states.items() if state == NEEDS_CUDA] == ["waits"]
    assert result[0]["tiny"] is True


def test_no_objective_crashes(result):
    cells = {row["objective"]: set(row.values()) - {row["objective"]} for row in rows(result, "table")}
    assert cells == {name: {"ok"} for name in set(OBJECTIVES) - set(FROM_TEACHER)}


def test_the_run_resumes_exactly_and_is_measured(result):
    values = {row["what"]: row["value"] for row in rows(result, "digits")}
    assert values.pop("largest difference of weights after a resume") == 0
    assert values.keys() == {"mean level of samples", "kid"}
    assert all(math.isfinite(v) for v in values.values())


def test_steps_are_measured_where_they_can_be(result):
    cells = {row["kind"]: row for row in rows(result, "step")}
    assert cells["compiled"]["samples_per_s"] == NEEDS_CUDA
    for kind in ("plain", "checkpoint"):
        row = cells[kind]
        assert row["samples_per_s"] == pytest.approx(row["batch"] / row["step_ms"] * 1e3, rel=1e-2)
    assert {
        "NCHW": sum(not row["cudnn_benchmark"] and row["step_ms"] > 0 for row in rows(result, "layouts")[:2]),
        "benchmark": sum(row["step_ms"] == NEEDS_CUDA for row in rows(result, "layouts")[2:4]),
    } == {"NCHW": 2, "benchmark": 2}


def test_differences_of_precisions_are_small_and_not_zero(result):
    cells = {row["precision"]: row for row in rows(result, "precision") if not row["compiled"]}
    assert cells["tf32"]["step_ms"] == NEEDS_CUDA
    assert cells["fp32"]["largest_difference"] == 0
    for precision in ("bf16", "fp16"):
        assert 0 < cells[precision]["mean_difference"] <= cells[precision]["largest_difference"]
        assert cells[precision]["largest_difference"] < 0.05 * cells[precision]["std_of_samples"]
    assert [row["guidance"] for row in rows(result, "guidance")] == [
        "none",
        "together",
        "apart",
        "on half of the levels",
    ]


def test_the_page_has_every_part_and_row(result):
    stored, page = result
    for name, part in stored["parts"].items():
        assert PARTS[name].summary[1:] in page
        for row in part["rows"]:
            assert f"| {next(iter(row.values()))} |" in page
    assert "the numbers mean nothing" in page
    assert "the numbers mean nothing" not in format_page({**stored, "tiny": False})


def test_it_takes_at_most_ten_minutes():
    assert sum(part.budget + STARTS for part in PARTS.values()) <= 600


def failing(setup):
    yield {"what": "a row before"}
    raise RuntimeError("CUDA error:\n an illegal memory access")


def endless(setup):
    yield {"what": "a row before"}
    for _ in range(300):
        time.sleep(0.01)


@pytest.mark.parametrize(("measure", "state", "error"), [
    (failing, "failed", "RuntimeError: CUDA error: an illegal memory access"),
    (endless, "out of time", "more than 1 s"),
])  # fmt: skip
def test_a_part_that_does_not_end_well_keeps_its_rows(measure, state, error, tmp_path):
    done = run_part(Part(measure, 1, "a part"), Setup(CPU, True, tmp_path))
    assert (done["state"], done["error"]) == (state, error)
    assert done["rows"] == [{"what": "a row before"}]


def test_a_process_that_dies_is_recorded(monkeypatch, tmp_path):
    monkeypatch.setattr(command.sys, "executable", "/bin/false")
    done = run_apart("guidance", "cpu", True, tmp_path)
    assert done["state"] == "failed"
    assert "exit code 1" in done["error"]


@pytest.mark.slow
def test_a_part_in_a_process_of_its_own(tmp_path):
    assert run_apart("guidance", "cpu", True, tmp_path)["state"] == "done"


def test_tables_have_all_columns():
    table = "| a | b |\n| --- | --- |\n| 1 |  |\n|  | x\\|y |"
    assert format_table([{"a": 1}, {"b": "x|y"}]) == [table, ""]


def test_waits_are_counted_by_torchs_debug_mode(monkeypatch, tmp_path):
    """The mode is on for exactly one step, and once for each way of drawing; its own notice is no wait."""
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    found = list(training.count_waits(Setup(CPU, True, tmp_path)))
    assert modes == ["default", "warn", "default", "default", *["warn", "default"] * 2]
    assert [row["waits"] for row in found] == [0, 0, 0]
    texts = [
        "called a synchronizing CUDA operation",
        "Synchronization debug mode does not detect all synchronizing operations",
    ]
    row = training.wait_row("x", [warnings.WarningMessage(UserWarning(text), UserWarning, "", 0) for text in texts])
    assert row == {"what": "x", "waits": 1, "first": texts[0]}


def test_its_training_runs_on_the_pretended_device(tmp_path, monkeypatch):
    """Random latents, classes and networks are put on the device without a mismatch."""
    from tests.support.devices import ACCELERATOR

    monkeypatch.setattr("benchmarks.gpu.setup.join_ranks", lambda device: ACCELERATOR)
    setup = Setup(CUDA, True, tmp_path)
    with PretendedDevice() as device:
        seen = []
        train_steps(setup, Flow(), setup.base, setup.latents(), lambda step: seen.append(sum(device.waits.values())),
                    steps=4, batch=8)  # fmt: skip
        assert seen[2] == seen[1]


def test_parts_measured_later_join_those_that_were_measured_before(tmp_path, capsys):
    """On the same machine only: columns of two machines would say nothing."""
    out = tmp_path / "gpu.json"
    command_line = ["bench", "gpu", "--device", "cpu", "--tiny", "--out", str(out), "--only"]
    assert main([*command_line, "save"]) == main([*command_line, "launches"]) == 0
    stored = json.loads(out.read_text())
    assert set(stored["parts"]) == {"save", "launches"}
    page = out.with_suffix(".md").read_text()
    assert 0 < page.index(PARTS["launches"].summary[1:]) < page.index(PARTS["save"].summary[1:])
    stored["machine"]["device"] = "another"
    out.write_text(json.dumps(stored))
    assert main([*command_line, "save"]) == 2
    assert "another" in capsys.readouterr().err
    assert json.loads(out.read_text()) == stored
