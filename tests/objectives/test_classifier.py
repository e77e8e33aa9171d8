"""Classifier guidance: with the exact classifier it is the exact conditional model; a trained one steers."""

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from genkit.backbones import MLP, DiT, UNet
from genkit.cli import main as cli
from genkit.core import Batch, Draw, Label, Prediction, Spec
from genkit.data import DATA
from genkit.diffusion.guidance import APG, by_classifier, classifier_free, compose
from genkit.diffusion.paths import PATHS, VE, VP, Cosine, Linear, mix
from genkit.diffusion.samplers import bind
from genkit.objectives import Classifier
from genkit.training.directory import read_log
from genkit.training.run import load_run, open_reference, with_classes
from tests.support.exact import F64, ExactDenoiser, Mixture, three

ROOT = Path(__file__).parents[2]
MIXTURE = three()
ALL_PATHS = pytest.mark.parametrize("path", [cls() for cls in PATHS.values()], ids=lambda p: type(p).__name__)


@dataclass(frozen=True)
class ExactClassifier:
    """``log p(k | x_t)`` of the components of a mixture, by Bayes' rule from the densities themselves."""

    mixture: Mixture
    path: object

    def __call__(self, x: Tensor, t: Tensor, cond) -> Tensor:
        a, s = self.path.alpha(t)[:, None, None], self.path.sigma(t)[:, None, None]
        covs = a[..., None] ** 2 * self.mixture.covs + s[..., None] ** 2 * torch.eye(self.mixture.dim, dtype=x.dtype)
        normals = torch.distributions.MultivariateNormal(a * self.mixture.means, covs)
        log_p = (normals.log_prob(x[:, None]) + self.mixture.weights.log()).log_softmax(1)
        return log_p.gather(1, cond["label"][:, None])[:, 0]


def state(path, t):
    t = torch.as_tensor(t, dtype=F64)
    x0, k = MIXTURE.sample(len(t))
    return mix(path, x0, torch.randn(len(t), 2, dtype=F64), t), t, {"label": (k + 1) % 3}


def unconditional(path):
    return classifier_free(0.0)(ExactDenoiser(MIXTURE, path))


