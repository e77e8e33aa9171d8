"""`genkit list`: what it shows is what the files say, whatever state they are in."""

import json
import random
import shutil
import subprocess
import sys

import pytest

from genkit import list_runs
from genkit.cli import main as cli
from genkit.cli.formats import format_age, format_bytes
from genkit.evaluation import Card, Estimate
from genkit.evaluation.listing import sort_runs, to_quantity
from genkit.evaluation.run_records import read_run
from genkit.training.annotations import annotate
from genkit.training.lock import RunLock, is_locked
from genkit.training.run import load_run
from tests.support.evaluation import refusal, train

MOONS = ["--data=moons", "--data.n=100", "--backbone.width=8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of several families, one of them stopped early and one in a folder below."""
    out = tmp_path_factory.mktemp("list") / "runs"
    digits = ["--data=digits", "--backbone=mlp", "--backbone.width=8"]
    flow = train(out, *MOONS, "--steps=4", "--save-every=2", "--objective=flow", "--name=flow", "--tags", "a", "b")
    train(out, *digits, "--steps=2", "--objective=vae", "--name=vae", "--note=looks good")
    train(out, *digits, "--steps=2", "--objective=gan", "--name=gan")
    stopped = train(out / "deeper", *MOONS, "--steps=2", "--objective=edm", "--name=edm")
    text = (stopped / "config.yaml").read_text()
    (stopped / "config.yaml").write_text(text.replace("\nsteps: 2\n", "\nsteps: 9\n"))
    for steps in (2, 4):
        assert cli.main(["eval", str(flow), "--n=40", f"--steps={steps}", "--metrics=w2,mmd"]) == 0
    assert cli.main(["eval", str(flow), "--n=30", "--steps=4", "--metrics=w2"]) == 0
    return out


@pytest.fixture
def copy(runs, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(runs, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs"


def names(found):
    return [run.name for run in found]


def test_the_table_says_what_the_files_say(runs, capsys):
    found = list_runs(runs)
    assert names(found) == ["0000-edm", "0000-flow", "0001-vae", "0002-gan"]
    assert [run.state for run in found] == ["stopped", "finished", "finished", "finished"]
    assert [(run.objective, run.backbone, run.data) for run in found][2:] == [
        ("vae", "mlp", "digits"),
        ("gan", "mlp", "digits"),
    ]
    for run in found:
        loaded = load_run(run.path)
        assert run.step == loaded.step
        assert run.parameters == {k: sum(p.numel() for p in net.parameters()) for k, net in loaded.nets.items()}
        last = json.loads((run.path / "log.jsonl").read_text().splitlines()[-1])
        assert run.losses == {k: v for k, v in last.items() if k.endswith("/loss")}
        assert run.size == sum(
            f.stat().st_size for f in run.path.rglob("*") if f.is_file() and not f.parent.is_symlink()
        )
    assert len(found[3].losses) == 2
    capsys.readouterr()
    assert cli.main(["list", str(runs), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == names(found)
    assert rows[1]["tags"] == ["a", "b"]
    assert rows[2]["notes"][0]["text"] == "looks good"
    assert cli.main(["list", str(runs)]) == 0
    table = capsys.readouterr().out
    assert all(text in table for text in ("0001-vae", "looks good", "2/9", "stopped", "a b"))


def test_the_best_card_is_of_the_most_samples_measured_in_one_way(copy):
    run = read_run(copy / "0000-flow")
    few = next(card for card in run.cards if card.settings["n"] == 30)
    Card({"w2": Estimate(0.001)}, {**few.settings, "steps": 3}).save(run.path / "eval" / "few.json")
    run = read_run(run.path)
    assert len(run.cards) == 4
    for headline in run.headlines:
        rivals = [card.metrics[headline.metric] for card in run.cards if card.settings["n"] == 40]
        assert headline.estimate.value == min(e.value for e in rivals)
        assert headline.card.settings["n"] == 40
        assert headline.best is not None
    assert {h.metric for h in run.headlines} == {"w2", "mmd"}


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        (["objective=flow"], ["0000-flow"]),
        (["objective!=flow"], ["0000-edm", "0001-vae", "0002-gan"]),
        (["data=dig*", "objective=vae"], ["0001-vae"]),
        (["tag=b"], ["0000-flow"]),
        (["tag!=b"], ["0000-edm", "0001-vae", "0002-gan"]),
        (["note=*good*"], ["0001-vae"]),
        (["state=stopped"], ["0000-edm"]),
        (["steps=9"], ["0000-edm"]),
        (["steps<3"], ["0001-vae", "0002-gan"]),
        (["backbone.width=8.0"], ["0000-edm", "0000-flow", "0001-vae", "0002-gan"]),
        (["objective.sigma_data>0"], ["0000-edm"]),
        (["age<1d", "size<1k"], []),
        (["w2>0"], ["0000-flow"]),
        (["coverage>0"], []),
        (["objective.path=linear"], ["0000-flow"]),
    ],
)
def test_conditions(runs, where, wanted):
    assert names(list_runs(runs, where=where)) == wanted


def test_sorting(runs):
    assert names(list_runs(runs, sort="steps")) == ["0001-vae", "0002-gan", "0000-flow", "0000-edm"]
    assert names(list_runs(runs, sort="steps", reverse=True))[0] == "0000-edm"
    by_loss = list_runs(runs, sort="loss")
    firsts = [next(iter(run.losses.values())) for run in by_loss]
    assert firsts == sorted(firsts)
    assert names(list_runs(runs, sort="w2"))[0] == "0000-flow"  # the others have none
    assert names(list_runs(runs, sort="w2", reverse=True))[0] == "0000-flow"
    found = list_runs(runs)
    for i, run in enumerate(found):  # a person's order of names
        object.__setattr__(run, "path", run.path.with_name(f"run-{(8, 9, 10, 100)[i]}"))
    random.Random(0).shuffle(found)
    assert names(sort_runs(found, "name")) == ["run-8", "run-9", "run-10", "run-100"]


def test_the_order_by_numbers_that_do_not_compare_is_said_to_mean_little(runs, tmp_path, capsys):
    other = train(tmp_path, *MOONS, "--steps=1")
    assert cli.main(["eval", str(other), "--n=20", "--steps=2", "--metrics=w2"]) == 0
    capsys.readouterr()
    assert cli.main(["list", str(runs / "0000-flow"), str(other), "--sort=w2"]) == 0
    assert "the order by w2 says little: the cards differ in more than the weights: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--where", "objectiv=flow"], "did you mean objective"),
        (["--where", "objective"], "FIELD=VALUE"),
        (["--where", "steps<many"], "FIELD<NUMBER"),
        (["--sort", "bakcbone.width"], "did you mean backbone.width"),
    ],
)
def test_mistakes(runs, capsys, options, message):
    assert message in refusal(capsys, "list", runs, *options)


