"""genkit bench race: contenders of other libraries and genkit on the same seconds, resumable, with a page."""

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import race, race_loops
from benchmarks.race_page import render_race
from benchmarks.results import ResultsFile, make_console, make_table
from genkit.cli.main import main
from tests.support.pages import check_page


def cells(**values):
    return {f"digits/{name}/{seed}": {"marks": [{"mark": m, "value": v} for m, v in zip((1.0, 2.0), pair, strict=True)]}
            for name, pairs in values.items() for seed, pair in enumerate(pairs)}  # fmt: skip


def test_curves_are_those_of_a_data_set():
    found = race.curves(cells(genkit=[(5, 1), (3, 3)], peer=[(9, 4), (9, 4)]), "digits")
    assert found == {"genkit": {1.0: [5, 3], 2.0: [1, 3]}, "peer": {1.0: [9, 9], 2.0: [4, 4]}}
    assert race.curves(cells(genkit=[(5, 1)]), "cifar10") == {}


def power_law(scale, exponent, marks=(5.0, 10.0, 20.0, 40.0, 80.0)):
    """A curve ``scale * seconds ** -exponent``, which is straight in logarithms."""
    return {"marks": [{"mark": m, "seconds": 1.1 * m, "value": scale * (1.1 * m) ** -exponent} for m in marks]}


def test_the_crossing_of_a_power_law_is_exact_and_one_before_the_first_mark_is_a_bound():
    points = [(m["seconds"], m["value"]) for m in power_law(60.0, 0.8)["marks"]]
    for target in (9.0, 4.0, 60.0 * 44.0**-0.8):
        assert race.find_crossing(points, target) == (pytest.approx((60.0 / target) ** (1 / 0.8)), False)
    assert race.find_crossing(points, 30.0) == (5.5, True)
    assert race.find_crossing(points, 1.0) is None
    assert race.find_crossing([(1.0, 5.0), (2.0, -0.1)], 0.5).seconds < 2.0  # an estimate may be below 0


def test_the_share_of_seconds_is_that_of_known_curves_with_an_interval_over_seeds():
    """Peers end at 40, 30 and 20; the own curves 100 / seconds are there after 2.5, 3.3 and 5 seconds, by scale."""
    ends = {"diffusers": 40.0, "lucidrains": 30.0, "torchcfm": 20.0}
    found = {f"digits/{name}/{s}": {"marks": [{"mark": 80.0, "seconds": 80.0, "value": v}]}
             for name, v in ends.items() for s in range(3)}  # fmt: skip
    factors = (0.5, 1.0, 2.0)
    marks = [2.0**i for i in range(-1, 7)]
    found |= {f"digits/genkit/{s}": power_law(100.0 * f, 1.0, marks) for s, f in enumerate(factors)}
    shares = race.all_shares(found, "digits")
    assert shares.keys() == {("genkit", name) for name in (*ends, "lucidrains or torchcfm")}
    for name, end in ends.items():
        share = shares["genkit", name]
        assert share.shares == pytest.approx([100.0 * f / end / 80.0 for f in factors])
        assert not share.is_bound
        half = 4.302653 * math.log(2) / math.sqrt(3)  # Student's 97.5 % at 2 degrees of freedom
        value, low, high = share.estimate
        assert (value, low / value, high / value) == pytest.approx((100.0 / end / 80, math.exp(-half), math.exp(half)))
    assert shares["genkit", "lucidrains or torchcfm"].shares == shares["genkit", "torchcfm"].shares, "the better end"
    del found["digits/torchcfm/2"]
    assert race.share_of_seconds(found, "digits", "genkit", ("torchcfm",)).seeds == 2, "seeds that both have"


def test_a_share_says_if_it_is_a_bound_or_not_reached():
    peer = {"marks": [{"mark": 80.0, "seconds": 80.0, "value": 10.0}]}
    found = {"digits/diffusers/0": peer, "digits/diffusers/1": peer, "digits/genkit/0": power_law(10.0, 1.0)}
    assert str(race.share_of_seconds(found, "digits", "genkit", ("diffusers",))) == "at most 0.0688"
    found["digits/genkit/1"] = power_law(100.0, 1.0)
    found["digits/diffusers/1"] = peer
    assert str(race.share_of_seconds(found, "digits", "genkit", ("diffusers",))) == "at most 0.125", "the largest one"
    found["digits/genkit/1"] = power_law(9000.0, 1.0)
    assert str(race.share_of_seconds(found, "digits", "genkit", ("diffusers",))) == "reached by 1 of 2 seeds"
    assert race.share_of_seconds(found, "digits", "genkit", ("torchcfm",)) is None


