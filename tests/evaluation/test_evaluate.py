"""`genkit eval`: the number itself, the card around it, ranks, kills, training, and every mistake in one line."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from scipy.linalg import sqrtm
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import nn

from genkit.backbones import MLP
from genkit.cli import main as cli
from genkit.cli.commands.watch import watch
from genkit.core import Loss, Objective, Phase
from genkit.core.tensors import sha256
from genkit.data import DATA
from genkit.evaluation import Drawn, Ranks, cards, find_data, measure
from genkit.evaluation.metrics.features import Classifier, Raw, RawExtractor
from genkit.evaluation.sources import Given, split_rows
from genkit.training.directory import read_log
from genkit.training.loop import initial_state
from genkit.training.run import load_run
from genkit.training.settings import TrainSettings

TRAIN = ["--tensorboard=false", "--device=cpu", "--sample-every=0", "--warmup=0", "--batch=16", "--lr=1e-3"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """Nobody's own cache is read or written."""
    before = os.environ.get("GENKIT_CACHE")
    place = tmp_path_factory.mktemp("cache")
    os.environ["GENKIT_CACHE"] = ENV["GENKIT_CACHE"] = str(place)
    yield place
    os.environ.pop("GENKIT_CACHE") if before is None else os.environ.update(GENKIT_CACHE=before)


def train(out, *args):
    assert cli.main(["train", *TRAIN, f"--out={out}", *args]) == 0
    return (out / "latest").resolve()


@pytest.fixture(scope="module")
def moons(tmp_path_factory):
    """Points with two classes; checkpoints at steps 4 and 8."""
    out = tmp_path_factory.mktemp("moons")
    return train(out, "--data=moons", "--data.n=400", "--backbone.width=16", "--steps=8", "--save-every=4")


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    """Grey pictures 8x8 of three classes, and a model of them."""
    root = tmp_path_factory.mktemp("grey")
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 255, (60, 8, 8), dtype=np.uint8), np.arange(60) % 3
    np.savez(root / "data.npz", x=x, y=y)
    data = ["--data=npz", f"--data.root={root}/data.npz", "--backbone=unet", "--backbone.width=16"]
    return train(root / "runs", *data, "--steps=1", "--batch=4")


def save(path, x):
    np.savez(path, x=x.astype(np.float32))
    return str(path)


@pytest.fixture
def points(tmp_path):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(90, 3)), 0.7 * rng.normal(size=(120, 3)) + [1.0, 0, 0]
    return save(tmp_path / "a.npz", a), save(tmp_path / "b.npz", b)


def card_of(tmp_path, *argv):
    out = tmp_path / "card.json"
    assert cli.main(["eval", *map(str, argv), "--out", str(out)]) == 0
    return json.loads(out.read_text())


def values(card):
    return {k: v["value"] for k, v in card["metrics"].items()}


def fid(x, y):
    """Heusel et al. 2017, with scipy's matrix root."""
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real))


def refused(capsys, *argv):
    """The one line with which genkit refuses."""
    capsys.readouterr()
    assert cli.main(list(map(str, argv))) == 2
    err = capsys.readouterr().err
    assert err.startswith("genkit: ")
    assert err.count("\n") == 1, err
    return err


# ---------------------------------------------------------------------------------------------------- the number
def test_of_two_files_it_is_what_scipy_says(tmp_path, points):
    card = card_of(tmp_path, *points, "--metrics=fid,w2", "--settings.transport=90")
    x, y = (np.load(p)["x"].astype(np.float64) for p in points)
    assert values(card)["fid"] == pytest.approx(fid(x, y), rel=1e-6)
    cost = cdist(x, y[:90], "sqeuclidean")
    best = cost[linear_sum_assignment(cost)].mean() ** 0.5
    assert values(card)["w2"] == pytest.approx(best, rel=1e-4)
    assert card["metrics"]["fid"]["low"] < card["metrics"]["fid"]["value"] < card["metrics"]["fid"]["high"]


