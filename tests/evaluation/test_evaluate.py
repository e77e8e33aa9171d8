"""`evaluate` and `genkit eval`: the numbers, the references, and mistakes that are one line."""

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from torch import nn

from genkit.cli import main as cli
from genkit.core import Loss, Objective, Phase
from genkit.data import DATA
from genkit.evaluation import DatasetSamples, EvaluationSettings, ModelSamples, evaluate, measure, open_data
from genkit.evaluation.metrics.features import Classifier, Raw, RawExtractor
from genkit.training.run import load_run
from genkit.training.sampling import Sampling
from tests.support.evaluation import evaluate_to_card, reference_fid, refusal, save_vectors, train, values


# ---------------------------------------------------------------------------------------------------- the number
def test_the_metrics_of_two_files_agree_with_scipy(tmp_path, points):
    card = evaluate_to_card(tmp_path, *points, "--metrics=fid,w2", "--metric-settings.transport=90")
    x, y = (np.load(p)["x"].astype(np.float64) for p in points)
    assert values(card)["fid"] == pytest.approx(reference_fid(x, y), rel=1e-6)
    cost = cdist(x, y[:90], "sqeuclidean")
    best = cost[linear_sum_assignment(cost)].mean() ** 0.5
    assert values(card)["w2"] == pytest.approx(best, rel=1e-4)
    assert card.metrics["fid"].low < card.metrics["fid"].value < card.metrics["fid"].high


def test_a_part_of_stored_samples_is_spread_evenly(tmp_path, points):
    """A folder is sorted by class: its first images would be of one class."""
    card = evaluate_to_card(tmp_path, *points, "--metrics=fid", "--n=30", "--reference-n=40")
    x, y = (np.load(p)["x"].astype(np.float64) for p in points)
    assert values(card)["fid"] == pytest.approx(reference_fid(x[::3], y[::3]), rel=1e-6)
    assert card.metrics["fid"].low is None, "no features were kept, so there is no interval"
    assert (card.settings["n"], card.settings["reference"]["n"]) == (30, 40)


def test_python_and_the_command_give_the_same_card(tmp_path, moons, points, capsys):
    """By keywords and by a settings dataclass; nothing is printed or saved."""
    before = set(moons.glob("eval/*"))
    card = evaluate(moons, metrics="fid,w2", n=40, steps=3, device="cpu")
    settings = EvaluationSettings(metrics="fid,w2", n=40, steps=2, device="cpu")
    assert evaluate(str(moons), settings, steps=3).metrics == card.metrics
    assert evaluate(load_run(moons, device="cpu"), settings, steps=3).metrics == card.metrics
    assert capsys.readouterr() == ("", "")
    assert set(moons.glob("eval/*")) == before
    command = evaluate_to_card(tmp_path, moons, "--metrics=fid,w2", "--n=40", "--steps=3")
    assert command.metrics == card.metrics
    assert card.save() == card.path
    assert json.loads(card.path.read_text())["metrics"] == card.to_dict()["metrics"]
    assert "fid" in repr(card)
    assert evaluate(points[0], reference=points[1], metrics="w2").path is None
    calls = []
    evaluate(moons, settings, progress=lambda *call: calls.append(call))
    assert calls[-1] == ("samples", 40, 40)


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
        net.weight.data = torch.diag(torch.tensor([2.0, 0.5])) * self.bad**2
        net.bias.data = torch.tensor([1.0, -1.0])
        return {"net": net}

    def loss(self, phase, nets, batch):
        return Loss(0 * nets["net"](batch.x).sum(1), {})

    def generator(self, nets, sampling=None):
        return lambda z, cond, noise=None: nets["net"](z)


def train_known(tmp_path, **changes):
    """A run of the model whose samples are known."""
    fields = [f"--objective.{k}={v}" for k, v in changes.items()]
    return train(tmp_path, f"--objective={__name__}:Known", *fields, "--data=moons", "--data.n=300", "--steps=1")


def test_the_fid_of_a_run_whose_samples_are_known(tmp_path):
    run = train_known(tmp_path)
    for split, seed in [("train", 7), ("test", 0)]:
        card = evaluate_to_card(tmp_path, run, "--metrics=fid", "--n=150", f"--seed={seed}", f"--reference={split}")
        z = np.stack([torch.randn(2, generator=torch.Generator().manual_seed(seed + i)).numpy() for i in range(150)])
        real = load_run(run).config.data.load(split).x.double().numpy()
        assert values(card)["fid"] == pytest.approx(reference_fid(z * [2, 0.5] + [1, -1], real), rel=1e-5)
        assert card.settings["reference"]["split"] == split
    assert card.settings["nfe"] == 1


