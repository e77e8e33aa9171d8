"""Guidance in one pass: the targets are those of classifier-free guidance, the base stays, the adapter learns."""

import copy

import pytest
import torch

from genkit import distill, load, train
from genkit.backbones import MLP, DiT, UNet
from genkit.backbones.guidance_adapter import add_guidance_adapter, takes_scale
from genkit.backbones.lora import GuidanceLoRA, adapt
from genkit.cli.main import main
from genkit.core import SCALE_INPUT, Batch, Draw, Label, Spec
from genkit.diffusion.guidance import classifier_free, scale_input
from genkit.diffusion.paths import Cosine, chart
from genkit.diffusion.samplers import bind
from genkit.integrations.export import export
from genkit.objectives import DDPM, EDM, Flow, GuidanceDistillation
from genkit.objectives.matching.guidance_distillation import MIN_TAU
from genkit.training.sampling import Sampling
from tests.support.exact import F64, ExactDenoiser, three

MIXTURE = three()
MODELS = [Flow(), Flow(path=Cosine()), DDPM(), EDM()]
PLANE = Spec((2,), {"label": Label(3)})


def batch_of(rows, seed=0, **noise):
    return Batch(torch.zeros(rows, 2, dtype=F64), {"label": torch.arange(rows) % 3}, draw=Draw((seed,), 0, rows))


@pytest.mark.parametrize("model", MODELS, ids=lambda m: f"{type(m).__name__}-{type(m.path).__name__}")
def test_targets_are_what_guidance_predicts_on_its_own_trajectory(model):
    objective = GuidanceDistillation(of=model, low=1.5, high=5.0, points=6)
    denoise = ExactDenoiser(MIXTURE, objective.path)
    targets = list(objective.guided_trajectory(denoise, batch_of(7)))
    scales = targets[0].scale
    assert len(targets) == 7
    assert float(scales.min()) >= 1.5
    assert float(scales.max()) <= 5.0
    assert scales.unique().numel() == 7
    for i, scale in enumerate(scales.tolist()):
        times = torch.stack([t.sample.t[i] for t in targets])
        assert bool((times.diff() < 0).all()), "the trajectory does not go from noise to data"
        visited = []

        def record(step, x, p, visited=visited):
            visited.append((x, p.x0, p.x1))

        # the sampler begins at sigma(1) z: take the z that gives the same start
        z = (targets[0].sample.x[i] / objective.path.sigma(times[:1]))[None]
        sampler = bind("ddim", times, classifier_free(scale), callback=record)
        sampler(denoise)(z, {"label": torch.tensor([i % 3])})
        assert len(visited) == len(targets) - 1
        for target, following, (x, x0, x1) in zip(targets, targets[1:], visited, strict=False):
            pairs = ((target.sample.x0, x0), (target.sample.x1, x1), (following.sample.x, x))
            assert all(torch.allclose(ours[i].double(), theirs[0].double(), atol=1e-4) for ours, theirs in pairs)


def test_trajectories_start_at_the_paths_own_noise_and_end_before_the_data():
    """Their steps are placed at random, so that all times are trained on."""
    objective, n = GuidanceDistillation(of=EDM(), points=3), 5000
    targets = list(objective.guided_trajectory(ExactDenoiser(MIXTURE, objective.path), batch_of(n)))
    sigma = float(objective.path.sigma(torch.ones(1, dtype=F64)))
    assert float(targets[0].sample.x.std()) == pytest.approx(sigma, rel=0.05)
    taus = [chart(objective.path, t.sample.t.double())[0] for t in targets]
    assert float(taus[-1].min()) == pytest.approx(MIN_TAU, rel=0.05)
    for k in (1, 2):
        assert float(taus[k].min()) == pytest.approx(1 - k / 3, abs=0.02)
        assert float(taus[k].max()) == pytest.approx(1 - (k - 1) / 3, abs=0.02)


class Shrinks(torch.nn.Module):
    """A network that guesses a share of what it sees, with the scale as an input, and a learned variance by choice."""

    def __init__(self, variance=False):
        super().__init__()
        self.share, self.variance = torch.nn.Parameter(torch.tensor(0.3, dtype=F64)), variance

    def forward(self, x, label, cond):
        keep = cond.get("keep", torch.ones(len(x), dtype=torch.bool))
        y = (
            self.share
            * x
            * (1 + 0.2 * cond["label"] * keep)[:, None]
            * cond.get(SCALE_INPUT, torch.ones(len(x)))[:, None]
        )
        return torch.cat([y, 9 * y], 1) if self.variance else y


