"""Notes and tags: kept in the run directory, whoever writes them, and never lost."""

import json
import threading

import pytest

from genkit.cli import main as cli
from genkit.config import load_yaml
from genkit.training.annotations import FILE, annotate, read_annotations
from genkit.training.lock import RunLock

TRAIN = ["--tensorboard=false", "--device=cpu", "--sample-every=0", "--warmup=0", "--data=moons", "--backbone.width=8"]


@pytest.fixture
def run(tmp_path):
    """A directory that is a run."""
    (tmp_path / "config.yaml").write_text("objective: flow\n")
    return tmp_path


def texts(run):
    return [note.text for note in read_annotations(run).notes]


def test_notes_add_up_and_tags_are_kept_once(run):
    annotate(run, "first", tags=["a", "b"])
    annotate(run, "second\nline", tags=["b", "c"], remove_tags=["a"])
    assert texts(run) == ["first", "second\nline"]
    assert read_annotations(run).tags == ("b", "c")
    stored = json.loads((run / FILE).read_text())
    assert [note["text"] for note in stored["notes"]] == ["first", "second\nline"]
    assert all(note["time"][:2] == "20" and "T" in note["time"] for note in stored["notes"])
    assert annotate(run, clear_notes=True).notes == ()
    assert read_annotations(run).tags == ("b", "c")


def test_no_note_of_many_writers_is_lost(run):
    """Also while the run is being trained."""
    lock = RunLock(run)
    writers = [
        threading.Thread(target=annotate, args=(run, f"note {i}"), kwargs={"tags": [f"t{i}"]}) for i in range(12)
    ]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    lock.release()
    assert sorted(texts(run)) == sorted(f"note {i}" for i in range(12))
    assert len(read_annotations(run).tags) == 12
    assert not list(run.glob(".*.part"))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"notes": [3]}', '{"notes": {}, "tags": 3}', '{"notes": [{}]}']
)
def test_a_damaged_file_is_shown_as_none_and_never_overwritten(run, content):
    (run / FILE).write_text(content)
    assert read_annotations(run).notes == ()
    with pytest.raises(ValueError, match=r"notes\.json: cannot be read"):
        annotate(run, "new")
    assert (run / FILE).read_text() == content


@pytest.mark.parametrize("bad", ["", "  ", "red \x1b[31m", "nul \0", "right \u202e left"])
def test_a_note_is_text(run, bad, capsys):
    assert cli.main(["note", str(run), bad]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (run / FILE).exists()


@pytest.mark.parametrize("bad", ["", "two words", "a,b", "a=b", "x" * 61, "\x1b[31m"])
def test_a_tag_is_one_word(run, bad):
    assert cli.main(["note", str(run), "--tag", bad]) == 2
    with pytest.raises(ValueError, match="one word"):
        annotate(run, tags=[bad])


def test_control_characters_of_a_foreign_file_reach_no_terminal(run, capsys):
    (run / FILE).write_text(json.dumps({"notes": [{"text": "\x1b[2J gone", "time": "\x07"}], "tags": ["\x9b1m"]}))
    assert cli.main(["note", str(run)]) == 0
    assert not any(c in capsys.readouterr().out for c in "\x1b\x07\x9b")


def test_the_command_writes_and_shows(run, capsys):
    assert cli.main(["note", str(run)]) == 0
    assert capsys.readouterr().out == "no notes and no tags\n"
    assert cli.main(["note", str(run), "half the rate", "--tag", "slow", "old"]) == 0
    assert cli.main(["note", str(run), "--remove-tag", "old"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-2] == "tags   slow"
    assert out[-1].endswith("half the rate")
    assert cli.main(["note", str(run), "--remove-tag", "old"]) == 2
    assert "has slow" in capsys.readouterr().err
    assert cli.main(["note", str(run / "none"), "x"]) == 2


def test_training_and_resuming_add_notes_that_the_configuration_does_not_hold(tmp_path, capsys):
    flags = [*TRAIN, f"--out={tmp_path}", "--note", "first try", "--tags", "a", "b"]
    assert cli.main(["train", *flags, "--steps=1"]) == 0
    run = tmp_path / "latest"
    assert cli.main(["train", "--resume", str(run), "--steps=2", "--note", "longer", "--tags", "c"]) == 0
    assert cli.main(["train", "--resume", str(run), "--steps=3"]) == 0
    assert texts(run) == ["first try", "longer"]
    assert read_annotations(run).tags == ("a", "b", "c")
    stored = load_yaml(run / "config.yaml")
    assert (stored["note"], stored["tags"]) == (None, [])
    capsys.readouterr()
    assert cli.main(["info", str(run)]) == 0
    out = capsys.readouterr().out
    assert "a b c" in out
    assert "first try" in out
    assert "longer" in out


def test_fine_tuning_takes_notes_too(tmp_path):
    flags = ["--tensorboard=false", "--device=cpu", "--sample-every=0", "--data=four-ways", "--data.n=10"]
    assert cli.main(["train", *flags, "--backbone.width=8", "--steps=1", f"--out={tmp_path}", "--tags", "base"]) == 0
    tiny = ["--num-envs=2", "--num-steps=2", "--iterations=1", "--eval-episodes=0", "--tensorboard=false"]
    base = tmp_path / "latest"
    assert cli.main(["finetune", str(base), *tiny, f"--out={tmp_path}", "--note=tuned", "--tags", "rl"]) == 0
    tuned = tmp_path / "latest"
    assert texts(tuned) == ["tuned"]
    assert read_annotations(tuned).tags == ("rl",)
    assert load_yaml(tuned / "finetune.yaml")["note"] is None
