"""The U-Nets of EDM: the map of names is complete, and the run is the same function as the peer's class."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from genkit.backbones import UNet
from genkit.backbones.blocks import BOX, FIR
from genkit.cli import main as cli
from genkit.config import from_dict
from genkit.core import Label, Spec
from genkit.core.tensors import mismatched_keys
from genkit.integrations.zoo.edm import read_edm
from genkit.integrations.zoo.foreign import Hints
from genkit.objectives import EDM
from genkit.training.run import load_run

PREFIX = "model."


class Layout(dict):
    """Names and tensors of EDM's state dict, with ``width`` channels and an embedding of four times as many."""

    def __init__(self, width, adm, taps):
        super().__init__()
        self.width, self.adm = width, adm
        line = torch.tensor(taps, device="cpu") / sum(taps)
        self.filter = torch.outer(line, line)[None, None]

    def layer(self, name, out, *shape, bias=True):
        self[f"{name}.weight"] = torch.randn(out, *shape)
        if bias:
            self[f"{name}.bias"] = torch.randn(out)

    def block(self, name, inp, out, resample=False, attention=False):
        self.layer(f"{name}.norm0", inp)
        self.layer(f"{name}.conv0", out, inp, 3, 3)
        self.layer(f"{name}.affine", out * (2 if self.adm else 1), 4 * self.width)
        self.layer(f"{name}.norm1", out)
        self.layer(f"{name}.conv1", out, out, 3, 3)
        if inp != out or (resample and not self.adm):
            self.layer(f"{name}.skip", out, inp, 1, 1)
        if resample:
            self[f"{name}.conv0.resample_filter"] = self[f"{name}.skip.resample_filter"] = self.filter
        if attention:
            self.layer(f"{name}.norm2", out)
            self.layer(f"{name}.qkv", 3 * out, out, 1, 1)
            self.layer(f"{name}.proj", out, out, 1, 1)


def make_layout(
    size, width, mults, blocks, attention, *, adm=False, residual=False, fourier=False, taps=BOX, labels=0, augment=0
):
    """A state dict of EDM, of random tensors."""
    net, waves = Layout(width, adm, taps), width * (2 if fourier else 1)
    if fourier:
        net["map_noise.freqs"] = torch.randn(width, device="cpu")
    if labels:
        net.layer("map_label", 4 * width if adm else waves, labels, bias=not adm)
    if augment:
        net.layer("map_augment", waves, augment, bias=False)
    net.layer("map_layer0", 4 * width, waves)
    net.layer("map_layer1", 4 * width, 4 * width)
    have = width * mults[0] if adm else width
    net.layer(f"enc.{size}x{size}_conv", have, 3, 3, 3)
    skips, aux = [have], 3
    for level, mult in enumerate(mults):
        n = size >> level
        if level:
            net.block(f"enc.{n}x{n}_down", have, have, resample=True)
            skips.append(have)
            if residual:
                net.layer(f"enc.{n}x{n}_aux_residual", have, aux, 3, 3)
                net[f"enc.{n}x{n}_aux_residual.resample_filter"] = net.filter
                aux = have
        for i in range(blocks):
            net.block(f"enc.{n}x{n}_block{i}", have, int(width * mult), attention=n in attention)
            skips.append(have := int(width * mult))
    for level, mult in reversed(list(enumerate(mults))):
        n = size >> level
        if level == len(mults) - 1:
            net.block(f"dec.{n}x{n}_in0", have, have, attention=True)
            net.block(f"dec.{n}x{n}_in1", have, have)
        else:
            net.block(f"dec.{n}x{n}_up", have, have, resample=True)
        for i in range(blocks + 1):
            attends = n in attention and (adm or i == blocks)
            net.block(f"dec.{n}x{n}_block{i}", have + skips.pop(), int(width * mult), attention=attends)
            have = int(width * mult)
    net.layer("out_norm" if adm else f"dec.{size}x{size}_aux_norm", have)
    net.layer("out_conv" if adm else f"dec.{size}x{size}_aux_conv", 3, have, 3, 3)
    return {PREFIX + name: value for name, value in net.items()}