def test_of_fewer_than_all_it_takes_them_evenly(tmp_path, points):
    """A folder is sorted by class: its first pictures would be of one class."""
    card = card_of(tmp_path, *points, "--metrics=fid", "--n=30", "--reference-n=40")
    x, y = (np.load(p)["x"].astype(np.float64) for p in points)
    assert values(card)["fid"] == pytest.approx(fid(x[::3], y[::3]), rel=1e-6)
    assert card["metrics"]["fid"]["low"] is None, "no features were kept, so there is no interval"
    assert (card["settings"]["n"], card["settings"]["reference"]["n"]) == (30, 40)


@dataclass(frozen=True)
class Known(Objective):
    """A one-pass model whose samples are known: ``(2 z_0 + 1, z_1 / 2 - 1)``, in the units of the codec (none)."""

    sampler: ClassVar[str | None] = None
    bad: float = 1.0

    @property
    def phases(self):
        return (Phase("fit", ("net",)),)

    def networks(self, backbones, spec):
        net = nn.Linear(2, 2)
        net.weight.data = torch.diag(torch.tensor([2.0, 0.5])) * self.bad
        net.bias.data = torch.tensor([1.0, -1.0])
        return {"net": net}

    def loss(self, phase, nets, batch):
        return Loss(0 * nets["net"](batch.x).sum(1), {})

    def generator(self, nets, sampling=None):
        return lambda z, cond, noise=None: nets["net"](z)


def known(tmp_path, **changes):
    """Its run directory."""
    fields = [f"--objective.{k}={v}" for k, v in changes.items()]
    data = ["--data=moons", "--data.n=300"]
    return train(tmp_path, f"--objective={__name__}:Known", *fields, *data, "--steps=1")


def test_of_a_run_whose_samples_are_known(tmp_path):
    run = known(tmp_path)
    for split, seed in [("train", 7), ("test", 0)]:
        card = card_of(tmp_path, run, "--metrics=fid", "--n=150", f"--seed={seed}", f"--reference={split}")
        z = np.stack([torch.randn(2, generator=torch.Generator().manual_seed(seed + i)).numpy() for i in range(150)])
        real = load_run(run).config.data.load(split).x.double().numpy()
        assert values(card)["fid"] == pytest.approx(fid(z * [2, 0.5] + [1, -1], real), rel=1e-5)
        assert card["settings"]["reference"]["split"] == split
    assert card["settings"]["nfe"] == 1


def test_a_run_is_measured_as_its_own_samples_in_a_file_are(tmp_path, moons):
    """`genkit sample --format npz`, measured, is the run, measured: the same seeds, sampler and steps."""
    how = ["--sampler=dpmpp_2m", "--steps=4", "--guidance=1.5", "--seed=3", "--batch=64"]
    assert cli.main(["sample", str(moons), "--n=64", "--format=npz", f"--out={tmp_path}/s.npz", *how]) == 0
    reference = save(tmp_path / "r.npz", np.random.default_rng(0).normal(size=(80, 2)))
    run = card_of(tmp_path, moons, reference, "--metrics=fid,w2,mmd", "--n=64", *how)
    file = card_of(tmp_path, tmp_path / "s.npz", reference, "--metrics=fid,w2,mmd")
    assert values(run) == pytest.approx(values(file), rel=1e-5)
    assert run["settings"]["nfe"] == 4
    assert run["settings"]["passes"] == 8, "guidance asks the network for two of each"


def test_pictures_are_measured_by_class_too(grey, tmp_path):
    """The classes that were asked for, by a classifier that learned the run's own data."""
    card = card_of(tmp_path, grey, "--n=20", "--steps=2", "--features=classifier", "--features.steps=5",
                   "--metrics=accuracy,fid,prdc", "--batch=20", "--settings.k=3")  # fmt: skip
    run = load_run(grey, device="cpu")
    see = Classifier(steps=5).load("cpu", run.config.data.load("train"))
    x, cond = run.sample(20, sampler="heun", steps=2, batch=2)
    assert values(card)["accuracy"] == pytest.approx(float((see(x).logits.argmax(1) == cond["label"]).double().mean()))
    assert card["settings"]["features"]["name"] == "classifier"
    assert values(card).keys() == {"accuracy", "fid", "precision", "recall", "density", "coverage"}


