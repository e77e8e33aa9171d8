"""A run that began from a pipeline of diffusers and is fine-tuned: it keeps the pipeline's grid, and learns on it."""

from dataclasses import replace

import pytest
import torch

import genkit
from genkit.rl.finetune.chain import find_denoiser
from genkit.rl.finetune.noise import FixedNoise
from genkit.rl.finetune.settings import FinetuneSettings
from genkit.rl.finetune.setup import build_chain, choose_grid, sampling_of
from genkit.training.pipelines import read_pipeline
from genkit.training.run import load_run
from genkit.training.sampling import Sampling
from tests.support.refusals import refuses


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run as ``--init`` leaves one of a DDIM pipeline, whose scheduler ends at the first discrete time."""
    pytest.importorskip("diffusers")
    from genkit.training.pipelines import Pipeline, write_pipeline

    out = tmp_path_factory.mktemp("base")
    run = genkit.train(objective="ddpm", data="moons", backbone={"name": "mlp", "width": 16, "depth": 1}, steps=1,
                       batch=8, sample_every=0, tensorboard=False, device="cpu", precision="fp32",
                       out=str(out))  # fmt: skip
    scheduler = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "set_alpha_to_one": False,
                 "steps_offset": 1, "clip_sample": False}  # fmt: skip
    write_pipeline(run.directory, Pipeline("diffusers", "folder", "ddim", scheduler))
    return load_run(run.directory, device="cpu")


def test_the_chain_without_noise_draws_as_the_pipeline(base, moons):
    settings = FinetuneSettings(run=str(base.directory), steps=4, min_std=0.0, exploration_noise=FixedNoise(0.0))
    settings = replace(settings, grid=choose_grid(settings, base))
    chain, z = build_chain(settings, base), torch.randn(5, 2)
    assert chain.from_noise
    want = base.generator(Sampling(sampler="ddim", steps=4))(z, {})
    with torch.no_grad():
        drawn = chain.sample(find_denoiser(base.objective, base.nets), z, {}).xs[-1]
    assert torch.allclose(drawn, want, atol=1e-5)
    assert torch.allclose(base.generator(sampling_of(settings, base))(z, {}), want, atol=1e-5)
    uniform = replace(settings, grid="uniform")
    other = base.generator(Sampling(sampler="ddim", steps=4, grid="uniform"))(z, {})
    assert (other - want).abs().max() > 1e-2
    assert torch.equal(base.generator(sampling_of(uniform, base))(z, {}), other)
    plain = load_run(moons, device="cpu")
    assert choose_grid(replace(settings, grid=None), plain) == "uniform"
    refuses(lambda: build_chain(settings, plain), "grid: given pipeline", "no pipeline")


def first(x, cond):
    return x[:, 0]


def test_the_new_run_keeps_the_pipeline(base, tmp_path):
    tuned = genkit.finetune(base, reward=f"{__name__}:first", method={"name": "ddpo"}, iterations=1, samples=8, steps=2,
                            eval_samples=0, device="cpu", tensorboard=False, out=str(tmp_path))  # fmt: skip
    assert read_pipeline(tuned.directory) == base.pipeline
    assert tuned.pipeline == base.pipeline
    assert Sampling().grid_for(tuned) == "pipeline"
