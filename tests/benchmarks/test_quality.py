"""`genkit bench quality`: its table has the numbers of `genkit eval`, and nothing is done twice."""

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from benchmarks.quality import measuring, page, training
from benchmarks.quality.settings import ROWS, Quality, latent_shape
from genkit import config
from genkit.cli import main as cli
from genkit.evaluation import Estimate, Evaluator
from genkit.evaluation.report.html import format_number, render_page
from genkit.evaluation.run_records import read_cards
from genkit.training.checkpoint import find_checkpoint, read_tensors
from genkit.training.run import load_run
from genkit.training.settings import TrainSettings
from tests.evaluation.test_report import check_page

FEATURES = ["--features=classifier", "--features.steps=60"]
TINY = ["--steps=4", "--n=32", "--nfe=3,2", "--backbone.width=8", "--batch=8", "--device=cpu", "--lr=1e-3", *FEATURES]


def in_process(argv):
    """`genkit train` without the start of another Python."""
    return cli.main(["train", *argv])


def never(*args, **kwargs):
    raise AssertionError("it was done again")


@pytest.fixture(scope="session")
def cached(tmp_path_factory):
    """A cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def bench(cached, tmp_path_factory):
    """Two rows: a flow, and a VAE, which draws in one pass."""
    out = tmp_path_factory.mktemp("quality") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "launch", in_process)
        assert cli.main(["bench", "quality", "--objectives=flow,vae", *TINY, f"--out={out}"]) == 0
    return out


@pytest.fixture
def trained(bench, tmp_path):
    """A copy of the flow's run, and its configuration."""
    shutil.copytree(bench / "runs", tmp_path / "runs", symlinks=True)
    settings = config.parse(Quality, [*TINY, f"--out={tmp_path}"])
    return next((tmp_path / "runs").glob("*-flow-seed0")), settings.train_config("flow", 0)


def cards_of(bench, row):
    cards, skipped = read_cards(next((bench / "runs").glob(f"*-{row}-seed0")) / "eval")
    assert not skipped
    return cards


def rows(bench):
    """The table of report.md, by objective and NFE."""
    lines = [x for x in (bench / "report.md").read_text().splitlines() if x.startswith("|")]
    head, _, *body = [[c.strip() for c in x.strip("|").split("|")] for x in lines]
    return {(cells[0], cells[2]): dict(zip(head, cells, strict=True)) for cells in body}


def test_the_table_has_the_numbers_of_the_cards(bench):
    table = rows(bench)
    assert list(table) == [("real", "–"), ("flow", "2"), ("flow", "3"), ("vae", "1")]
    flow = cards_of(bench, "flow")
    assert [card.settings["nfe"] for card in flow] == [2, 3]
    for card in flow:
        line = table["flow", str(int(card.settings["nfe"]))]
        assert line["sampler"] == "dpmpp_2m, uniform"
        for key, name in (
            ("fid", "fd (classifier) ↓"),
            ("accuracy", "accuracy ↑"),
            ("precision", "precision (classifier) ↑"),
        ):
            value = card.metrics[key]
            assert (
                line[name] == f"{format_number(value.value)} [{format_number(value.low)}, {format_number(value.high)}]"
            )
    record = json.loads((bench / "results.json").read_text())
    values = next(x["values"] for x in record["rows"] if (x["name"], x["nfe"]) == ("flow", 3))
    assert values["fd (classifier)"]["value"] == flow[1].metrics["fid"].value


def test_held_out_data_are_the_floor(bench):
    """They are closer to the training data than samples after four steps, and the classifier knows them."""
    table = rows(bench)
    first = lambda cell: float(cell.split()[0])  # noqa: E731
    distances = [first(line["fd (classifier) ↓"]) for line in table.values()]
    assert distances[0] < 0.5 * min(distances[1:])
    assert first(table["real", "–"]["accuracy ↑"]) > 0.7
    text = (bench / "report.md").read_text()
    assert "real: 32 held-out samples" in text
    assert text.count(cards_of(bench, "flow")[0].notes[0]) == 1  # the bias of the FID