# ------------------------------------------------------------------------------------------- the exact classifier
@ALL_PATHS
def test_exact_classifier_makes_the_exact_conditional_model(path):
    """score(x) + grad log p(y | x) = score(x | y): Dhariwal & Nichol 2021, eq. 2, on every path."""
    x, t, cond = state(path, torch.linspace(0.02, 0.98, 13))
    got = by_classifier(ExactClassifier(MIXTURE, path))(unconditional(path))(x, t, cond)
    want = ExactDenoiser(MIXTURE, path)(x, t, cond)
    assert torch.allclose(got.x0, want.x0, atol=1e-6, rtol=1e-6)
    assert torch.allclose(got.x1, want.x1, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(unconditional(path)(x, t, cond).x0, want.x0, atol=0.1)


@ALL_PATHS
def test_the_scale_weighs_the_gradient_and_x_stays(path):
    x, t, cond = state(path, torch.linspace(0.02, 0.98, 13))
    bare, with_it = unconditional(path)(x, t, cond), ExactDenoiser(MIXTURE, path)(x, t, cond)
    for scale in (-1.0, 0.0, 3.0):
        got = by_classifier(ExactClassifier(MIXTURE, path), scale)(unconditional(path))(x, t, cond)
        assert torch.allclose(got.x0, bare.x0 + scale * (with_it.x0 - bare.x0), atol=1e-6, rtol=1e-6)
        assert torch.allclose(mix(path, got.x0, got.x1, t), x, atol=1e-9)


@ALL_PATHS
def test_in_pure_noise_the_limit_is_taken(path):
    x, t, cond = state(path, torch.ones(6))
    got = by_classifier(ExactClassifier(MIXTURE, path))(unconditional(path))(x, t, cond)
    want = ExactDenoiser(MIXTURE, path)(x, t, cond)
    assert torch.allclose(got.x0, want.x0, atol=1e-2)
    assert torch.allclose(mix(path, got.x0, got.x1, t), x, atol=1e-9)


@pytest.mark.parametrize("path", [Linear(), VP()], ids=lambda p: type(p).__name__)
def test_sampling_by_the_exact_classifier_is_conditional_sampling(path):
    """Also under a sampler's no_grad, and from t = 1 on."""
    z, cond = torch.randn(200, 2, dtype=F64), {"label": torch.full((200,), 2)}
    guidance = compose(classifier_free(0.0), by_classifier(ExactClassifier(MIXTURE, path)))
    got = bind("heun", 20, guidance)(ExactDenoiser(MIXTURE, path))(z, cond)
    assert torch.allclose(got, bind("heun", 20)(ExactDenoiser(MIXTURE, path))(z, cond), atol=2e-3)


def test_samples_without_conditions_are_left_alone():
    x, t, cond = state(Linear(), [0.3, 0.5, 0.7])
    cond |= {"keep": torch.tensor([True, False, True])}
    bare = ExactDenoiser(MIXTURE, Linear())
    got = by_classifier(ExactClassifier(MIXTURE, Linear()))(bare)(x, t, cond)
    assert torch.allclose(got.x0[1], bare(x, t, {}).x0[1])
    assert not torch.allclose(got.x0[0], bare(x, t, cond).x0[0], atol=1e-2)


# ------------------------------------------------------------------------------------------------- the objective
SPEC = Spec((2,), {"label": Label(3), "style": Label(7)})


class Scores(nn.Module):
    """A classifier that answers what it is told, and remembers what it saw."""

    def __init__(self, out):
        super().__init__()
        self.out, self.seen = out, []

    def forward(self, x, cond):
        self.seen.append((x, cond["t"]))
        return self.out


@pytest.mark.parametrize("path", [Linear(), VP(), VE(), Cosine()], ids=lambda p: type(p).__name__)
def test_loss_is_the_cross_entropy_of_samples_on_the_path(path):
    x0, label, n = torch.randn(32, 2), torch.arange(32) % 3, 32
    net = Scores(torch.randn(n, 3))
    loss = Classifier(path=path).loss("classify", {"net": net}, Batch(x0, {"label": label}, draw=Draw((1,), 0, n)))
    p = net.out.softmax(1)
    assert torch.allclose(loss.per_sample, -p[torch.arange(n), label].log(), atol=1e-6)
    assert float(loss.logs["accuracy"]) == pytest.approx(float((p.argmax(1) == label).float().mean()))
    draw = Draw((1,), 0, n)
    t, x1 = 1 - draw.uniform(), draw.normal(2)
    a, s = path.alpha(t), path.sigma(t)
    seen, tau = net.seen[0]
    assert torch.allclose(seen, (a / (a**2 + s**2))[:, None] * mix(path, x0, x1, t), atol=1e-6)
    assert torch.allclose(tau[:, 0], s / (a + s), atol=1e-6)


def test_the_label_names_the_classes():
    for name, num in (("label", 3), ("style", 7)):
        nets = Classifier(label=name).networks(MLP(width=16), SPEC)
        classify = Classifier(label=name).classify(nets)
        t, x = torch.full((4,), 0.5), torch.randn(4, 2)
        total = sum(classify(x, t, {name: torch.full((4,), k)}).exp() for k in range(num))
        assert torch.allclose(total, torch.ones(4), atol=1e-5)


@pytest.mark.parametrize("backbone", [UNet(width=8), DiT(width=8, depth=1, head_size=4)], ids=["unet", "dit"])
def test_images_and_their_gradients(backbone):
    spec, objective = Spec((1, 8, 8), {"label": Label(3)}), Classifier()
    nets = objective.networks(backbone, spec)
    x, t = torch.randn(5, 1, 8, 8), torch.linspace(0.1, 1, 5)
    cond = {"label": torch.arange(5) % 3}
    loss = objective.loss("classify", nets, Batch(x, cond)).per_sample
    assert loss.shape == (5,)
    for p in nets["net"].parameters():
        nn.init.normal_(p, std=0.1)
    guided = by_classifier(objective.classify(nets))(Still(Linear()))(x, t, cond)
    assert bool((guided.x0 - x).flatten(1).norm(dim=1).gt(1e-6).all())
    alone = by_classifier(objective.classify(nets))(Still(Linear()))(x[2:3], t[2:3], {"label": cond["label"][2:3]})
    assert torch.allclose(alone.x0, guided.x0[2:3], atol=1e-4)  # no sample feels the gradient of another


@dataclass(frozen=True)
class Still:
    """A denoiser that predicts x itself."""

    path: object

    def __call__(self, x, t, cond):
        return Prediction(x, (x - (1 - t).view(-1, *(1,) * (x.ndim - 1)) * x) / t.view(-1, *(1,) * (x.ndim - 1)))


def test_a_trained_network_moves_the_data_by_no_more_in_pure_noise():
    """sigma^2 / alpha has no bound there, and a network's gradient is not 0: what it sees must shrink with alpha."""
    torch.manual_seed(0)
    nets = Classifier().networks(MLP(width=32), SPEC)
    for p in nets["net"].parameters():
        nn.init.normal_(p, std=0.2)
    x, cond = torch.randn(50, 2), {"label": torch.ones(50, dtype=torch.long)}
    guided = by_classifier(Classifier().classify(nets))(Still(Linear()))
    far, near, end = ((guided(x, torch.full((50,), t), cond).x0 - x).norm(dim=1).mean() for t in (0.9, 0.9995, 1.0))
    assert float(near) < 3 * float(far)
    assert float(end) == pytest.approx(float(near), rel=0.05)


# ------------------------------------------------------------------------------------------------------- learned
@pytest.fixture(scope="module")
def moons():
    """A classifier of two moons, and the exact denoiser of some of their points, each a narrow Gaussian."""
    torch.manual_seed(0)
    data, objective = DATA["moons"](n=5000).load(), Classifier()
    nets = objective.networks(MLP(width=64, depth=2), data.spec)
    opt = torch.optim.Adam(nets["net"].parameters(), 3e-3)
    for _ in range(300):
        i = torch.randint(len(data.x), (128,))
        loss = objective.loss("classify", nets, Batch(data.x[i], {"label": data.cond["label"][i]})).per_sample.mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    nets["net"].requires_grad_(False)
    n = 120
    points = Mixture(
        torch.full((n,), 1 / n, dtype=F64), data.x[:n].double(), 0.01 * torch.eye(2, dtype=F64).expand(n, 2, 2)
    )
    return data, nets, points


def test_learned_classifier_knows_noised_samples(moons):
    """Better than chance where there is something to see, sure on clean data, and unsure in pure noise."""
    data, nets, _ = moons
    x0, label = data.x[:2000], data.cond["label"][:2000]
    classify, right = Classifier().classify(nets), []
    for t in (0.02, 0.3, 0.6, 1.0):
        times = torch.full((2000,), t)
        x = mix(Linear(), x0, torch.randn_like(x0), times)
        right.append(float((classify(x, times, {"label": label}).exp() > 0.5).float().mean()))
    assert right[0] > 0.97
    assert right[1] > 0.85
    assert right[2] > 0.6
    assert right[3] == pytest.approx(0.5, abs=0.05)


def test_learned_classifier_guides_an_unconditional_model(moons):
    data, nets, points = moons
    z = torch.randn(150, 2)
    share = []
    for scale in (0.0, 1.0, 4.0):
        for k in (0, 1):
            cond = {"label": torch.full((150,), k)}
            exact = Float32(ExactDenoiser(points, Linear()))
            x = bind("heun", 10, by_classifier(Classifier().classify(nets), scale))(exact)(z, cond)
            nearest = data.cond["label"][torch.cdist(x, data.x[:500]).argmin(1)]
            share.append(float((nearest == k).float().mean()))
    bare, once, more = (min(share[i : i + 2]) for i in (0, 2, 4))
    assert bare < 0.6
    assert once > 0.85
    assert more > 0.95


@dataclass(frozen=True)
class Float32:
    inner: ExactDenoiser

    @property
    def path(self):
        return self.inner.path

    def __call__(self, x, t, cond):
        return Prediction(*(y.float() for y in self.inner(x.double(), t.double(), {})))


# ------------------------------------------------------------------------------------------- the command line
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs by name: a flow with classes, one without, a ddpm, classifiers on linear and vp paths and of other data."""
    out, base = (
        tmp_path_factory.mktemp("runs"),
        ["--backbone.width=16", "--steps=4", "--batch=16", "--warmup=0", "--lr=0.02"],
    )
    jobs = {
        "flow": ["--objective=flow", "--data=moons", "--save-every=2", "--ema", "0.05", "0.9", "--sample-every=4"],
        "plain": ["--objective=flow", "--data=checkerboard"],
        "ddpm": ["--objective=ddpm", "--data=moons"],
        "linear": ["--objective=classifier", "--data=moons", "--sample-every=2"],
        "vp": ["--objective=classifier", "--data=moons", "--objective.path=vp"],
        "eight": ["--objective=classifier", "--data=8gaussians"],
        "digits": ["--objective=classifier", "--data=digits"],
    }
    for name, argv in jobs.items():
        argv = ["train", "--tensorboard=false", "--sample-every=0", f"--out={out}", f"--name={name}", *base, *argv]
        assert cli.main(argv) == 0
    return {name: str(next(out.glob(f"*-{name}"))) for name in jobs}


def sample(trained, run, *argv, out="x.npz"):
    argv = [trained.get(a, a) for a in argv]
    return cli.main(["sample", trained[run], "--n=4", "--steps=2", "--format=npz", f"--out={out}", *argv])


@pytest.mark.parametrize(
    ("run", "argv"),
    [
        ("flow", ["--classifier", "linear"]),
        ("plain", ["--classifier", "linear", "--label=1"]),
        ("ddpm", ["--classifier", "vp", "--classifier-scale=3", "--guidance=2"]),
        ("flow", ["--guidance=2", "--guidance-interval", "0.2", "0.8", "--guidance-rule=rescale"]),
        ("flow", ["--guidance=2", "--guidance-rule=apg", "--guidance-rule.momentum=-0.5", "--guidance-passes=apart"]),
        ("flow", ["--guidance=2", "--autoguide=ema:0.05"]),
        ("flow", ["--guidance=2", "--autoguide=step:2"]),
        ("plain", ["--guidance=2", "--autoguide", "flow"]),
    ],
)
def test_the_command_line_guides(trained, run, argv, tmp_path):
    draws = []
    for name, more in (("guided.npz", argv), ("bare.npz", [])):
        assert sample(trained, run, *more, out=tmp_path / name) == 0
        draws.append(np.load(tmp_path / name)["arr_0"])
    assert np.isfinite(draws[0]).all()
    assert not np.allclose(draws[0], draws[1])


@pytest.mark.parametrize(
    ("run", "argv", "says"),
    [
        ("flow", ["--guidance=nan"], "finite"),
        ("flow", ["--guidance=2", "--guidance-interval", "0.8", "0.2"], "low < high"),
        ("flow", ["--guidance-interval", "0.2", "0.8"], "no effect without guidance"),
        ("flow", ["--guidance-rule=apg"], "no effect at guidance 1"),
        ("flow", ["--guidance-passes=apart"], "no effect at guidance 1"),
        ("flow", ["--guidance=2", "--guidance-rule=agp"], "did you mean apg?"),
        ("flow", ["--guidance=2", "--guidance-rule=apg", "--guidance-rule.phi=0.5"], "phi"),
        ("flow", ["--guidance=2", "--guidance-rule=rescale", "--guidance-rule.phi=2"], "phi"),
        ("flow", ["--autoguide=ema:0.05"], "no effect at guidance 1"),
        ("flow", ["--guidance=2", "--autoguide=ema:0.9"], "the model itself"),
        ("flow", ["--guidance=2", "--autoguide=ema:0.7"], "this run has: 0.05, 0.9"),
        ("flow", ["--guidance=2", "--autoguide=step:3"], "saved: 2, 4"),
        ("flow", ["--guidance=2", "--autoguide=nowhere"], "does not exist"),
        ("flow", ["--guidance=2", "--autoguide=ema:0.05", "--guidance-passes=apart"], "two networks"),
        ("flow", ["--guidance=2", "--autoguide", "ddpm"], "the model's path is Linear"),
        ("flow", ["--guidance=2", "--autoguide", "linear"], "draws nothing"),
        ("plain", ["--guidance=2"], "no conditions"),
        ("plain", ["--label=1"], "no classes"),
        ("flow", ["--classifier", "vp"], "the model's path is Linear"),
        ("ddpm", ["--classifier", "linear"], "the model's path is VP"),
        ("flow", ["--classifier", "flow"], "given a run of Flow"),
        ("flow", ["--classifier", "eight"], "knows label as"),
        ("plain", ["--classifier", "digits"], "the same data"),
        ("plain", ["--classifier", "linear", "--label=2"], "allowed 0..1"),
        ("flow", ["--classifier", "linear", "--classifier-scale=0"], "no effect"),
        ("flow", ["--classifier-scale=2"], "no classifier"),
        ("linear", [], "draws nothing"),
        ("linear", ["--sampler=heun"], "draws nothing"),
    ],
)
def test_mistakes_are_one_line(capsys, trained, run, argv, says, tmp_path):
    assert sample(trained, run, *argv, out=tmp_path / "x.npz") == 2
    err = capsys.readouterr().err.strip()
    assert says in err
    assert "\n" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_run_hands_every_setting_on(trained):
    run, weak = load_run(trained["flow"]), open_reference(load_run(trained["flow"]), "step:2")
    bare, (linear, apart, apg, limited, auto, auto_apg) = run.sample(4, steps=4).x, (
        run.sample(4, steps=4, guidance=3.0, **how).x
        for how in ({}, {"guidance_passes": "apart"}, {"guidance_rule": APG()}, {"guidance_interval": (0.2, 0.8)},
                    {"weak": weak},
                    {"weak": weak, "guidance_rule": APG()})
    )  # fmt: skip
    assert torch.allclose(linear, apart, atol=1e-5)
    different = [bare, linear, apg, limited, auto, auto_apg]
    assert all(not torch.allclose(a, b, atol=1e-5) for i, a in enumerate(different) for b in different[:i])
    assert weak.step == 2
    assert Path(weak.weights).name == "ema-0.9.safetensors"


def test_data_without_classes_is_refused(capsys, tmp_path):
    argv = ["train", "--objective=classifier", "--data=checkerboard", "--device=cpu", f"--out={tmp_path}"]
    assert cli.main(argv) == 2
    assert "take data with classes" in capsys.readouterr().err
    with pytest.raises(ValueError, match="label, style"):
        Classifier(label="size").networks(MLP(), SPEC)


def test_a_missing_label_is_refused(trained):
    flow, linear = load_run(trained["flow"]), load_run(trained["linear"])
    with pytest.raises(ValueError, match="given no label to guide to"):
        flow.sample(2, cond={}, classifier=linear)
    with pytest.raises(ValueError, match="knows label as"):
        with_classes(replace(flow.spec, cond={"label": Label(3)}), linear)


def test_a_classifier_says_what_to_do_next_and_logs_its_accuracy(trained):
    run = Path(trained["linear"])
    assert all("classify/accuracy" in r for r in read_log(run))
    assert not (run / "samples").exists()


def test_script(trained, tmp_path):
    out, script = tmp_path / "guided.png", ROOT / "samplers/classifier_guidance.py"
    how = ["--unconditional", "--scales", "0", "2", "--n=6", "--steps=2", f"--out={out}"]
    done = subprocess.run(
        [sys.executable, str(script), trained["flow"], trained["linear"], *how],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("probability") == 2
    assert Image.open(out).size[0] > 100