def test_a_missing_directory(tmp_path, capsys):
    assert "no directory" in refusal(capsys, "list", tmp_path / "none")
    capsys.readouterr()
    assert cli.main(["list", str(tmp_path)]) == 0
    assert "no runs in" in capsys.readouterr().out


def test_quantities():
    assert [to_quantity(text) for text in ("3", "-1.5e3", "2d", "1.5MB", "4 k", "x", "2y", "")] == [
        3, -1500, 2 * 86400, 1.5e6, 4000, None, None, None
    ]  # fmt: skip
    assert [format_bytes(n) for n in (0, 999, 1000, 46_500, 999_700, 3_300_000, 2e12)] == [
        "0 B", "999 B", "1 kB", "46 kB", "1 MB", "3.3 MB", "2 TB"
    ]  # fmt: skip
    assert [format_age(1000, 1000 + s) for s in (5, 61, 7200, 86400 * 3)] == ["5 s", "1 min", "2 h", "3 d"]


# ---------------------------------------------------------------------------------------------------------- states
def test_training_now_and_killed(copy):
    run = copy / "0000-flow"
    assert not is_locked(run)
    lock = RunLock(run)
    assert read_run(run).state == "training now"
    assert is_locked(run)
    lock.release()
    assert read_run(run).state == "finished"
    # a process that was killed leaves its files; the lock ended with it
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (run / ".lock").touch()
    (run / ".lock-owner").write_text(f"process {gone.pid} on elsewhere\n")
    assert read_run(run).state == "finished"
    RunLock(run).release()


