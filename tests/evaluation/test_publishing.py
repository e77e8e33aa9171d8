"""``genkit push`` and ``genkit pull`` against the hub's HTTP on loopback, by the hub's own library."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml

import genkit
from genkit.cli import main as cli
from genkit.core.tensors import sha256
from genkit.training.directory import find_run
from genkit.training.run import load_run

huggingface_hub = pytest.importorskip("huggingface_hub")
SMALL = ["--objective=flow", "--data=digits", "--backbone=mlp", "--backbone.width=16", "--no-tensorboard",
         "--device=cpu", "--workers=0", "--save-every=2", "--sample-every=4", "--lr=1e-2"]  # fmt: skip
CARD = {
    "metrics": {"fid": {"value": 3.25, "low": 3.0, "high": 3.5}},
    "settings": {"n": 1000, "sampler": "heun", "steps": 20, "features": {"name": "raw"}, "run": "r", "step": 4},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert cli.main(["train", *SMALL, "--steps=4", f"--out={out}"]) == 0
    return (out / "latest").resolve()


@pytest.fixture
def run(trained):
    """The run without evaluations."""
    yield trained
    for path in trained.glob("eval/*.json"):
        path.unlink()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    from tests.support.hub import serve_hub

    with serve_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        address = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
        yield server


def weights_of(run):
    return {k: v for net in load_run(run, device="cpu").nets.values() for k, v in net.state_dict().items()}


def same_weights(a, b):
    a, b = weights_of(a), weights_of(b)
    return a.keys() == b.keys() and all(bool((a[k] == b[k]).all()) for k in a)


# ------------------------------------------------------------------------------------------------------- there and back
def test_a_run_comes_back_as_it_went(hub, run, tmp_path, capsys):
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / "a.json").write_text(json.dumps(CARD))
    assert cli.main(["push", str(run), "me/digits", "--private", "--message", "first"]) == 0
    assert f"out={run.parent}" in capsys.readouterr().out, "local paths that go along were not named"
    assert hub.private["me/digits"]
    assert hub.messages == ["first"]
    assert cli.main(["pull", "me/digits", str(tmp_path / "back")]) == 0
    files = {
        str(p.relative_to(tmp_path / "back")): p.read_bytes() for p in (tmp_path / "back").rglob("*") if p.is_file()
    }
    assert files == hub.models["me/digits"][-1], "what came down is not what went up"
    assert {"config.yaml", "README.md", "samples.png", "eval/a.json"} < files.keys()
    assert {p.rpartition(".")[2] for p in files} == {"yaml", "md", "png", "json", "safetensors"}
    assert same_weights(run, tmp_path / "back")
    assert genkit.load(tmp_path / "back").sample(2, seed=1).x.equal(genkit.load(run).sample(2, seed=1).x)


def test_a_second_push_takes_the_place_of_the_first(hub, run, tmp_path):
    genkit.push(run, "me/digits", step=2)
    hub.models["me/digits"][-1]["notes.txt"] = b"not ours"
    genkit.push(run, "me/digits")
    files = hub.models["me/digits"][-1]
    assert sorted(f for f in files if f.endswith("state.json")) == ["checkpoints/step-0000004/state.json"]
    assert files["notes.txt"] == b"not ours"
    old = genkit.pull(f"me/digits@{hub.sha('me/digits', 1)}", tmp_path / "old")
    assert [p.name for p in (old / "checkpoints").iterdir()] == ["step-0000002"]
    assert not (old / "notes.txt").exists(), "a file that is no part of a run was downloaded"


def test_the_card_names_what_the_run_is_and_its_metrics_but_ranks_none_that_were_trained_on(hub, run):
    trained_on = {**CARD, "settings": {**CARD["settings"], "trained_on": ["raw"]}}
    (run / "eval").mkdir(exist_ok=True)
    (run / "eval" / "a.json").write_text(json.dumps(CARD))
    (run / "eval" / "b.json").write_text(json.dumps(trained_on))
    pushed = genkit.push(run, "me/digits")
    text = hub.models["me/digits"][-1]["README.md"].decode()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["library_name"] == "genkit"
    assert {"flow", "mlp"} <= set(head["tags"])
    results = head["model-index"][0]["results"]
    assert [r["metrics"][0]["value"] for r in results] == [3.25], "a card that ranks nothing is among the results"
    assert text.count("3.25") == 3
    assert text.count("ranks nothing") == 1
    assert "genkit sample hf://me/digits --n 16" in text
    assert "| `lr` | 0.01 |" in text
    assert pushed.url.endswith("me/digits")


# ----------------------------------------------------------------------------------------------------- names of the hub
def test_commands_take_a_name_of_the_hub(hub, run, tmp_path, capsys):
    genkit.push(run, "me/digits")
    samples = tmp_path / "s.npz"
    assert cli.main(["sample", "hf://me/digits", "--n=2", "--format=npz", f"--out={samples}", "--device=cpu"]) == 0
    assert cli.main(["info", "hf://me/digits"]) == 0
    assert cli.main(["train", "--init=hf://me/digits", *SMALL, "--steps=2", f"--out={tmp_path / 'more'}"]) == 0
    first = find_run("hf://me/digits")
    assert first == find_run(f"hf://me/digits@{hub.sha('me/digits')}")
    genkit.push(run, "me/digits", step=2)
    second = find_run("hf://me/digits")
    assert second != first, "a new commit was not seen"
    assert [p.name for p in (second / "checkpoints").iterdir()] == ["step-0000002"]


def test_without_a_network_the_last_copy_is_taken_with_a_warning(hub, run, monkeypatch, caplog):
    from huggingface_hub import constants

    genkit.push(run, "me/digits")
    copy = find_run("hf://me/digits")
    # a download that was killed: newer, and not whole
    part = copy.with_name(f".{copy.name}-1.part")
    (part / "checkpoints").mkdir(parents=True)
    (part / "config.yaml").write_text("")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with caplog.at_level("WARNING", "genkit"):
        assert find_run("hf://me/digits") == copy
    assert "cannot be reached for me/digits" in caplog.text
    assert f"taking the copy of commit {copy.name[:10]}" in caplog.text
    with pytest.raises(ValueError, match=r"cannot be reached for me/others .*; is there a network"):
        find_run("hf://me/others")


# ------------------------------------------------------------------------------------------------------------- refusals
def refused(capsys, *args):
    capsys.readouterr()
    assert cli.main(list(args)) == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if line and "Fetching" not in line
    ]  # the library's progress
    assert len(lines) == 1, lines
    return lines[0]


def test_what_cannot_be_done_is_one_line_and_nothing_is_written(hub, run, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert "has no me/none, or it is private" in refused(capsys, "pull", "me/none", out)
    for name in ("digits", "a/b/c", "../x", "me/..", "me/x@"):
        assert re.search(r"allowed OWNER/NAME", refused(capsys, "pull", name, out)), name
    hub.models["me/other"] = [{"model.safetensors": b"x", "README.md": b"y"}]
    assert "me/other is no run of genkit" in refused(capsys, "pull", "me/other", out)
    assert "main branch" in refused(capsys, "push", str(run), "me/digits@abc")
    hub.forbidden = True
    assert "does not let you at me/digits (403); log in" in refused(capsys, "push", str(run), "me/digits")
    assert "me/digits" not in hub.models
    hub.forbidden = False
    genkit.push(run, "me/digits")
    (tmp_path / "there").mkdir()
    assert "is there already" in refused(capsys, "pull", "me/digits", str(tmp_path / "there"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]


def test_a_run_with_somebody_elses_code_is_not_run_and_a_damaged_one_not_loaded(hub, run, tmp_path, capsys):
    genkit.push(run, "me/digits")
    files = hub.models["me/digits"][-1]
    config = files["config.yaml"].replace(b"backbone: {name: mlp,", b"backbone: {name: 'evil:Net',")
    hub.models["me/code"] = [{**files, "evil.py": b"raise SystemExit(7)", "config.yaml": config}]
    code = genkit.pull("me/code", tmp_path / "code")
    assert not (code / "evil.py").exists()
    assert "evil:Net" in refused(capsys, "sample", str(code))
    nets = "checkpoints/step-0000004/nets.safetensors"
    hub.models["me/broken"] = [{**files, nets: files[nets][:-4] + b"\0\0\0\1"}]
    broken = genkit.pull("me/broken", tmp_path / "broken")
    assert sha256(broken / nets) != sha256(genkit.pull("me/digits", tmp_path / "whole") / nets)
    assert refused(capsys, "sample", str(broken))


def test_training_reads_a_data_set_of_the_hub_from_its_cache(hub, tmp_path, monkeypatch):
    """Only the files that are asked for are downloaded, once; the run names the address; later no network is needed."""
    from huggingface_hub import constants

    from tests.data.test_sharded import chw, everything, picture, shards, webdataset

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    shards(tmp_path / "data")
    tars = {f"data/{path.name}": path.read_bytes() for path in sorted((tmp_path / "data").glob("*.tar"))}
    hub.models["datasets/me/clothes"] = [{**tars, "data/other.bin": b"no", "loader.py": b"raise SystemExit"}]
    root = "hf://datasets/me/clothes/data/train-{000..001}.tar"
    batch = everything(webdataset(root).load())
    assert batch.x.equal(torch.stack([chw(picture(i)) for i in range(12)]))
    fetched = sorted(path.name for path in (tmp_path / "hub").rglob("*") if path.is_symlink())
    assert fetched == ["train-000.tar", "train-001.tar"]
    assert everything(webdataset("hf://datasets/me/clothes").load()).x.shape[0] == 30
    assert webdataset(root).with_absolute_root().root == root

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    small = [option for option in SMALL if option != "--data=digits"]
    argv = ["--data=webdataset", f"--data.root={root}", "--data.size=8", *small, "--steps=2", f"--out={tmp_path}/runs"]
    assert cli.main(["train", *argv]) == 0
    assert load_run(tmp_path / "runs" / "latest").config.data.root == root