@pytest.mark.parametrize("model", [Flow(), DDPM(), DDPM(learn_variance=True)], ids=["flow", "ddpm", "variance"])
def test_a_samples_loss_is_the_mean_over_its_own_trajectory(model):
    objective = GuidanceDistillation(of=model, low=1.5, high=5.0, points=4)
    net = Shrinks(getattr(model, "learn_variance", False))
    found = objective.loss("distill", {"net": net}, batch_of(6)).per_sample
    with torch.no_grad():
        targets = list(objective.guided_trajectory(objective.denoiser(net), batch_of(6)))
    parts = []
    for target in targets:
        x_in, label = objective.parametrization.inputs(objective.path, target.sample.x, target.sample.t)
        out = net(x_in, label, {**target.cond, SCALE_INPUT: target.scale})[:, :2].float()
        parts.append(model.squared_error(target.sample, out))
    expected = torch.stack(parts).mean(0)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(loss.sum(), net.share)[0] for loss in (found, expected)]
    torch.testing.assert_close(*slopes)  # the targets are constants


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_an_adapter_is_its_formula(kind):
    """``y + strength (w - 1) U (1 + g log w) D x`` (Jensen et al. 2025), also of a strided, padded, dilated kernel."""
    torch.manual_seed(0)
    linear = kind == "linear"
    layer = torch.nn.Linear(5, 3) if linear else torch.nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=2)
    net = Wraps(layer)
    x, scale = torch.randn(4, 5) if linear else torch.randn(4, 2, 9, 9), torch.tensor([1.0, 1.5, 3.0, 6.0])
    plain = layer(x)
    add_guidance_adapter(net, ["layer"], rank=2, strength=0.7)
    adapter = layer.guidance_adapter
    with torch.no_grad():
        for p in adapter.parameters():
            torch.nn.init.normal_(p)
        if linear:
            down = torch.nn.functional.linear(x, adapter.down.weight)
        else:
            down = torch.nn.functional.conv2d(x, adapter.down.weight, stride=2, padding=1, dilation=2)
        wide = lambda v: v.view(-1, *[1] * (x.ndim - 1))  # noqa: E731
        bent = down * (1 + wide(scale.log()) * adapter.gain.view(1, 2, *[1] * (x.ndim - 2)))
        up = torch.einsum("or,br...->bo...", adapter.up.weight.view(3, 2), bent)
        torch.testing.assert_close(net(x, None, {SCALE_INPUT: scale}), plain + 0.7 * wide(scale - 1) * up)
    assert SCALE_INPUT not in net.seen


class Wraps(torch.nn.Module):
    """A network of one layer, which keeps the conditions that it saw."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, label, cond):
        self.seen = cond
        return self.layer(x)


def test_the_range_of_scales_is_that_of_the_adapter():
    objective = GuidanceDistillation(low=1.5, high=2.5)
    assert objective.guidance_range == (1.5, 2.5)
    assert "--guidance 2.5" in objective.usage
    decided = GuidanceDistillation(of=EDM()).decide(lambda: 0.7)
    assert decided.sigma_data == 0.7


def test_what_cannot_be_distilled_is_refused():
    with pytest.raises(ValueError, match="GuidanceDistillation, which is not sampled in steps"):
        GuidanceDistillation(of=GuidanceDistillation())
    with pytest.raises(ValueError, match="no conditions to guide by"):
        GuidanceDistillation().networks(MLP(), Spec((2,)))
    with pytest.raises(ValueError, match="recomputed activations"):
        GuidanceDistillation().networks(MLP(checkpoint=True), PLANE)


def adapted(backbone, spec, seed=0):
    torch.manual_seed(seed)
    net = backbone.denoiser(spec)
    for p in net.parameters():  # final layers begin at zero; the tests need outputs
        torch.nn.init.normal_(p, std=0.2)
    before = copy.deepcopy(net)
    adapt({"net": net}, GuidanceLoRA(rank=3, layers="."))
    return before, net


def learn(net):
    """Weights as after training: the change is not zero."""
    for name, p in net.named_parameters():
        assert "guidance_adapter" in name, "something else than the adapter is trained"
        torch.nn.init.normal_(p, std=0.3)


@pytest.mark.parametrize(("backbone", "shape"), [
    (MLP(width=16, depth=2), (5,)), (UNet(width=8, mults=(1, 2), head_size=4), (1, 8, 8)),
    (DiT(width=16, depth=2, head_size=8), (1, 8, 8)), (UNet(width=8, mults=(1, 2), head_size=4), (2, 16)),
])  # fmt: skip
def test_without_a_scale_the_network_is_bit_for_bit_what_it_was(backbone, shape):
    spec = Spec(shape, {"label": Label(3)})
    before, net = adapted(backbone, spec)
    x, t, cond = torch.randn(4, *shape), torch.rand(4), {"label": torch.tensor([0, 1, 2, 0])}
    scaled = cond | {SCALE_INPUT: torch.tensor([1.0, 2.0, 3.0, 6.0])}
    with torch.no_grad():
        plain = before(x, t, cond)
        assert takes_scale(net)
        assert not takes_scale(before)
        assert torch.equal(net(x, t, cond), plain)
        assert torch.equal(net(x, t, scaled), plain), "an adapter that has learned nothing changes something"
        learn(net)
        guided = net(x, t, scaled)
        assert torch.equal(net(x, t, cond), plain)
        assert torch.equal(guided[0], plain[0]), "scale 1 is no guidance"
        assert all(not torch.allclose(guided[i], plain[i], atol=1e-3) for i in (1, 2, 3))
        for i in range(4):  # each sample has its own scale
            one = net(x[i : i + 1], t[i : i + 1], {k: v[i : i + 1] for k, v in scaled.items()})
            assert torch.allclose(one[0], guided[i], atol=1e-5)
        twin = copy.deepcopy(net)
        learn(twin)
        assert not torch.allclose(twin(x, t, scaled), guided, atol=1e-3)
        assert torch.equal(net(x, t, scaled), guided), "an average shares state with the network that it averages"


def test_scales_that_were_not_learned_are_refused():
    for scale in (0.5, 7.0):
        with pytest.raises(ValueError, match="allowed 1 to 6"):
            scale_input(scale, 1.0, 6.0)
    denoise = ExactDenoiser(MIXTURE, Flow().path)
    assert scale_input(1.0, 1.0, 6.0)(denoise) is denoise


@pytest.mark.parametrize(("changes", "says"), [
    ({"objective": "guidance-distillation"}, "genkit distill RUN"),
    ({"objective": {"name": "guidance-distillation", "of": {"name": "vae"}}}, "not sampled in steps"),
    ({"objective": {"name": "guidance-distillation", "low": 6.0}}, "below high"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        train(data="moons", steps=1, out=str(tmp_path), workers=0, tensorboard=False, **changes)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A flow of three classes in the plane, well enough trained that guidance matters."""
    out = tmp_path_factory.mktemp("base")
    return train(
        data={"name": "8gaussians", "n": 4000}, backbone={"name": "mlp", "width": 64}, steps=400, batch=256, workers=0,
        tensorboard=False, sample_every=0, out=str(out), ema=(0.99,),
    )  # fmt: skip


