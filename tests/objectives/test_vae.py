"""VAEs against the linear Gaussian model's closed form; shapes, classes, the command line."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.distributions import Normal, kl_divergence

from genkit.backbones import MLP, DiT, UNet
from genkit.cli import main as cli
from genkit.core import Batch, Draw, Label, Spec
from genkit.data import DATA
from genkit.diffusion.samplers import Seeds, dequantise
from genkit.evaluation.likelihoods import LATENT_KEY, choose_rows
from genkit.objectives import OBJECTIVES, VAE, VQ, Autoencoder
from genkit.objectives.autoencoders.autoencoder import Posterior
from genkit.objectives.autoencoders.likelihoods import (
    LIKELIHOODS,
    Bernoulli,
    Gaussian,
)
from genkit.training.directory import read_log
from genkit.training.optimizers.groups import phase_parameters
from genkit.training.run import load_run
from tests.support.exact_latent import F64, Linear, LinearGaussian, principal
from tests.support.objectives import batch_of, normal_data, train

LATENT = 3


def test_the_elbo_is_the_evidence_under_the_true_posterior():
    """Every weight p(x | z) p(z) / q(z | x) is p(x) then: both bounds are exact for each sample, at any draw."""
    model = LinearGaussian.random(5, LATENT, 0.4, orthogonal=True)
    x = model.law().sample((50,))
    for samples in (1, 5):
        got = VAE(latent=(LATENT,)).bounds(model.networks(), batch_of(x), samples)
        assert torch.allclose(got.elbo, model.law().log_prob(x), atol=1e-10)
        assert torch.allclose(got.iwae, model.law().log_prob(x), atol=1e-10)


@pytest.mark.parametrize("how", [{}, {"shift": 0.3}, {"stretch": 1.5}])
def test_the_elbo_is_short_of_the_evidence_by_the_kl_of_the_posterior(how):
    model = LinearGaussian.random(5, LATENT, 0.4, orthogonal=False)
    x = model.law().sample((4,)).repeat_interleave(4000, 0)
    truth = model.law().log_prob(x[::4000]) - model.gap(x[::4000], **how)
    objective = VAE(latent=(LATENT,))
    loss = objective.loss(
        "vae", model.networks(**how), batch_of(x)
    ).per_sample  # nats a dimension, with the KL's formula
    for got in (objective.bounds(model.networks(**how), batch_of(x, seed=1), 2).elbo, -loss * 5):
        each = got.unflatten(0, (4, 4000))
        assert float(((each.mean(1) - truth) / (each.std(1) / math.sqrt(4000))).abs().max()) < 3.5
    assert float(model.gap(x[::4000], **how).min()) > 0.1


def test_the_importance_weighted_bound_rises_to_the_evidence():
    model = LinearGaussian.random(5, LATENT, 0.4, orthogonal=False)
    x = model.law().sample((400,))
    short = []
    for samples in (1, 4, 16, 64, 1000):
        got = VAE(latent=(LATENT,)).bounds(model.networks(stretch=1.3), batch_of(x), samples)
        assert bool((got.iwae >= got.elbo - 1e-12).all())
        short.append(float((model.law().log_prob(x) - got.iwae).mean()))
    assert all(a > 1.5 * b for a, b in pairwise(short)), short
    assert short[0] == pytest.approx(float(model.gap(x, stretch=1.3).mean()), rel=0.1)
    assert abs(short[-1]) < 0.02 * short[0]


def test_draws_depend_on_the_row_alone():
    model = LinearGaussian.random(5, LATENT, 0.4, orthogonal=False)
    x = model.law().sample((20,))
    whole = VAE(latent=(LATENT,)).bounds(model.networks(), batch_of(x), 20)
    part = VAE(latent=(LATENT,)).bounds(model.networks(), Batch(x[7:], draw=Draw((0,), 7, 20)), 20)
    assert torch.allclose(whole.iwae[7:], part.iwae)
    assert torch.allclose(whole.elbo[7:], part.elbo)


def test_a_linear_vae_learns_the_principal_components():
    """It reaches the likelihood and the noise of Tipping & Bishop's closed form (Lucas et al. 2019, theorem 1)."""
    x = normal_data()
    objective = VAE(latent=(3,), likelihood=Gaussian(std=1.0))
    nets = train(objective, Linear(), x, Spec((5,)), 600, lr=3e-2)
    std, evidence = principal(torch.cov(x.T).double(), 3)
    assert float(nets["decoder"](torch.zeros(1, 3)).log_scale.detach().exp().mean()) == pytest.approx(std, rel=0.03)
    assert float(objective.bounds(nets, batch_of(x), 4).elbo.mean()) == pytest.approx(evidence, abs=0.01)
    assert float(objective.loss("vae", nets, batch_of(x[:2000])).logs["active_units"]) == 3


