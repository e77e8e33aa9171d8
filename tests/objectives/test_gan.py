"""GANs: the optimal discriminator of known laws, phases, ranks, conditions, the command line, modes."""

import importlib.util
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from sklearn.svm import SVC

from genkit import config
from genkit.backbones import MLP, DiT, UNet
from genkit.cli import main as cli
from genkit.core import Batch, Draw, Image, Label, Spec, Vector
from genkit.data import DATA
from genkit.data.codecs import Identity
from genkit.objectives import GAN
from genkit.objectives.adversarial.gan import NUM_FEATURES, Projection, diversity
from genkit.objectives.adversarial.losses import (
    GAN_LOSSES,
    PENALTIES,
    Minimax,
    NonSaturating,
    Relativistic,
    Wasserstein,
)
from genkit.training.loop import fit, initial_state
from genkit.training.run import load_run
from genkit.training.settings import TrainSettings
from tests.support.objectives import PLANE, Shift, batch_of
from tests.support.ranks import on_two_ranks

F64 = torch.float64


@dataclass(frozen=True)
class DiscriminatorOnly(GAN):
    """The discriminator alone learns: against a generator that stands still."""

    @property
    def phases(self):
        return (replace(super().phases[0], repeats=1),)


def train_discriminator(objective, drawn, real, steps, lr, batch=512):
    """A discriminator of two normal laws ``(mean, scale)``, each with independent numbers."""
    torch.manual_seed(0)
    nets = {"generator": Shift(*drawn), "discriminator": MLP(width=48, depth=1).encoder(PLANE, (1,))}
    cfg = config.from_dict(TrainSettings, {"steps": steps, "batch": batch, "lr": lr, "precision": "fp32",
                                          "log_every": steps, "ema": [0.99], "warmup": 20})  # fmt: skip
    mean, scale = map(torch.tensor, real)

    def stream(step, draw, first, last):
        z = Draw((1, step), first, last).normal(2)
        return Batch(mean + scale * z, draw=Draw((2, step), first, last), step=step)

    state = initial_state(objective, nets, cfg)
    fit(objective, state, stream, Identity(), cfg, Accelerator(cpu=True))
    return state


def law(mean, scale):
    return torch.distributions.Independent(torch.distributions.Normal(torch.tensor(mean), torch.tensor(scale)), 1)


def test_the_best_discriminator_is_p_over_p_plus_q():
    """Goodfellow et al. 2014, proposition 1, on laws whose log ratio is no linear function."""
    p, q = ((0.0, 0.0), (1.0, 1.0)), ((1.0, 0.0), (0.6, 1.2))
    state = train_discriminator(DiscriminatorOnly(gan_loss=Minimax(), latent=(2,)), q, p, steps=300, lr=6e-3, batch=256)
    x = torch.cat([law(*p).sample((2000,)), law(*q).sample((2000,))])
    truth = torch.sigmoid(law(*p).log_prob(x) - law(*q).log_prob(x))
    with torch.no_grad():
        got = torch.sigmoid(state.emas[0.99]["discriminator"](x, {})[:, 0])
    assert float((got - truth).abs().mean()) < 0.02
    assert float((truth - 0.5).abs().mean()) > 0.15  # a discriminator that knows nothing is far off


def test_the_wgan_gp_discriminator_measures_the_distance():
    """W1 of a normal law and the same one moved is the way that it was moved. A penalty of weight L overestimates by
    about W1 / (2 L), so L is large here."""
    objective = DiscriminatorOnly(gan_loss=Wasserstein(gp=50.0), latent=(2,))
    away = (0.9, -1.2)  # 1.5
    state = train_discriminator(objective, ((0.0, 0.0), (0.7, 1.0)), (away, (0.7, 1.0)), steps=150, lr=6e-3, batch=256)
    x, y = law(away, (0.7, 1.0)).sample((20_000,)), law((0.0, 0.0), (0.7, 1.0)).sample((20_000,))
    critic = state.emas[0.99]["discriminator"]
    with torch.no_grad():
        assert float(critic(x, {}).mean() - critic(y, {}).mean()) == pytest.approx(1.5, rel=0.05)


