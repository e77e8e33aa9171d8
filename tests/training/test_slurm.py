"""Ranks started by Slurm's srun."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import genkit
from genkit import config
from genkit.cli.main import main
from genkit.config import load_yaml
from genkit.training.directory import read_log
from genkit.training.settings import TrainSettings
from genkit.training.slurm import expand_counts, first_host, slurm_ranks

STEP = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "7",
        "SLURM_JOB_ID": "31", "SLURM_STEP_NODELIST": "gpu[03-05,09],login1",
        "SLURM_STEP_TASKS_PER_NODE": "4,3"}  # fmt: skip


def test_a_task_becomes_a_rank():
    assert slurm_ranks(STEP) == {
        "RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "20031",
    }  # fmt: skip
    given = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"}
    assert slurm_ranks({**STEP, **given}).items() >= given.items()
    assert slurm_ranks({**STEP, "SLURM_JOB_ID": "32"})["MASTER_PORT"] == "20032"  # two jobs may share a machine


@pytest.mark.parametrize(
    "change",
    [{"WORLD_SIZE": "2"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_NUM_TASKS": None}, {"SLURM_PROCID": None}],
)
def test_a_single_task_a_batch_script_and_torchrun_stay_as_they_are(change):
    env = {k: v for k, v in {**STEP, "SLURM_NTASKS": "7", **change}.items() if v is not None}
    assert slurm_ranks(env) == {}


def test_a_step_without_nodes_is_refused_in_one_line(monkeypatch, capsys):
    for name, value in {**STEP, "SLURM_STEP_NODELIST": ""}.items():
        monkeypatch.setenv(name, value)
    assert main(["train"]) == 2
    assert capsys.readouterr().err == (
        "genkit: srun: started 7 tasks and names no node; set MASTER_ADDR to the node of the first one\n"
    )


def test_lists_of_nodes_and_tasks():
    assert [first_host(s) for s in ("a1", "a1,a2", "n[07-09]", "n[3,5],m1", "r[1-2]n[03-4],x", "n[1-2]-ib,q")] == [
        "a1", "a1", "n07", "n3", "r1n03", "n1-ib",
    ]  # fmt: skip
    assert [expand_counts(s) for s in ("4", "4(x2),3", "2,1(x3)")] == [[4], [4, 4, 3], [2, 1, 1, 1]]


SMALL = ["--data=moons", "--backbone.width=16", "--sample-every=0", "--tensorboard=false", "--device=cpu"]


def srun(folder, *args, job=None):
    """Two tasks of ``genkit train``, started as srun starts them."""
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(job or os.getpid())}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "genkit", "train", *SMALL, *args], cwd=folder, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
            env={**os.environ, **step, "SLURM_PROCID": i, "SLURM_LOCALID": i, "OMP_NUM_THREADS": "1"},
        )
        for i in ("0", "1")
    ]  # fmt: skip


@pytest.mark.slow
def test_two_tasks_of_srun_train_one_run(tmp_path):
    tasks = srun(tmp_path, "--steps=4")
    outputs = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    (run,) = (tmp_path / "runs").glob("0*")
    assert json.loads((run / "env.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path):
    """What ``examples/train.sbatch`` relies on: SIGUSR1 reaches all tasks, which end with 130; the job is requeued."""
    command = ["--steps=300", "--save-every=1000", "--log-every=1", "--batch=32", "--resume=auto"]
    tasks = srun(tmp_path, *command)
    while not (logs := list((tmp_path / "runs").glob("0*/log.jsonl"))) or not logs[0].stat().st_size:
        assert [task.poll() for task in tasks] == [None, None], [task.communicate()[0] for task in tasks]
        time.sleep(0.02)
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
    outputs = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [130, 130], outputs
    (run,) = (tmp_path / "runs").glob("0*")
    stopped = json.loads((run / "latest/state.json").read_text())["step"]
    assert 0 < stopped < 300
    tasks = srun(tmp_path, *command, job=os.getpid() + 1)
    outputs = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert [p.name for p in (tmp_path / "runs").glob("0*")] == [run.name]
    assert [record["step"] for record in read_log(run)] == list(range(1, 301))
    whole = genkit.train(config.from_dict(TrainSettings, load_yaml(run / "config.yaml")), out=str(tmp_path / "one"))
    mine = genkit.load(run, device="cpu")
    for key, value in whole.nets["net"].state_dict().items():
        assert torch.allclose(mine.nets["net"].state_dict()[key], value, atol=1e-4), key
