"""Latent diffusion: a first stage as a codec against its closed form; caches, copies of weights, two-stage training."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from genkit.cli import main as cli
from genkit.core import NO_COND, Backbone, Batch, Draw, Spec
from genkit.data import DATA, Stream
from genkit.data.codecs import Identity, Pixels, Standardize
from genkit.data.latents import Latents
from genkit.diffusion.paths import Linear
from genkit.diffusion.samplers import GRIDS, Seeds, bind
from genkit.objectives import VAE, VQ, Autoencoder
from genkit.objectives.autoencoders.autoencoder import Posterior
from genkit.training.directory import read_log
from genkit.training.first_stage import WEIGHTS, CachedLatentCodec, LatentCodec, RunStage
from genkit.training.latent_cache import LatentCache, encode
from genkit.training.latent_statistics import LatentStatistics, compute_statistics
from genkit.training.run import load_run, open_first_stage
from genkit.training.sampling import Sampling
from tests.support.data import everything
from tests.support.exact import ExactDenoiser, Mixture

CPU = torch.device("cpu")
PLAIN, D, K = Identity(), 6, 2


# ------------------------------------------------------------------------- an orthonormal projection, in closed form
class Matrix(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x, cond=NO_COND):
        return x @ self.weight


@dataclass(frozen=True)
class Projection(Backbone):
    """``z = x W`` and ``x = z W^T``, with orthonormal columns of W ``[D, K]``."""

    seed: int = 0

    def weight(self, dim, latent):
        return torch.linalg.qr(torch.randn(dim, latent, generator=torch.Generator().manual_seed(self.seed))).Q

    def denoiser(self, spec):
        raise NotImplementedError

    def encoder(self, spec, out):
        return Matrix(self.weight(*spec.shape, *out))

    def decoder(self, spec, inp):
        return Matrix(self.weight(*spec.shape, *inp).T.contiguous())


def projection(base=PLAIN, seed=0):
    objective, backbone, spec = Autoencoder(latent=(K,)), Projection(seed), Spec((D,))
    return RunStage("projection", objective, backbone, spec, base, objective.networks(backbone, spec))


MEAN, ROOT = torch.tensor([1.0, -2.0]), torch.tensor([[2.0, 0.0], [0.6, 0.3]])  # z = MEAN + ROOT n


def plane(n, seed=1):
    """Samples in the plane that W spans, ``[n, D]``: latents are correlated, and far from standard normal."""
    z = MEAN + torch.randn(n, K, generator=torch.Generator().manual_seed(seed)) @ ROOT.T
    return z @ Projection().weight(D, K).T


def codec_of(x, posterior="draw", stage=None):
    stage = stage or projection()
    s = compute_statistics([stage.posterior(Batch(x))])
    return LatentCodec(stage, tuple(s.mean.tolist()), tuple(s.std(posterior).tolist()), posterior)


def test_a_projection_loses_nothing_of_a_plane_and_its_latents_are_normalised():
    x = plane(500)
    codec = codec_of(x)
    z = codec.encode(Batch(x)).x
    assert z.shape == (500, K)
    assert torch.allclose(codec.decode(z), x, atol=1e-5)
    assert np.allclose(z.numpy().mean(0), 0, atol=1e-5)
    assert np.allclose(z.numpy().std(0), 1, atol=1e-5)
    off = x + 0.5 * torch.linalg.svd(Projection().weight(D, K), full_matrices=True).U[:, -1]
    assert torch.allclose(codec.decode(codec.encode(Batch(off)).x), x, atol=1e-5)  # the nearest point of the plane


def test_the_exact_flow_of_latents_decodes_to_the_law_of_the_data():
    """The denoiser of the normalised latents' own normal law stands where a network stands."""
    codec = codec_of(plane(20_000))
    std = torch.tensor(codec.scaling.std)
    cov = (ROOT @ ROOT.T) / std[:, None] / std
    shift = (MEAN - torch.tensor(codec.scaling.mean)) / std
    law = Mixture(torch.ones(1).double(), shift[None].double(), cov[None].double())
    noise = Seeds(range(6000), CPU)
    generate = bind("heun", GRIDS["uniform"](32))(ExactDenoiser(law, Linear()))
    x = codec.decode(generate(noise((K,)).double(), NO_COND, noise))
    weight = Projection().weight(D, K)
    truth = weight @ ROOT @ ROOT.T @ weight.T
    assert torch.allclose(x.mean(0), weight @ MEAN, atol=0.08)
    assert torch.allclose(x.T.cov(), truth, atol=0.15)
    assert torch.allclose(x @ weight @ weight.T, x, atol=1e-4)  # in the plane, all of them


