"""The first stage of latent diffusion: perceptual distances, patches, the adaptive weight, and two stages on digits."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributions import Normal, kl_divergence
from torchvision.models import vgg
from torchvision.transforms.v2.functional import normalize

from genkit.backbones import MLP, DiT, UNet
from genkit.cli import main as cli
from genkit.core import Batch, Draw, Label, Spec
from genkit.objectives import FirstStage
from genkit.objectives.autoencoders.first_stage import (
    KL,
    AdaptiveWeight,
    PatchDiscriminator,
    VectorQuantizer,
    last_layer,
)
from genkit.objectives.autoencoders.perceptual import VGG11, VGG16, GradientDifference, RandomFeatures, make_vgg
from genkit.training.run import load_run

PICTURES = Spec((1, 8, 8))


def batch_of(x, start=0, step=None):
    return Batch(x, draw=Draw((0,), start, start + len(x)), step=step)


# ------------------------------------------------------------------------------------------- perceptual distances
def test_edge_distance_sees_edges_at_every_size_and_no_brightness():
    """A ramp of slope a differs from nothing by a, 2 a and 4 a at 8x8, 4x4 and 2x2, across it; and not along it."""
    ramp = 0.3 * torch.arange(8.0).expand(2, 1, 8, 8)
    see = GradientDifference()
    for x in (ramp, ramp.mT):
        assert torch.allclose(see(x, torch.zeros_like(x)), torch.full((2,), 0.3 * (1 + 2 + 4) / 3))
    assert torch.allclose(see(ramp + 5, ramp), torch.zeros(2), atol=1e-5)


def test_random_features_are_the_same_everywhere_and_compare_unit_vectors():
    x, y = torch.randn(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(4)
    one = RandomFeatures(3)
    torch.manual_seed(5)
    assert RandomFeatures(3)(x, y).equal(one(x, y))
    assert torch.allclose(one(x, x), torch.zeros(3), atol=1e-6)
    assert torch.allclose(one(x, 7 * x), torch.zeros(3), atol=1e-5)  # without biases, a factor turns no feature
    small = x + 0.1 * (y - x)
    assert bool((one(x, small) < one(x, y)).all())
    assert torch.allclose(one(x[1:2], y[1:2]), one(x, y)[1:2], atol=1e-6)
    assert not list(one.parameters())


def test_the_first_layer_of_random_features_is_a_distance_of_cosines():
    """``|u - v|^2 = 2 - 2 cos`` of unit vectors: against torch's cosine."""
    x, y = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    see, expected = RandomFeatures(3), []
    a, b = x, y
    for i in range(3):
        a, b = (F.conv2d(v, see.get_buffer(f"filters{i}"), stride=1 if i == 0 else 2, padding=1).relu() for v in (a, b))
        expected.append((2 - 2 * F.cosine_similarity(a, b, dim=1)).mean((1, 2)))
    assert torch.allclose(see(x, y), torch.stack(expected).mean(0), atol=1e-4)


KINDS = {"vgg11": (VGG11, "A", (1, 4, 9, 14, 19)), "vgg16": (VGG16, "D", (3, 8, 15, 22, 29))}  # the latter as in LPIPS


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random weights in files as torchvision's are: with a classifier, which nobody needs."""
    folder = tmp_path_factory.mktemp("vgg")
    torch.manual_seed(7)
    for name, (_, letter, _) in KINDS.items():
        held = {f"features.{k}": v for k, v in vgg.make_layers(vgg.cfgs[letter]).state_dict().items()}
        torch.save({**held, "classifier.6.bias": torch.zeros(1000)}, folder / f"{name}.pth")
    return folder


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_distance_in_vgg_is_one_of_cosines_in_the_layers_of_lpips(files, name, channels):
    """Against torchvision's layers by number, its normalisation and torch's cosine."""
    kind, letter, numbers = KINDS[name]
    see = kind(weights=str(files / f"{name}.pth")).network(channels)
    stored = torch.load(files / f"{name}.pth", weights_only=True)
    peer = vgg.make_layers(vgg.cfgs[letter])
    peer.load_state_dict({k.removeprefix("features."): v for k, v in stored.items() if k.startswith("features.")})
    x, y = 2 * torch.rand(2, 2, channels, 32, 32, generator=torch.Generator().manual_seed(1)) - 1
    a, b = (normalize(v.expand(-1, 3, -1, -1) / 2 + 0.5, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) for v in (x, y))
    expected = []
    for number, layer in enumerate(peer):
        a, b = layer(a), layer(b)
        if number in numbers:
            expected.append((2 - 2 * F.cosine_similarity(a, b, dim=1)).mean((1, 2)))
    assert len(expected) == 5
    assert torch.allclose(see(x, y), torch.stack(expected).mean(0), atol=1e-4)


