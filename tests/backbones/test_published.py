"""Options that published networks need: against diffusers on copied weights, and against closed forms."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from genkit.backbones import BACKBONES, DiT, UNet
from genkit.backbones.blocks import BOX, FIR, Attention, MapAttention, Resample, ResBlock, rms_norm, rotate
from genkit.backbones.dit import DiTBlock, Trunk
from genkit.backbones.embed import Conditioner, TimeEmbed, grid_angles, sinusoid
from genkit.backbones.unet import Layout, ResidualInput
from genkit.core import Label, Spec
from tests.support import backbones as contract
from tests.support.backbones import TINY, build, eval_pair

UNETS = {
    "ddpm": UNet(width=8, mults=(1, 2), attention=(6, 8), head_size=8, scale_shift=False, waves=4),
    "adm": UNet(width=8, mults=(1, 2), attention=(6, 8), head_size=8, resample="block"),
    "ncsn": UNet(width=8, stem=4, mults=(1, 2), attention=(6, 8), head_size=8, resample="fir", rescale=True,
                 residual_input=True, residual_border=True, up_attention="last", scale_shift=False,
                 waves=4, wave_rates=(1.0, 3.0, 0.5, 7.0), early_conditions=True, norm_eps=1e-6),
}  # fmt: skip
DITS = {
    "modern": DiT(width=8, depth=2, head_size=4, norm="rms", qk_norm=True, mlp="swiglu", rope=True),
    "jit": DiT(
        width=8, depth=2, head_size=4, bottleneck=3, class_tokens=2, class_tokens_start=1, registers=3, rope=True
    ),
}


@pytest.mark.parametrize(("family", "variant"), [("unet", v) for v in UNETS] + [("dit", v) for v in DITS])
def test_variants_keep_the_contract(family, variant, monkeypatch):
    monkeypatch.setitem(TINY, family, {**UNETS, **DITS}[variant])
    contract.check_all(family, monkeypatch)


@pytest.mark.parametrize(("family", "variant"), [("unet", v) for v in UNETS] + [("dit", v) for v in DITS])
def test_every_parameter_of_a_variant_matters(family, variant):
    for cut in BACKBONES[family].cuts:
        net, f, x = build({**UNETS, **DITS}[variant], cut, Spec((2, 8, 8), {"label": Label(5)}))
        f(x, {"label": torch.arange(3), "keep": torch.tensor([True, False, True])}).square().sum().backward()
        assert not [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().amax() > 0]


# ------------------------------------------------------------------------------------------------ the U-Net's peer
def copy_linear(ours, theirs):
    ours.weight.copy_(theirs.weight.reshape(ours.weight.shape))
    ours.bias.copy_(theirs.bias)


def copy_block(ours: ResBlock, theirs):
    """Weights of a ResnetBlock2D; its second norm has no weights of its own here if it is modulated."""
    names = {"norm1": "norm1", "conv1": "conv1", "emb": "time_emb_proj", "norm2": "norm2", "conv2": "conv2",
             "skip": "conv_shortcut"}  # fmt: skip
    for a, b in ((getattr(ours, k), getattr(theirs, v)) for k, v in names.items()):
        if a is not None:
            copy_linear(a, b)
        elif b is theirs.norm2:
            assert bool((b.weight == 1).all() and (b.bias == 0).all())
        else:
            assert b is None


def copy_attention(ours: MapAttention, theirs):
    copy_linear(ours.norm, theirs.group_norm)
    for name in ("weight", "bias"):
        qkv = [getattr(layer, name) for layer in (theirs.to_q, theirs.to_k, theirs.to_v)]
        getattr(ours.self_attention.kv, name).copy_(torch.cat(qkv))
    copy_linear(ours.self_attention.out, theirs.to_out[0])


def peer(cfg: UNet, resample: str, **options):
    """diffusers' UNet2DModel of the same layout, with random weights everywhere."""
    from diffusers import UNet2DModel

    plain = {"conv": ("DownBlock2D", "UpBlock2D"), "resnet": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")}[
        resample
    ]
    net = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=cfg.num_blocks, norm_num_groups=4,
        block_out_channels=tuple(cfg.width * m for m in cfg.mults), attention_head_dim=cfg.head_size,
        down_block_types=(plain[0], "AttnDownBlock2D"), downsample_padding=1, norm_eps=1e-5,
        up_block_types=("AttnUpBlock2D", plain[1]), downsample_type=resample, upsample_type=resample,
        **options,
    )  # fmt: skip
    torch.manual_seed(1)
    for name, p in net.named_parameters():
        if not (options and "norm2" in name):
            torch.nn.init.normal_(p, std=0.3)
    return net.eval()