def test_genkit_eval_gives_the_same_card(bench, capsys):
    """With the same settings: the same file."""
    run, card = next((bench / "runs").glob("*-flow-seed0")), cards_of(bench, "flow")[1]
    path = run / "eval" / f"{card.name}.json"
    before = json.loads(path.read_text())
    argv = [str(run), "--sampler=dpmpp_2m", "--steps=3", "--n=32", "--device=cpu", *FEATURES]
    assert cli.main(["eval", *argv]) == 0
    assert str(path) in capsys.readouterr().out
    after = json.loads(path.read_text())
    assert after["metrics"] == before["metrics"]
    path.write_text(json.dumps(before))


def test_the_page(bench):
    page = check_page((bench / "report.html").read_text())
    for card in (*cards_of(bench, "flow"), *cards_of(bench, "vae")):
        assert repr(card.metrics["fid"].value) in [a["value"] for a in page.all("data")]
    assert [i["alt"] for i in page.all("img")] == [
        f"Grid of samples: {x}" for x in ("flow, NFE 2", "flow, NFE 3", "vae, NFE 1")
    ]
    labels = [s["aria-label"] for s in page.all("svg")]
    floor = rows(bench)["real", "–"]["fd (classifier) ↓"].split()[0]
    assert any(v.startswith("fd (classifier) against") and v.endswith(f"real data: {floor}") for v in labels)
    assert sum("loss against the step" in v for v in labels) >= 2
    assert "--objectives=flow,vae" in page.text


def test_a_model_of_one_pass(bench):
    assert rows(bench)["vae", "1"]["sampler"] == "one pass"
    (card,) = cards_of(bench, "vae")
    assert card.settings["nfe"] == 1
    assert card.settings["sampler"] is None


def test_nothing_is_done_twice(bench, monkeypatch):
    before = {name: (bench / name).read_text() for name in ("report.md", "results.json")}
    monkeypatch.setattr(training, "launch", never)
    monkeypatch.setattr(Evaluator, "measure", never)
    monkeypatch.setattr(measuring, "time_sampling", never)
    assert cli.main(["bench", "quality", "--objectives=flow,vae", *TINY, f"--out={bench}"]) == 0
    assert {name: (bench / name).read_text() for name in before} == before


def test_a_killed_training_continues(trained, monkeypatch):
    """From its last checkpoint, to bit-identical weights; the cost is that of both parts."""
    run, cfg = trained
    end = run / "checkpoints" / "step-0000004"
    whole = read_tensors(end, "nets.safetensors")
    shutil.rmtree(end)
    (run / "latest").unlink()
    (run / "latest").symlink_to("checkpoints/step-0000003")
    (run / "cost.json").write_text('[{"cpu": 9.0, "wall": 12.0, "steps": 3}]')
    settings = []

    def launch(argv):
        settings.append(argv)
        time.sleep(0.01)
        return in_process(argv)

    monkeypatch.setattr(training, "launch", launch)
    assert training.train(cfg) == run
    assert settings == [["--resume", str(run)]]
    again = read_tensors(end, "nets.safetensors")
    assert all(torch.equal(again[k], v) for k, v in whole.items())
    cost = training.read_cost(run)
    assert cost.steps == 4
    assert 12 < cost.wall < 60


@pytest.mark.parametrize("change", [{"lr": 2e-3}, {"steps": 8}, {"seed": 1}, {"batch": 16}])
def test_another_configuration_is_another_run(trained, change):
    run, cfg = trained
    assert training.find_run(cfg) == (run, 4)
    assert training.find_run(replace(cfg, **change)) == (None, 0)


def test_resolved_settings_are_the_same_run(trained):
    """The precision is resolved in the run's config.yaml; threads and workers do not matter."""
    run, cfg = trained
    assert training.find_run(replace(cfg, precision="fp32", threads=2, workers=0)) == (run, 4)