# ------------------------------------------------------------------------------------------------------- the card
def test_a_card_says_all_that_the_number_hangs_on(moons):
    before = set(moons.glob("eval/*"))
    argv = ["eval", str(moons), "--metrics=fid,w2", "--n=40", "--steps=3", "--guidance=2", "--ema=0.999"]
    assert cli.main(argv) == 0
    (path,) = set(moons.glob("eval/*")) - before
    assert path.name.startswith("0000008-heun3-g2-n40-")
    card = json.loads(path.read_text())
    s = card["settings"]
    file = load_run(moons).directory / s["weights"]
    assert s["weights_sha256"] == sha256(file)
    assert (s["ema"], s["step"], s["sampler"], s["grid"], s["guidance"], s["seed"]) == (
        "0.999",
        8,
        "heun",
        "uniform",
        2,
        0,
    )
    assert (s["nfe"], s["passes"]) == (5, 10)
    assert s["reference"]["sha256"] == find_hash(moons)
    assert s["features"]["name"] == "raw"
    assert {"torch", "genkit", "numpy"} <= s["versions"].keys()
    assert s["seconds"] > 0
    assert s["effective_batch"] == 3, "16 blocks, so that no rank idles"
    assert "too high" in s["notes"][0]


def find_hash(run):
    data = load_run(run).config.data.load("train")
    import hashlib

    digest = hashlib.sha256(str(((2,), len(data))).encode())
    digest.update(data.x.numpy().tobytes())
    digest.update(data.cond["label"].numpy().tobytes())
    return digest.hexdigest()


def test_cards_compare_over_weights_only(moons, tmp_path, capsys):
    argv = ["eval", str(moons), "--metrics=w2,mmd", "--n=40", "--steps=2"]
    for name, extra in {"a": ["--step=4"], "b": [], "more": ["--n=50"], "guided": ["--guidance=2"]}.items():
        assert cli.main([*argv, *extra, f"--out={tmp_path}/{name}.json"]) == 0
    capsys.readouterr()
    a, b = str(tmp_path / "a.json"), str(tmp_path / "b.json")
    assert cli.main(["eval", "--compare", a, b, "--json"]) == 0
    found = {x["metric"]: x for x in json.loads(capsys.readouterr().out)["metrics"]}
    assert found["w2"]["a"]["value"] == values(cards.read(Path(a)))["w2"]
    assert found["w2"]["overlap"] is None
    assert found["mmd"]["overlap"] is True
    assert cli.main(["eval", "--compare", a, b]) == 0
    assert "overlap" in capsys.readouterr().out
    line = refused(capsys, "eval", "--compare", a, tmp_path / "more.json")
    assert "n: 40 and 50" in line
    assert "differ in more than the weights" in line
    assert "guidance: 1.0 and 2.0" in refused(capsys, "eval", "--compare", a, tmp_path / "guided.json")
    assert "is no card" in refused(capsys, "eval", "--compare", a, moons / "config.yaml")
    assert "needs two" in refused(capsys, "eval", "--compare", a)


def test_intervals_overlap_or_do_not():
    line = lambda a, b: cards.Line("fid", cards.Estimate(*a), cards.Estimate(*b)).overlap  # noqa: E731
    assert line((1, 0.5, 1.5), (2, 1.4, 2.6)) is True
    assert line((1, 0.5, 1.5), (2, 1.6, 2.4)) is False
    assert line((2, 1.6, 2.4), (1, 0.5, 1.5)) is False


def test_a_number_that_is_none_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="kid: is nan"):
        cards.numbers({"kid": cards.Estimate(float("nan"))})
    assert cards.numbers({"kid": cards.Estimate(1.0, float("nan"), 2.0)})["kid"] == {"value": 1, "low": None, "high": 2}
    with pytest.raises(ValueError, match="JSON"):
        cards.write({"metrics": {"kid": {"value": float("inf")}}}, tmp_path / "card.json")
    assert not (tmp_path / "card.json").exists()