def test_a_stage_takes_the_worlds_samples_by_the_codec_of_its_own_run():
    base = Standardize((1.0,) * D, (2.0,) * D)
    x = 1 + 2 * plane(50)
    stage = projection(base)
    assert torch.allclose(stage.posterior(Batch(x)).mean, projection().posterior(Batch(plane(50))).mean, atol=1e-5)
    codec = codec_of(x, stage=stage)
    assert torch.allclose(codec.decode(codec.encode(Batch(x)).x), x, atol=1e-4)


# -------------------------------------------------------------------------------------------------------- statistics
def posteriors(*sizes):
    g = torch.Generator().manual_seed(3)
    level = torch.tensor([1000.0, 0.0, -3.0]).reshape(1, 3, 1, 1)
    each = []
    for i, n in enumerate(sizes):
        mean = level + (i + 1) * torch.randn(n, 3, 2, 2, generator=g) + i
        each.append(Posterior(mean, torch.randn(n, 3, 2, 2, generator=g)))
    return each


def test_statistics_are_those_of_numpy_however_the_samples_are_cut():
    parts = posteriors(7, 1, 30)
    got = compute_statistics(parts)
    mean = torch.cat([q.mean for q in parts]).double().numpy()
    var = torch.cat([q.log_var for q in parts]).double().exp().numpy()
    axes = (0, 2, 3)
    assert np.allclose(got.mean.numpy(), mean.mean(axes), rtol=1e-12)
    assert np.allclose(got.std("mean").numpy(), mean.std(axes), rtol=1e-9)
    assert np.allclose(got.std("draw").numpy(), np.sqrt(mean.var(axes) + var.mean(axes)), rtol=1e-9)
    assert LatentStatistics.from_dict(json.loads(json.dumps(got.to_dict()))).std("draw").equal(got.std("draw"))


def test_draws_of_posteriors_have_the_measured_deviation():
    (q,) = posteriors(4000)
    s = compute_statistics([q])
    codec = LatentCodec(projection(), tuple(s.mean.tolist()), tuple(s.std("draw").tolist()))
    encoded = codec.encode_posterior(q, Batch(q.mean, draw=Draw((0,), 0, 4000))).x
    assert torch.allclose(encoded.std((0, 2, 3)), torch.ones(3), atol=0.02)
    assert torch.allclose(encoded.mean((0, 2, 3)), torch.zeros(3), atol=0.02)
    still = LatentCodec(codec.stage, codec.scaling.mean, codec.scaling.std, "mean")
    assert not torch.allclose(still.encode_posterior(q, Batch(q.mean)).x.std((0, 2, 3)), torch.ones(3), atol=0.02)


def test_a_constant_channel_does_not_divide_by_zero():
    codec = codec_of(plane(1).repeat(5, 1))
    z = codec.encode(Batch(plane(1))).x
    assert bool(torch.isfinite(z).all())
    assert torch.allclose(codec.decode(torch.randn(3, K)), plane(1).expand(3, D), atol=1e-5)


def test_no_samples_have_no_statistics():
    with pytest.raises(ValueError, match="there are no samples"):
        compute_statistics([])


