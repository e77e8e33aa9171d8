"""The space of the loss: what it follows, what it weighs, and that the end of a zero-SNR schedule is learned."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

import genkit
from genkit import config
from genkit.backbones import MLP
from genkit.core import Batch, Draw, Spec
from genkit.diffusion.parametrization import PARAMETRIZATIONS
from genkit.diffusion.paths import PATHS, VE, VP, Linear
from genkit.objectives import DDPM, EDM, Flow
from genkit.objectives.matching.matching import LOSS_SPACES, MAX_ERROR_SCALE
from genkit.objectives.matching.weights import P2, EDMWeight, LossSpace, MinSNR
from genkit.training.settings import TrainSettings

F64 = torch.float64


def test_the_loss_follows_the_prediction_unless_it_is_asked_for():
    spaces = {prediction: DDPM(prediction=prediction).space for prediction in PARAMETRIZATIONS}
    assert spaces == {"velocity": "velocity", "eps": "eps", "x0": "v", "v": "v", "score": "eps", "karras": "v"}
    assert {Flow(path=VP(), prediction=p).space for p in PARAMETRIZATIONS} == {"velocity"}
    assert DDPM(prediction="v", loss_space="eps").space == "eps"
    assert DDPM(prediction="v", loss_weight=MinSNR()).space == "x0"  # the space that the weight is stated for
    assert Flow(path=VP(), loss_weight=P2()).space == "eps"
    assert set(LOSS_SPACES) == set(get_args(LossSpace))


@pytest.mark.parametrize("space", ["eps", "x0", "velocity"])
def test_an_older_configuration_means_what_it_meant(space):
    """Its config.yaml has the space that was the default then."""
    tree = config.dump(TrainSettings()) | {"objective": {"name": "ddpm", "prediction": "v", "loss_space": space}}
    assert config.from_dict(TrainSettings, tree).objective.space == space
    new = replace(TrainSettings(), objective=DDPM(prediction="v"))
    assert config.from_dict(TrainSettings, config.dump(new)).objective.space == "v"


def test_a_run_says_what_was_decided_and_is_found_by_what_was_given(tmp_path):
    given = {"objective": {"name": "ddpm", "prediction": "v"}, "data": "moons", "backbone": {"name": "mlp", "width": 8}}
    tiny = {"batch": 8, "workers": 0, "sample_every": 0, "tensorboard": False, "device": "cpu", "out": str(tmp_path)}
    run = genkit.train(**given, **tiny, steps=1)
    assert config.load_yaml(run.directory / "config.yaml")["objective"]["loss_space"] == "v"
    again = genkit.train(**given, **tiny, steps=2, resume="auto")
    assert (again.directory, again.step) == (run.directory, 2)
    assert genkit.train(resume=run.directory, steps=3, objective=given["objective"]).step == 3
    with pytest.raises(ValueError, match=r"objective.loss_space: given eps, but .* with v"):
        genkit.train(resume=run.directory, steps=4, objective=given["objective"] | {"loss_space": "eps"})


def test_v_loss_is_the_papers():
    """``|v - v_hat|^2`` with ``v = alpha eps - sigma x0`` (Salimans & Ho 2022, section 4) at every time, t = 1 too."""
    t = torch.tensor([1e-3, 0.3, 0.7, 1.0], dtype=F64)
    for zero_snr in (False, True):
        objective = DDPM(prediction="v", zero_snr=zero_snr)
        assert torch.allclose(objective.error_scale(t, t).abs(), torch.ones(4, dtype=F64), atol=1e-12)
    snr = (VP().alpha(t) / VP().sigma(t)) ** 2  # of x0 it is SNR + 1 (section 4), up to the bound
    scale = DDPM(prediction="x0").error_scale(t, t) ** 2
    assert torch.allclose(scale, (1 + snr).clamp(max=MAX_ERROR_SCALE**2))


def test_no_default_loss_ignores_the_noisy_end():
    """A loss that is 0 where samples begin says nothing about the first step of sampling."""
    one = torch.ones(1, dtype=F64)
    for objective in [
        *(DDPM(prediction=p, zero_snr=z) for p in ("v", "x0", "velocity") for z in (False, True)),
        *(DDPM(prediction=p) for p in PARAMETRIZATIONS),
        *(Flow(path=kind(), prediction=p) for kind in PATHS.values() for p in ("v", "x0", "velocity")),
    ]:
        ends = [objective.parametrization.target(objective.path, x0, 1 - x0, one).abs() for x0 in (one, 0 * one)]
        assert float(objective.error_scale(one, one).abs() * torch.maximum(*ends)) > 0.2, objective
        assert not objective.notes()


def test_a_loss_without_the_noisy_end_is_mentioned():
    forgetful = {"prediction": "v", "loss_space": "eps"}
    for objective in (DDPM(zero_snr=True, **forgetful), Flow(**forgetful)):
        (note,) = objective.notes()
        assert "has weight 0 at t = 1" in note
    assert not DDPM(prediction="v", loss_space="eps").notes()  # its path does not end in pure noise


@pytest.mark.parametrize(("space", "learned"), [(None, True), ("eps", False)])
def test_the_last_step_of_a_zero_snr_schedule_is_learned(space, learned):
    """Data N(0.8, 0.1^2): at t = 1, where x is noise, the best x0 is their mean; the old default left it at chance."""
    objective = DDPM(prediction="v", zero_snr=True, loss_space=space)
    torch.manual_seed(0)
    net = objective.networks(MLP(width=32, depth=2), Spec((8,), {}))["net"]
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    rows = 256
    for step in range(250):
        x = 0.8 + 0.1 * torch.randn(rows, 8)
        loss = objective.loss("denoise", {"net": net}, Batch(x, draw=Draw((step,), 0, rows))).per_sample.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x0 = objective.denoiser(net)(torch.randn(512, 8), torch.ones(512), {}).x0
    error = float((x0 - 0.8).square().mean().sqrt())
    assert (error < 0.15) == learned, error


# ------------------------------------------------------------------------------------------- the bound of the scale
def test_only_a_division_is_bounded():
    """NCSN++ weighs the score's error by sigma^2 (Song et al. 2021, eq. 7 and appendix C), up to sigma_max."""
    levels = torch.tensor([1.0, 10.0, 20.0, 40.0, 80.0], dtype=F64)
    t = VE().time_of(levels)
    assert torch.allclose(Flow(path=VE(), prediction="score", loss_space="eps").error_scale(t, t), -levels)
    divided = DDPM(prediction="eps", loss_space="x0").error_scale(torch.ones(1), torch.ones(1))
    assert float(divided.abs()) == MAX_ERROR_SCALE
    of_score = DDPM(prediction="score", loss_space="x0").error_scale(torch.ones(1), torch.ones(1))
    assert float(of_score.abs()) == pytest.approx(MAX_ERROR_SCALE * float(VP().sigma(torch.ones(1))))


def test_edm_is_unweighted_on_its_own_outputs():
    t = torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    assert torch.allclose(EDM().error_scale(t, t), torch.ones(3, dtype=F64))
    flow = Flow(path=VE(), prediction="karras", loss_weight=EDMWeight())
    assert torch.allclose(flow.error_scale(t, t), torch.ones(3, dtype=F64))
    assert Flow(path=Linear()).space == "velocity"
