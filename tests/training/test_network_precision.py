"""Precision beyond the sampler: first stages in chunks, likelihoods, pairs, pictures of training, compiled networks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.backbones import UNet
from genkit.core import Batch, Spec, pictures
from genkit.data.codecs import Pixels
from genkit.evaluation import evaluate, likelihood
from genkit.evaluation.sources import ModelSamples, sampling_settings
from genkit.objectives import VAE
from genkit.training import first_stage
from genkit.training.first_stage import LatentCodec, RunStage
from genkit.training.precision import use_codec_precision, with_networks
from genkit.training.reflow import reflow
from genkit.training.run import load_run
from genkit.training.sampling import Sampling, grid_size, picture_names
from genkit.training.shown import GRID_SIZE
from genkit.training.train import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def moons(tmp_path_factory):
    out = tmp_path_factory.mktemp("moons")
    train(objective="flow", data="moons", backbone={"name": "mlp", "width": 16, "depth": 2}, steps=40, batch=64,
          sample_every=0, tensorboard=False, device="cpu", workers=0, out=str(out))  # fmt: skip
    return load_run(out / "latest", device="cpu")


@pytest.fixture(scope="module")
def codec():
    """A latent codec of 8 x 8 images, with random weights."""
    torch.manual_seed(0)
    objective, spec = VAE(latent=(4, 4, 4)), Spec((1, 8, 8))
    backbone = UNet(width=8, mults=(1, 1))
    nets = {k: net.eval().requires_grad_(False) for k, net in objective.networks(backbone, spec).items()}
    stage = RunStage("stage", objective, backbone, spec, Pixels(), nets)
    return LatentCodec(stage, (0.0,) * 4, (1.0,) * 4, "mean")


def images(n=5):
    return Batch(torch.randint(256, (n, 1, 8, 8), dtype=torch.uint8))


def test_first_stages_encode_and_decode_in_chunks(codec, monkeypatch):
    batch, sizes = images(), []
    z = codec.encode(batch).x
    x = codec.decode(z)
    monkeypatch.setattr(first_stage, "CHUNK_NUMBERS", 2 * 64)
    count = [
        net.register_forward_hook(lambda m, args, out: sizes.append(len(args[0]))) for net in codec.stage.nets.values()
    ]
    torch.testing.assert_close(codec.encode(batch).x, z, rtol=0, atol=1e-6)
    assert sizes == [2, 2, 1]
    assert (codec.decode(z).int() - x.int()).abs().max() <= 1  # a level, where rounding falls the other way
    assert sizes == [2, 2, 1] * 2
    for hook in count:
        hook.remove()


def test_first_stages_compute_in_bf16_and_not_in_fp16(codec):
    batch = images()
    exact, z = codec.encode(batch).x, torch.randn(5, 4, 4, 4)
    with use_codec_precision("bf16", CPU):
        rounded, x = codec.encode(batch).x, codec.decode(z)
    with use_codec_precision("fp16", CPU):
        assert torch.equal(codec.encode(batch).x, exact)
    assert rounded.dtype == torch.float32
    assert x.dtype == torch.uint8
    assert 0 < (rounded - exact).abs().max() < 0.05
    assert (x.int() - codec.decode(z).int()).abs().max() <= 4


def test_a_run_decodes_in_its_precision(moons, codec):
    latent = replace(moons, codec=codec)
    z = torch.randn(5, 4, 4, 4)
    with use_codec_precision("bf16", CPU):
        rounded = codec.stage.objective.decode(codec.stage.nets, z)
    assert torch.equal(latent.decode(z, "bf16"), Pixels().decode(rounded))
    assert torch.equal(latent.decode(z), codec.decode(z))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_likelihoods_and_pairs_in_half_precision(moons, precision, tmp_path):
    exact, rounded = (likelihood(moons, n=16, steps=4, precision=p) for p in ("fp32", precision))
    shift = abs(exact.bits_per_dim.value - rounded.bits_per_dim.value)
    assert 0 < shift < 0.02
    assert rounded.settings["precision"] == precision
    a, b = (reflow(moons, n=8, steps=2, precision=p, out=tmp_path / f"{p}.npz") for p in ("fp32", precision))
    assert a.path.read_bytes() != b.path.read_bytes()


def test_pictures_of_training_are_drawn_in_its_precision(tmp_path):
    train(objective="flow", data="moons", backbone={"name": "mlp", "width": 16, "depth": 1}, steps=20, batch=64,
          sample_every=20, tensorboard=False, device="cpu", workers=0, precision="bf16",
          out=str(tmp_path))  # fmt: skip
    run = load_run(tmp_path / "latest", device="cpu")
    drawn = np.asarray(Image.open(next(run.directory.glob("samples/*.png"))))
    n = grid_size(run.data_spec, GRID_SIZE)

    def picture(precision):
        x, cond = run.sample(n, batch=n, precision=precision)
        return np.asarray(pictures.draw_samples(x, cond, picture_names(run.spec)))

    assert np.array_equal(drawn, picture("bf16"))
    assert not np.array_equal(drawn, picture("fp32"))


@pytest.mark.slow
def test_a_compiled_run_draws_the_same_samples_and_is_left_as_it_was(moons, monkeypatch):
    """By the tracing of torch.compile, without its C++ kernels, which take seconds to build."""
    compiled, calls = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda forward: calls.append(1) or compiled(forward, backend="eager"))
    exact = moons.sample(8, Sampling(steps=3))
    drawn = moons.sample(8, Sampling(steps=3, compile=True))
    torch.testing.assert_close(drawn.x, exact.x, rtol=0, atol=1e-6)
    assert (drawn.evaluations, len(calls)) == (exact.evaluations, 1)
    assert all("forward" not in vars(net) for net in moons.nets.values())


def test_a_failing_compiled_network_is_left_as_it_was(moons):
    def fail(z, cond, noise=None):
        assert all("forward" in vars(net) for net in moons.nets.values())
        raise RuntimeError

    with pytest.raises(RuntimeError):
        with_networks(fail, moons.nets, "bf16", CPU)(torch.zeros(1, 2), {})
    assert all("forward" not in vars(net) for net in moons.nets.values())


def test_a_card_in_bf16_tells_the_shift_of_its_samples(moons):
    """The numbers on the card are those of samples drawn in both precisions with the same seeds."""
    settings = {"n": 20, "steps": 3, "metrics": "mmd", "reference_n": 20}
    card, plain = (evaluate(moons, precision=p, **settings) for p in ("bf16", "fp32"))
    exact, rounded = (moons.sample(16, steps=3, precision=p).x for p in ("fp32", "bf16"))
    difference = (exact - rounded).abs()
    shift = card.settings["precision_shift"]
    assert shift["n"] == 16
    assert shift["mean"] == pytest.approx(float(difference.mean()), abs=1e-6)
    assert shift["max"] == pytest.approx(float(difference.max()), abs=1e-6)
    assert shift["max"] > 0
    assert "bf16 (mean difference to fp32" in card.summary()
    assert "precision_shift" not in plain.settings


def test_cards_do_not_depend_on_compilation(moons):
    plain, compiled = (sampling_settings(ModelSamples(moons, Sampling(compile=c))) for c in (False, True))
    assert plain == compiled


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_torchs_own_kernels_draw_the_same_samples(moons, precision, tolerance):
    settings = Sampling(steps=3, precision=precision)
    exact, drawn = (moons.sample(8, replace(settings, compile=c)).x for c in (False, True))
    torch.testing.assert_close(drawn, exact, rtol=0, atol=tolerance)
