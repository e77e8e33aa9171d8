"""The contract of guidance rules, run on ``RULES`` by ``tests/diffusion`` and on an added one by ``tests/recipes``."""

import torch

from genkit.diffusion.guidance import autoguidance, clamp, classifier_free, compose, within
from genkit.diffusion.paths import PATHS, VP, Cosine, mix
from tests.support.exact import F64, ExactDenoiser, three

MIXTURE = three()


def tensors(*shape):
    return torch.randn(*shape, dtype=F64)


def check_off_at_one(rule):
    """At scale 1 the better estimate is left alone, and so it is at any scale if the worse one is the same."""
    denoise = ExactDenoiser(MIXTURE, VP())
    assert classifier_free(1.0, rule)(denoise) is denoise
    assert autoguidance(ExactDenoiser(MIXTURE, Cosine()), 1.0, rule)(denoise) is denoise
    good, bad = tensors(5, 3, 4), tensors(5, 3, 4)
    assert torch.allclose(rule(good, bad, 1.0, None)[0], good, atol=1e-12)
    assert torch.allclose(rule(good, good, 4.0, None)[0], good, atol=1e-12)


def check_rows_are_independent(rule):
    """A sample's guidance does not depend on the other samples of its batch."""
    good, bad = tensors(5, 3, 4), tensors(5, 3, 4)
    both = rule(good, bad, 3.0, None)[0]
    assert torch.allclose(both[:2], rule(good[:2], bad[:2], 3.0, None)[0], atol=1e-12)


def check_stays_on_the_path(rule, path):
    """``x = alpha x0 + sigma x1`` holds for the guided prediction, also with other guidance around it."""
    t = torch.linspace(0.1, 0.9, 6, dtype=F64)
    x0, k = MIXTURE.sample(6)
    x = mix(path, x0, tensors(6, 2), t)
    bare = ExactDenoiser(MIXTURE, path)
    weak = ExactDenoiser(MIXTURE.noised(0.9, 0.4), path)
    everything = compose(classifier_free(3.0, rule), within(0.1, 0.8, autoguidance(weak, 2.0, rule)), clamp())
    got = everything(bare)(x, t, {"label": k})
    assert torch.allclose(mix(path, got.x0, got.x1, t), x, atol=1e-9)
    assert not torch.allclose(got.x0, bare(x, t, {"label": k}).x0, atol=1e-3)


def check_all(rule):
    check_off_at_one(rule)
    check_rows_are_independent(rule)
    for path in PATHS.values():
        check_stays_on_the_path(rule, path())