def small(objective, steps=2, accelerator=None, micro_batch=None, spec=None):
    """A few steps in float64 on points with classes; the state."""
    spec = spec or Spec((2,), {"label": Label(3)})
    how = {
        "steps": max(1, steps),
        "batch": 32,
        "micro_batch": micro_batch,
        "log_every": 1,
        "ema": [0.9],
        "precision": "fp32",
    }
    cfg = config.from_dict(TrainSettings, {"objective": "gan", **how})
    torch.manual_seed(0)
    nets = {k: net.double() for k, net in objective.networks(MLP(width=16, depth=1), spec).items()}
    logged = []

    def stream(step, draw, first, last):
        mine, rows = Draw((3, step, draw), first, last), torch.arange(first, last)
        cond = {"label": rows % 3} if spec.cond else {}
        return Batch(mine.normal(2).double(), cond, draw=Draw((4, step, draw), first, last), step=step)

    state = initial_state(objective, nets, cfg)
    if steps:
        fit(objective, state, stream, Identity(), cfg, accelerator or Accelerator(cpu=True), log=logged.append)
    return state, logged


HARD = [
    GAN(gan_loss=Wasserstein(), latent=(4,)),
    GAN(gan_loss=Relativistic(penalty_every=2), latent=(4,), spectral_norm=True, conditioning="embedding"),
]


@pytest.mark.parametrize("objective", HARD, ids=["wgan-gp", "r1-r2-spectral"])
def test_gradient_penalties_through_two_ranks_and_four_pieces_are_those_of_one(tmp_path, objective):
    """Double backward through DDP, in float64: 32 rows on one rank, and 2 ranks with 4 pieces of 4 rows each."""

    def weights(state):
        return {f"{k}.{n}": v.detach() for k, net in state.nets.items() for n, v in net.state_dict().items()}

    both = on_two_ranks(lambda a: weights(small(objective, steps=3, accelerator=a, micro_batch=4)[0]))
    whole = weights(small(objective, steps=3)[0])
    assert whole.keys() == both[0].keys()
    for name, value in whole.items():
        assert torch.equal(both[0][name], both[1][name]), name
        assert torch.allclose(both[0][name], value, atol=1e-9), name


@pytest.mark.parametrize("objective", HARD, ids=["wgan-gp", "r1-r2-spectral"])
def test_four_pieces_are_one_batch(objective):
    whole, cut = small(objective)[0], small(objective, micro_batch=8)[0]
    for name, net in whole.nets.items():
        for a, b in zip(net.parameters(), cut.nets[name].parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-9), name


@dataclass(frozen=True)
class OnePhase(GAN):
    """One phase of the two."""

    which: int = 0

    @property
    def phases(self):
        return super().phases[self.which : self.which + 1]


@pytest.mark.parametrize(("which", "mover"), [(0, "discriminator"), (1, "generator")])
def test_a_phase_moves_only_its_own_network(which, mover):
    before, after = (small(OnePhase(latent=(4,), which=which), steps=n)[0].nets for n in (0, 1))
    for name in before:
        same = [torch.equal(a, b) for a, b in zip(before[name].parameters(), after[name].parameters(), strict=True)]
        assert all(same) == (name != mover), name


def test_a_phase_needs_no_gradient_of_the_other_and_repeats_as_the_loss_says():
    objective = GAN(gan_loss=Wasserstein(discriminator_steps=3), latent=(4,))
    nets = {k: net.double() for k, net in objective.networks(MLP(width=16, depth=1), PLANE).items()}
    for mine, other in (("generator", "discriminator"), ("discriminator", "generator")):
        for name, net in nets.items():
            net.zero_grad(set_to_none=True)
            net.requires_grad_(name == mine)
        objective.loss(mine, nets, batch_of(torch.randn(8, 2, dtype=F64), step=0)).per_sample.sum().backward()
        assert all(p.grad is None for p in nets[other].parameters())
        assert any(bool((p.grad != 0).any()) for p in nets[mine].parameters())
    state, _ = small(objective, steps=2)
    taken = {k: {int(s["step"]) for s in opt.state.values()} for k, opt in state.optimizers.items()}
    assert taken == {"discriminator": {6}, "generator": {2}}


def test_both_networks_learn_with_every_loss():
    for name, game in GAN_LOSSES.items():
        _, logged = small(GAN(gan_loss=game(), latent=(4,)))
        assert logged[-1]["discriminator/grad_norm"] > 0, name
        assert logged[-1]["generator/grad_norm"] > 0, name
        assert {"discriminator/accuracy", "discriminator/margin", "discriminator/diversity"} <= logged[-1].keys()
        seen = {k.removeprefix("discriminator/") for line in logged for k in line}  # lazy ones are not in every line
        assert set(GAN_LOSSES[name]().penalties) == seen & {*PENALTIES}


