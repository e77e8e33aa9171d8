"""What several ranks say of one mistake."""

import os
import subprocess
import sys
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from genkit.cli import ranks
from genkit.cli.main import COMMANDS, main


@pytest.fixture
def launched(monkeypatch):
    """The store that torchrun keeps, and a function that makes this process one of its ranks."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(ranks, "PATIENCE", timedelta(seconds=0.3))

    def become(rank, agent="True"):
        env = {"RANK": rank, "WORLD_SIZE": 3, "MASTER_ADDR": "localhost", "MASTER_PORT": store.port,
               "TORCHELASTIC_USE_AGENT_STORE": agent}  # fmt: skip
        for name, value in env.items():
            monkeypatch.setenv(name, str(value))

    yield become
    del store


def test_the_same_mistake_is_said_once_and_another_one_too(launched, capsys):
    launched(0)
    assert main(["train", "--resume=nowhere"]) == 2
    assert capsys.readouterr().err.startswith("genkit: run: given nowhere")
    launched(1)
    assert main(["train", "--resume=nowhere"]) == 2
    assert capsys.readouterr().err == ""
    launched(2)
    assert main(["train", "--resume=elsewhere"]) == 2
    assert capsys.readouterr().err.startswith("genkit: rank 2: run: given elsewhere")


SHARED = {"train", "sample", "eval", "sweep", "encode", "distill", "finetune"}


def test_the_commands_that_share_their_work_are_known():
    assert {name for name, command in COMMANDS.items() if command.shares_work} == SHARED


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - SHARED))
def test_a_command_of_one_process_refuses_ranks_in_one_line(name, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main([name, "nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"genkit: {name}: works in one process, and a launcher started 3; run it without torchrun")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("agent", ["True", "False"])
def test_a_mistake_of_one_rank_alone_is_said(launched, capsys, agent):
    launched(1, agent)
    assert main(["train", "--lr=-1"]) == 2
    assert capsys.readouterr().err == "genkit: rank 1: --lr: given -1.0; should be greater than 0\n"


def test_without_a_launcher_nothing_waits(monkeypatch, capsys):
    monkeypatch.setattr(ranks, "open_store", lambda: pytest.fail("asks for a store"))
    assert main(["info", "nowhere"]) == 2
    assert capsys.readouterr().err.startswith("genkit: run: given nowhere")


def test_a_rank_runs_its_handlers_and_skips_the_finalization():
    """The interpreter's finalization would wait for the thread, for ever."""
    code = """
import atexit, threading
from genkit.cli.ranks import end_process
threading.Thread(target=threading.Event().wait).start()
atexit.register(print, "handled")
end_process(3)
"""
    env = {**os.environ, "WORLD_SIZE": "2", "RANK": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (3, "handled\n")