def test_a_run_is_measured_like_its_samples_in_a_file(tmp_path, moons):
    """`genkit sample --format npz`, measured, equals the run, measured: the same seeds, sampler and steps."""
    how = ["--sampler=dpmpp_2m", "--steps=4", "--guidance=1.5", "--seed=3", "--batch=64"]
    assert cli.main(["sample", str(moons), "--n=64", "--format=npz", f"--out={tmp_path}/s.npz", *how]) == 0
    reference = save_vectors(tmp_path / "r.npz", np.random.default_rng(0).normal(size=(80, 2)))
    run = evaluate_to_card(tmp_path, moons, reference, "--metrics=fid,w2,mmd", "--n=64", *how)
    file = evaluate_to_card(tmp_path, tmp_path / "s.npz", reference, "--metrics=fid,w2,mmd")
    assert values(run) == pytest.approx(values(file), rel=1e-5)
    assert run.settings["nfe"] == 4
    assert run.settings["passes"] == 8, "guidance evaluates the network on two rows per sample"


def test_accuracy_is_measured_by_a_classifier_of_the_runs_own_data(grey, tmp_path):
    card = evaluate_to_card(tmp_path, grey, "--n=20", "--steps=2", "--features=classifier", "--features.steps=5",
                            "--metrics=accuracy,fid,prdc", "--batch=20", "--metric-settings.k=3")  # fmt: skip
    run = load_run(grey, device="cpu")
    extract = Classifier(steps=5).load("cpu", run.config.data.load("train"))
    x, cond = run.sample(20, sampler="heun", steps=2, batch=2)
    correct = (extract(x).logits.argmax(1) == cond["label"]).double().mean()
    assert values(card)["accuracy"] == pytest.approx(float(correct))
    assert card.settings["features"]["name"] == "classifier"
    assert values(card).keys() == {"accuracy", "fid", "precision", "recall", "density", "coverage"}


# -------------------------------------------------------------------------------------------------- the reference
def test_reference_statistics_are_cached_by_content(tmp_path, points, monkeypatch):
    argv = (*points, "--metrics=fid,w2")
    first = evaluate_to_card(tmp_path, *argv)
    rows = count_extracted_rows(monkeypatch)
    again = evaluate_to_card(tmp_path, *argv)
    assert sum(rows) == 90, "the reference was measured again"
    assert values(first) == values(again)
    y = np.load(points[1])["x"]
    y[-1, 0] += 1
    save_vectors(points[1], y)
    rows.clear()
    assert values(evaluate_to_card(tmp_path, *argv)) != values(again)
    assert sum(rows) == 90 + 120


def count_extracted_rows(monkeypatch):
    rows, extract = [], RawExtractor.__call__
    monkeypatch.setattr(RawExtractor, "__call__", lambda self, x: rows.append(len(x)) or extract(self, x))
    return rows


def test_statistics_in_a_file_are_as_good_as_the_samples(tmp_path, points, capsys):
    a, b = points
    stats = tmp_path / "stats" / "b.npz"
    assert cli.main(["eval", b, "--save-stats", str(stats)]) == 0
    with np.load(stats) as file:
        y = np.load(b)["x"].astype(np.float64)
        assert np.allclose(file["mu"], y.mean(0))
        assert np.allclose(file["sigma"], np.cov(y, rowvar=False))
    direct, from_file = (evaluate_to_card(tmp_path, a, reference, "--metrics=fid") for reference in (b, stats))
    assert values(from_file)["fid"] == pytest.approx(values(direct)["fid"], rel=1e-9)
    foreign = tmp_path / "foreign.npz"  # pytorch-fid's files do not store n
    np.savez(foreign, mu=y.mean(0), sigma=np.cov(y, rowvar=False))
    fid = values(evaluate_to_card(tmp_path, a, foreign, "--metrics=fid"))["fid"]
    assert fid == pytest.approx(values(direct)["fid"], rel=1e-9)
    assert "has only mu and sigma" in refusal(capsys, "eval", a, stats, "--metrics=w2")
    wrong = tmp_path / "wrong.npz"
    np.savez(wrong, mu=np.zeros(5), sigma=np.eye(5))
    assert "5 features; raw features have 3" in refusal(capsys, "eval", a, wrong, "--metrics=fid")
    assert "no samples" in refusal(capsys, "eval", stats, b)


def test_for_fid_alone_only_sums_are_kept():
    data = open_data("moons:test")
    extractor = Raw().load("cpu", data.data)
    assert measure(data, extractor, 200).statistics.features is None
    assert measure(data, extractor, 200, keep=frozenset({"features"})).statistics.features.shape == (200, 2)