NCSN = {"residual": True, "fourier": True, "taps": FIR}
PUBLISHED = {  # Karras et al. 2022, table 7, whose last column has the millions of parameters
    "ddpm++": ((32, 128, (2, 2, 2), 4, (16,)), {"augment": 9}, 55.7),
    "ncsn++": ((32, 128, (2, 2, 2), 4, (16,)), {**NCSN, "augment": 9}, None),
    "adm-64": ((64, 192, (1, 2, 3, 4), 3, (32, 16, 8)), {"adm": True, "labels": 1000}, 296),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_every_name_of_a_published_network_has_its_place(preset):
    sizes, options, millions = PUBLISHED[preset]
    with torch.device("meta"):
        stored = make_layout(*sizes, **options)
    count = sum(v.numel() for k, v in stored.items() if not k.endswith(("resample_filter", "freqs")))
    assert millions is None or count / 1e6 == pytest.approx(millions, rel=0.005)
    model = read_edm(dict(stored), Hints())
    assert isinstance(model.backbone, UNet)
    with torch.device("meta"):
        net = model.backbone.denoiser(model.spec)
    assert not mismatched_keys({"net": net}, {f"net.{k}": v for k, v in model.tensors.items()})
    expected = from_dict(UNet, {"preset": preset})
    for name in UNet.presets[preset].keys() - {"dropout", "head_size"}:
        assert getattr(model.backbone, name) == getattr(expected, name), name
    assert model.backbone.time_scale == 1
    norms = sum(v.numel() for k, v in stored.items() if options.get("adm") and ".norm1." in k)  # part of the scales
    unused = stored[f"{PREFIX}map_augment.weight"].numel() if "augment" in options else 0
    null = model.tensors["cond.embed.on_label.null"].numel() if "labels" in options else 0
    assert sum(v.numel() for v in model.tensors.values()) == count - norms - unused + null


TINY = (16, 8, (1, 2), 1, (8,))


def write(folder, stored, name="edm.safetensors"):
    save_file({k: v.clone().contiguous() for k, v in stored.items()}, folder / name)
    return str(folder / name)


def test_a_run_with_and_without_the_prefix(tmp_path, capsys):
    stored = make_layout(*TINY, labels=4, augment=9, **NCSN)
    plain = {k.removeprefix(PREFIX): 0.1 * v for k, v in stored.items() if "resample_filter" not in k}
    assert cli.main(["import", "edm", write(tmp_path, {PREFIX + k: v for k, v in plain.items()}), f"{tmp_path}/a"]) == 0
    out = capsys.readouterr().out
    assert "inputs of augmentation are left out" in out
    assert "null class is a label of zeros" in out
    assert cli.main(["import", "edm", write(tmp_path, plain, "b.safetensors"), f"{tmp_path}/b"]) == 0
    a, b = (load_file(next((tmp_path / name).rglob("nets.safetensors"))) for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    run = load_run(tmp_path / "a", device="cpu")
    assert run.spec == Spec((3, 16, 16), {"label": Label(4)})
    assert run.objective == EDM(sigma_data=0.5)
    assert cli.main(["sample", f"{tmp_path}/a", "--n=2", "--steps=2", "--label=1", "--format=npz",
                     f"--out={tmp_path}/x.npz", "--device=cpu"]) == 0  # fmt: skip


def without(stored, text):
    return {k: v for k, v in stored.items() if text not in k}


@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        (lambda s: without(s, "dec.8x8_in0.conv0.weight"), (), "has no dec.8x8_in0.conv0.weight, which edm has"),
        (lambda s: without(s, "enc.8x8_block0.qkv"), (), "has dec.8x8_block1.norm2.bias, which edm does not have"),
        (lambda s: without(s, "dec.8x8_block1.proj.bias"), (), "has no dec.8x8_block1.proj.bias"),
        (lambda s: without(s, "map_layer1"), (), "has no map_layer1.weight"),
        (lambda s: {**s, "model.more": torch.zeros(1)}, (), "has more, which edm does not have"),
        (lambda s: without(s, "enc."), (), "has no enc.32x32_block0.conv0.weight, or of another size"),
        (lambda s: {**s, "enc.8x8_aux_down.resample_filter": torch.ones(1)}, (), "of an encoder or decoder with skips"),
        (lambda s: {**s, "enc.8x8_up.resample_filter": torch.ones(1, 1, 4, 4)}, (), "which are the filters"),
        (lambda s: {k.replace("8x8", "4x4"): v for k, v in s.items()}, (), "has levels of 16, 4"),
        (lambda s: s, ("--size=32",), "given 32, but the file is of 16"),
        (lambda s: s, ("--head-size=4",), "have one head"),
        (lambda s: dict(make_layout(16, 8, (1, 1.5), 1, (8,))), (), "which are no multiples of 8"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused_in_one_line(change, more, words, tmp_path, capsys):
    file = write(tmp_path, change(make_layout(*TINY)))
    assert cli.main(["import", "edm", file, f"{tmp_path}/run", *more]) == 2
    error = capsys.readouterr().err
    assert words in error, error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


NETWORKS = {
    "ddpm++": (8, {}, "SongUNet", {}),
    "ncsn++": (8, NCSN, "SongUNet", {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual",
                                     "resample_filter": [1, 3, 3, 1]}),
    "adm": (64, {"adm": True}, "DhariwalUNet", {}),
}  # fmt: skip
RECORDED = {  # pixel (0, 7) of the channels of three pictures with five classes
    "ddpm++": [(0.0353918, 0.006324, 0.014979), (-0.0547727, 0.4247904, -0.4390234), (0.08067, 0.7302457, 0.2918119)],
    "ncsn++": [(-0.0114123, 0.0068747, 0.0108961), (-0.572291, 1.1025, -0.18615), (-0.184886, 0.666452, 0.055055)],
    "adm": [(0.0010943, -0.006241, 0.0054032), (0.7934153, 0.0618098, -0.213127), (0.0229942, 0.2795574, -0.1543728)],
}  # fmt: skip
SIGMA, Y = torch.tensor([0.01, 1.0, 40.0]), torch.tensor([0, 4, 2])


def random_network(kind, labels):
    """Weights of a small network, and its input: pictures of the noise levels ``SIGMA``."""
    torch.manual_seed(0)
    width, options, *_ = NETWORKS[kind]
    stored = make_layout(16, width, (1, 2), 2, (8,), labels=labels, augment=9, **options)
    for name, value in stored.items():
        if name.endswith("freqs"):
            value *= 16
        elif "filter" not in name and value.ndim > 1:
            value /= value[0].numel() ** 0.5
        elif "filter" not in name:
            stored[name] = 0.3 * value + (1 if "norm" in name and name.endswith("weight") else 0)
    for part in ("weight", "bias"):  # smaller variances at the first norms, so that what is added to them matters
        stored[f"{PREFIX}enc.16x16_conv.{part}"] *= 0.02
    return stored, SIGMA.view(-1, 1, 1, 1) * torch.randn(3, 3, 16, 16)


def denoise(run, x, cond):
    """The denoised pictures, by the objective's preconditioning."""
    path, precondition = run.objective.path, run.objective.parametrization
    t, x = path.time_of(SIGMA.double()), x.double()
    out = run.nets["net"](*(v.float() for v in precondition.inputs(path, x, t)), cond)
    return precondition.predict(path, x, t, out.double()).x0


def imported(folder, stored):
    assert cli.main(["import", "edm", write(folder, stored), f"{folder}/run"]) == 0
    return load_run(folder / "run", device="cpu")


def error(theirs, ours):
    """The largest difference, in standard deviations of each picture."""
    return float(((ours - theirs).abs().amax((1, 2, 3)) / theirs.std((1, 2, 3))).max())


@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_denoised_pictures_are_those_that_were_recorded(kind, tmp_path):
    """Pixels of the peer's pictures (the next test), where it is not installed."""
    stored, x = random_network(kind, 5)
    ours = denoise(imported(tmp_path, stored), x, {"label": Y})
    for picture, numbers in zip(ours, RECORDED[kind], strict=True):
        expected = torch.tensor(numbers, dtype=torch.float64)
        torch.testing.assert_close(picture[:, 0, 7], expected, rtol=0, atol=5e-5 * float(picture.std()))


@pytest.mark.slow
@pytest.mark.parametrize("labels", [0, 5])
@pytest.mark.parametrize("kind", NETWORKS)
@torch.no_grad()
def test_the_denoiser_is_that_of_physicsnemo(kind, labels, tmp_path):
    """It is in training mode, without dropout: its norms take another variance in evaluation."""
    legacy = pytest.importorskip("physicsnemo.diffusion.preconditioners.legacy")
    stored, x = random_network(kind, labels)
    width, _, name, options = NETWORKS[kind]
    peer = legacy.EDMPrecond(
        16, 3, labels, model_type=name, num_blocks=2, attn_resolutions=[8], augment_dim=9, dropout=0.0,
        model_channels=width, channel_mult=[1, 2], **options,
    ).train()  # fmt: skip
    peer.model.load_state_dict({k.removeprefix(PREFIX): v for k, v in stored.items()})
    run = imported(tmp_path, stored)
    theirs = peer(x, SIGMA, class_labels=F.one_hot(Y, labels) if labels else None)
    ours = denoise(run, x, {"label": Y} if labels else {})
    assert error(theirs, ours) < 1e-5
    if labels:  # no label is the null class
        assert error(peer(x, SIGMA, class_labels=torch.zeros(3, labels)), denoise(run, x, {})) < 1e-5
        assert error(theirs, denoise(run, x, {"label": Y.flip(0)})) > 1e-3
