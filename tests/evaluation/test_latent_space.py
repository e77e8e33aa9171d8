"""The latent space of a run: principal directions agree with scikit-learn's, a traversal moves one coordinate only."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from genkit import config
from genkit.cli import main as cli
from genkit.core import Batch
from genkit.data import DATA
from genkit.evaluation.report import latent_space
from genkit.evaluation.report.html import render_note
from genkit.evaluation.report.page import render_run
from genkit.training.run import Run
from genkit.training.settings import TrainSettings

CPU = torch.device("cpu")
SMALL = {"name": "mlp", "width": 16, "depth": 1}
CODES = {
    "vae": {"name": "vae", "latent": [5]},
    "ae": {"name": "ae", "latent": [2, 2, 2]},
    "vq": {"name": "vq", "latent": [3, 2, 2], "codebook_size": 7},
    "autoencoder": {"name": "autoencoder", "latent": [3, 2, 2]},
}


def codes_of(n=200, d=6):
    g = torch.Generator().manual_seed(5)
    return 3 + torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g)


def untrained(objective, labels=False, data="digits"):
    """A run that is not on disk."""
    cfg = config.from_dict(
        TrainSettings, {"objective": objective, "backbone": SMALL, "data": {"name": data, "labels": labels}}
    )
    loaded = cfg.data.load("train")
    nets = cfg.objective.networks(cfg.backbone, loaded.spec)
    return Run(Path("nowhere"), cfg, nets, loaded.spec, loaded.codec, 0, "none", CPU)


# ------------------------------------------------------------------------------------------------------------- axes
def test_the_axes_are_those_of_scikit_learn():
    codes = codes_of()
    axes, pca = latent_space.principal_axes(codes.reshape(200, 3, 2), 4), PCA(4).fit(codes.double().numpy())
    assert np.allclose(axes.mean.numpy(), pca.mean_, atol=1e-6)
    assert np.allclose(np.abs((axes.directions.numpy() * pca.components_).sum(1)), 1, atol=1e-6)
    assert np.allclose(axes.deviation.numpy() ** 2 * 200 / 199, pca.explained_variance_, rtol=1e-6)
    assert np.allclose(axes.share.numpy(), pca.explained_variance_ratio_, rtol=1e-6)
    mirrored = latent_space.principal_axes(6 - codes.flip(0), 4)  # the mirrored cloud has the same axes
    assert torch.allclose(mirrored.directions, axes.directions, atol=1e-5)


def test_codes_on_a_line_have_one_axis_and_equal_codes_are_refused():
    line = torch.linspace(0, 1, 9)[:, None] * torch.tensor([3.0, 4.0])
    axes = latent_space.principal_axes(line, 8)
    assert axes.directions.tolist() == [pytest.approx([0.6, 0.8])]
    with pytest.raises(ValueError, match="has collapsed"):
        latent_space.principal_axes(torch.full((9, 4), 2.5), 8)


def test_a_traversal_moves_along_its_own_axis_only():
    codes = codes_of()
    axes = latent_space.principal_axes(codes, 3)
    z = latent_space.traverse_axes(axes, codes[7].reshape(2, 3))
    assert z.shape == (3 * latent_space.TRAVERSAL_STEPS, 2, 3)
    scores = axes.scores(z).reshape(3, latent_space.TRAVERSAL_STEPS, 3)
    for i in range(3):
        expected = (
            torch.linspace(
                -latent_space.TRAVERSAL_REACH, latent_space.TRAVERSAL_REACH, latent_space.TRAVERSAL_STEPS
            ).double()
            * axes.deviation[i]
        )
        assert torch.allclose(scores[i, :, i], expected, atol=1e-5)
        others = [k for k in range(3) if k != i]
        assert torch.allclose(
            scores[i][:, others], axes.scores(codes[7:8])[:, others].expand(latent_space.TRAVERSAL_STEPS, 2), atol=1e-5
        )
    rest = lambda v: v - axes.scores(v) @ axes.directions - axes.mean  # noqa: E731  (what no axis reaches)
    assert torch.allclose(rest(z.flatten(1).double()), rest(codes[7:8].double()), atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- codes
@pytest.mark.parametrize("name", CODES)
def test_codes_are_the_encoders_with_the_classes_of_the_samples(name):
    run = untrained(CODES[name])
    samples = latent_space.encode_dataset(run, 36, batch=10)
    data = DATA["digits"]().load("test")
    rows = torch.arange(36) * len(data) // 36
    x = Batch(data.x[rows].float() / 127.5 - 1)
    with torch.no_grad():
        assert torch.allclose(samples.codes, run.objective.encode(run.nets, x.x).mean, atol=1e-5)
    assert samples.label.equal(data.cond["label"][rows])
    assert samples.cond == {}
    assert samples.names == tuple("0123456789")


def test_training_samples_are_encoded_if_none_are_held_out():
    run = untrained({"name": "ae", "latent": [2]}, data="moons")
    assert len(latent_space.encode_dataset(run, 30).codes) == 30


@pytest.mark.parametrize("name", CODES)
def test_traversals_are_decoded_with_the_samples_own_class(name):
    run = untrained(CODES[name], labels=True)
    samples = latent_space.encode_dataset(run, 40)
    axes = latent_space.principal_axes(samples.codes, 3)
    picture = np.asarray(latent_space.draw_traversals(run, samples, axes))
    k = len(axes.deviation)
    near = int((samples.codes.flatten(1) - axes.mean).square().sum(1).argmin())
    cond = {"label": samples.label[near].expand(k * latent_space.TRAVERSAL_STEPS)}
    z = run.objective.quantize(run.nets, latent_space.traverse_axes(axes, samples.codes[near]))
    with torch.no_grad():
        x = run.codec.decode(run.objective.decode(run.nets, z, cond))
    assert np.array_equal(picture, np.asarray(latent_space.draw_rows(x, {})))
    assert len(x.flatten(1).unique(dim=0)) > k  # it changes along the rows


def test_figures_of_points():
    assert set(latent_space.latent_figures(untrained({"name": "ae", "latent": [1]}, data="moons"), 50)) == {
        "traversals",
        "map",
    }


# -------------------------------------------------------------------------------------------------------- the report
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    argv = ["--objective=ae", "--objective.latent=3", "--backbone=mlp", "--backbone.width=16", "--steps=2", "--batch=8",
            "--data.labels=false", "--no-tensorboard", "--sample-every=0", "--workers=0"]  # fmt: skip
    assert cli.main(["train", *argv, f"--out={out}"]) == 0
    return (out / "latest").resolve()


def alts(page):
    return re.findall(r'alt="(Latent space[^"]*)"', page.read_text())


def test_the_page_shows_the_latent_space_and_draws_it_once(trained, tmp_path, monkeypatch):
    out = tmp_path / "page.html"
    assert cli.main(["report", str(trained), f"--out={out}"]) == 0
    assert alts(out) == ["Latent space: traversals", "Latent space: map"]
    paths = sorted((trained / "space").iterdir())
    assert [p.name for p in paths] == ["step-0000002-map.png", "step-0000002-traversals.png"]
    with Image.open(paths[1]) as image:
        assert image.size == (9 * 99 + 3, 3 * 99 + 3)
    monkeypatch.setattr(latent_space, "latent_figures", lambda run: pytest.fail("drawn again"))
    assert cli.main(["report", str(trained), f"--out={out}"]) == 0
    assert alts(out) == ["Latent space: traversals", "Latent space: map"]


def test_a_latent_space_that_cannot_be_drawn_is_a_note_on_the_page(trained, tmp_path, monkeypatch):
    def refuse(run):
        raise ValueError("mnist: no such files")

    monkeypatch.setattr(latent_space, "latent_figures", refuse)
    moved = tmp_path / "run"
    shutil.copytree(trained, moved, symlinks=True, ignore=shutil.ignore_patterns("space"))
    assert cli.main(["report", str(moved)]) == 0
    assert alts(moved / "report.html") == []
    assert "Not drawn: mnist: no such files" in (moved / "report.html").read_text()


def test_a_run_without_a_code_has_no_such_section(tmp_path):
    (tmp_path / "config.yaml").write_text("objective: flow\n")
    assert cli.main(["report", str(tmp_path)]) == 0
    assert "Latent space" not in (tmp_path / "report.html").read_text()
    assert "Latent space" in render_run(tmp_path, {"Latent space": [render_note("here")]})