def test_the_page_has_geometric_means_shares_and_all_numbers(capsys):
    found = cells(genkit=[(5, 1), (3, 4)], lucidrains=[(9, 4), (16, 9)])
    for cell in found.values():
        for entry in cell["marks"]:
            entry |= {"seconds": entry["mark"], "steps": int(1000 * entry["mark"]), "low": 0.5, "high": 99.0}
    results = ResultsFile(None, {"clock": "CPU seconds"}, ["race", "--data", "digits"])
    results.cells = found
    page = check_page(render_race(results, ["digits", "cifar10"], "Measured ``--marks`` times."))
    (plot,) = page.all("svg")
    assert "genkit, defaults: 3.873 at 1, 2 at 2; denoising-diffusion-pytorch: 12 at 1, 6 at 2" in plot["aria-label"]
    assert "cifar10" not in page.text
    assert "Measured --marks times." in page.text
    assert "denoising-diffusion-pytorch 12.5±4.9 6.500±3.536 2 2,000" in page.text
    assert f"{race.share_of_seconds(found, 'digits', 'genkit', ('lucidrains',))}" in page.text
    race.print_table(make_console(), "digits", found)
    assert "6.500±3.536" in capsys.readouterr().out


def test_numbers_in_tables_are_never_cut_short(capsys):
    row = [f"{i}23.456±{i}.789" for i in range(8)]
    for console in (make_console(), Console(width=60)):
        table = make_table(*"abcdefgh")
        table.add_row(*row)
        console.print(table)
        lines = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
        assert ["".join(cells).replace(" ", "") for cells in zip(*lines, strict=True)] == row
    assert len(lines) > 1, "a narrow console folds them"


def test_a_loop_stops_at_its_marks_and_is_measured_with_its_average(monkeypatch):
    """A clock of 1 second a step: 3 and 6 steps; the copies are the averages of then, not of the end."""
    data = race_loops.RaceData({}, torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4), torch.device("cpu"))
    net = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    ticks = iter(range(10**6))
    monkeypatch.setattr(race_loops.RaceData, "clock", lambda self: float(next(ticks)))

    def step(x, y):
        with torch.no_grad():
            net.weight += 1
        return torch.zeros(())

    loop = race_loops.Loop(net, step, lambda y, seed, evaluations: net.weight.detach().clone())
    monkeypatch.setitem(race_loops.LOOPS, "counting", lambda data: loop)
    first, second = race_loops.train_loop("counting", data, [3.0, 6.0], seed=0)
    assert [(s.seconds, s.steps) for s in (first, second)] == [(3.0, 3), (6.0, 6)]
    average, expected = 0.0, []
    for i in range(1, 7):
        average += (1 - min(0.999, (1 + i) / (10 + i))) * (i - average)
        expected.append(average)
    got = [float(s.sample(torch.zeros(1), 0, 1)) for s in (second, first)]
    assert got == pytest.approx([expected[5], expected[2]], rel=1e-6)


def test_every_mark_has_its_own_checkpoint_of_genkit(monkeypatch):
    data = race_loops.data_of("digits", Path(), 64, torch.device("cpu"))
    monkeypatch.setattr(race_loops, "NETWORK", {"name": "unet", "width": 8, "mults": [1], "attention": []})
    monkeypatch.setattr(race_loops, "step_seconds", lambda options, pilot, clock: 0.01)
    marks = [1.28 / 2**i for i in reversed(range(8))]
    assert [s.steps for s in race_loops.train_genkit("genkit", data, marks, 0)] == [1, 2, 4, 8, 16, 32, 64, 128]
    with pytest.raises(ValueError, match=r"seconds: given 0\.05, in which genkit takes 5 steps; 5 marks need more"):
        race_loops.train_genkit("genkit", data, [0.05 / 2**i for i in reversed(range(5))], 0)


def test_a_contender_without_its_package_is_refused_in_one_line(monkeypatch):
    def absent(data):
        raise ImportError("No module named 'torchcfm'")

    monkeypatch.setitem(race_loops.LOOPS, "torchcfm", absent)
    data = race_loops.RaceData({}, torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(4), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"contenders: torchcfm needs torchcfm .* or leave torchcfm out"):
        race_loops.train_loop("torchcfm", data, [1.0], seed=0)


@pytest.mark.slow
def test_diffusers_and_genkit_race_once_and_give_a_page(tmp_path, monkeypatch, capsys):
    out, page = tmp_path / "race.json", tmp_path / "race.html"
    argv = ["bench", "race", "--data", "digits", "--seconds", "1.5", "--marks", "2", "--seeds", "1", "--samples", "20",
            "--evaluations", "2", "--device", "cpu", "--out", str(out), "--page", str(page), "--contenders",
            "diffusers", "genkit", "genkit-recipe"]  # fmt: skip
    assert main(argv) == 0
    found = json.loads(out.read_text())["cells"]
    assert found.keys() == {f"digits/{name}/0" for name in argv[-3:]}
    for cell in found.values():
        first, second = cell["marks"]
        assert [first["mark"], second["mark"]] == [0.75, 1.5]
        assert first["steps"] < second["steps"]
        assert 0.5 * first["mark"] < first["seconds"] < second["seconds"] < 3 * second["mark"]
        assert all(math.isfinite(entry["value"]) and entry["low"] < entry["value"] for entry in cell["marks"])
    text = page.read_text()
    assert all(name in text for name in ("diffusers", "genkit, Muon", "Student", "CPU seconds of training"))
    monkeypatch.setattr(race, "measure", lambda *a: pytest.fail("measured again"))
    assert main(argv) == 0
    assert "what diffusers has at the end" in capsys.readouterr().out
    assert main([*argv[:5], "3", *argv[6:]]) == 2