def copy_weights(ours, theirs):
    """The weights of a UNet2DModel, block by block in the order of the forward pass."""
    blocks = [*theirs.down_blocks, theirs.mid_block, *theirs.up_blocks]
    resnets, attentions, convs = [], [], []
    for block in blocks:
        resnets += block.resnets
        for resampler in (*(getattr(block, "downsamplers", None) or ()), *(getattr(block, "upsamplers", None) or ())):
            (resnets if hasattr(resampler, "conv1") else convs).append(getattr(resampler, "conv", resampler))
        attentions += [a for a in getattr(block, "attentions", None) or () if a is not None]
    found = list(ours.modules())
    for mine, other, copy in (
        ([m for m in found if isinstance(m, ResBlock)], resnets, copy_block),
        ([m for m in found if isinstance(m, MapAttention)], attentions, copy_attention),
        ([m.conv for m in found if type(m).__name__ in ("Downsample", "Upsample")], convs, copy_linear),
    ):
        assert len(mine) == len(other)
        for a, b in zip(mine, other, strict=True):
            copy(a, b)
    for a, b in (
        (ours.down.first, theirs.conv_in),
        (ours.up.norm, theirs.conv_norm_out),
        (ours.up.last, theirs.conv_out),
    ):
        copy_linear(a, b)
    # the time embeddings differ in their sinusoids: both become one constant
    for layer in (ours.cond.start.layer2, theirs.time_embedding.linear_2):
        layer.weight.zero_()
        layer.bias.copy_(torch.linspace(-1, 1, len(layer.bias)))


@pytest.mark.parametrize(
    ("cfg", "resample", "options"),
    [
        (UNet(scale_shift=False), "conv", {}),
        (UNet(resample="block"), "resnet", {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 4}),
    ],
    ids=["ddpm", "adm"],
)
@torch.no_grad()
def test_unets_agree_with_diffusers(cfg, resample, options):
    pytest.importorskip("diffusers")
    cfg = replace(cfg, width=16, mults=(1, 2), num_blocks=2, attention=(8,), head_size=8)
    theirs, ours = peer(cfg, resample, **options), cfg.denoiser(Spec((3, 16, 16)))
    # groups: 4 channels each here, 4 groups there
    for m in theirs.modules():
        if isinstance(m, torch.nn.GroupNorm):
            m.num_groups = max(m.num_channels // 4, 1)
    copy_weights(ours, theirs)
    x = torch.randn(2, 3, 16, 16)
    y, expected = ours(x, torch.rand(2)), theirs(x, torch.tensor([3, 7])).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("taps", [BOX, FIR])
@pytest.mark.parametrize("up", [False, True])
def test_filters_agree_with_diffusers(taps, up):
    pytest.importorskip("diffusers")
    from diffusers.models.downsampling import downsample_2d
    from diffusers.models.upsampling import upsample_2d

    x = torch.randn(2, 3, 8, 12)
    expected = (upsample_2d if up else downsample_2d)(x, torch.tensor(taps, dtype=torch.float))
    torch.testing.assert_close(Resample(2, taps, up)(x), expected)


@pytest.mark.parametrize("taps", [BOX, FIR])
def test_filters_of_signals_are_those_of_pictures(taps):
    x = torch.randn(2, 3, 8)
    for up in (False, True):
        flat = Resample(2, taps, up)(x[:, :, None].expand(-1, -1, 8, -1))[:, :, 2]
        torch.testing.assert_close(Resample(1, taps, up)(x), flat)


def test_the_residual_input_knows_what_lies_outside_its_border():
    """With the border a picture is filtered as a part of a larger one that is zero elsewhere."""
    torch.manual_seed(0)
    cfg = UNet(width=8, resample="fir", residual_input=True)
    x = torch.randn(2, 3, 8, 8)
    for border in (True, False):
        layer = ResidualInput(Layout(replace(cfg, residual_border=border), Spec((3, 8, 8))), 3, 5)
        large = layer(F.pad(x, (4, 4, 4, 4)))[..., 2:-2, 2:-2]
        assert torch.allclose(layer(x), large, atol=1e-5) == border


def test_given_rates_of_a_time_embedding():
    """Those that it has itself change nothing."""
    torch.manual_seed(0)
    net, label = TimeEmbed(8, 5, 7.0), torch.tensor([0.0, 0.3, -1.0])
    given = TimeEmbed(8, 5, 7.0, tuple(10_000 ** (-i / 5) for i in range(5)))
    given.load_state_dict(net.state_dict())
    torch.testing.assert_close(given(label), net(label))
    other = TimeEmbed(8, 5, 7.0, (1.0, 2.0, 3.0, 4.0, 5.0))
    other.load_state_dict(net.state_dict())
    assert (other(label) - net(label)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="wave_rates has 2 numbers; needs 32"):
        UNet(wave_rates=(1.0, 2.0))


def test_early_conditions_are_added_to_the_sinusoids():
    spec = Spec((2,), {"label": Label(3)})
    embed = Conditioner(spec, 8, waves=4, early=True)
    time, label, y = embed.start, torch.tensor([0.1, 0.7]), torch.tensor([2, 0])
    waves = sinusoid(1000 * label, 8)
    for cond, given in (({"label": y}, embed.embed["on_label"].table(y)), ({}, embed.embed["on_label"].null)):
        expected = time.layer2(F.silu(time.layer1(waves + given)))
        torch.testing.assert_close(embed(torch.zeros(2, 2), (), label, cond).emb, expected)


def test_rescaled_blocks_keep_the_variance():
    torch.manual_seed(0)
    block = ResBlock(2, 32, 32, 4, scale_shift=False, rescale=True, resample=Resample(2, BOX, up=True))
    assert block.skip is not None
    x, emb = torch.randn(4, 32, 6, 6), torch.randn(4, 4)
    y = block(x, emb)  # the branch starts at zero
    torch.testing.assert_close(y, block.skip(F.interpolate(x, scale_factor=2.0)) / 2**0.5)


def test_attention_on_the_way_up():
    def count(cfg):
        return sum(isinstance(m, MapAttention) for m in cfg.denoiser(Spec((1, 8, 8))).up.modules())

    every = UNet(width=8, mults=(1, 2), num_blocks=2, attention=(8,))
    assert (count(every), count(replace(every, up_attention="last"))) == (3, 1)


# ------------------------------------------------------------------------------------------------------- the DiT
def test_rms_norm_is_torchs():
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(rms_norm(x), F.rms_norm(x, (8,), eps=1e-6))


def test_rotation_depends_on_differences_of_positions_only():
    """<R(p) q, R(p') k> is a function of p - p' on each axis, and at equal positions <q, k>."""
    torch.manual_seed(0)
    grid = (4, 5)
    angles = grid_angles(grid, 4)
    q, k = torch.randn(8), torch.randn(8)
    scores = rotate(q.expand(1, 1, 20, 8), angles)[0, 0] @ rotate(k.expand(1, 1, 20, 8), angles)[0, 0].T
    scores = scores.view(*grid, *grid)
    torch.testing.assert_close(scores[0, 0, 0, 0], q @ k)
    torch.testing.assert_close(scores[1, 2, 2, 4], scores[0, 0, 1, 2])
    torch.testing.assert_close(scores[3, 1, 1, 3], scores[2, 2, 0, 4])
    assert (scores[0, 0, 1, 2] - scores[0, 0, 2, 1]).abs() > 1e-3
    # complex form of eq. 34: the pair (q_i, q_{i+4}) as one number, turned by the angle
    turned = torch.complex(q[:4], q[4:]) * torch.polar(torch.ones(20, 4), angles)
    torch.testing.assert_close(rotate(q.expand(1, 1, 20, 8), angles)[0, 0], torch.cat([turned.real, turned.imag], 1))


def test_normalised_queries_and_keys_ignore_their_scale():
    torch.manual_seed(0)
    layer = Attention(16, 8, qk_norm=True)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        y = layer(x)
        layer.kv.bias.zero_()
        before = layer(x)
        layer.kv.weight[:32] *= 7  # queries and keys
        torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-4)
        assert y.shape == x.shape
        layer.scales[0] *= 3
        assert (layer(x) - before).abs().amax() > 1e-3


