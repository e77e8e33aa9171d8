"""Several processes, and processes that are killed: the numbers are those of one that was not."""

import subprocess
import sys

import pytest
import torch

from genkit.cli import main as cli
from genkit.evaluation import Card, ModelSamples, Ranks
from genkit.evaluation.cards import setting_differences
from genkit.evaluation.sources import split_into_blocks
from tests.support.evaluation import evaluate_to_card, subprocess_environment, values


@pytest.mark.parametrize(("n", "batch"), [(1, 64), (3, 64), (64, 64), (1000, 64), (10_000, 64), (100, 7)])
def test_blocks_do_not_depend_on_ranks(n, batch):
    blocks = split_into_blocks(n, batch)
    assert [i for block in blocks for i in block] == list(range(n))
    assert max(map(len, blocks)) <= batch
    assert len(blocks) >= min(n, 10), "some ranks would idle"


def test_ranks_share_the_errors_of_the_main_one():
    def fail(message):
        raise ValueError(message)

    with pytest.raises(ValueError, match="too few"):
        Ranks().once(fail, "too few")
    assert Ranks().once(max, 2, 3) == 3


TWO_RANKS = """
import sys, torch
from genkit.training.distributed import join_ranks
from genkit.training.run import load_run
from genkit.training.sampling import Sampling
from genkit.evaluation import ModelSamples, Ranks, measure
from genkit.evaluation.metrics.features import Raw

ranks = Ranks.of(join_ranks(torch.device("cpu")))
torch.set_num_threads(1)
samples = ModelSamples(load_run(sys.argv[1], device="cpu"), Sampling(steps=3, guidance=2.0))
options = {"keep": frozenset({"features", "labels"}), "batch": 8, "ranks": ranks}
results = {n: measure(samples, Raw().load("cpu"), n, **options) for n in (1, 3, 101)}

class Failing:
    spec, name, limit, label, identity = samples.spec, "failing", None, samples.label, samples.identity
    def rows(self, first, last, n):
        if ranks.rank == ranks.world - 1 and first > 60:
            raise ValueError("this rank has failed")
        return samples.rows(first, last, n)

try:
    measure(Failing(), Raw().load("cpu"), 200, **options)
    error = "nothing"
except ValueError as e:
    error = str(e)
errors = ranks.gather(error)
if ranks.is_main:
    statistics = {n: result.statistics for n, result in results.items()}
    last = statistics[101]
    torch.save({"x": {n: s.features for n, s in statistics.items()}, "labels": last.labels, "mean": last.moments.mean,
                "cov": last.moments.cov, "nfe": results[101].nfe, "errors": errors}, sys.argv[2])
"""


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(tmp_path, moons, monkeypatch):
    """Samples bitwise, moments to 1e-12; with fewer samples than ranks; a rank's error is raised on all."""
    (tmp_path / "two.py").write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(tmp_path / "two.py"), str(moons), str(tmp_path / "2.pt")], cwd=tmp_path,
                          env=subprocess_environment(), capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.setattr(sys, "argv", ["one.py", str(moons), str(tmp_path / "1.pt")])
    exec(TWO_RANKS, {"__name__": "one"})
    one, two = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    for n in (1, 3, 101):
        assert torch.equal(one["x"][n], two["x"][n]), n
    assert torch.equal(one["labels"], two["labels"])
    assert torch.allclose(one["mean"], two["mean"], rtol=1e-12)
    assert torch.allclose(one["cov"], two["cov"], rtol=1e-12)
    assert one["nfe"] == two["nfe"] == 5
    assert two["errors"] == ["this rank has failed"] * 2


@pytest.mark.slow
def test_accelerate_launch_writes_the_card_of_one_rank(tmp_path, moons):
    argv = ["eval", str(moons), "--metrics=fid,w2,mmd", "--n=100", "--steps=3", "--device=cpu"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "-m", "genkit"]
    for name, command in {"one": [sys.executable, "-m", "genkit"], "two": launch}.items():
        done = subprocess.run([*command, *argv, f"--out={tmp_path}/{name}.json"], cwd=tmp_path,
                              env=subprocess_environment(), capture_output=True, text=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (Card.load(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert values(one) == pytest.approx(values(two), rel=1e-10)
    assert (one.settings["ranks"], two.settings["ranks"]) == (1, 2)
    assert setting_differences(one, two) == []


@pytest.mark.slow
def test_ranks_refuse_in_one_line(tmp_path, moons):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "genkit"]
    done = subprocess.run([*launch, "eval", str(moons), "--metrics=fidd", "--device=cpu"], cwd=tmp_path,
                          env=subprocess_environment(), capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("genkit: --metrics: given 'fidd'") == 1


def test_a_killed_evaluation_continues(tmp_path, moons, monkeypatch):
    """Killed between two blocks, it does the rest only, and its card is the same."""
    monkeypatch.setattr("genkit.evaluation.measurement.SAVE_SECONDS", -float("inf"))  # save after every block
    argv = (moons, "--metrics=fid,w2,mmd", "--n=160", "--steps=2", "--seed=5")
    expected = evaluate_to_card(tmp_path, *argv)
    drawn, rows = [], ModelSamples.rows

    def killed_after_seven(self, first, last, n):
        if len(drawn) == 7:
            raise KeyboardInterrupt
        drawn.append((first, last))
        return rows(self, first, last, n)

    monkeypatch.setattr(ModelSamples, "rows", killed_after_seven)
    assert cli.main(["eval", *map(str, argv), f"--out={tmp_path}/killed.json"]) == 130
    assert not (tmp_path / "killed.json").exists()
    drawn.clear()
    monkeypatch.setattr(ModelSamples, "rows", lambda self, *a: drawn.append(a[:2]) or rows(self, *a))
    again = evaluate_to_card(tmp_path, *argv)
    assert drawn == [(i, i + 10) for i in range(70, 160, 10)]
    clocks = ("seconds", "draw_cpu_seconds", "metric_seconds")
    settings = [{k: v for k, v in card.settings.items() if k not in clocks} for card in (again, expected)]
    assert again.metrics == expected.metrics
    assert settings[0] == settings[1]
    drawn.clear()
    evaluate_to_card(tmp_path, *argv[:-1], "--seed=6")
    assert len(drawn) == 16, "the intermediate results belonged to another seed"
