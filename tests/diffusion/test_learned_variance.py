"""Guidance moves the ends of a prediction and keeps its learned variance, each row at its own time too."""

import pytest
import torch

from genkit.core import Prediction
from genkit.diffusion.guidance import APG, autoguidance, by_classifier, clamp, classifier_free, compose, within
from genkit.diffusion.inverse_problems import Dense, Measurement, dps, pigdm
from genkit.diffusion.paths import VP
from genkit.diffusion.posterior import LearnedVariance, learned_variance
from genkit.diffusion.samplers import Seeds, bind

MATRIX = torch.tensor([[1.0, 0.5, 0.0, -0.3]])


class Learned:
    """A denoiser whose variance is a known function of x, with classes that shift the data."""

    path = VP()
    factor = 1.0

    def __call__(self, x, t, cond):
        a, s = self.path.alpha(t)[:, None], self.path.sigma(t)[:, None]
        shift = cond.get("label", torch.zeros(len(x)))[:, None] * cond.get("keep", torch.ones(len(x)))[:, None]
        x0 = a * x / (a**2 + s**2) * self.factor + 0.1 * shift
        return LearnedVariance.of(Prediction(x0, (x - a * x0) / s), torch.tanh(3 * x))


class Classifier:
    path = VP()

    def __call__(self, x, t, cond):
        return -x.square().sum(1)


def weaker():
    weak = Learned()
    weak.factor = 0.5
    return weak


MEASURED = Measurement(Dense(MATRIX), torch.tensor([[0.7]] * 6), 0.1)
GUIDANCE = {
    "clamp": clamp(-0.1, 0.1),
    "classifier_free": classifier_free(2.0),
    "apart": classifier_free(2.0, APG(), "apart"),
    "null": classifier_free(0.0),
    "autoguidance": autoguidance(weaker(), 2.0),
    "classifier": by_classifier(Classifier(), 0.1),
    "pigdm": pigdm(MEASURED),
    "dps": dps(MEASURED),
}
GUIDANCE |= {f"{name} within": within(0.2, 0.8, guidance) for name, guidance in GUIDANCE.items()}
GUIDANCE["composed"] = compose(classifier_free(2.0), within(0.2, 0.8, pigdm(MEASURED)), clamp())


@pytest.mark.parametrize("name", GUIDANCE)
@pytest.mark.parametrize("times", [[0.5] * 6, [0.05, 0.3, 0.5, 0.7, 0.9, 1.0]], ids=["one time", "mixed times"])
def test_the_learned_variance_is_kept(name, times):
    x, t = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor(times)
    cond = {"label": torch.arange(6.0)}
    plain, guided = Learned()(x, t, cond), GUIDANCE[name](Learned())(x, t, cond)
    w = learned_variance(guided)
    assert w is not None
    assert torch.allclose(w, plain.w)
    assert not w.requires_grad
    assert not torch.equal(guided.x0, plain.x0)
    noise = Seeds(range(6))
    bind("ancestral", 5, GUIDANCE[name], variance="learned")(Learned())(noise((4,)), cond, noise)