def test_the_loss_works_inside_no_grad():
    """As the loop does, looking for the first layer that is not finite."""
    objective = GAN(latent=(4,))
    nets = objective.networks(MLP(width=16, depth=1), PLANE)
    x = torch.randn(8, 2)
    with torch.no_grad():
        dry = objective.loss("discriminator", nets, batch_of(x)).per_sample
    assert torch.allclose(dry, objective.loss("discriminator", nets, batch_of(x)).per_sample)


@pytest.mark.slow
def test_penalties_of_compiled_networks_are_those_of_plain_ones():
    """Compiled code has no second derivative: the penalised pass goes without."""
    objective = GAN(latent=(4,))
    nets, x = objective.networks(MLP(width=16, depth=1), PLANE), torch.randn(8, 2)
    plain = objective.loss("discriminator", nets, batch_of(x)).per_sample
    for net in nets.values():
        net.compile(backend="aot_eager")
    compiled = objective.loss("discriminator", nets, batch_of(x)).per_sample
    assert torch.allclose(compiled, plain, atol=1e-5)
    compiled.sum().backward()
    assert all(p.grad is not None for p in nets["discriminator"].parameters())


@pytest.mark.parametrize("family", [UNet(width=8, mults=(1, 2)), DiT(width=16, depth=1, patch=1)], ids=["unet", "dit"])
def test_penalties_work_on_pictures_with_every_backbone(family):
    """144 tokens: there fused attention, which has no second derivative, would be taken."""
    spec = Spec((1, 12, 12), {"label": Label(3)})
    objective = GAN(latent=(4,), augment=("color", "translation", "cutout"))
    nets = objective.networks(family, spec)
    batch = batch_of(torch.rand(4, 1, 12, 12) * 2 - 1, {"label": torch.arange(4) % 3})
    loss = objective.loss("discriminator", nets, batch)
    loss.per_sample.sum().backward()
    assert loss.logs["r1"] > 0
    assert all(p.grad is not None for p in nets["discriminator"].parameters())  # DDP waits for every one
    assert nets["generator"](torch.randn(4, 4), batch.cond).shape == (4, 1, 12, 12)


def test_projection_is_the_papers_inner_product():
    spec = Spec((2,), {"label": Label(3), "at": Vector((2, 2))})
    net = GAN(conditioning="projection").networks(MLP(width=16, depth=1), spec)["discriminator"]
    assert isinstance(net, Projection)
    x, label, at = torch.randn(5, 2), torch.tensor([0, 1, 2, 0, 1]), torch.randn(5, 2, 2)
    phi = net.features(x, {})
    towards = net.v[0].weight[label] + at.flatten(1) @ net.v[1].weight.T
    assert torch.allclose(
        net(x, {"label": label, "at": at})[:, 0], net.psi(phi)[:, 0] + (towards * phi).sum(1), atol=1e-5
    )
    assert phi.shape == (5, NUM_FEATURES)


@pytest.mark.parametrize("condition", ["projection", "embedding"])
def test_both_networks_use_the_condition(condition):
    spec = Spec((2,), {"label": Label(3)})
    objective = GAN(latent=(4,), conditioning=condition)
    torch.manual_seed(0)
    state, _ = small(objective, spec=spec)
    z, x, zero = torch.randn(6, 4, dtype=F64), torch.randn(6, 2, dtype=F64), torch.zeros(6, dtype=torch.long)
    for net, point in ((state.nets["generator"], z), (state.nets["discriminator"], x)):
        assert not torch.allclose(net(point, {"label": zero}), net(point, {"label": zero + 1}))


def test_pictures_as_conditions_are_embedded():
    spec = Spec((1, 8, 8), {"from": Image(2)})
    nets = GAN(latent=(4,)).networks(UNet(width=8), spec)
    assert not isinstance(nets["discriminator"], Projection)
    cond = {"from": torch.randn(2, 2, 8, 8)}
    assert nets["discriminator"](nets["generator"](torch.randn(2, 4), cond), cond).shape == (2, 1)