# -------------------------------------------------------------------------------------------------------------- runs
TINY = ["--backbone=mlp", "--backbone.width=8", "--backbone.depth=1", "--batch=16", "--sample-every=0", "--workers=0",
        "--no-tensorboard", "--log-every=1", "--precision=fp32"]  # fmt: skip
SAME = ["--data.labels=false", *TINY]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A VAE, a codebook, an autoencoder that is conditional, and a flow on the VAE's latents."""
    out = tmp_path_factory.mktemp("runs")
    made = {}
    for name, args in {
        "vae": ["--objective=vae", "--objective.latent", "3", "2", "2", "--objective.beta=0.1", "--steps=30", *SAME],
        "vq": [
            "--objective=vq",
            "--objective.latent",
            "3",
            "2",
            "2",
            "--objective.codebook-size=9",
            "--steps=3",
            *SAME,
        ],
        "conditional": ["--objective=ae", "--objective.latent=4", "--steps=1", *TINY],
        "flow": ["--objective=flow", f"--codec={out}/vae", "--steps=4", *TINY],
    }.items():
        assert cli.main(["train", f"--out={out}/all", *args]) == 0
        shutil.copytree((out / "all" / "latest").resolve(), out / name, symlinks=True)
        made[name] = out / name
    return made


@pytest.fixture(scope="module")
def cache(trained):
    out = trained["vae"].parent / "cache"
    assert cli.main(["encode", str(trained["vae"]), "--data=digits", f"--out={out}", "--shard=500"]) == 0
    return out


def stage_of(run):
    return open_first_stage(str(run), (1, 8, 8), CPU)


def test_a_latent_run_samples_decoded_images(trained):
    run = load_run(trained["flow"])
    assert (run.spec.shape, run.data_spec.shape) == ((3, 2, 2), (1, 8, 8))
    x, cond = run.sample(6, steps=3)
    assert (x.dtype, x.shape) == (torch.uint8, (6, 1, 8, 8))
    assert cond["label"].tolist() == [0, 1, 2, 3, 4, 5]
    noise = Seeds(range(6), CPU)
    with torch.no_grad():
        z = run.generator(Sampling(steps=3))(noise((3, 2, 2)), cond, noise)
        q = stage_of(trained["vae"])
        back = q.decode(torch.tensor(run.codec.scaling.std)[:, None, None] * z
                        + torch.tensor(run.codec.scaling.mean)[:, None, None])  # fmt: skip
    assert x.equal(back)


def test_the_statistics_of_training_are_numpys_of_all_samples(trained):
    data = DATA["digits"]().load("train")
    codec = load_run(trained["flow"]).codec
    q = stage_of(trained["vae"]).posterior(Batch(data.x))
    mean, var = q.mean.detach().double().numpy(), q.log_var.detach().double().exp().numpy()
    assert np.allclose(codec.scaling.mean, mean.mean((0, 2, 3)), atol=1e-5)
    assert np.allclose(codec.scaling.std, np.sqrt(mean.var((0, 2, 3)) + var.mean((0, 2, 3))), rtol=1e-5)


def test_the_run_keeps_a_copy_of_its_first_stage_and_detects_damage(trained, tmp_path):
    """Elsewhere, without the first stage's own folder, it draws the same."""
    moved = tmp_path / "moved"
    shutil.copytree(trained["flow"], moved, symlinks=True)
    away = trained["vae"].rename(tmp_path / "vae")
    try:
        assert load_run(moved).sample(3, steps=2).x.equal(load_run(trained["flow"]).sample(3, steps=2).x)
        resumed = ["train", "--resume", str(moved), "--steps=6"]
        assert cli.main(resumed) == 0
    finally:
        away.rename(trained["vae"])
    assert load_run(moved).codec.to_dict() == load_run(trained["flow"]).codec.to_dict()
    path = moved / "codec" / WEIGHTS
    stored = load_file(path)
    save_file({k: v + 1 for k, v in stored.items()}, path)
    with pytest.raises(ValueError, match="is damaged, or of another first stage"):
        load_run(moved)
    path.unlink()
    with pytest.raises(ValueError, match="there is no such file"):
        load_run(moved)


