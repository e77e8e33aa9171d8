"""docs/contributing/data-source.md, executed: a new source is one file and one line."""

import numpy as np
import pytest
import yaml

from genkit.cli.main import main
from genkit.data import DATA, find_source
from genkit.data.toy import Moons
from tests.recipes.data_source import Csv
from tests.support import sources as contract
from tests.support.recipes import page_shows
from tests.support.refusals import refuses

TINY = ["--objective=flow", "--backbone.width=16", "--backbone.depth=1", "--steps=4", "--batch=8", "--workers=0",
        "--no-tensorboard", "--device=cpu"]  # fmt: skip


@pytest.fixture
def table(tmp_path):
    moons = Moons(n=100).load()
    path = tmp_path / "moons.csv"
    np.savetxt(path, np.column_stack([moons.x, moons.cond["label"]]), delimiter=",")
    return path


def test_the_page_shows_this_recipe():
    page_shows("data-source")


def test_the_source_keeps_the_contract(table):
    contract.check_all(Csv(root=str(table)))


def test_its_suffix_selects_it(monkeypatch, table):
    monkeypatch.setitem(DATA, "csv", Csv)
    assert find_source(str(table)) == ("csv", {"root": str(table)})


@pytest.mark.parametrize("way", ["name", "path", "module:Class"])
def test_a_source_is_one_file_and_one_line(way, table, monkeypatch, tmp_path, capsys):
    if way != "module:Class":
        monkeypatch.setitem(DATA, "csv", Csv)
    name = {"name": "csv", "path": str(table), "module:Class": "tests.recipes.data_source:Csv"}[way]
    root = [] if way == "path" else [f"--data.root={table}"]
    assert main(["train", f"--data={name}", *root, *TINY, f"--out={tmp_path}"]) == 0
    run = tmp_path / "latest"
    stored = yaml.safe_load((run / "config.yaml").read_text())
    assert stored["backbone"]["name"] == "mlp"
    assert stored["data"]["root"] == str(table)

    out = tmp_path / "samples.npz"
    assert main(["sample", str(run), "--n=6", "--label=1", "--steps=2", "--format=npz", f"--out={out}"]) == 0
    with np.load(out) as arrays:
        assert arrays["arr_0"].shape == (6, 2)
    capsys.readouterr()
    assert main(["eval", str(run), "--n=20", "--metrics=w2", "--steps=2", "--json"]) == 0
    assert "w2" in capsys.readouterr().out


def test_its_faults_are_one_line(tmp_path):
    (tmp_path / "bad.csv").write_text("1,2,zero\n")
    refuses(lambda: Csv(root=str(tmp_path / "bad.csv")).load(), "bad.csv: cannot be read", "zero")