def test_kl_is_that_of_torch():
    q = Posterior(torch.randn(4, 2, 3, dtype=F64), torch.randn(4, 2, 3, dtype=F64))
    prior = Normal(torch.zeros(4, 2, 3, dtype=F64), 1.0)
    assert torch.allclose(q.kl(), kl_divergence(Normal(q.mean, (q.log_var / 2).exp()), prior))
    z = torch.randn(4, 2, 3, dtype=F64)
    assert torch.allclose(q.sample(z), q.mean + z * q.log_var.exp().sqrt())


def vae_loss(objective, step=None, n=40):
    torch.manual_seed(0)
    nets = objective.networks(MLP(width=16, depth=1), Spec((4,)))
    return objective.loss("vae", nets, batch_of(torch.randn(n, 4), step=step)), nets


def test_beta_weighs_the_kl_term_and_rises():
    base, _ = vae_loss(VAE(beta=0))
    for beta, anneal, step, share in [
        (1, 0, 0, 1),
        (3, 0, None, 3),
        (1, 100, 0, 0),
        (2, 100, 25, 0.5),
        (2, 100, 400, 2),
    ]:
        loss, _ = vae_loss(VAE(beta=beta, anneal_steps=anneal), step)
        assert float((loss.per_sample - base.per_sample).detach().mean()) * 4 == pytest.approx(
            share * float(base.logs["kl"].detach()), abs=1e-5
        )
        assert float(loss.logs["neg_elbo"].detach()) == pytest.approx(
            float((base.logs["kl"] + base.logs["reconstruction"]).detach()), abs=1e-5
        )
    assert torch.equal(
        vae_loss(VAE(anneal_steps=50))[0].per_sample, vae_loss(VAE())[0].per_sample
    )  # outside training: the end


def test_free_bits_cost_nothing_and_pull_at_nothing():
    free, nets = vae_loss(VAE(beta=1, free_bits=50.0))
    base, _ = vae_loss(VAE(beta=0))
    assert torch.allclose(free.per_sample, base.per_sample + 50 * 16 / 4)
    slope = torch.autograd.grad(free.per_sample.sum(), nets["encoder"].last.weight)[0]
    alone, nets = vae_loss(VAE(beta=0))
    assert torch.allclose(slope, torch.autograd.grad(alone.per_sample.sum(), nets["encoder"].last.weight)[0])
    part, _ = vae_loss(VAE(free_bits=0.05))
    assert bool((part.per_sample >= vae_loss(VAE())[0].per_sample).all())


def test_collapse_is_detected_and_reported():
    class Net(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self, x, cond=()):
            mean = torch.cat([x * self.scale, torch.zeros(len(x), 3)], 1)
            return torch.cat([mean, torch.zeros_like(mean)], 1)

    objective = VAE(latent=(5,))
    decoder = objective.likelihood.decoder_head(MLP(width=8), Spec((2,)), (5,))
    for scale, units in ((1.0, 2), (0.05, 0), (0.2, 2)):  # means of variance 0.01 and less are not active
        logs = objective.loss("vae", {"encoder": Net(scale), "decoder": decoder}, batch_of(torch.randn(3000, 2))).logs
        assert float(logs["active_units"]) == units
        record = {"step": 600, "vae/kl": float(logs["kl"]), "vae/active_units": float(logs["active_units"])}
        said = objective.warning(record)
        assert (said is not None) == (units == 0)
        assert objective.warning({**record, "step": 100}) is None
    objective = replace(objective, anneal_steps=1000)
    assert objective.warning({"step": 600, "vae/kl": 0.0, "vae/active_units": 0.0}) is None
    assert "collapse" in objective.warning({"step": 1600, "vae/kl": 0.0, "vae/active_units": 0.0})


def test_a_heavy_kl_term_collapses_a_real_training():
    x = normal_data(2000)
    nets = {b: train(VAE(latent=(3,), beta=b), Linear(), x, Spec((5,)), 150) for b in (1.0, 300.0)}
    logs = {b: VAE(latent=(3,), beta=b).loss("vae", n, batch_of(x)).logs for b, n in nets.items()}
    assert float(logs[1.0]["active_units"]) == 3
    assert float(logs[300.0]["active_units"]) == 0