@pytest.mark.slow
def test_a_fresh_process_draws_without_the_first_stage(trained, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(trained["flow"], moved, symlinks=True)
    away = trained["vae"].rename(tmp_path / "vae")
    try:
        argv = ["sample", str(moved), "--n=3", "--steps=2", "--format=npz", f"--out={tmp_path}/x.npz"]
        subprocess.run([sys.executable, "-m", "genkit", *argv], check=True)
    finally:
        away.rename(trained["vae"])
    x = load_run(trained["flow"]).sample(3, steps=2).x
    with np.load(tmp_path / "x.npz") as stored:
        assert np.array_equal(stored["arr_0"], x.permute(0, 2, 3, 1).numpy())


def test_resume_is_bit_identical_on_latents(trained, tmp_path):
    args = ["train", "--objective=flow", f"--codec={trained['vae']}", f"--out={tmp_path}", "--schedule=constant", *TINY]
    assert cli.main([*args, "--steps=2"]) == 0
    first = (tmp_path / "latest").resolve()
    assert cli.main(["train", "--resume", str(first), "--steps=4"]) == 0
    assert cli.main([*args, "--steps=4"]) == 0
    uncut = (tmp_path / "latest").resolve()
    assert uncut != first
    a, b = (load_file(run / "latest" / "nets.safetensors") for run in (first, uncut))
    assert all(a[k].equal(b[k]) for k in b)


@pytest.mark.parametrize("name", ["vae", "vq"])
def test_latents_do_not_depend_on_micro_batches(trained, name):
    stage, data = stage_of(trained[name]), DATA["digits"]().load("train")
    stream = Stream(data, 24, seed=5)
    codec = LatentCodec(stage, (0.0,) * 3, (1.0,) * 3)
    uncut = codec.encode(stream(3, 0, 0, 24)).x
    parts = [codec.encode(stream(3, 0, *rows)).x for rows in ((0, 5), (5, 16), (16, 24))]
    assert torch.allclose(torch.cat(parts), uncut, atol=1e-5)
    if name == "vae":
        still = LatentCodec(stage, (0.0,) * 3, (1.0,) * 3, "mean")
        assert float((still.encode(stream(3, 0, 0, 24)).x - uncut).abs().max()) > 1e-2  # it is a draw
        assert not torch.allclose(codec.encode(stream(4, 0, 0, 24)).x, uncut)


def test_a_codebook_decodes_the_entries_nearest_to_a_drawn_latent(trained):
    run = load_run(trained["vq"])
    stage, codes = stage_of(trained["vq"]), run.nets["codebook"].codes
    entries = codes[torch.tensor([[[1, 4], [0, 2]]])].movedim(-1, 1)
    gap = torch.cdist(codes, codes).fill_diagonal_(torch.inf).min() / 2
    near = entries + 0.9 * gap * nn.functional.normalize(torch.randn(1, 3, 2, 2), dim=1)
    assert stage.decode(near).equal(stage.decode(entries))
    assert isinstance(run.objective, VQ)
    assert stage.posterior(Batch(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))).log_var.eq(-torch.inf).all()


def test_black_and_white_vaes_are_shown_black_and_white():
    """The encoder of a Bernoulli law has seen nothing else."""
    inputs = []

    class Net(nn.Module):
        def forward(self, x, cond=NO_COND):
            inputs.append(x)
            return torch.zeros(len(x), 4)

    from genkit.objectives.autoencoders.likelihoods import LIKELIHOODS

    objective = VAE(latent=(2,), likelihood=LIKELIHOODS["bernoulli"]())
    stage = RunStage("b", objective, Projection(), Spec((1, 2, 2)), Pixels(), {"encoder": Net(), "decoder": Net()})
    stage.posterior(Batch(torch.randint(0, 256, (9, 1, 2, 2), dtype=torch.uint8)))
    assert set(inputs[0].unique().tolist()) == {-1.0, 1.0}