def test_diversity_is_a_ratio_of_distances_within_classes():
    real = torch.tensor([[0.0], [2.0], [10.0], [14.0]])
    label = {"label": torch.tensor([0, 0, 1, 1])}
    assert float(diversity(real, real, label)) == 1
    assert float(diversity(real, 3 * real, {})) == pytest.approx(3)
    one_each = torch.tensor([[1.0], [1.0], [12.0], [12.0]])
    assert float(diversity(real, one_each, label)) == 0  # one picture a class
    assert float(diversity(real, one_each, {})) > 0.5
    spread = torch.tensor([[0.0], [1.0], [12.0], [14.0]])
    assert float(diversity(real, spread, label)) == pytest.approx((1 + 2) / (2 + 4))
    assert float(diversity(real, spread, {"label": torch.arange(4)})) > 0  # no two of a class: all pairs
    assert math.isnan(float(diversity(real[:1], real[:1], {})))


def test_collapse_divergence_and_imbalance_are_one_line_warnings():
    record = {"step": 1000, "discriminator/diversity": 0.9, "discriminator/accuracy": 0.6}
    say = GAN().warning
    assert say(record) is None
    for change, start_of_line in (
        ({"discriminator/diversity": 0.05}, "mode collapse"),
        ({"discriminator/diversity": 9.0}, "divergence"),
        ({"discriminator/accuracy": 0.999}, "the discriminator wins"),
    ):
        line = say({**record, **change})
        assert line.startswith(start_of_line)
        assert "\n" not in line
        assert say({**record, **change, "step": 100}) is None
    assert say({**record, "discriminator/diversity": None}) is None
    assert GAN(gan_loss=Wasserstein()).warning({**record, "discriminator/accuracy": 0.999}) is None


ARGS = ["--data=moons", "--backbone.width=16", "--backbone.depth=1", "--steps=4", "--batch=16", "--log-every=1",
        "--sample-every=4", "--tensorboard=false", "--device=cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("gan")
    assert cli.main(["train", "--objective=gan", *ARGS, f"--out={out}"]) == 0
    return out / "latest"


def test_a_run_is_sampled_from_the_average_of_the_generator(trained):
    run = load_run(trained)
    assert run.weights.endswith("ema-0.999.safetensors")
    x, cond = run.sample(6, seed=3)
    from genkit.diffusion.samplers import Seeds

    z = Seeds(range(3, 9), run.device)((64,))
    assert torch.allclose(x, run.nets["generator"](z, cond))
    raw = load_run(trained, ema="none").sample(6, seed=3).x
    assert not torch.allclose(x, raw)
    assert torch.allclose(run.sample(2, seed=5).x, x[2:4], atol=1e-6) == bool(
        (cond["label"][2:4] == torch.arange(2)).all()
    )
    assert (trained / "samples" / "step-0000004.png").exists()


def test_an_objective_has_default_settings_that_a_user_overrides():
    cfg = config.from_dict(TrainSettings, {"objective": "gan"})
    assert cfg.betas == GAN.default_settings["betas"] != TrainSettings().betas
    assert config.from_dict(TrainSettings, {"objective": "gan", "betas": [0.5, 0.9]}).betas == (0.5, 0.9)
    assert config.from_dict(TrainSettings, {"objective": "flow"}).betas == TrainSettings().betas
    assert config.parse(TrainSettings, ["--objective=gan"]).warmup == GAN.default_settings["warmup"]
    assert config.parse(TrainSettings, ["--objective=gan", "--warmup=7"]).warmup == 7
    assert config.from_dict(TrainSettings, config.dump(cfg)) == cfg


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"sampler": "heun"}, "sampler: has no effect on GAN"),
        ({"guidance": 2.0}, "guidance: has no effect on GAN"),
        ({"steps": 50}, "steps: has no effect on GAN"),
    ],
)
def test_what_has_no_effect_on_one_pass_is_refused(trained, how, message):
    with pytest.raises(ValueError, match=message):
        load_run(trained).sample(2, **how)
    with pytest.raises(ValueError, match="sampler: has no effect on GAN"):
        GAN().generator({}, lambda denoise: None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.labels=false", "--objective.conditioning=projection"], "but this data has no labels"),
        (["--objective.gan-loss.discriminator-steps=0"], "gan-loss.discriminator-steps"),
        (["--objective.gan-loss.r1=-1"], "gan-loss.r1"),
        (["--objective.gan-loss=wasserstein", "--objective.gan-loss.gp=0"], "gp: given 0, which leaves"),
        (["--objective.gan-loss=hinge", "--objective.gan-loss.penalty-every=4"], "penalty_every: given 4, but r1, r2"),
        (["--objective.latent", "0"], "latent"),
        (["--data=moons", "--objective.augment", "cutout"], "augment: given cutout, but samples are vectors"),
        (["--objective.augment", "cut-out"], "augment"),
        (["--objective.gan-loss=wgan"], "given 'wgan'; allowed: relativistic"),
    ],
)
def test_invalid_settings_are_one_line_and_exit_code_2(tmp_path, capsys, flags, message):
    argv = ["train", "--objective=gan", "--data=digits", "--steps=1", "--device=cpu", f"--out={tmp_path}", *flags]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert "\n" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Wasserstein(discriminator_steps=0), "discriminator_steps: given 0; needs 1"),
        (lambda: NonSaturating(r1=-1.0), "r1: given -1.0; a penalty's weight is 0 or more"),
        (lambda: Relativistic(r2=float("nan")), "r2: given nan"),
        (lambda: Relativistic(r1=0.0, r2=0.0, penalty_every=2), "penalty_every: given 2, but r1, r2 and gp are 0"),
        (lambda: GAN(latent=()), "latent: given"),
        (
            lambda: GAN(conditioning="projection").networks(UNet(), Spec((1, 8, 8), {"from": Image(1)})),
            "take embedding",
        ),
        (lambda: GAN(conditioning="embedding").networks(MLP(), PLANE), "no labels; leave it out"),
    ],
)
def test_senseless_settings_are_refused_in_python_too(make, message):
    with pytest.raises(ValueError, match=message) as e:
        make()
    assert "\n" not in str(e.value)