def test_swiglu():
    block = DiTBlock(DiT(width=12, mlp="swiglu"), 0)
    assert block.layer1.out_features == 2 * 32
    assert block.layer2.in_features == 32
    torch.nn.init.ones_(block.emb.bias)
    with torch.no_grad():
        for p in block.attention.parameters():
            p.zero_()
        h = torch.randn(2, 3, 12)
        a, b = block.layer1(2 * F.layer_norm(h, (12,)) + 1).chunk(2, -1)
        torch.testing.assert_close(block(h, torch.zeros(2, 12), None, None), h + block.layer2(F.silu(a) * b))


def test_class_tokens_join_late_and_carry_the_class():
    """Without their modulation, the class reaches the patches through attention only."""
    torch.manual_seed(0)
    cfg = DiT(width=8, depth=2, head_size=4, class_tokens=2, class_tokens_start=1)
    _, f, x = build(cfg, "denoiser", Spec((1, 4, 4), {"label": Label(5)}))
    net = _
    assert [None if t is None else t.shape[1] for t in further_counts(net.trunk, x)] == [None, 2]
    for block in net.trunk.blocks:
        torch.nn.init.zeros_(block.emb.weight)
    torch.nn.init.zeros_(net.trunk.emb_last.weight)
    a, b = eval_pair(f, x, {"label": torch.tensor([0, 1, 2])}, {"label": torch.tensor([3, 1, 4])})
    assert (a - b)[[0, 2]].abs().amax() > 1e-5
    torch.testing.assert_close(a[1], b[1])


def further_counts(trunk: Trunk, x):
    c = trunk.conditions(x, torch.zeros(len(x)), {})
    return [trunk.further_tokens(i, c) for i in range(len(trunk.blocks))]


def test_wrong_settings_of_a_dit_are_refused():
    with pytest.raises(ValueError, match=r"class_tokens_start is 6; allowed 0 to 5, as depth is 6"):
        DiT(class_tokens=4, class_tokens_start=6)
    with pytest.raises(ValueError, match=r"a head has 6 features; needs a multiple of 4"):
        DiT(width=12, head_size=6, rope=True)