# ------------------------------------------------------------------------------------------------------------ caches
def test_a_cache_holds_the_moments_of_every_sample_and_its_statistics(trained, cache):
    data, kept = DATA["digits"]().load("train"), Latents(root=str(cache)).load("train")
    q = stage_of(trained["vae"]).posterior(Batch(data.x))
    batch = kept.batch(torch.arange(len(data)), Draw((0,), 0, len(data)))
    assert torch.allclose(batch.x, torch.cat([q.mean, q.log_var], 1), atol=1e-5)
    assert batch.cond["label"].equal(data.cond["label"])
    assert kept.spec == replace(data.spec, shape=(3, 2, 2))
    s = LatentStatistics.from_dict(kept.statistics)
    assert np.allclose(s.mean.numpy(), q.mean.detach().numpy().mean((0, 2, 3)), atol=1e-5)
    assert len(list(cache.glob("train-*.safetensors"))) == 3
    assert Latents(root=str(cache)).decoded_source() == DATA["digits"]()


def test_encoding_is_a_call_that_returns_the_cache_and_prints_nothing(trained, tmp_path, capsys):
    calls = []
    settings = {"data": "digits", "split": "test", "shard": 200, "batch": 100, "device": "cpu"}
    made = encode(str(trained["vae"]), out=tmp_path, progress=lambda *call: calls.append(call), **settings)
    assert capsys.readouterr() == ("", "")
    assert made == LatentCache(tmp_path, "test", 359, 2, made.shape)
    assert calls == [("encoding", 0, 359), ("encoding", 200, 359), ("encoding", 359, 359)]
    assert len(Latents(root=str(made.path)).load("test")) == 359
    assert encode(str(trained["vae"]), out=tmp_path, **settings).num_written == 0


def test_training_on_a_cache_is_training_on_the_samples(trained, cache, tmp_path):
    assert cli.main(["train", "--objective=flow", "--data=latents", f"--data.root={cache}", f"--out={tmp_path}",
                     f"--codec={trained['vae']}", "--steps=4", *TINY]) == 0  # fmt: skip
    run = load_run(tmp_path / "latest")
    losses = lambda d: [r["denoise/loss"] for r in read_log(d)]  # noqa: E731
    assert losses(run.directory) == pytest.approx(losses(trained["flow"]), rel=1e-4)
    assert run.data_spec.shape == (1, 8, 8)
    one, other = run.sample(4, steps=2).x.int(), load_run(trained["flow"]).sample(4, steps=2).x.int()
    assert int((one - other).abs().max()) <= 2