ROOT = Path(__file__).parents[2]


def example(name):
    spec = importlib.util.spec_from_file_location("example", next((ROOT / "examples").glob(f"*_{name}.py")))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["projection", "embedding"])
def test_a_conditional_gan_draws_the_requested_digit(tmp_path, condition):
    """A quarter of configs/digits_gan.yaml: an SVM sees the class asked for, and the classes have variety."""
    argv = ["--config", str(ROOT / "configs/digits_gan.yaml"), "--steps=500", f"--objective.conditioning={condition}"]
    assert cli.main(["train", *argv, "--device=cpu", "--tensorboard=false", f"--out={tmp_path}"]) == 0
    run, digits = load_run(tmp_path / "latest"), example("evaluate_digits")
    x, cond = run.sample(1000)
    classifier = SVC(gamma=0.001).fit(*digits.load_digits("train"))
    right = torch.from_numpy(classifier.predict(x.flatten(1).numpy() * (16 / 255))) == cond["label"]
    assert float(right.float().mean()) >= 0.95
    assert min(float(right[cond["label"] == c].float().mean()) for c in range(10)) >= 0.8
    real = DATA["digits"]().load("train").batch(torch.arange(1000), Draw((0,), 0, 1000))
    assert 0.7 < apart(x, cond["label"]) / apart(real.x, real.cond["label"]) < 1.3


def apart(x, label):
    """The mean distance of two samples of a class."""
    flat = x.flatten(1).float()
    return float(torch.stack([torch.pdist(flat[label == c]).mean() for c in range(10)]).mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["non-saturating, R1 and R2", "relativistic, R1 and R2"])
def test_a_gan_with_both_penalties_finds_all_eight_modes(name):
    """Seed 0 of examples/04_gan_modes.py."""
    x, result = example("gan_modes").train(name, seed=0)
    assert result["modes"] == 8
    assert result["near"] >= 0.9
    assert result["warning"] is None
    assert x.shape == (5000, 2)


@pytest.mark.slow
def test_without_its_penalties_the_non_saturating_loss_drops_modes():
    """What the test above would see if they were lost; measured: 4 of 8."""
    _, result = example("gan_modes").train("non-saturating, R1 and R2", seed=0, r1=0.0, r2=0.0, penalty_every=1)
    assert result["modes"] <= 6


def test_the_example_counts_modes():
    count_modes = example("gan_modes").count_modes
    data = DATA["8gaussians"](n=4000, noise=0.1, labels=False).load()
    assert data.spec.cond == {}
    assert data.cond == {}
    found = count_modes(data.x)
    assert found["modes"] == 8
    assert found["near"] == pytest.approx(
        1 - math.exp(-4.5), abs=0.006
    )  # a normal law of the plane within 3 deviations
    half = count_modes(torch.cat([data.x[data.x[:, 0] > 0.5], torch.zeros(2000, 2)]))
    assert half["modes"] == 3
    assert half["near"] < 0.5
