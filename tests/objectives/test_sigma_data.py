"""The standard deviation of the data: measured when a run begins, one number for the prediction and the weight."""

import pytest
import torch

import genkit
from genkit import config
from genkit.diffusion.paths import VE, VP, Linear
from genkit.objectives import DDPM, EDM, Flow
from genkit.objectives.matching.weights import EDMWeight

TINY = {"backbone": {"name": "mlp", "width": 8}, "batch": 8, "steps": 1, "workers": 0, "sample_every": 0,
        "tensorboard": False, "device": "cpu"}  # fmt: skip
KARRAS = [Flow(path=VE(), prediction="karras"), DDPM(prediction="karras"), EDM()]


@pytest.mark.parametrize("objective", KARRAS, ids=lambda o: type(o).__name__)
def test_it_is_measured_unless_given(objective):
    assert objective.parametrization.sigma_data == 0.5  # of code that never trains
    decided = objective.decide(lambda: 0.75)
    assert decided.sigma_data == decided.parametrization.sigma_data == 0.75
    assert decided.decide(lambda: 9.0) == decided
    assert "sigma_data is 0.75" in decided.notes()[0]


def test_others_have_none():
    for objective in (Flow(), DDPM()):
        assert objective.decide(lambda: 0.75).sigma_data is None


@pytest.mark.parametrize("std", [0.5, 0.8])
def test_the_weight_and_the_prediction_agree(std):
    """EDM's weight is 1 on the outputs of EDM's preconditioning, whatever the data (Karras et al. 2022, eq. 144)."""
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for path in (VE(), VP()):
        objective = Flow(path=path, prediction="karras", loss_weight=EDMWeight()).decide(lambda: std)
        assert torch.allclose(objective.error_scale(t, t).abs(), torch.ones(3, dtype=torch.float64))
    weighted = Flow(loss_weight=EDMWeight()).decide(lambda: std)
    x0 = Flow(loss_weight=EDMWeight(std)).error_scale(t, t)
    assert torch.allclose(weighted.error_scale(t, t), x0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Flow(sigma_data=0.7), "sigma_data: given 0.7, which has no effect on prediction velocity"),
        (lambda: DDPM(sigma_data=0.7), "no effect on prediction eps"),
        (lambda: Flow(loss_weight=EDMWeight(0.5), sigma_data=0.7), "no effect"),
        (
            lambda: Flow(path=VE(), prediction="karras", loss_weight=EDMWeight(0.4)),
            "given 0.4, but the prediction karras",
        ),
        (lambda: Flow(path=VE(), prediction="karras", loss_weight=EDMWeight(0.4), sigma_data=0.5), "has 0.5"),
    ],
)
def test_numbers_that_do_nothing_or_differ_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
    assert Flow(path=Linear()).sigma_data is None


def test_a_run_keeps_what_was_measured_and_an_older_one_what_it_had(tmp_path):
    run = genkit.train(objective="edm", data="digits", out=str(tmp_path), **TINY)
    x = run.codec.encode(run.config.data.load("train").batch(torch.arange(1000), None)).x
    stored = config.load_yaml(run.directory / "config.yaml")["objective"]["sigma_data"]
    assert stored == run.objective.sigma_data == pytest.approx(float(x.std()), rel=0.02)
    assert genkit.load(run.directory, device="cpu").objective.parametrization.sigma_data == stored
    assert genkit.train(resume=run.directory, steps=2).objective.sigma_data == stored
    old = DDPM(prediction="karras")  # whose config.yaml had no such entry, and meant 0.5
    assert old.parametrization.sigma_data == 0.5
