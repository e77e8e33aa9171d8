"""Backbone: every family x cut x shape x conditions, and the promises that objectives and samplers rely on.

The contract in ``tests/support/backbones.py`` is derived from ``BACKBONES`` and what each family declares.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from genkit.backbones import BACKBONES, MLP, DiT, UNet
from genkit.backbones.blocks import GroupNorm, MapAttention, ResBlock, attend, crop_to, group_norm, num_groups, pad_to
from genkit.backbones.dit import DiTBlock
from genkit.backbones.embed import EMBEDDERS, ScalarEmbed, TimeEmbed, grid_positions, scalar_keys, sinusoid
from genkit.backbones.mlp import MLPBlock
from genkit.core import Image, Spec, Tokens
from tests.support import backbones as contract
from tests.support.backbones import BATCH, KINDS, TINY, build, conditions, eval_pair, has_field, kinds

FAMILIES = [name for name in BACKBONES if name != "diffusers"]  # whose networks have tests/integrations/test_bridges.py
every_family = pytest.mark.parametrize("family", FAMILIES)
every_cut = pytest.mark.parametrize(("family", "cut"), [(f, cut) for f in FAMILIES for cut in BACKBONES[f].cuts])


def test_every_condition_is_tested():
    assert {type(k) for k in KINDS.values()} == set(EMBEDDERS)


# ------------------------------------------------------------------------------------------ the contract of all
@every_cut
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_shapes_and_gradients(family, cut, data):
    contract.check_shapes_and_gradients(family, cut, data)


@every_family
@pytest.mark.parametrize("check", contract.PER_FAMILY, ids=lambda f: f.__name__.removeprefix("check_"))
def test_contract_of_a_family(check, family):
    check(family)


@every_cut
@pytest.mark.parametrize("check", contract.PER_CUT, ids=lambda f: f.__name__.removeprefix("check_"))
def test_contract_of_a_cut(check, family, cut):
    check(family, cut)


@pytest.mark.parametrize(
    ("family", "cut", "name"), [(f, cut, name) for f in FAMILIES for cut in BACKBONES[f].cuts for name in kinds(f)]
)
def test_keep_is_per_sample(family, cut, name):
    contract.check_keep_is_per_sample(family, cut, name)


@pytest.mark.parametrize(
    ("family", "cut"), [(f, cut) for f in FAMILIES if "tokens" in BACKBONES[f].routes for cut in BACKBONES[f].cuts]
)
def test_masks_hide_tokens(family, cut):
    contract.check_masks_hide_tokens(family, cut)


@pytest.mark.parametrize(
    ("family", "cut"), [(f, cut) for f in FAMILIES if has_field(f, "checkpoint") for cut in BACKBONES[f].cuts]
)
def test_checkpointing_gives_the_same_gradients(family, cut, monkeypatch):
    contract.check_checkpointing_gives_the_same_gradients(family, cut, monkeypatch)


@pytest.mark.parametrize("family", [f for f in FAMILIES if has_field(f, "dropout")])
def test_dropout_is_for_training(family):
    contract.check_dropout_is_for_training(family)


@every_cut
def test_blocks_are_modulated(family, cut):
    """The contract looks at the gradients of these."""
    net, _, _ = build(TINY[family], cut, Spec((1, 8, 8)))
    assert any(name.endswith(("emb.bias", "emb_gain.value")) for name, _ in net.named_parameters())


# ---------------------------------------------------------------------------------------------- single families
@pytest.mark.parametrize("family", ["unet", "dit"])
@pytest.mark.parametrize("shape", [(3, 30, 21), (1, 8, 8), (2, 13), (4, 5, 16)])
def test_default_sizes_pad_and_crop(family, shape):
    backbone = {"unet": UNet(width=16), "dit": DiT(width=16, depth=2)}[family]
    _, f, x = build(backbone, "denoiser", Spec(shape))
    y = f(x.requires_grad_(), {})
    assert y.shape == x.shape
    y[..., -1].sum().backward()  # the last column is made from what is there, and from the far side as well
    assert x.grad[..., -1].abs().amin(dim=tuple(range(1, x.ndim - 1))).min() > 0
    assert x.grad[..., 0].abs().amax() > 0


@pytest.mark.parametrize("cut", ["denoiser", "encoder"])
def test_a_transformer_knows_where_its_patches_are(cut):
    _, f, x = build(TINY["dit"], cut, Spec((1, 8, 8)))
    y, rolled = eval_pair(f, x, {}, {})[0], eval_pair(f, x.roll(2, -1), {}, {})[0]
    assert ((rolled if cut == "encoder" else rolled.roll(-2, -1)) - y).abs().amax() > 1e-3


def test_pad_and_crop_are_inverse():
    x = torch.randn(2, 3, 5, 7)
    padded = pad_to(x, (8, 8))
    assert padded.shape == (2, 3, 8, 8)
    assert padded[:, :, 5:].abs().sum() == padded[:, :, :, 7:].abs().sum() == 0
    torch.testing.assert_close(crop_to(padded, (5, 7)), x, rtol=0, atol=0)


@pytest.mark.parametrize("size", [8, 12, 32])
def test_codes_as_maps(size):
    spec = Spec((1, size, size), kinds("unet"))
    for backbone, code in [(TINY["unet"], (4, size // 2, size // 2)), (TINY["dit"], (4, size // 2, size // 2))]:
        _, encode, x = build(backbone, "encoder", spec, code)
        _, decode, z = build(backbone, "decoder", spec, code)
        assert encode(x, conditions(spec)).shape == (BATCH, *code)
        assert decode(z, conditions(spec)).shape == x.shape
    _, encode, x = build(TINY["unet"], "encoder", spec, (4, size, size))
    assert encode(x, {}).shape == (BATCH, 4, size, size)
    odd = Spec((1, 13))
    _, encode, x = build(TINY["unet"], "encoder", odd, (4, 7))
    _, decode, z = build(TINY["unet"], "decoder", odd, (4, 7))
    assert encode(x, {}).shape == z.shape
    assert decode(z, {}).shape == x.shape
    _, encode, x = build(TINY["mlp"], "encoder", odd, (4, 3, 3))
    assert encode(x, {}).shape == (BATCH, 4, 3, 3)


def test_the_default_unet_suits_small_and_larger_images():
    small, large = (UNet().denoiser(Spec((c, s, s))) for c, s in ((1, 8), (3, 32)))
    assert small.layout.sizes == [(8, 8), (4, 4)]
    assert large.layout.sizes == [(32, 32), (16, 16), (8, 8)]
    assert all(0.7e6 < sum(p.numel() for p in net.parameters()) < 3e6 for net in (small, large))
    assert UNet().denoiser(Spec((1, 5))).layout.sizes == [(5,)]
    assert all(min(UNet().denoiser(Spec((1, 4, n))).layout.sizes[-1]) >= 4 for n in (4, 9, 64))


def test_the_mask_belongs_to_the_first_sequence_there():
    spec = Spec((1, 4, 4), {"a": Tokens(3), "b": Tokens(2)})
    net, f, x = build(TINY["unet"], "denoiser", spec)
    a, b, mask = torch.randn(BATCH, 3, 3), torch.randn(BATCH, 2, 2), torch.tensor([[True, False, False]] * BATCH)
    spec.check({"a": a, "b": b, "mask": mask}, BATCH)
    one, two = eval_pair(f, x, {"a": a, "b": b, "mask": mask}, {"a": a[:, :1], "b": b})
    torch.testing.assert_close(one, two)
    one, two = eval_pair(f, x, {"b": b, "mask": mask[:, :2]}, {"b": b[:, :1]})
    torch.testing.assert_close(one, two)
    assert net.cond.names["tokens"] == ["a", "b"]


def test_group_norm_is_group_norm():
    x = torch.randn(3, 24, 5, 4, dtype=torch.double, requires_grad=True)
    scale, shift = (torch.randn(3, 24, dtype=torch.double, requires_grad=True) for _ in range(2))
    weight = torch.randn_like(x)
    plain = F.group_norm(x, num_groups(24))
    expected = plain * (1 + scale[..., None, None]) + shift[..., None, None]
    ours = group_norm(x, 1 + scale, shift)
    torch.testing.assert_close(ours, expected)
    grads = [torch.autograd.grad((y * weight).sum(), (x, scale, shift)) for y in (ours, expected)]
    torch.testing.assert_close(*grads)
    norm = GroupNorm(24).double()
    torch.testing.assert_close(norm(x), plain)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    torch.testing.assert_close(norm(x), F.group_norm(x, num_groups(24), norm.weight, norm.bias))
    assert num_groups(128) == num_groups(512) == 32
    assert all(c % num_groups(c) == 0 and (c < 4 or c // num_groups(c) >= 4) for c in range(1, 200))


def test_residual_block():
    block = ResBlock(2, 8, 16, 5)
    x, emb = torch.randn(2, 8, 3, 4), torch.randn(2, 5)
    torch.testing.assert_close(block(x, emb), block.skip(x))
    same = ResBlock(1, 8, 8, 5)
    torch.testing.assert_close(same(x[..., 0], emb), x[..., 0])
    torch.nn.init.normal_(block.conv2.weight)
    scale, shift = (v[..., None, None] for v in block.emb(emb).chunk(2, 1))
    h = block.conv1(F.silu(F.group_norm(x, 2)))
    h = block.conv2(F.silu((1 + scale) * F.group_norm(h, 4) + shift))
    torch.testing.assert_close(block(x, emb), h + block.skip(x))


def test_blocks_start_as_the_identity():
    h, emb, tokens = torch.randn(2, 9, 8), torch.randn(2, 8), torch.randn(2, 3, 8)
    torch.testing.assert_close(DiTBlock(DiT(width=8), 8)(h, emb, tokens, None), h)
    torch.testing.assert_close(MLPBlock(8, 0.0)(h[:, :1], emb), h[:, :1])
    x = h.transpose(1, 2).reshape(2, 8, 3, 3)
    torch.testing.assert_close(MapAttention(8, 64, 8)(x, tokens, None), x)


def test_time_is_in_thousands():
    embed, label = TimeEmbed(8), torch.tensor([0.0, 0.3, -1.2])
    expected = embed.layer2(F.silu(embed.layer1(sinusoid(1000 * label, 64))))
    torch.testing.assert_close(embed(label), expected)


def test_attention_is_attention():
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    mask = torch.rand(2, 1, 1, 7) < 0.7
    mask[..., 0] = True
    for m in (None, mask):
        torch.testing.assert_close(attend(q, k, v, m), F.scaled_dot_product_attention(q, k, v, m))
    k, v = (torch.randn(2, 3, 1030, 8) for _ in range(2))  # above 1024 positions the fused kernel takes over
    torch.testing.assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_positions():
    p = grid_positions((3, 5), 16)
    assert p.shape == (15, 16)
    torch.testing.assert_close(p.view(3, 5, 16)[2, :, :8], sinusoid(torch.tensor([2.0]), 8).expand(5, 8))
    torch.testing.assert_close(p.view(3, 5, 16)[:, 4, 8:], sinusoid(torch.tensor([4.0]), 8).expand(3, 8))
    angles = torch.tensor([0.7, 0.7 * 10_000**-0.5])
    torch.testing.assert_close(sinusoid(torch.tensor([0.7]), 4)[0], torch.cat([angles.cos(), angles.sin()]))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: UNet(width=0), "width is 0"),
        (lambda: UNet(mults=()), "mults is"),
        (lambda: UNet(mults=(1, -2)), "mults is"),
        (lambda: UNet(dropout=1.0), "dropout is 1.0"),
        (lambda: DiT(width=6), "width is 6.*multiple of 4"),
        (lambda: DiT(patch=0), "patch is 0"),
        (lambda: MLP(depth=0), "depth is 0"),
        (lambda: MLP(dropout=-0.1), "dropout is -0.1"),
        (lambda: DiT(dropout=2.0), "dropout is 2.0"),
        (lambda: UNet().denoiser(Spec((2,))), r"shape \(2,\).*allowed.*try --backbone=mlp"),
        (lambda: DiT().encoder(Spec((2,)), (3,)), r"shape \(2,\).*allowed.*try --backbone=mlp"),
        (lambda: UNet().denoiser(Spec((1, 4, 4, 4))), "allowed"),
        (
            lambda: MLP().denoiser(Spec((2,), {"mine": Image(3)})),
            "'mine' is of kind Image; allowed here: Label, Vector, Tokens, Text, Frames; try",
        ),
        (lambda: MLP().encoder(Spec((2,), {"mine": Image(3)}), (2,)), "'mine' is of kind Image"),
        (lambda: UNet().encoder(Spec((1, 8, 8)), (4, 3, 3)), r"\(3, 3\).*reach 8x8, 4x4, 2x2"),
        (lambda: UNet().decoder(Spec((1, 8, 8)), (4, 3, 3)), r"\(3, 3\).*reach 8x8, 4x4, 2x2"),
        (lambda: DiT().encoder(Spec((1, 8, 8)), (4, 2, 2)), r"\(2, 2\).*makes \(4, 4\); try --backbone.patch=4"),
        (lambda: DiT().decoder(Spec((1, 8)), (4, 3)), r"\(3,\).*makes \(4,\)"),
    ],
)
def test_bad_input_is_a_value_error(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("family", TINY)
def test_a_number_of_zero_is_an_absent_one_and_a_new_one_changes_nothing(family):
    """So a network that gets a second time starts as it was without, and stays so where the two times agree."""
    spec = Spec(contract.shape_of(family, 2, 6, 6), {"number": KINDS["number"]})
    net, f, x = build(TINY[family], "denoiser", spec)
    number = torch.linspace(0.2, 1, BATCH)
    with torch.no_grad():
        torch.testing.assert_close(f(x, {"number": 0 * number}), f(x, {}))
        assert float((f(x, {"number": number}) - f(x, {})).abs().amax()) > 1e-4
        for name in scalar_keys(net):
            if name.endswith("layer2"):
                net.get_parameter(name).zero_()
        torch.testing.assert_close(f(x, {"number": number}), f(x, {}))
    fresh = TINY[family].denoiser(spec)
    assert [float(fresh.get_parameter(k).abs().max()) for k in scalar_keys(fresh) if k.endswith("layer2")] == [0.0]


def test_the_derivative_by_a_number_is_moderate():
    """Its fastest wave turns 8 rad over the path; that of the time label 1000."""
    net = MLP(width=64, depth=1).denoiser(Spec((2,), {"number": KINDS["number"]}))
    embed = net.net.cond.embed["on_number"]
    with torch.no_grad():
        embed.scaled_layer2.normal_()
    value, keep = torch.rand(50), torch.ones(50, dtype=torch.bool)
    slope = torch.func.jvp(lambda v: embed(v, keep), (value,), (torch.ones(50),))[1]
    assert 0.3 < float(slope.square().mean().sqrt()) < 8


@pytest.mark.parametrize("width", [64, 256])
def test_a_step_of_adam_moves_the_embedding_of_a_number_little(width):
    """Adam's first step has the size of the rate in every weight, and the same sign where the gradients agree. Not
    divided, it was 0.13 at a rate of 0.001 and width 256, by which flow maps diverged."""
    embed = ScalarEmbed(KINDS["number"], width)
    value, keep = torch.ones(4), torch.ones(4, dtype=torch.bool)
    optimizer = torch.optim.Adam(embed.parameters(), lr=1e-3)
    embed(value, keep).sum().backward()
    optimizer.step()
    moved = float(embed(value, keep).detach().abs().max())
    assert 0.001 < moved < 0.015


@pytest.mark.parametrize("mask", [False, True])
def test_attention_of_dual_tensors_has_a_gradient(mask):
    """The derivative of attention along a tangent, and its gradient, in any size: by differences, in float64."""
    from torch.autograd import forward_ad as fw

    q, k, v, direction = torch.randn(4, 2, 2, 150, 4, dtype=torch.float64)
    seen = torch.arange(150).expand(2, 1, 1, 150) < 130 if mask else None

    def slope(q):
        with fw.dual_level():
            return fw.unpack_dual(attend(fw.make_dual(q, direction), k, v, seen)).tangent

    h = 1e-5
    plain = (attend(q + h * direction, k, v, seen) - attend(q - h * direction, k, v, seen)) / (2 * h)
    torch.testing.assert_close(slope(q), plain, rtol=1e-6, atol=1e-8)
    probe, weight = torch.randn_like(q), torch.randn_like(q)
    (grad,) = torch.autograd.grad((slope(q.requires_grad_()) * weight).sum(), q)
    with torch.no_grad():
        change = ((slope(q + h * probe) - slope(q - h * probe)) * weight).sum() / (2 * h)
    torch.testing.assert_close((grad * probe).sum(), change, rtol=1e-5, atol=1e-7)
