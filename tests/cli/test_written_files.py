"""Every command that writes where the user says: no foreign file is replaced, and no file is written in place."""

from __future__ import annotations

import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from genkit.cli.main import COMMANDS, main
from genkit.config import load_object

SMALL = ["--backbone=mlp", "--backbone.width=8", "--batch=8", "--steps=1", "--workers=0", "--no-tensorboard",
         "--sample-every=0", "--device=cpu"]  # fmt: skip
WRITERS = {  # every command with --out, by what it writes
    "sample grid": "sample {digits} --n=2 --steps=1 --trajectory --out={out}/a.png",
    "sample npz": "sample {digits} --n=2 --steps=1 --format=npz --out={out}/a.npz",
    "sample folder": "sample {digits} --n=2 --steps=1 --format=png --trajectory --out={out}/few",
    "eval": "eval {digits} --n=16 --steps=1 --features=raw --metrics=fid --out={out}/a.json --save-stats={out}/s.npz",
    "reflow": "reflow {moons} --n=4 --steps=1 --out={out}/a.npz",
    "encode": "encode {vae} --out={out}/latents --shard=800",
    "report": "report {digits} --out={out}/a.html",
    "export": "export {digits} {out}/exported --to=run",
    "rollout": "rollout {policy} --episodes=2 --num-envs=2 --max-steps=4 --film=1 --out={out}/rollouts",
    "demo": "demo four-ways --episodes=2 --out={out}/a.npz",
    "demo of an expert": "demo Pendulum-v1 --expert=saved --expert.path={expert} --episodes=1 --out={out}/a.npz",
}
RUNS = {
    "train",
    "tune",
    "finetune",
    "distill",
    "pull",
    "import",
}  # these write new directories, and `latest` (tests/core/test_links.py)
NEW_ONLY = ("export",)  # refuses what is there, whoever wrote it


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Runs of each kind, and an expert."""
    top = tmp_path_factory.mktemp("runs")
    trained = {
        "digits": ["--data=digits"],
        "moons": ["--data=moons"],
        "vae": ["--data=digits", "--objective=vae", "--data.labels=false"],
        "policy": ["--data=four-ways", "--data.n=8"],
    }
    for name, argv in trained.items():
        assert main(["train", *argv, *SMALL, f"--out={top}", f"--name={name}"]) == 0
    found = {name: next(top.glob(f"*-{name}")) for name in trained}
    import numpy as np

    from genkit.envs.ars import LinearPolicy

    LinearPolicy(np.zeros((1, 3)), np.zeros(3), np.ones(3), -np.ones(1) * 2, np.ones(1) * 2).save(top / "expert.json")
    return {**found, "expert": top / "expert.json"}


def run(line, places, out):
    return main(line.format(out=out, **places).split())


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_every_command_with_out_is_listed():
    with_out = {
        name
        for name, command in COMMANDS.items()
        if command.settings and "out" in {f.name for f in fields(load_object(command.settings))}
    }
    assert with_out == {line.split()[0] for line in WRITERS.values()} | RUNS


@pytest.mark.parametrize("name", WRITERS)
def test_no_foreign_file_is_replaced_and_own_ones_are(places, tmp_path, capsys, name):
    if "Pendulum" in WRITERS[name]:
        pytest.importorskip("gymnasium")
    first = tmp_path / "first"
    first.mkdir()
    assert run(WRITERS[name], places, first) == 0, capsys.readouterr().err
    written = [p.relative_to(first) for p in files(first)]
    assert written
    assert run(WRITERS[name], places, first) == (2 if name in NEW_ONLY else 0), capsys.readouterr().err
    for i, path in enumerate(written):
        out = tmp_path / str(i)
        (out / path).parent.mkdir(parents=True)
        (out / path).write_bytes(b'{"precious": "and mentions genkit"}\n')
        capsys.readouterr()
        assert run(WRITERS[name], places, out) == 2, path
        assert len(capsys.readouterr().err.splitlines()) == 1
        assert (out / path).read_bytes() == b'{"precious": "and mentions genkit"}\n'
        shutil.copytree(first, out, dirs_exist_ok=True)  # the same among files of genkit's own
        (out / path).write_bytes(b"mine")
        assert run(WRITERS[name], places, out) == 2, path
        assert (out / path).read_bytes() == b"mine"


OPENED: list[Path] | None = None


def note_opened(event, args):
    """A hook of the interpreter, which cannot be taken away: files that are opened to be written."""
    if OPENED is not None and event == "open" and isinstance(args[0], str | bytes):
        mode, flags = args[1] or "", args[2]
        if set("wax+") & set(mode) or (not mode and flags & 3):
            OPENED.append(Path(args[0] if isinstance(args[0], str) else args[0].decode()))


sys.addaudithook(note_opened)


@pytest.mark.parametrize("name", WRITERS)
def test_no_file_is_written_under_its_final_name(places, tmp_path, monkeypatch, name):
    """A command that is killed half-way leaves no cut file where a whole one is expected."""
    if "Pendulum" in WRITERS[name]:
        pytest.importorskip("gymnasium")
    monkeypatch.setattr(sys.modules[__name__], "OPENED", [])
    assert run(WRITERS[name], places, tmp_path) == 0
    below = [p.relative_to(tmp_path) for p in OPENED if p.is_relative_to(tmp_path)]
    assert below or name in ("encode", "export")  # safetensors writes without Python
    in_place = [p for p in below if not any(part.startswith(".") for part in p.parts)]
    assert not in_place