# -------------------------------------------------------------------------------------------------- the reference
def test_reference_statistics_are_remembered_by_their_content(tmp_path, points, monkeypatch):
    argv = (*points, "--metrics=fid,w2")
    first = card_of(tmp_path, *argv)
    rows = count_rows(monkeypatch)
    again = card_of(tmp_path, *argv)
    assert sum(rows) == 90, "the reference was measured again"
    assert values(first) == values(again)
    y = np.load(points[1])["x"]
    y[-1, 0] += 1
    save(points[1], y)
    rows.clear()
    assert values(card_of(tmp_path, *argv)) != values(again)
    assert sum(rows) == 90 + 120


def count_rows(monkeypatch):
    rows, see = [], RawExtractor.__call__
    monkeypatch.setattr(RawExtractor, "__call__", lambda self, x: rows.append(len(x)) or see(self, x))
    return rows


def test_statistics_as_a_file_are_as_good_as_the_samples(tmp_path, points, capsys):
    a, b = points
    stats = tmp_path / "stats" / "b.npz"
    assert cli.main(["eval", b, "--save-stats", str(stats)]) == 0
    with np.load(stats) as file:
        y = np.load(b)["x"].astype(np.float64)
        assert np.allclose(file["mu"], y.mean(0))
        assert np.allclose(file["sigma"], np.cov(y, rowvar=False))
    direct, through = (card_of(tmp_path, a, where, "--metrics=fid") for where in (b, stats))
    assert values(through)["fid"] == pytest.approx(values(direct)["fid"], rel=1e-9)
    theirs = tmp_path / "theirs.npz"  # pytorch-fid's layout does not tell n
    np.savez(theirs, mu=y.mean(0), sigma=np.cov(y, rowvar=False))
    assert values(card_of(tmp_path, a, theirs, "--metrics=fid"))["fid"] == pytest.approx(
        values(direct)["fid"], rel=1e-9
    )
    assert "holds only mu and sigma" in refused(capsys, "eval", a, stats, "--metrics=w2")
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, mu=np.zeros(5), sigma=np.eye(5))
    assert "5 numbers; raw features have 3" in refused(capsys, "eval", a, wrong, "--metrics=fid")
    assert "no samples" in refused(capsys, "eval", stats, b)


def test_of_fid_alone_only_sums_are_kept():
    data = find_data("moons:test")
    extractor = Raw().load("cpu", data.data)
    assert measure(data, extractor, 200).measured.features is None
    assert measure(data, extractor, 200, keep=frozenset({"features"})).measured.features.shape == (200, 2)


# -------------------------------------------------------------------------------------------------- ranks, kills
@pytest.mark.parametrize(("n", "batch"), [(1, 64), (3, 64), (64, 64), (1000, 64), (10_000, 64), (100, 7)])
def test_blocks_hang_on_no_rank(n, batch):
    blocks = split_rows(n, batch)
    assert [i for b in blocks for i in b] == list(range(n))
    assert max(map(len, blocks)) <= batch
    assert len(blocks) >= min(n, 10), "some ranks would idle"


TWO = """
import sys, torch
from genkit.training.distributed import join_ranks
from genkit.evaluation import Drawn, Ranks, measure
from genkit.evaluation.metrics.features import Raw
from genkit.core.tensors import sha256
from genkit.training.directory import read_log
from genkit.training.run import load_run
from genkit.training.settings import TrainSettings

ranks = Ranks.of(join_ranks(torch.device("cpu")))
torch.set_num_threads(1)
drawn = Drawn(load_run(sys.argv[1], device="cpu"), {"steps": 3, "guidance": 2.0})
keep = frozenset({"features", "labels"})
look = lambda n, s=drawn: measure(s, Raw().load("cpu"), n, keep=keep, batch=8, ranks=ranks)
found = {n: look(n) for n in (1, 3, 101)}

class Fails:
    spec, name, limit, label, identity = drawn.spec, "fails", None, drawn.label, drawn.identity
    def rows(self, first, last, n):
        if ranks.rank == ranks.world - 1 and first > 60:
            raise ValueError("this rank has failed")
        return drawn.rows(first, last, n)

try:
    look(200, Fails())
    said = "nothing"
except ValueError as e:
    said = str(e)
every = ranks.gather(said)
if ranks.main:
    m = {n: f.measured for n, f in found.items()}
    torch.save({"x": {n: v.features for n, v in m.items()}, "labels": m[101].labels, "mean": m[101].moments.mean,
                "cov": m[101].moments.cov, "nfe": found[101].nfe, "said": every}, sys.argv[2])
"""