def test_a_run_without_a_checkpoint_is_ignored(trained):
    run, cfg = trained
    shutil.rmtree(run / "checkpoints")
    assert training.find_run(cfg) == (None, 0)
    (run / "config.yaml").write_text("objective: {name: flow")
    assert training.find_run(cfg) == (None, 0)


def test_a_training_that_fails_or_is_stopped(trained, monkeypatch):
    _, cfg = trained
    cfg = replace(cfg, seed=5)
    monkeypatch.setattr(training, "launch", lambda argv: 2)
    with pytest.raises(ValueError, match="ended with code 2"):
        training.train(cfg)
    monkeypatch.setattr(training, "launch", lambda argv: 130)
    with pytest.raises(KeyboardInterrupt):
        training.train(cfg)


def test_the_cost_of_a_training(bench, trained):
    """It is recorded in the run; a training inside this process has no CPU time of children."""
    cost = training.read_cost(trained[0])
    assert cost.steps == 4
    assert 0 < cost.wall < 600
    assert rows(bench)["flow", "2"]["training, CPU s"] == format_number(cost.cpu)


def test_a_lost_cost_is_extrapolated():
    assert training.Cost(10, 12, 50).scaled_to(200) == training.Cost(40, 48, 200)
    assert training.Cost(0, 0, 0).scaled_to(200).cpu == 0


def test_seeds_are_averaged():
    """The mean, with the smallest and the largest value; a single one keeps its interval."""
    one = Estimate(3.0, 2.5, 3.5)
    assert page.average_seeds([one]) == one
    assert page.average_seeds([one, Estimate(6.0, 5.9, 6.1), Estimate(0.0)]) == Estimate(3.0, 0.0, 6.0)


def test_the_note_counts_the_trainings_that_there_are():
    settings = config.parse(Quality, ["--objectives=flow,vae", "--seeds=3"])

    def note(*done):
        return page.note_of_seeds(settings, [page.Result(row, seed, 2, "heun", *[None] * 3) for row, seed in done])

    begun = note(("flow", 0), ("flow", 0), ("flow", 1), ("vae", 0))
    assert begun.startswith("So far 1 to 2 of 3 trainings of each row.")
    assert note(*[(row, seed) for row in settings.row_names for seed in range(3)]).startswith("Means over 3 trainings;")


def test_the_summary_has_a_line_for_each_row_and_its_distance_at_each_number():
    def line(name, nfe, fid, accuracy):
        values = {"fid": Estimate(fid), "accuracy": Estimate(accuracy), "cpu": Estimate(7.0)}
        return page.Line(name, "heun", nfe, values, "classifier")

    flow = [line("flow", 5, 3.0, 0.8), line("flow", 20, 2.0, 0.9)]
    lines = [line("real", None, 0.5, 0.99), *flow, line("vae", 1, 4.0, 0.7)]
    found = check_page(render_page("", "", [("", [page.html_summary(lines, page.column_keys(lines))])]))
    assert "objective 1 NFE 5 NFE 20 NFE accuracy ↑ training, CPU s" in found.text
    assert found.text.endswith("real 0.5000 0.9900 7 flow 3 2 0.9000 7 vae 4 0.7000 7")


@pytest.mark.parametrize("name", ROWS)
def test_every_row_trains_the_same_budget(name):
    settings = config.parse(Quality, ["--steps=40", "--backbone.width=24", "--data.size=10"])
    every = [cfg for cfg in (settings.first_stage_config(name, 3), settings.train_config(name, 3)) if cfg]
    assert sum(cfg.steps for cfg in every) == 40
    for cfg in every:
        assert (cfg.backbone.width, cfg.data.size, cfg.seed) == (24, 10, 3)
        assert config.from_dict(TrainSettings, config.dump(cfg)) == cfg


