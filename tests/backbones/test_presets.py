"""Presets: parameter counts of the papers, and which of preset, file and flag wins."""

import pytest
import torch

from genkit.backbones import BACKBONES, EDM2, DiT, UNet
from genkit.backbones.blocks import ResBlock
from genkit.config import ConfigError, dump, from_dict, override, parse
from genkit.config.blocks import get_fields
from genkit.core import Label, Spec
from genkit.training.settings import TrainSettings

LATENT, PIXELS, CLASSES = (4, 32, 32), (3, 256, 256), {"label": Label(1000)}
PUBLISHED = [  # millions of parameters
    # Peebles & Xie 2023, table 4
    *[("dit", f"S/{p}", LATENT, 33) for p in (2, 4, 8)],
    *[("dit", f"B/{p}", LATENT, m) for p, m in ((2, 130), (4, 130), (8, 131))],
    *[("dit", f"L/{p}", LATENT, m) for p, m in ((2, 458), (4, 458), (8, 459))],
    *[("dit", f"XL/{p}", LATENT, m) for p, m in ((2, 675), (4, 675), (8, 676))],
    # Li & He 2025, table 6
    ("dit", "JiT-B/16", PIXELS, 131),
    ("dit", "JiT-L/16", PIXELS, 459),
    ("dit", "JiT-H/16", PIXELS, 953),
    ("dit", "JiT-B/32", (3, 512, 512), 133),
    # Ho et al. 2020, appendix B
    ("unet", "ddpm-cifar10", (3, 32, 32), 35.7),
    # Karras et al. 2022, table 7
    ("unet", "ddpm++", (3, 32, 32), 55.7),
    # Dhariwal & Nichol 2021, table 4 and appendix I
    ("unet", "adm-64", (3, 64, 64), 296),
    ("unet", "adm-256", PIXELS, 554),
    # Karras et al. 2024, table 2
    *[("edm2", n, (4, 64, 64), m) for n, m in
      {"XS": 125, "S": 280, "M": 498, "L": 777, "XL": 1119, "XXL": 1523}.items()],
]  # fmt: skip
UNCONDITIONAL = {"ddpm-cifar10", "ddpm++"}


def count_parameters(family, preset, shape):
    spec = Spec(shape, {} if preset in UNCONDITIONAL else CLASSES)
    with torch.device("meta"):
        net = from_dict(BACKBONES[family], {"preset": preset}).denoiser(spec)
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(("family", "preset", "shape", "millions"), PUBLISHED, ids=lambda v: str(v))
def test_parameters_are_those_of_the_paper(family, preset, shape, millions):
    assert count_parameters(family, preset, shape) / 1e6 == pytest.approx(millions, rel=0.005)


def test_ddpm_has_every_parameter():
    """35,746,307 is the count of the published weights (google/ddpm-cifar10-32)."""
    assert count_parameters("unet", "ddpm-cifar10", (3, 32, 32)) == 35_746_307


@pytest.mark.parametrize("family", [name for name, cls in BACKBONES.items() if cls.presets])
def test_presets_hold_settings_of_their_family(family):
    cls = BACKBONES[family]
    names = {frozenset(settings) for settings in cls.presets.values()}
    assert all(name <= get_fields(cls).keys() - {"preset"} for name in names)
    for name, settings in cls.presets.items():
        made = from_dict(cls, {"preset": name})
        assert made == from_dict(cls, dump(made)), name  # what a run's config.yaml holds
        assert {k: getattr(made, k) for k in settings} == dict(settings)
        assert made.notes(Spec((3, 64, 64)))[0] == f"preset   {name}"


def test_given_settings_win():
    made = from_dict(DiT, {"preset": "L/4", "depth": 3})
    assert (made.width, made.patch, made.depth) == (1024, 4, 3)
    assert made.notes(Spec((4, 8, 8))) == ("preset   L/4, but with depth 3",)
    again = override(made, preset="B/2")
    assert (again.width, again.patch, again.depth) == (768, 2, 12)
    assert override(made, depth=5).width == 1024


SMALL = {"width": 8, "mults": [1], "num_blocks": 1, "attention": [], "head_size": 8, "dropout": 0.0}


@pytest.mark.parametrize(
    ("preset", "scale"), [("ncsn++", 0.5**0.5), ("ddpm++", 0.5**0.5), ("ddpm-cifar10", 1), ("adm-64", 1)]
)
def test_residual_sums_are_rescaled_where_the_paper_does(preset, scale):
    """By 1 / sqrt(2) in the networks of Song et al. 2021, appendix H; the branch of a new block is zero."""
    cfg = from_dict(UNet, {"preset": preset, **SMALL, **({"stem": 8} if scale < 1 else {})})
    net = cfg.denoiser(Spec((3, 8, 8))).eval()
    block = next(m for m in net.modules() if isinstance(m, ResBlock) and m.skip is None and m.resample is None)
    x = torch.randn(2, 8, 8, 8)
    emb = torch.randn(2, next(m.in_features for m in block.modules() if isinstance(m, torch.nn.Linear)))
    torch.testing.assert_close(block(x, emb), x * scale)


def backbone(*argv):
    return parse(TrainSettings, argv).backbone


def test_a_preset_on_the_command_line(tmp_path):
    assert backbone("--backbone=dit", "--backbone.preset", "XL/2").depth == 28
    assert backbone("--backbone.depth", "2", "--backbone=dit", "--backbone.preset", "XL/2").depth == 2
    # a switch that is given wins although it equals the default of the family
    assert not backbone("--backbone.preset", "ddpm++").scale_shift
    assert backbone("--backbone.preset", "ddpm++", "--backbone.scale-shift").scale_shift
    # a flag takes precedence over a file, and a preset of the file over defaults
    path = tmp_path / "c.yaml"
    path.write_text("backbone: {name: dit, preset: B/2, depth: 3, width: 64, dropout: 0.1}")
    assert backbone("--config", str(path)).depth == 3
    chosen = backbone("--config", str(path), "--backbone.preset", "S/8")
    assert (chosen.depth, chosen.width, chosen.patch, chosen.dropout) == (12, 384, 8, 0.1)
    assert backbone("--config", str(path), "--backbone.preset", "S/8", "--backbone.width", "8").width == 8


def test_unknown_presets_are_refused():
    with pytest.raises(ConfigError, match=r"--backbone.preset: given 'XL/3'; allowed: S/2, .*did you mean XL/"):
        backbone("--backbone=dit", "--backbone.preset", "XL/3")
    with pytest.raises(ConfigError, match=r"backbone.preset: given 'XL/2'; allowed: ddpm-cifar10"):
        from_dict(TrainSettings, {"backbone": {"preset": "XL/2"}})
    with pytest.raises(ConfigError, match=r"preset: given \[1\]"):
        from_dict(DiT, {"preset": [1]})
    with pytest.raises(ValueError, match=r"preset is 'huge'; allowed: XS, S"):
        EDM2(preset="huge")
    with pytest.raises(ValueError, match=r"all settings are the defaults; try genkit.config.from_dict\(UNet"):
        UNet(preset="adm-64")


@pytest.mark.parametrize(("preset", "heads"), [("S/2", 6), ("B/4", 12), ("L/2", 16), ("XL/8", 16), ("JiT-G/16", 16)])
def test_heads_are_those_of_the_paper(preset, heads):
    cfg = from_dict(DiT, {"preset": preset})
    assert cfg.width // cfg.head_size == heads