@pytest.mark.parametrize(
    "configs",
    [
        [DATA["digits"](labels=False), DATA["digits"](captions=("a {label}",)), DATA["digits"]()],
        [DATA["8gaussians"](labels=False), DATA["8gaussians"]()],
    ],
    ids=["digits", "8gaussians"],
)
def test_the_reference_does_not_depend_on_a_models_conditions(configs):
    """A model without classes shares the reference, and its features, with one that has them."""
    references = [DatasetSamples(c.with_default_conditions().load("test"), "", c, "test") for c in configs]
    assert len({reference.hash() for reference in references}) == 1
    assert all(reference.label == "label" for reference in references)


# ----------------------------------------------------------------------------------------------- samples of a run
def test_other_seeds_steps_or_weights_are_other_samples(moons):
    """Otherwise an interrupted evaluation would continue with the numbers of another."""
    run = load_run(moons, device="cpu")
    identity = ModelSamples(run, Sampling(steps=2), "a").identity()
    assert ModelSamples(run, Sampling(steps=2), "a").identity() == identity
    for sampling, weights in [(Sampling(steps=2, seed=7), "a"), (Sampling(steps=3), "a"), (Sampling(steps=2), "b")]:
        assert ModelSamples(run, sampling, weights).identity() != identity


def test_nan_hides_in_no_pixel(grey):
    """The codec would make NaN a black pixel."""
    run = load_run(grey, device="cpu")
    for net in run.nets.values():
        for p in net.parameters():
            p.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="sample 0 is not finite"):
        ModelSamples(run, Sampling(steps=2)).rows(0, 2, 2)
    with pytest.raises(ValueError, match="sample 0 is not finite"):
        run.sample(2, steps=2)


# --------------------------------------------------------------------------------------------------------- mistakes
def save_image(path, size=(8, 8), seed=0):
    rng = np.random.default_rng(seed)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)


def test_a_truncated_or_odd_image_in_a_folder_is_named(tmp_path, capsys):
    for i in range(6):
        save_image(tmp_path / "a" / f"{i}.png", seed=i)
    content = (tmp_path / "a" / "4.png").read_bytes()
    (tmp_path / "a" / "4.png").write_bytes(content[: len(content) // 2])
    argv = ["eval", tmp_path / "a", tmp_path / "a", "--features=raw", "--metrics=fid"]
    assert "4.png" in refusal(capsys, *argv)
    save_image(tmp_path / "a" / "4.png", (9, 8))
    line = refusal(capsys, *argv)
    assert "4.png is 9x8" in line
    assert "--data.size=8" in line
    assert cli.main([*map(str, argv), "--data.size=8"]) == 0


def test_mistakes_are_one_line(tmp_path, moons, grey, points, capsys):
    a, b = points
    messages = {
        "given 91, but": (a, b, "--n=91"),
        "did you mean kid?": (a, b, "--metrics=fid,kit"),
        "--metrics: given ','": (a, b, "--metrics=,"),
        "have no class scores": (a, b, "--metrics=is"),
        "accuracy: needs class-conditional samples": (a, b, "--metrics=accuracy"),
        "w2: is for vectors": (grey, "--metrics=w2", "--features=raw"),
        "needs a reference": (a,),
        "guidance: has no effect on stored samples": (a, b, "--guidance=2"),
        "reconstruct: needs a run with a code": (a, b, "--reconstruct=test"),
        "is unknown": (tmp_path / "nowhere", b),
        "a split of a run's data": (a, "--reference=train"),
        "needs RUN, or A B": (a, b, b),
        "resize: given clean, which has no effect": (a, b, "--resize=clean"),
        "which is not a file": (grey, "--features=inception", f"--weights={tmp_path}/absent.pt"),
        "--sampler: given 'hoin'": (moons, "--sampler=hoin"),
        "ends in .npz": (a, "--save-stats=stats.json"),
        "greater than or equal to 2": (a, b, "--n=1"),
    }
    for words, argv in messages.items():
        assert words in refusal(capsys, "eval", *argv)
    assert not list(grey.glob("eval/*"))


def test_guidance_of_a_model_without_conditions_is_refused(tmp_path, capsys):
    run = train(tmp_path, "--data=checkerboard", "--data.n=50", "--backbone.width=8", "--steps=1")
    assert "no conditions to guide by" in refusal(capsys, "eval", run, "--guidance=2", "--n=20")
    assert "accuracy: needs class-conditional" in refusal(capsys, "eval", run, "--metrics=accuracy", "--n=20")


def test_a_run_that_has_diverged_is_refused(tmp_path, capsys):
    line = refusal(capsys, "eval", train_known(tmp_path, bad="1e30"), "--metrics=fid", "--n=20")
    assert "not finite" in line
    assert not list(tmp_path.glob("*/eval/*"))