@pytest.mark.slow
def test_a_row_of_two_trainings(cached, tmp_path, monkeypatch):
    """The flow learns the latents of the first stage; the cost is that of both; nothing is done twice."""
    monkeypatch.setattr(training, "launch", in_process)
    argv = ["bench", "quality", "--objectives=latent", *TINY, f"--out={tmp_path}"]
    assert cli.main(argv) == 0
    stage, flow = (next((tmp_path / "runs").glob(f"*-{name}-seed0")) for name in ("latent-stage", "latent"))
    assert config.load_yaml(flow / "config.yaml")["codec"] == str(stage.resolve())
    assert (load_run(stage).step, load_run(flow).step) == (2, 2)
    assert load_run(flow).spec.shape == (2, 4, 4)
    both = [training.read_cost(run) for run in (stage, flow)]
    assert sum(c.steps for c in both) == 4
    settings = config.parse(Quality, [*TINY, f"--out={tmp_path}"])
    assert training.train_row(settings, "latent", 0) == training.TrainedRow(flow, both[0] + both[1])
    assert "2 of the steps train a first stage of 2x4x4" in (tmp_path / "report.md").read_text()
    monkeypatch.setattr(training, "launch", never)
    monkeypatch.setattr(Evaluator, "measure", never)
    assert cli.main(argv) == 0


@pytest.mark.parametrize(
    ("shape", "latent"),
    [((1, 8, 8), (2, 4, 4)), ((1, 28, 28), (4, 7, 7)), ((3, 32, 32), (4, 8, 8)), ((1, 10, 12), (2, 5, 6))],
)
def test_latents_are_smaller_than_samples(shape, latent):
    assert latent_shape(shape) == latent


def test_rows_differ_in_their_objective_only():
    settings = config.parse(Quality, [])
    a, b = settings.train_config("flow", 0), settings.train_config("flow-ot", 0)
    assert type(a.objective.coupling).__name__ != type(b.objective.coupling).__name__
    assert replace(b, objective=replace(b.objective, coupling=a.objective.coupling), name=a.name) == a


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--objectives=flow,nothing"], "nothing"),
        (["--objectives=,"], "given none"),
        (["--objectives=classifier"], "draws no samples"),
        (["--objectives=flow,latent", "--data=moons"], "whose first stage is for images"),
        (["--objectives=latent", "--steps=1"], "need 2 or more"),
        (["--nfe=0"], "given '0'"),
        (["--nfe=5,-1"], "whole numbers"),
        (["--nfe="], "whole numbers"),
        (["--n=1"], "--n"),
        (["--seeds=0"], "--seeds"),
    ],
)
def test_mistakes_are_found_before_any_training(argv, message, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training, "launch", never)
    assert cli.main(["bench", "quality", *TINY, f"--out={tmp_path}", *argv]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_process_of_its_own(tmp_path):
    settings = config.parse(Quality, [*TINY, f"--out={tmp_path}"])
    cost = training.read_cost(training.train(settings.train_config("flow", 0)))
    assert cost.steps == 4
    assert 0.5 < cost.cpu < 120


@pytest.mark.slow
def test_sigterm_saves_the_training(tmp_path):
    """The training process saves, no child process is left, and the next call continues."""
    flags = [
        "--objectives=flow",
        "--steps=100000",
        "--backbone.width=8",
        "--batch=8",
        "--device=cpu",
        f"--out={tmp_path}",
    ]
    with subprocess.Popen([sys.executable, "-m", "genkit", "bench", "quality", *flags]) as process:
        while not list(tmp_path.glob("runs/*/log.jsonl")):
            assert process.poll() is None
            time.sleep(0.2)
        process.terminate()
        assert process.wait(60) == 130
    run = next(tmp_path.glob("runs/0000-*"))
    step = int(find_checkpoint(run).name.removeprefix("step-"))
    assert 0 < step < 100_000
    assert training.read_cost(run).steps == step
    assert not re.search(
        str(tmp_path), subprocess.run(["ps", "ax", "-o", "args"], capture_output=True, text=True).stdout
    )