def test_two_ranks_draw_and_measure_what_one_does(tmp_path, moons, monkeypatch):
    """Samples bitwise, moments to 1e-10; fewer samples than ranks; a rank that fails is heard by all."""
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(tmp_path / "two.py"), str(moons), str(tmp_path / "2.pt")],
                          cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.setattr(sys, "argv", ["one.py", str(moons), str(tmp_path / "1.pt")])
    exec(TWO, {"__name__": "one"})
    one, two = (torch.load(tmp_path / f"{world}.pt") for world in (1, 2))
    for n in (1, 3, 101):
        assert torch.equal(one["x"][n], two["x"][n]), n
    assert torch.equal(one["labels"], two["labels"])
    assert torch.allclose(one["mean"], two["mean"], rtol=1e-12)
    assert torch.allclose(one["cov"], two["cov"], rtol=1e-12)
    assert one["nfe"] == two["nfe"] == 5
    assert two["said"] == ["this rank has failed"] * 2


@pytest.mark.slow
def test_accelerate_launch_writes_the_card_of_one_rank(tmp_path, moons):
    argv = ["eval", str(moons), "--metrics=fid,w2,mmd", "--n=100", "--steps=3", "--device=cpu"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "-m", "genkit"]
    for name, begin in {"one": [sys.executable, "-m", "genkit"], "two": command}.items():
        done = subprocess.run([*begin, *argv, f"--out={tmp_path}/{name}.json"], cwd=tmp_path, env=ENV,
                              capture_output=True, text=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (cards.read(tmp_path / f"{name}.json") for name in ("one", "two"))
    assert values(one) == pytest.approx(values(two), rel=1e-10)
    assert (one["settings"]["ranks"], two["settings"]["ranks"]) == (1, 2)
    assert cards.differences(one, two) == []


def test_a_kill_costs_nothing_that_was_saved(tmp_path, moons, monkeypatch):
    """Cut between two blocks; the second run does the rest alone, and its card is the same."""
    monkeypatch.setattr("genkit.evaluation.shards.SAVE", -float("inf"))  # after every block
    argv = (moons, "--metrics=fid,w2,mmd", "--n=160", "--steps=2", "--seed=5")
    whole = card_of(tmp_path, *argv)
    drawn, rows = [], Drawn.rows

    def until(self, first, last, n):
        if len(drawn) == 7:
            raise KeyboardInterrupt
        drawn.append((first, last))
        return rows(self, first, last, n)

    monkeypatch.setattr(Drawn, "rows", until)
    assert cli.main(["eval", *map(str, argv), f"--out={tmp_path}/cut.json"]) == 130
    assert not (tmp_path / "cut.json").exists()
    drawn.clear()
    monkeypatch.setattr(Drawn, "rows", lambda self, *a: drawn.append(a[:2]) or rows(self, *a))
    again = card_of(tmp_path, *argv)
    assert drawn == [(i, i + 10) for i in range(70, 160, 10)]
    drop = lambda card: {k: v for k, v in card["settings"].items() if k not in ("seconds", "metric_seconds")}  # noqa: E731
    assert again["metrics"] == whole["metrics"]
    assert drop(again) == drop(whole)
    drawn.clear()
    card_of(tmp_path, *argv[:-1], "--seed=6")
    assert len(drawn) == 16, "what was kept belonged to another seed"


# --------------------------------------------------------------------------------------------------- while training
def test_watching_a_training_does_not_change_it(tmp_path):
    args = ["--data=moons", "--data.n=300", "--backbone.width=16", "--steps=6", "--save-every=3", "--log-every=3"]
    plain = train(tmp_path / "a", *args)
    watched = train(tmp_path / "b", *args, "--eval-every=3", "--eval-n=40", "--eval-steps=2", "--eval-metrics=w2,fid",
                    "--tensorboard=true")  # fmt: skip
    for file in sorted((plain / "latest").glob("*.safetensors")):
        assert file.read_bytes() == (watched / "latest" / file.name).read_bytes(), file.name
    losses = [[r["denoise/loss"] for r in read_log(run) if "denoise/loss" in r] for run in (plain, watched)]
    assert losses[0] == losses[1]
    lines = {r["step"]: r["eval/w2"] for r in read_log(watched) if "eval/w2" in r}
    assert list(lines) == [3, 6]
    found = sorted((watched / "eval").glob("*.json"))
    assert [values(cards.read(p))["w2"] for p in found] == list(lines.values())
    card = card_of(tmp_path, watched, "--n=40", "--steps=2", "--metrics=w2,fid", "--batch=16", "--step=3")
    told = cards.read(found[0])
    assert values(card) == values(told), "eval afterwards says something else"
    assert card["settings"]["weights_sha256"] == told["settings"]["weights_sha256"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(watched / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("eval/w2")] == [3, 6]


def test_what_is_watched_goes_on_training(tmp_path):
    """Without an average the networks themselves are measured, and must have their dropout back."""
    cfg = replace(TrainSettings(), eval_every=1, eval_n=4, eval_steps=1, ema=(), precision="fp32")
    cfg = replace(cfg, data=find_data("moons").config, backbone=MLP(width=8))
    data = cfg.data.load("train")
    state = initial_state(cfg.objective, cfg.objective.networks(cfg.backbone, data.spec), cfg)
    seen = []
    state.nets["net"].train().register_forward_hook(lambda net, *_: seen.append(net.training))
    card = watch(cfg, state, data, Accelerator(cpu=True))(state, tmp_path)
    assert set(seen) == {False}
    assert state.nets["net"].training
    assert card["settings"]["ema"] == "none"


@pytest.mark.slow
def test_two_ranks_that_train_watch_together(tmp_path):
    """The card is what one rank makes of that checkpoint afterwards."""
    args = ["train", *TRAIN, "--data=moons", "--data.n=300", "--backbone.width=16", "--steps=4", "--eval-every=2",
            "--eval-n=50", "--eval-metrics=fid,w2", "--save-every=2"]  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "-m", "genkit"]
    done = subprocess.run([*command, *args], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    run = (tmp_path / "runs" / "latest").resolve()
    told = {c["settings"]["step"]: c for c in map(cards.read, run.glob("eval/*.json"))}
    assert sorted(told) == [2, 4]
    for step, card in told.items():
        alone = card_of(tmp_path, run, "--n=50", "--metrics=fid,w2", "--batch=16", f"--step={step}")
        assert card["settings"]["ranks"] == 2
        assert values(alone) == pytest.approx(values(card), rel=1e-10)


def test_a_mistake_in_what_to_watch_is_found_before_training(tmp_path, capsys):
    argv = ["train", *TRAIN, f"--out={tmp_path}", "--data=moons", "--steps=2", "--eval-every=1"]
    assert "did you mean mmd?" in refused(capsys, *argv, "--eval-metrics=mmf")
    assert "did you mean raw?" in refused(capsys, *argv, "--eval-features=ray")
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------------- mistakes
def picture(path, size=(8, 8), seed=0):
    rng = np.random.default_rng(seed)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)


def test_a_folder_with_a_truncated_or_odd_picture_is_refused_by_name(tmp_path, capsys):
    for i in range(6):
        picture(tmp_path / "a" / f"{i}.png", seed=i)
    whole = (tmp_path / "a" / "4.png").read_bytes()
    (tmp_path / "a" / "4.png").write_bytes(whole[: len(whole) // 2])
    argv = ["eval", tmp_path / "a", tmp_path / "a", "--features=raw", "--metrics=fid"]
    assert "4.png" in refused(capsys, *argv)
    picture(tmp_path / "a" / "4.png", (9, 8))
    line = refused(capsys, *argv)
    assert "4.png is 9x8" in line
    assert "--data.size=8" in line
    assert cli.main([*map(str, argv), "--data.size=8"]) == 0


def test_mistakes_are_one_line(tmp_path, moons, grey, points, capsys):
    a, b = points
    says = {
        "given 91, but": (a, b, "--n=91"),
        "did you mean kid?": (a, b, "--metrics=fid,kit"),
        "metrics: given none": (a, b, "--metrics=,"),
        "have no scores of classes": (a, b, "--metrics=is"),
        "accuracy: needs samples that were asked for by class": (a, b, "--metrics=accuracy"),
        "w2: is for vectors": (grey, "--metrics=w2", "--features=raw"),
        "needs a reference": (a,),
        "guidance: has no effect on samples that exist": (a, b, "--guidance=2"),
        "is unknown": (tmp_path / "nowhere", b),
        "a split of a run's data": (a, "--reference=train"),
        "needs RUN, or A B": (a, b, b),
        "mode: given clean, which has no effect": (a, b, "--mode=clean"),
        "which is not a file": (grey, "--features=inception", f"--weights={tmp_path}/absent.pt"),
        "sampler: given 'hoin'": (moons, "--sampler=hoin"),
        "ends in .npz": (a, "--save-stats=stats.json"),
        "greater than or equal to 2": (a, b, "--n=1"),
    }
    for words, argv in says.items():
        assert words in refused(capsys, "eval", *argv)
    assert not list(grey.glob("eval/*"))


def test_guidance_of_a_model_without_conditions_is_refused(tmp_path, capsys):
    run = train(tmp_path, "--data=checkerboard", "--data.n=50", "--backbone.width=8", "--steps=1")
    assert "no conditions to guide by" in refused(capsys, "eval", run, "--guidance=2", "--n=20")
    assert "accuracy: needs samples" in refused(capsys, "eval", run, "--metrics=accuracy", "--n=20")


def test_a_run_that_has_diverged_is_refused(tmp_path, capsys):
    line = refused(capsys, "eval", known(tmp_path, bad="1e300"), "--metrics=fid", "--n=20")
    assert "not finite" in line
    assert not list(tmp_path.glob("*/eval/*"))


def test_nan_hides_in_no_pixel(grey):
    """The codec would make NaN a black pixel."""
    run = load_run(grey, device="cpu")
    for net in run.nets.values():
        for p in net.parameters():
            p.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="sample 0 is not finite"):
        Drawn(run, {"steps": 2}).rows(0, 2, 2)
    with pytest.raises(ValueError, match="sample 0 is not finite"):
        run.sample(2, steps=2)


def test_other_seeds_steps_or_weights_are_other_samples(moons):
    """Else an evaluation that was cut off would go on with the numbers of another."""
    run = load_run(moons, device="cpu")
    usual = Drawn(run, {"steps": 2}, seed=0, weights_sha256="a").identity()
    assert Drawn(run, {"steps": 2}, seed=0, weights_sha256="a").identity() == usual
    for changed in ({"seed": 7}, {"how": {"steps": 3}}, {"weights_sha256": "b"}):
        assert Drawn(**{"run": run, "how": {"steps": 2}, "weights_sha256": "a", **changed}).identity() != usual


def test_ranks_hear_what_the_main_one_refuses():
    ranks = replace(Ranks(), rank=0)
    with pytest.raises(ValueError, match="no"):
        ranks.once(lambda: (_ for _ in ()).throw(ValueError("no")))
    assert ranks.once(lambda: 3) == 3


@pytest.mark.parametrize(
    "told",
    [
        [DATA["digits"](labels=False), DATA["digits"](captions=("a {label}",)), DATA["digits"]()],
        [DATA["8gaussians"](labels=False), DATA["8gaussians"]()],
    ],
    ids=["digits", "8gaussians"],
)
def test_what_a_model_is_measured_by_does_not_hang_on_what_it_is_told(told):
    """A model without classes shares the reference of one that has them, features and all."""
    found = [Given(config.with_default_conditions().load("test"), "", config, "test") for config in told]
    assert len({given.hash() for given in found}) == 1
    assert all(given.label == "label" for given in found)