def test_no_checkpoint_yet(copy):
    shutil.rmtree(copy / "0000-flow" / "checkpoints")
    run = read_run(copy / "0000-flow")
    assert (run.state, run.parameters, run.step) == ("no checkpoint yet", {}, 4)


DAMAGES = ["", "\0\xff", "{", "[1]", "null", "a: [", "3", '{"step": "x"}', "- - -\n"]


@pytest.mark.parametrize("seed", range(12))
def test_damaged_files_never_stop_the_list(copy, seed, capsys):
    """Any file of a run is damaged, removed or replaced by a folder; the other runs are shown as before."""
    rng = random.Random(seed)
    before = {run.name: run.losses for run in list_runs(copy)}
    run = copy / "0000-flow"
    files = sorted(p for p in run.rglob("*") if p.is_file() and not p.is_symlink())
    for file in rng.sample(files, 4):
        what = rng.choice([*DAMAGES, "remove", "folder", "cut"])
        data = file.read_bytes()
        file.unlink()
        if what == "folder":
            file.mkdir()
        elif what == "cut":
            file.write_bytes(data[: len(data) // 2])
        elif what != "remove":
            file.write_text(what, encoding="latin-1")
    found = {r.name: r for r in list_runs(copy, sort="loss")}
    assert all(found[name].losses == losses for name, losses in before.items() if name != "0000-flow")
    assert cli.main(["list", str(copy)]) == 0
    assert cli.main(["list", str(copy), "--json"]) == 0
    json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_damaged_configuration_is_named(copy, capsys):
    (copy / "0001-vae" / "config.yaml").write_text("")
    (copy / "0002-gan" / "config.yaml").write_text("a: [")
    capsys.readouterr()
    assert cli.main(["list", str(copy)]) == 0
    out = capsys.readouterr().out
    assert sum(" damaged " in line for line in out.splitlines()) == 2
    assert "0001-vae: config.yaml: is empty" in out
    assert "0002-gan: config.yaml:1: not valid YAML" in out


def test_other_programs_folders_are_left_out(copy, capsys):
    """And a run is listed once, whatever links name it; a loop of links ends."""
    (copy / "hydra").mkdir()
    (copy / "hydra" / "config.yaml").write_text("model: {lr: 1}\n")
    (copy / "loop").symlink_to(copy)
    (copy / ".hidden").mkdir()
    shutil.copytree(copy / "0001-vae", copy / ".hidden" / "run")
    (copy / "z-elsewhere").symlink_to(copy / ".hidden" / "run")
    assert len(list_runs(copy)) == 5
    capsys.readouterr()
    assert cli.main(["list", str(copy), str(copy / "latest"), "--json"]) == 0
    done = capsys.readouterr()
    assert len(json.loads(done.out)) == 5
    assert "hydra: left out" in done.err


def test_a_foreign_run_is_listed_without_importing_what_it_names(copy, monkeypatch, capsys):
    """Nor does a terminal obey what its name and notes contain."""
    run = (copy / "0002-gan").rename(copy / "0002-\x1b[31mred")
    text = (run / "config.yaml").read_text().replace("name: digits", "name: evil_of_list:Boom")
    assert "evil_of_list:Boom" in text
    (run / "config.yaml").write_text(text)
    annotate(run, "plain")
    (copy / "evil_of_list.py").write_text("class Boom: pass\n")
    monkeypatch.chdir(copy)
    monkeypatch.syspath_prepend(str(copy))
    capsys.readouterr()
    assert cli.main(["list", "."]) == 0
    assert cli.main(["diff", str(run), str(copy / "0001-vae")]) == 0
    out = capsys.readouterr().out
    assert out.count("evil_of_list:Boom") == 2
    assert "\x1b" not in out
    assert "evil_of_list" not in sys.modules