def test_vgg_teaches_the_picture_and_nothing_of_it_is_trained_or_saved(files):
    see = VGG11(weights=str(files / "vgg11.pth")).network(1)
    for side in (8, 28):  # at 8x8 there is no fifth layer
        x = 2 * torch.rand(3, 1, side, side) - 1
        y = (x + 0.2 * torch.randn_like(x)).requires_grad_()
        assert torch.allclose(see(x, x), torch.zeros(3), atol=1e-6)
        found = see(y, x)
        assert bool((found > 1e-4).all())
        (grad,) = torch.autograd.grad(found.sum(), y)
        assert bool(torch.isfinite(grad).all() and (grad.flatten(1).norm(dim=1) > 0).all())
        with torch.no_grad():
            assert float(see(y - 0.1 * grad / grad.norm(), x).sum()) < float(found.detach().sum())
    assert not list(see.parameters())
    assert not see.state_dict()


class Code:
    """A pickle that would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["missing", "code", "noise", "list", "vgg11", "shape", "safetensors"])
def test_another_file_than_vggs_is_one_line_and_runs_no_code(files, tmp_path, name):
    mark, file = tmp_path / "mark", tmp_path / "given.pth"
    made = {
        "missing": lambda: None,
        "code": lambda: file.write_bytes(pickle.dumps({"features.0.weight": Code(mark)})),
        "noise": lambda: file.write_bytes(bytes(range(256)) * 9),
        "list": lambda: torch.save([torch.zeros(3)], file),
        "vgg11": lambda: shutil.copy(files / "vgg11.pth", file),
        "shape": lambda: torch.save({"features.0.weight": torch.zeros(64, 1, 3, 3)}, file),
        "safetensors": lambda: save_file({"features.0.bias": torch.zeros(64)}, file.with_suffix(".safetensors")),
    }
    made[name]()
    if name == "safetensors":
        file = file.with_suffix(".safetensors")
    with pytest.raises(ValueError, match=r"perceptual\.weights: ") as e:
        VGG16(weights=str(file)).setup()
    said = str(e.value)
    assert "\n" not in said
    assert str(file) in said
    assert "vgg16-397923af.pth" in said
    assert not mark.exists()
    if name in ("vgg11", "shape", "safetensors"):
        assert {"vgg11": "features.2.weight", "shape": "features.0.weight", "safetensors": "features.0.weight"}[
            name
        ] in said


def test_vgg_sees_pictures_of_one_or_three_channels():
    with pytest.raises(ValueError, match=r"perceptual: VGG sees 1 or 3 channels, and samples have 2"):
        FirstStage(perceptual=VGG16()).networks(MLP(width=8, depth=1), Spec((2, 8, 8)))


def test_a_stage_that_learned_by_vgg_needs_its_file_to_learn_only(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    argv = ["train", "--objective=autoencoder", "--objective.perceptual=vgg11", "--data.labels=false", "--steps=2",
            f"--out={tmp_path / 'runs'}", *ARGS]  # fmt: skip
    assert cli.main(argv) == 2
    said = capsys.readouterr().err.strip()
    assert (
        "perceptual.weights: no file of VGG's weights here; get https://download.pytorch.org/models/vgg11-8a719046"
        in said
    )
    assert "\n" not in said
    assert not (tmp_path / "runs").exists()
    kept = tmp_path / "cache" / "vgg11-8a719046.pth"
    kept.parent.mkdir()
    shutil.copy(files / "vgg11.pth", kept)
    assert cli.main(argv) == 0
    run = (tmp_path / "runs" / "latest").resolve()
    line = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert line["reconstruct/perceptual"] > 0
    assert not any(k.startswith("looks") for k in load_file(run / "latest" / "nets.safetensors"))
    kept.unlink()
    make_vgg.cache_clear()  # as in a new process
    assert load_run(run).nets.keys() >= {"encoder", "decoder"}
    assert cli.main(["train", "--objective=flow", f"--codec={run}", "--steps=1", f"--out={tmp_path}", *ARGS]) == 0
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(run), "--steps=3"]) == 2
    assert "perceptual.weights: no file" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- patches
def test_a_patch_knows_its_surroundings_alone():
    net = PatchDiscriminator((3, 32, 32))
    x = torch.randn(2, 3, 32, 32)
    other = x.clone()
    other[:, :, :4, :4] += 1
    a, b = net(x), net(other)
    assert a.shape == (2, 1, 4, 4)
    assert not torch.allclose(a[..., 0, 0], b[..., 0, 0])
    assert a[..., 3, 3].equal(b[..., 3, 3])
    assert torch.allclose(net(x[:1]), a[:1], atol=1e-6)


@pytest.mark.parametrize("backbone", [MLP(width=8, depth=1), UNet(width=8), DiT(width=8, depth=1, head_size=4)])
def test_the_last_layer_is_the_last_the_output_is_linear_in_it(backbone):
    decoder = backbone.decoder(PICTURES, (2, 4, 4)).double()
    with torch.no_grad():
        for p in decoder.parameters():  # blocks start as the identity
            p += 0.1 * torch.randn_like(p)
        weight, z = last_layer(decoder), torch.randn(2, 2, 4, 4).double()
        once = decoder(z)
        weight *= 2
        twice = decoder(z)
        weight *= 0
        never = decoder(z)
    assert torch.allclose(twice - once, once - never, atol=1e-9)
    assert float((once - never).abs().max()) > 1e-3


# ----------------------------------------------------------------------------------------------------------- the loss
def test_the_cost_of_a_posterior_is_its_divergence():
    objective = FirstStage(latent=(2, 4, 4), bottleneck=KL(weight=0.3), perceptual_weight=0)
    nets = objective.networks(MLP(width=16, depth=1), PICTURES)
    x = torch.randn(5, 1, 8, 8)
    q = objective.encode(nets, x)
    truth = kl_divergence(Normal(q.mean, (0.5 * q.log_var).exp()), Normal(0.0, 1.0)).flatten(1).sum(1)
    loss = objective.loss("reconstruct", nets, batch_of(x))
    error = (objective.decode(nets, q.sample(batch_of(x).normal(2, 4, 4))) - x).abs().flatten(1).mean(1)
    assert torch.allclose(loss.per_sample, error + 0.3 * truth / 64, atol=1e-5)
    assert torch.allclose(loss.logs["kl"], truth.mean(), rtol=1e-4)


def with_discriminator(**more):
    objective = FirstStage(latent=(2, 4, 4), adversarial_weight=0.7, adversarial_start=3, **more)
    nets = objective.networks(MLP(width=16, depth=1), PICTURES)
    return objective, {k: v.train() for k, v in nets.items()}


def test_the_adaptive_weight_is_the_ratio_of_the_batchs_gradients_however_it_is_cut():
    """By autograd on the whole batch; used a step later, and forgotten by no micro-batch."""
    objective, nets = with_discriminator()
    x, last, plain = torch.randn(12, 1, 8, 8), last_layer(nets["decoder"]), FirstStage(latent=(2, 4, 4))
    rec = plain.loss("reconstruct", nets, batch_of(x)).per_sample
    out = objective.decode(nets, objective.encode(nets, x).sample(batch_of(x).normal(2, 4, 4)))
    opinion = -nets["discriminator"](out).flatten(1).mean(1)
    sizes = [torch.autograd.grad(v.sum(), last, retain_graph=True)[0].norm() for v in (rec, opinion)]
    expected = float(sizes[0] / sizes[1])
    for cuts in (((0, 12),), ((0, 5), (5, 6), (6, 12))):
        balance = nets["balance"] = AdaptiveWeight(last).train()
        for a, b in cuts:
            objective.loss("reconstruct", nets, batch_of(x[a:b], a, step=3))
        assert float(balance.weight) == 0
        objective.after_step(nets, 3)
        assert float(balance.weight) == pytest.approx(expected, rel=1e-3)
        assert not bool(balance.rec.any() | balance.gan.any())
    got = objective.loss("reconstruct", nets, batch_of(x, step=4))
    assert torch.allclose(got.per_sample, rec + 0.7 * expected * opinion, atol=1e-4)
    assert float(got.logs["weight"]) == pytest.approx(expected, rel=1e-3)


def test_the_discriminator_starts_late():
    objective, nets = with_discriminator()
    nets["balance"].weight.fill_(5.0)
    x = torch.randn(6, 1, 8, 8)
    plain = FirstStage(latent=(2, 4, 4)).loss("reconstruct", nets, batch_of(x)).per_sample
    assert objective.loss("reconstruct", nets, batch_of(x, step=2)).per_sample.equal(plain)
    judged = objective.loss("discriminator", nets, batch_of(x, step=2)).per_sample
    assert judged.tolist() == [0.0] * 6
    judged.sum().backward()  # every weight has a gradient, of zeros: ranks wait for one
    assert all(p.grad is not None and not p.grad.any() for p in nets["discriminator"].parameters())
    assert not objective.loss("reconstruct", nets, batch_of(x, step=3)).per_sample.equal(plain)
    nn.init.zeros_(nets["discriminator"].layers[-1].weight)
    nn.init.constant_(nets["discriminator"].layers[-1].bias, 0.25)  # hinge: (1 - s) + (1 + s)
    assert torch.allclose(objective.loss("discriminator", nets, batch_of(x, step=3)).per_sample, torch.tensor(2.0))


def test_the_discriminator_learns_what_the_decoder_cannot_draw():
    objective, nets = with_discriminator()
    x = torch.randn(24, 1, 8, 8)
    optimizer = torch.optim.Adam(nets["discriminator"].parameters(), 2e-3)
    for _ in range(20):
        loss = objective.loss("discriminator", nets, batch_of(x, step=3))
        optimizer.zero_grad()
        loss.per_sample.mean().backward()
        optimizer.step()
    assert float(loss.logs["accuracy"]) > 0.95
    assert float(loss.per_sample.detach().mean()) < 0.5


def test_the_codebooks_latents_are_entries():
    objective = FirstStage(latent=(3, 4, 4), bottleneck=VectorQuantizer(codebook_size=8))
    nets = objective.networks(MLP(width=16, depth=1), PICTURES)
    z = objective.encode(nets, torch.randn(5, 1, 8, 8)).mean
    assert bool((z.movedim(1, -1)[..., None, :] == nets["codebook"].codes).all(-1).any(-1).all())
    before = nets["codebook"].codes.clone()
    for net in nets.values():
        net.train()
    objective.loss("reconstruct", nets, batch_of(torch.randn(5, 1, 8, 8)))
    objective.after_step(nets, 0)
    assert not nets["codebook"].codes.equal(before)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: VectorQuantizer(codebook_size=0), "codebook_size: given 0; a codebook needs 2"),
        (lambda: VectorQuantizer(ema_decay=1.0), "ema_decay 1.0"),
        (lambda: KL(weight=-1.0), "weight: given -1.0; allowed from 0"),
        (lambda: KL(weight=float("nan")), "weight: given nan"),
    ],
)
def test_invalid_bottlenecks_are_refused(make, expected):
    with pytest.raises(ValueError, match=expected) as e:
        make()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "flags",
    [["--objective.bottleneck=vq", "--objective.bottleneck.codebook-size=0"], ["--objective.bottleneck.weight=-1"]],
)
def test_invalid_bottlenecks_are_one_line_and_exit_code_2(tmp_path, capsys, flags):
    assert cli.main(["train", "--objective=autoencoder", *flags, f"--out={tmp_path}", "--steps=1"]) == 2
    said = capsys.readouterr().err.strip()
    assert flags[-1].partition("=")[0].rpartition(".")[2] in said
    assert "\n" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("how", "spec", "expected"),
    [
        ({"perceptual_weight": 1.0}, Spec((6,)), "perceptual_weight and adversarial_weight are for pictures"),
        ({"adversarial_weight": 1.0}, Spec((6,)), "perceptual_weight and adversarial_weight are for pictures"),
        ({"adversarial_weight": -1.0}, PICTURES, "adversarial_weight -1.0"),
        ({"latent": ()}, PICTURES, "latent"),
    ],
)
def test_mistakes_are_refused(how, spec, expected):
    with pytest.raises(ValueError, match=expected):
        FirstStage(**how).networks(MLP(width=8, depth=1), spec)


# ----------------------------------------------------------------------------------------------------- whole training
ARGS = ["--backbone=mlp", "--backbone.width=8", "--backbone.depth=1", "--batch=16", "--sample-every=0", "--workers=0",
        "--no-tensorboard", "--schedule=constant", "--precision=fp32"]  # fmt: skip


def test_a_first_stage_resumes_and_its_latents_are_learned_without_its_discriminator(tmp_path):
    argv = ["train", "--objective=autoencoder", "--objective.latent", "2", "4", "4", f"--out={tmp_path}", *ARGS]
    argv += ["--objective.adversarial-weight=0.5", "--objective.adversarial-start=1"]
    argv += ["--data.labels=false", "--micro-batch=5"]
    assert cli.main([*argv, "--steps=4"]) == 0
    whole = (tmp_path / "latest").resolve()
    assert cli.main([*argv, "--steps=2"]) == 0
    cut = (tmp_path / "latest").resolve()
    assert cli.main(["train", "--resume", str(cut), "--steps=4"]) == 0
    a, b = (load_file(run / "latest" / "nets.safetensors") for run in (whole, cut))
    assert all(a[k].equal(b[k]) for k in a)
    assert float(a["balance.weight"]) > 0
    assert cli.main(["train", "--objective=flow", f"--codec={whole}", "--steps=1", f"--out={tmp_path}", *ARGS]) == 0
    shutil.rmtree(whole)
    run = load_run(tmp_path / "latest")
    assert set(run.codec.stage.nets) == {"encoder", "decoder"}
    assert run.sample(2, steps=2).x.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("name", ["ae", "vq", "autoencoder"])
def test_the_command_that_training_ends_with_works(tmp_path, capsys, name):
    """Also of labelled data, of which a first stage takes the pictures alone."""
    small = ["--steps=1", f"--out={tmp_path}", *ARGS]
    assert cli.main(["train", f"--objective={name}", "--objective.latent", "2", "2", "2", *small]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("next")]
    genkit, *argv = line.removeprefix("next").split()
    assert genkit == "genkit"
    assert cli.main([*argv, *(small if argv[0] == "train" else [])]) == 0
    if argv[0] == "train":
        run = load_run(tmp_path / "latest")
        assert set(run.spec.cond) == {"label"}
        assert run.sample(2, steps=2).x.shape == (2, 1, 8, 8)


def test_a_first_stage_sees_no_class():
    labelled = Spec((1, 8, 8), {"label": Label(3)})
    nets = [FirstStage(latent=(2,)).networks(MLP(width=8, depth=1), spec) for spec in (labelled, Spec((1, 8, 8)))]
    shapes = [{f"{k}.{n}": p.shape for k, net in each.items() for n, p in net.named_parameters()} for each in nets]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_two_stages_draw_digits(tmp_path, capsys):
    """Fréchet distances of the pixels themselves, in the units of their variance: a flow of latents that has learned
    nothing, one that has, and real digits of the test split."""
    wide = ["--backbone.width=64", "--backbone.depth=2", "--sample-every=0", "--no-tensorboard", f"--out={tmp_path}"]

    def fid(what, *more):
        capsys.readouterr()
        argv = ["eval", str(what), "--n=359", "--metrics=fid", "--features=raw", "--json", *more]
        assert cli.main(argv) == 0
        return json.loads(capsys.readouterr().out)["metrics"]["fid"]["value"]

    first = ["--objective=autoencoder", "--objective.latent", "4", "4", "4", "--data.labels=false", "--backbone=mlp",
             "--lr=2e-3", "--steps=600"]  # fmt: skip
    assert cli.main(["train", *first, *wide]) == 0
    stage = (tmp_path / "latest").resolve()
    flow = ["--objective=flow", f"--codec={stage}", "--backbone=dit", "--backbone.patch=1", "--backbone.head-size=32"]
    assert cli.main(["train", *flow, *wide, "--steps=1"]) == 0
    untrained = fid(tmp_path / "latest", "--steps=5")
    assert cli.main(["train", *flow, *wide, "--steps=500", "--batch=32", "--ema=0.99"]) == 0
    trained, real = fid(tmp_path / "latest", "--steps=5"), fid("digits:test", "--reference=digits:train")
    # measured: 402,807 untrained, 44,757 trained, 6,411 of the real test split
    assert trained < 0.2 * untrained
    assert real < trained