def test_an_interrupted_encoding_continues(trained, cache, tmp_path, capsys):
    out = tmp_path / "cache"
    shutil.copytree(cache, out)
    argv = ["encode", str(trained["vae"]), "--data=digits", f"--out={out}", "--shard=500"]
    second = out / "train-00001-of-00003.safetensors"
    before = second.read_bytes()
    second.unlink()
    third = out / "train-00002-of-00003.safetensors"
    third.write_bytes(third.read_bytes()[:300])  # a disk that was full
    kept = (out / "train-00000-of-00003.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"train-00001.*run the same genkit encode again"):
        Latents(root=str(out)).load()
    assert cli.main(argv) == 0
    assert "2 files written" in capsys.readouterr().out
    assert second.read_bytes() == before
    assert (out / "train-00000-of-00003.safetensors").stat().st_mtime_ns == kept
    assert everything(Latents(root=str(out)).load()).x.equal(everything(Latents(root=str(cache)).load()).x)


def test_mirrored_data_are_cached_in_both_views(trained, tmp_path):
    out = tmp_path / "cache"
    assert cli.main(["encode", str(trained["vae"]), "--data=digits", "--data.flip", f"--out={out}", "--split=test",
                     "--batch=100"]) == 0  # fmt: skip
    kept, data = Latents(root=str(out)).load("test"), DATA["digits"](flip=True).load("test")
    rows, draw = torch.arange(40), lambda: Draw((7,), 0, 40)
    codec = LatentCodec(stage_of(trained["vae"]), (0.0,) * 3, (1.0,) * 3)
    cached = CachedLatentCodec(codec.stage, codec.scaling.mean, codec.scaling.std)
    one = codec.encode(replace(data.batch(rows, draw()), draw=Draw((1,), 0, 40)))
    other = cached.encode(replace(kept.batch(rows, draw()), draw=Draw((1,), 0, 40)))
    assert torch.allclose(one.x, other.x, atol=1e-5)
    plain = codec.encode(replace(data.batch(rows, Draw((8,), 0, 40)), draw=Draw((1,), 0, 40)))
    assert not torch.allclose(one.x, plain.x, atol=1e-2)


def test_evaluation_measures_pictures_against_the_pictures_that_were_encoded(cache, trained, tmp_path, capsys):
    assert cli.main(["train", "--objective=flow", "--data=latents", f"--data.root={cache}", f"--out={tmp_path}",
                     "--steps=1", *TINY]) == 0  # fmt: skip
    capsys.readouterr()
    for run in (tmp_path / "latest", trained["flow"]):
        argv = ["eval", str(run), "--n=24", "--steps=2", "--features=raw", "--metrics=fid", "--json"]
        assert cli.main(argv) == 0
        card = json.loads(capsys.readouterr().out)
        assert card["settings"]["reference"]["data"] == "digits"
        assert card["settings"]["reference"]["n"] == 1438


# --------------------------------------------------------------------------------------------------- reconstructions
def test_a_run_rebuilds_samples_through_its_code_and_a_model_of_latents_through_its_codec(trained):
    x = DATA["digits"]().load("test").x[:9]
    for name in ("vae", "vq"):
        run, stage = load_run(trained[name]), stage_of(trained[name])
        assert run.reconstruct(Batch(x)).equal(stage.decode(stage.posterior(Batch(x)).mean))
    run = load_run(trained["flow"])
    draw = lambda: Draw((3,), 0, 9)  # noqa: E731
    z = stage_of(trained["vae"]).posterior(Batch(x)).sample(draw().normal(3, 2, 2))
    assert run.reconstruct(Batch(x, draw=draw())).equal(stage_of(trained["vae"]).decode(z))


def test_evaluation_measures_reconstructions_by_row(trained, capsys):
    """Against numpy: the FID in raw pixels of few samples is that of their means and covariances."""
    run, x = load_run(trained["vq"]), DATA["digits"]().load("test").x
    argv = ["eval", str(trained["vq"]), "--reconstruct=test", "--n=60", "--features=raw", "--metrics=fid", "--json"]
    assert cli.main([*argv, "--reference=test"]) == 0
    card = json.loads(capsys.readouterr().out)
    back = run.reconstruct(Batch(x[torch.arange(60) * len(x) // 60]))
    a, b = (v.flatten(1).double().numpy() for v in (back, x))
    cov = [np.cov(v, rowvar=False) for v in (a, b)]
    root = np.sqrt(np.linalg.eigvals(cov[0] @ cov[1]).real.clip(0)).sum()
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov[0] + cov[1]) - 2 * root
    assert card["metrics"]["fid"]["value"] == pytest.approx(wanted, rel=1e-3)
    assert card["settings"]["reconstructed"]["split"] == "test"
    assert "nfe" not in card["settings"]
    assert [p for p in (trained["vq"] / "eval").iterdir() if json.loads(p.read_text()) == card]
    assert cli.main([*argv[:-1], "--reconstruct=train"]) == 0  # another split, another card
    output = capsys.readouterr().out
    assert "reconstructions of digits:train" in output
    assert len(list((trained["vq"] / "eval").iterdir())) == 2


REFUSED = {
    "without a code": (["{mlp}", "--reconstruct=test"], "has no code"),
    "no run": (["digits:test", "--reconstruct=test"], "reconstruct: needs a run with a code"),
    "sampling": (["{vq}", "--reconstruct=test", "--steps=5"], "steps: has no effect on reconstructions"),
    "draws nothing": (["{vq}"], "of an autoencoder, its reconstructions: --reconstruct test"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_reconstructed_is_refused_in_one_line(trained, tmp_path, capsys, name):
    argv, expected = REFUSED[name]
    if "{mlp}" in argv:
        assert cli.main(["train", "--objective=flow", f"--out={tmp_path}", "--steps=1", *TINY]) == 0
        capsys.readouterr()
    argv = [a.format(mlp=tmp_path / "latest", **trained) for a in argv]
    assert cli.main(["eval", *argv, "--n=20", "--features=raw", "--metrics=fid"]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert expected in error


# --------------------------------------------------------------------------------------------------------- bad input
BAD = {
    "no encoder": (["--codec={flow}"], r"a run of Flow, which has no encoder; train one: --objective=vae"),
    "conditional": (["--codec={conditional}"], r"decodes only with label; train it with --data.labels=false"),
    "absent": (["--codec=no/such"], r"no/such, which does not exist"),
    "other samples": (["--codec={vae}", "--data=moons"], r"encodes samples \[1, 8, 8\]; the data are \[2\]"),
    "another first stage": (
        ["--codec={vq}", "--data=latents", "--data.root={cache}"],
        r"the latents in .* were made with other weights \(sha256 \w{12}\)",
    ),
    "no cache": (["--data=latents", "--data.root={vae}"], r"holds no latents.json; make a cache"),
    "no use": (["--codec-posterior=mean"], r"given mean, but no codec"),
    "clipped": (["sample", "{flow}", "--clip"], r"clip: .* this model predicts latents; leave it out"),
    "likelihood": (["likelihood", "{flow}"], r"has a density of latents, and none of samples"),
    "bound": (["likelihood", "{flow}", "--bound=vlb"], r"has a density of latents, and none of samples"),
    "reflow": (["reflow", "{flow}", "--n=4"], r"a model of latents, whose pairs cannot be stored"),
    "latents of latents": (["encode", "{flow}"], r"a run of Flow, which has no encoder"),
    "other folder": (["encode", "{vq}", "--data=digits", "--out={cache}"], r"holds latents of another stage; name"),
    "other data": (
        ["encode", "{vae}", "--data=digits", "--data.size=9", "--out={cache}"],
        r"encodes samples \[1, 8, 8\]",
    ),
    "encoded twice": (["encode", "{vae}", "--data=latents", "--data.root={cache}"], r"latents of latents"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_refused_in_one_line(trained, cache, tmp_path, capsys, name):
    argv, expected = BAD[name]
    argv = [a.format(cache=cache, **trained) for a in argv]
    if argv[0].startswith("--"):
        argv = ["train", "--objective=flow", f"--out={tmp_path}", "--steps=1", *argv]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert re.search(expected, error), error
    assert not list(tmp_path.iterdir())


def test_latents_that_do_not_fit_the_backbone_are_refused_in_one_line(trained, tmp_path, capsys):
    assert (
        cli.main(["train", "--objective=ae", "--objective.latent=4", f"--out={tmp_path}/ae", "--steps=1", *SAME]) == 0
    )
    capsys.readouterr()
    argv = ["train", "--objective=flow", f"--codec={tmp_path}/ae/latest", f"--out={tmp_path}/flow", "--backbone=dit"]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "codec" in error
    assert "(4,)" in error


# --------------------------------------------------------------------------------------------------------- diffusers
def foreign(kind, folder):
    """A tiny model, as diffusers saves it."""
    import diffusers

    torch.manual_seed(3)
    settings = {
        "AutoencoderKL": {"in_channels": 1, "out_channels": 1, "latent_channels": 2, "norm_num_groups": 2,
                          "block_out_channels": (4, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
                          "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1},
        "AutoencoderTiny": {"in_channels": 1, "out_channels": 1, "latent_channels": 2,
                            "encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
                            "num_encoder_blocks": (1, 1),
                            "num_decoder_blocks": (1, 1)},
        "VQModel": {"in_channels": 1, "out_channels": 1, "latent_channels": 2, "vq_embed_dim": 2, "norm_num_groups": 2,
                    "num_vq_embeddings": 16, "block_out_channels": (4, 8), "layers_per_block": 1,
                    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
    }[kind]  # fmt: skip
    net = getattr(diffusers, kind)(**settings).eval()
    net.save_pretrained(folder)
    return net


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny", "VQModel"])
def test_an_autoencoder_of_diffusers_is_a_codec(kind, tmp_path, capsys):
    net = foreign(kind, tmp_path / "saved")
    x = DATA["digits"]().load("train").x[:20]
    inside = x.float() / 127.5 - 1
    stage = open_first_stage(f"diffusers:{tmp_path}/saved", (1, 8, 8), CPU)
    q = stage.posterior(Batch(x))
    with torch.no_grad():
        out = net.encode(inside)
        z = out.latent_dist.mean if kind == "AutoencoderKL" else out.latents
        back = net.decode(z).sample
    assert torch.allclose(q.mean, z, atol=1e-6)
    if kind == "AutoencoderKL":
        assert torch.allclose(q.log_var.exp(), out.latent_dist.var, rtol=1e-4)
    assert stage.latent == tuple(z.shape[1:])
    assert int((stage.decode(z).int() - ((back + 1) * 127.5).round().clamp(0, 255).int()).abs().max()) <= 1
    args = ["train", "--objective=flow", f"--codec=diffusers:{tmp_path}/saved", "--steps=2", f"--out={tmp_path}/runs"]
    assert cli.main([*args, *TINY]) == 0
    shutil.rmtree(tmp_path / "saved")  # the run has its own copy
    run = load_run(tmp_path / "runs" / "latest")
    assert run.codec.stage.sha256 == stage.sha256
    assert run.sample(3, steps=2).x.shape == (3, 1, 8, 8)


@pytest.mark.slow
def test_an_unsuitable_diffusers_folder_is_refused_in_one_line(tmp_path, capsys):
    foreign("AutoencoderKL", tmp_path / "kl")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    for folder, data, expected in (
        ("none", "digits", "holds no config.json"),
        ("unet", "digits", "holds a UNet2DModel; allowed: AutoencoderKL, AutoencoderTiny, VQModel"),
        ("kl", "moons", "is for images of 1 channels; the data are [2]"),
    ):
        argv = ["train", f"--data={data}", f"--codec=diffusers:{tmp_path}/{folder}", f"--out={tmp_path}/runs"]
        assert cli.main(argv) == 2
        error = capsys.readouterr().err.strip()
        assert expected in error
        assert len(error.splitlines()) == 1
    argv = ["train", "--data=digits", "--data.size=9", f"--codec=diffusers:{tmp_path}/kl", f"--out={tmp_path}/runs"]
    assert cli.main(argv) == 2
    assert "choose a size that it can halve evenly" in capsys.readouterr().err
    for pickled in (tmp_path / "kl").glob("*.safetensors"):
        torch.save({}, pickled.with_suffix(".bin"))
        pickled.unlink()
    argv = ["train", "--data=digits", f"--codec=diffusers:{tmp_path}/kl", f"--out={tmp_path}/runs"]
    assert cli.main(argv) == 2
    assert "cannot be read" in capsys.readouterr().err