@pytest.mark.slow  # 15 s of training
def test_one_pass_draws_what_guidance_draws_in_two(base, tmp_path, capsys):
    run = distill(base, guidance=(1, 4), rank=8, steps=200, batch=64, out=str(tmp_path))
    again = load(run.directory, device="cpu")
    two = base.sample(256, Sampling(sampler="ddim", steps=10, guidance=3.0))
    one = again.sample(256, Sampling(sampler="ddim", steps=10, guidance=3.0))
    none = base.sample(256, Sampling(sampler="ddim", steps=10))
    assert (one.network_rows, two.network_rows) == (10, 20)
    assert torch.equal(again.sample(256, Sampling(sampler="ddim", steps=10)).x, none.x), "the base has changed"
    error = (one.x - two.x).square().mean() / (none.x - two.x).square().mean()
    assert float(error) < 0.1, float(error)
    with pytest.raises(ValueError, match="allowed 1 to 4"):
        again.sample(4, guidance=5.0)
    # the command, and the line that it prints
    argv = ["distill", str(base.directory), "--guidance", "1", "4", "--steps=2", "--device=cpu", f"--out={tmp_path}"]
    assert main(argv) == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next ")).split()[2:]
    assert command[0] == "sample"
    assert main([*command, "--steps=2"]) == 0
    with pytest.raises(ValueError, match="takes the guidance scale as an input"):
        again.sample(4, guidance=2.0, guidance_passes="apart")
    with pytest.raises(ValueError, match="distilled already"):
        distill(run)
    # resumed, it is the same as in one go
    half = distill(base, guidance=(1, 4), rank=8, steps=40, batch=64, out=str(tmp_path), name="half", save_every=20)
    resumed = train(resume=half.directory, step=20)
    assert (half.step, resumed.step) == (40, 40)
    ours, theirs = (dict(run.nets["net"].named_parameters()) for run in (half, resumed))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_an_exported_run_needs_no_base_and_is_guided_as_before(scale, tmp_path):
    base = train(data={"name": "8gaussians", "n": 64}, backbone={"name": "mlp", "width": 8}, steps=2, batch=8,
                 workers=0, tensorboard=False, sample_every=0, out=str(tmp_path))  # fmt: skip
    run = distill(base, rank=2, steps=3, batch=8, lr=0.1, points=2, out=str(tmp_path))
    out = tmp_path / "exported"
    export(run.directory, out, to="run", lora_scale=scale)
    loaded = load(run.directory, device="cpu", adapter_scale=scale)
    for folder in (base.directory, run.directory):
        folder.rename(tmp_path / f"moved-{folder.name}")
    exported = load(out, device="cpu")
    for guidance in (1.0, 3.0):
        expected = loaded.sample(4, sampler="ddim", steps=2, guidance=guidance).x
        assert torch.equal(exported.sample(4, sampler="ddim", steps=2, guidance=guidance).x, expected)
    assert not torch.equal(loaded.sample(4, sampler="ddim", steps=2).x, expected), "the adapter has no effect"
    assert main(["info", str(out)]) == 0
    with pytest.raises(ValueError, match="needs a scale above 0"):
        export(out, tmp_path / "off", to="run", lora_scale=0)
