"""Guidance: linear, off at 1, and on the exact mixture the known combination of scores."""

import pytest
import torch
from exact import F64, ExactDenoiser, three
from hypothesis import given
from hypothesis import strategies as st

from genkit.core import Prediction
from genkit.guidance import clamp, classifier_free
from genkit.paths import PATHS, VP, Linear, mix

MIXTURE = three()


def state(n=6, t=0.6):
    x0, k = MIXTURE.sample(n)
    x1 = torch.randn(n, 2, dtype=F64)
    return mix(VP(), x0, x1, torch.full((n,), t, dtype=F64)), torch.full((n,), t, dtype=F64), {"label": k}


def test_off_at_one():
    denoise = ExactDenoiser(MIXTURE, VP())
    assert classifier_free(1.0)(denoise) is denoise


@given(scale=st.floats(-3, 8))
def test_linear_in_the_scale(scale):
    denoise = ExactDenoiser(MIXTURE, VP())
    x, t, cond = state()
    got = classifier_free(scale)(denoise)(x, t, cond)
    with_it, without = denoise(x, t, cond), denoise(x, t, {})
    for part in ("x0", "x1"):
        a, b = getattr(with_it, part), getattr(without, part)
        assert torch.allclose(getattr(got, part), b + scale * (a - b), atol=1e-11)


@pytest.mark.parametrize("path", [cls() for cls in PATHS.values()], ids=lambda p: type(p).__name__)
def test_is_the_score_of_the_sharpened_law(path):
    """score = s(x) + w (s(x | k) - s(x)): Ho & Salimans 2022, eq. 6, with scores by autograd of the densities."""
    w, t = 2.5, torch.full((4,), 0.5, dtype=F64)
    x0, _ = MIXTURE.sample(4)
    x = mix(path, x0, torch.randn(4, 2, dtype=F64), t).requires_grad_()
    a, s = float(path.alpha(t[:1])), float(path.sigma(t[:1]))
    log_p = MIXTURE.noised(a, s).log_prob(x)
    log_k = MIXTURE.component(1).noised(a, s).log_prob(x)
    score = torch.autograd.grad((log_p + w * (log_k - log_p)).sum(), x)[0]
    cond = {"label": torch.ones(4, dtype=torch.long)}
    got = classifier_free(w)(ExactDenoiser(MIXTURE, path))(x.detach(), t, cond)
    assert torch.allclose(-got.x1 / s, score, atol=1e-9)
    assert torch.allclose(a * got.x0 + s * got.x1, x.detach(), atol=1e-9)


def test_one_pass_of_twice_the_batch_and_samples_that_keep_nothing():
    calls = []
    exact = ExactDenoiser(MIXTURE, VP())

    class Count:
        path = VP()

        def __call__(self, x, t, cond):
            calls.append(len(x))
            return exact(x, t, cond)

    x, t, cond = state(4)
    classifier_free(2.0)(Count())(x, t, cond)
    assert calls == [8]
    keep = torch.tensor([True, False, True, False])
    got = classifier_free(2.0)(exact)(x, t, {**cond, "keep": keep})
    null = exact(x, t, {})
    assert torch.allclose(got.x0[~keep], null.x0[~keep])
    assert not torch.allclose(got.x0[keep], null.x0[keep])


def test_needs_a_condition():
    x, t, _ = state()
    with pytest.raises(ValueError, match="no condition"):
        classifier_free(2.0)(ExactDenoiser(MIXTURE, VP()))(x, t, {})


def test_clamp_stays_on_the_path():
    class Wild:
        path = Linear()

        def __call__(self, x, t, cond):
            return Prediction(3 * torch.ones_like(x), x)

    x, t = torch.randn(3, 2), torch.full((3,), 0.4)
    got = clamp()(Wild())(x, t, {})
    assert float(got.x0.max()) == 1
    assert torch.allclose(0.6 * got.x0 + 0.4 * got.x1, x, atol=1e-6)