@pytest.mark.parametrize("latent", [(6,), (4, 4, 4)])
@pytest.mark.parametrize("backbone", [MLP(width=16), UNet(width=8), DiT(width=16, depth=1)])
@pytest.mark.parametrize("name", ["vae", "ae", "vq"])
def test_latents_are_vectors_or_maps_on_every_family(name, backbone, latent):
    """And a phase's gradient reaches all of its networks, and nothing else."""
    spec = Spec((1, 8, 8), {"label": Label(3)})
    objective = OBJECTIVES[name](latent=latent)
    nets = objective.networks(backbone, spec)
    cond = {"label": torch.arange(4) % 3}
    batch = batch_of(torch.rand(4, 1, 8, 8) * 2 - 1, cond=cond)
    objective.loss(objective.phases[0].name, nets, batch).per_sample.mean().backward()
    trained = {n for n, _ in phase_parameters(objective.phases[0], nets)}
    for net, module in nets.items():
        for key, p in module.named_parameters(prefix=net):
            if "null" not in key:
                assert (p.grad is not None) == (key in trained), key
    q = objective.encode(nets, batch.x, cond)
    assert q.mean.shape == (4, *latent) == (4, *objective.noise_shape(spec))
    assert objective.decode(nets, q.mean, cond).shape == (4, 1, 8, 8)
    if objective.is_generative:
        assert objective.generator(nets)(torch.randn(4, *latent), cond).shape == (4, 1, 8, 8)


def test_encoder_and_decoder_see_the_conditions():
    spec = Spec((4,), {"label": Label(3)})
    objective = VAE(latent=(2,))
    torch.manual_seed(0)
    nets = objective.networks(MLP(width=16), spec)
    for net in nets.values():
        for p in net.parameters():
            nn.init.normal_(p, std=0.3)
    x, z = torch.randn(5, 4), torch.randn(5, 2)
    one, two = ({"label": torch.full((5,), k)} for k in (0, 1))
    assert not torch.allclose(objective.encode(nets, x, one).mean, objective.encode(nets, x, two).mean, atol=1e-3)
    assert not torch.allclose(objective.generator(nets)(z, one), objective.generator(nets)(z, two), atol=1e-3)


def test_a_conditional_vae_draws_the_requested_class():
    """A small one on the digits; a classifier of real digits knows 95 % of its samples, and all classes come."""
    from sklearn.linear_model import LogisticRegression

    data = DATA["digits"]().load("train")
    x, y = data.x.float() / 127.5 - 1, data.cond["label"]
    judge = LogisticRegression(max_iter=300).fit(x.flatten(1).numpy(), y.numpy())
    test = DATA["digits"]().load("test")
    assert judge.score((test.x.float() / 127.5 - 1).flatten(1).numpy(), test.cond["label"].numpy()) > 0.94
    objective = VAE(latent=(8,), likelihood=Gaussian(std=0.3))
    nets = train(objective, MLP(width=64, depth=1), x, data.spec, 400, size=128, lr=4e-3, cond=data.cond, clip=1.0)
    asked = torch.arange(500) % 10
    drawn = objective.generator(nets)(torch.randn(500, 8), {"label": asked}).detach()
    seen = torch.from_numpy(judge.predict(drawn.flatten(1).numpy()))
    assert float((seen == asked).float().mean()) >= 0.95
    assert len(seen[seen == asked].unique()) == 10


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: VAE(beta=-1.0), "beta: given -1.0; allowed from 0"),
        (lambda: VAE(beta=math.nan), "beta: given nan"),
        (lambda: VAE(anneal_steps=-1), "anneal_steps: given -1"),
        (lambda: VAE(latent=()), r"latent: given \(\)"),
        (lambda: VAE(latent=(4, 0, 4)), r"latent: given \(4, 0, 4\)"),
        (lambda: VAE(likelihood=Gaussian(std=0.0)), "std: given 0.0"),
        (lambda: VQ(codebook_size=0), "codebook_size: given 0; a codebook needs 2"),
        (lambda: VQ(ema_decay=1.0), "ema_decay 1.0"),
        (lambda: Autoencoder(top_k=16), r"top_k: given 16; allowed 1\.\.15"),
        (lambda: Autoencoder(mask_prob=1.0), "mask_prob 1.0"),
        (lambda: Autoencoder(latent=(1,), sparsity_weight=0.1), "a latent of one number"),
        (lambda: VAE(latent=(4, 5, 5)).networks(UNet(), Spec((1, 8, 8))), r"UNet: given a latent of size \(5, 5\)"),
        (lambda: VQ(latent=(4, 7, 7)).networks(DiT(), Spec((1, 8, 8))), r"DiT: given a latent of size \(7, 7\)"),
        (lambda: VAE(likelihood=Bernoulli()).networks(MLP(), Spec((2,))), "bernoulli is a distribution of pixels"),
        (lambda: VAE().generator({}, lambda denoise: denoise), "sampler: has no effect on VAE"),
        (lambda: VQ().generator({}), "vq: draws nothing"),
        (lambda: Autoencoder().generator({}), "ae: draws nothing"),
    ],
)
def test_mistakes_are_refused_in_one_line(make, reason):
    with pytest.raises(ValueError, match=reason) as e:
        make()
    assert "\n" not in str(e.value)


SMALL = ["--data=digits", "--backbone=mlp", "--backbone.width=16", "--batch=32", "--tensorboard=false", "--device=cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the command line, of some steps, for each law of pixels."""
    out, made = tmp_path_factory.mktemp("runs"), {}
    for name in LIKELIHOODS:
        args = [*SMALL, f"--out={out}", "--steps=10", "--sample-every=10", f"--objective.likelihood={name}"]
        assert cli.main(["train", "--objective=vae", "--objective.latent", "5", *args]) == 0
        made[name] = (out / "latest").resolve()
    return made


def test_a_trained_vae_draws_and_refuses_samplers(trained, tmp_path, capsys):
    run = trained["bernoulli"]
    assert (run / "samples" / "step-0000010.png").is_file()
    loaded = load_run(run)
    whole, cond = loaded.sample(9)
    later, _ = loaded.sample(3, seed=6, cond={"label": cond["label"][6:9]}, batch=2)
    assert (whole[6:].int() - later.int()).abs().max() <= 1
    assert len(whole.unique(dim=0)) == 9
    assert cli.main(["sample", str(run), "--n=4", f"--out={tmp_path / 'four.png'}"]) == 0
    assert json.loads((tmp_path / "four.png.json").read_text())["nfe"] == 1
    for flags, name in ((["--sampler=heun"], "sampler"), (["--guidance=2"], "guidance"), (["--clip"], "clip")):
        capsys.readouterr()
        assert cli.main(["sample", str(run), "--n=4", f"--out={tmp_path / 'no.png'}", *flags]) == 2
        assert f"genkit: {name}: has no effect on VAE" in capsys.readouterr().err


def test_settings_out_of_range_are_refused_by_the_command_line(tmp_path, capsys):
    for flags, reason in (
        (["--objective=vae", "--objective.beta=-1"], "beta"),
        (["--objective=vq", "--objective.codebook-size=0"], "codebook-size"),
        (["--objective=vae", "--objective.latent", "4", "3", "3", "--backbone=unet"], "latent of size"),
    ):
        assert cli.main(["train", *flags, "--data=digits", f"--out={tmp_path}", "--steps=1"]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert reason in said
    assert not list(tmp_path.iterdir())


def test_the_loop_passes_the_step_and_updates_the_codebook(tmp_path):
    """A KL term that has hardly begun to rise after ten steps; a codebook that follows the encoder's answers."""
    args = [*SMALL, f"--out={tmp_path}", "--steps=10", "--sample-every=0", "--log-every=10"]
    assert cli.main(["train", "--objective=vae", "--objective.anneal-steps=1000000", *args]) == 0
    record = read_log(tmp_path / "latest")[-1]
    assert record["vae/loss"] * 64 == pytest.approx(record["vae/reconstruction"], abs=1e-3)
    assert record["vae/kl"] > 0.01
    assert cli.main(["train", "--objective=vq", "--objective.latent", "4", "--objective.codebook-size=8", *args]) == 0
    assert not (tmp_path / "latest" / "samples").exists()
    assert cli.main(["train", "--resume", str(tmp_path / "latest"), "--steps=12", "--sample-every=12"]) == 0
    picture = Image.open(tmp_path / "latest" / "samples" / "step-0000012.png")  # 32 samples above, 32 answers below
    assert picture.width > 700  # 8 tiles of 8x8, enlarged
    assert 0.8 < picture.width / picture.height < 1.25  # near square, whatever the captions take
    run = load_run(tmp_path / "latest")
    book = run.nets["codebook"]
    assert float(book.counts.sum()) == pytest.approx(32 * (1 - 0.99**12), rel=0.2)  # revived entries count as average
    assert torch.allclose(book.codes[book.counts > 0], (book.sums / book.counts[:, None])[book.counts > 0], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vae", "vq"])
def test_training_on_two_ranks_is_training_on_one(tmp_path, name):
    """The codebook too, although neither rank sees the whole batch."""
    args = ["--data=moons", "--backbone.width=16", f"--objective={name}", "--objective.latent", "4", "--batch=32",
            "--device=cpu", "--tensorboard=false", "--steps=6", "--sample-every=0", "--clip=0"]  # fmt: skip
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "-m",
        "genkit",
        "train",
        *args,
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, f"--out={tmp_path}/two"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert cli.main(["train", *args, "--micro-batch=5", f"--out={tmp_path}/one"]) == 0
    one, two = (load_file(tmp_path / k / "latest" / "latest" / "nets.safetensors") for k in ("one", "two"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.allclose(value, two[key], atol=2e-5), key


def bounds_of(capsys, *argv):
    capsys.readouterr()
    assert cli.main(["likelihood", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("law", LIKELIHOODS)
def test_the_command_prints_the_bounds(trained, capsys, law):
    """As the objective has them for the same rows, whatever the batch; bits of masses, or of a density of pixels."""
    found = bounds_of(capsys, trained[law], "--n=20", "--draws=5")
    cut = bounds_of(capsys, trained[law], "--n=20", "--draws=5", "--batch=7")
    assert found["iwae_nats"] == pytest.approx(cut["iwae_nats"], rel=1e-6)
    assert found["iwae_nats"]["value"] > -found["neg_elbo_nats"]["value"]
    assert found["neg_elbo_nats"]["stderr"] > 0
    assert (found["draws"], found["settings"]["bound"], found["settings"]["n"]) == (5, "iwae", 20)
    density = law == "gaussian"
    bits = -found["iwae_nats"]["value"] / (64 * math.log(2)) + (math.log2(127.5) if density else 0)
    assert found["bits_per_dim"]["value"] == pytest.approx(bits, rel=1e-9)
    run = load_run(trained[law])
    data = run.config.data.load("test")
    rows = choose_rows(len(data), 20, 0)
    x = data.x[rows].float() / 127.5 - 1
    if density:
        x = dequantise(data.x[rows], Seeds(range(20)))
    batch = Batch(x, {"label": data.cond["label"][rows]}, draw=Draw((0, LATENT_KEY), 0, 20))
    assert found["iwae_nats"]["value"] == pytest.approx(
        float(run.objective.bounds(run.nets, batch, 5).iwae.mean()), rel=1e-6
    )
    fewer, more = (bounds_of(capsys, trained[law], "--n=300", draws) for draws in ("--draws=5", "--draws=60"))
    assert more["iwae_nats"]["value"] > fewer["iwae_nats"]["value"] + 0.03  # in expectation, so of many rows


def test_the_command_refuses_options_without_effect(trained, tmp_path, capsys):
    flow, code = tmp_path / "flow", tmp_path / "ae"
    tiny = ["--backbone.width=8", "--steps=1", "--sample-every=0", "--tensorboard=false", "--device=cpu"]
    assert cli.main(["train", "--data=moons", *tiny, f"--out={flow}"]) == 0
    assert cli.main(["train", "--data=moons", "--objective=ae", *tiny, f"--out={code}"]) == 0
    for argv, reason in (
        ([trained["bernoulli"], "--steps=8"], "steps: given 8, which is for a path to noise"),
        ([trained["bernoulli"], "--probes=2"], "probes: given 2, which is for the ODE"),
        ([trained["bernoulli"], "--bound=ode"], "needs a model whose path ends in standard normal noise"),
        ([flow / "latest", "--bound=iwae"], "bound: given iwae, but Flow has no latent; allowed: ode, vlb"),
        ([flow / "latest", "--draws=8"], "draws: given 8, which is for a VAE; allowed with --bound iwae"),
        ([code / "latest"], "likelihood: Autoencoder has none; needs a flow, a diffusion or a VAE"),
    ):
        capsys.readouterr()
        assert cli.main(["likelihood", *map(str, argv), "--n=2"]) == 2
        said = capsys.readouterr().err
        assert reason in said
        assert said.count("\n") == 1
