"""Backbones: every family x cut x shape x conditions, and the promises that objectives and samplers rely on."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch.func import functional_call, jvp

from genkit.backbones import BACKBONES, MLP, DiT, UNet
from genkit.backbones.blocks import GroupNorm, MapAttention, ResBlock, attend, crop_to, group_norm, num_groups, pad_to
from genkit.backbones.dit import DiTBlock
from genkit.backbones.embed import EMBEDDERS, TimeEmbed, grid_positions, sinusoid
from genkit.backbones.mlp import MLPBlock
from genkit.core import Frames, Image, Label, Spec, Text, Tokens, Vector

TINY = {
    "mlp": MLP(width=8, depth=1),
    "unet": UNet(width=8, mults=(1, 2), attention=(6, 8), head_size=8),
    "dit": DiT(width=8, depth=1, head_size=4),
}
RANKS = {"mlp": (0, 1, 2), "unet": (1, 2), "dit": (1, 2)}
KINDS = {
    "label": Label(5),
    "state": Vector((2, 3)),
    "image": Image(2),
    "text": Tokens(6),
    "words": Text(9),
    "frames": Frames((2, 3, 9, 5)),
}
GLOBAL = ("label", "state", "frames")
CUTS = ("denoiser", "encoder", "decoder")
BATCH = 3


def test_the_tables_here_are_complete():
    assert set(TINY) == set(RANKS) == set(BACKBONES) - {"diffusers"}  # whose tests are in test_bridges.py
    assert all(type(TINY[name]) is BACKBONES[name] for name in TINY)
    assert {type(k) for k in KINDS.values()} == set(EMBEDDERS)


def kinds(family: str, *names: str):
    """Those of the conditions that the family takes, all of them if none is named."""
    return {n: KINDS[n] for n in names or KINDS if family != "mlp" or n in GLOBAL}


def conditions(spec: Spec, batch: int = BATCH, length: int = 4):
    """Some conditions for this spec, tokens with a mask that shows the first two."""
    made = {
        "label": lambda: torch.arange(batch) % 5,
        "state": lambda: torch.randn(batch, 2, 3),
        "image": lambda: torch.randn(batch, 2, *spec.shape[1:]),
        "text": lambda: torch.randn(batch, length, 6),
        "frames": lambda: torch.randint(256, (batch, 2, 3, 9, 5), dtype=torch.uint8),
        "words": lambda: torch.randint(1, 257, (batch, 7)) * (torch.arange(7) < 4 + torch.arange(batch)[:, None] % 3),
    }
    cond = {name: made[name]() for name in spec.cond}
    if "text" in cond:
        cond["mask"] = torch.arange(length).expand(batch, -1) < 2
    return cond


def build(backbone, cut: str, spec: Spec, code: tuple[int, ...] = (5,)):
    """``(net, f, x)``: the cut with every parameter perturbed (much starts at zero), ``f(x, cond)``, and an input."""
    torch.manual_seed(0)
    net = {
        "denoiser": lambda: backbone.denoiser(spec),
        "encoder": lambda: backbone.encoder(spec, code),
        "decoder": lambda: backbone.decoder(spec, code),
    }[cut]()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn_like(p)
    label = torch.linspace(-1, 1, BATCH)
    f = (lambda x, c: net(x, label[: len(x)], c)) if cut == "denoiser" else net
    return net, f, torch.randn(BATCH, *(code if cut == "decoder" else spec.shape))


every = pytest.mark.parametrize(("family", "cut"), [(f, c) for f in TINY for c in CUTS])


# ------------------------------------------------------------------------------------------ shapes and gradients
@every
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_shapes_and_gradients(family, cut, data):
    rank = data.draw(st.sampled_from(RANKS[family]))
    shape = (data.draw(st.integers(1, 4)), *data.draw(st.tuples(*[st.integers(2, 13)] * rank)))
    names = data.draw(st.sets(st.sampled_from(sorted(kinds(family)))))
    spec = Spec(shape, {n: KINDS[n] for n in sorted(names)})
    net, f, x = build(TINY[family], cut, spec)
    cond = conditions(spec)
    spec.check(cond, BATCH)

    y = f(x.requires_grad_(), {**cond, "keep": torch.tensor([True, False, True])} if cond else {})
    assert y.shape == (BATCH, *((5,) if cut == "encoder" else shape))
    assert y.isfinite().all()
    (y * torch.randn_like(y)).sum().backward()
    assert x.grad.abs().amax() > 0
    dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().amax() > 0]
    assert not dead
    modulations = [p.grad for n, p in net.named_parameters() if n.endswith("emb.bias")]
    assert modulations
    assert all((g != 0).all() for g in modulations)  # each scale, shift and gate has its own place in the block

    net.zero_grad(set_to_none=True)  # without "keep" the nulls have no say, but DDP still needs them in the graph
    f(x, cond).sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


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
    assert small.plan.sizes == [(8, 8), (4, 4)]
    assert large.plan.sizes == [(32, 32), (16, 16), (8, 8)]
    assert all(0.7e6 < sum(p.numel() for p in net.parameters()) < 3e6 for net in (small, large))
    assert UNet().denoiser(Spec((1, 5))).plan.sizes == [(5,)]
    assert all(min(UNet().denoiser(Spec((1, 4, n))).plan.sizes[-1]) >= 4 for n in (4, 9, 64))


@pytest.mark.parametrize("family", TINY)
def test_denoisers_start_at_zero_and_autoencoders_do_not(family):
    spec = Spec((2, 8, 8), kinds(family))
    net = TINY[family].denoiser(spec)
    assert net(torch.randn(2, 2, 8, 8), torch.rand(2)).abs().amax() == 0
    assert TINY[family].encoder(spec, (3,))(torch.randn(2, 2, 8, 8)).abs().amin() > 0
    assert TINY[family].decoder(spec, (3,))(torch.randn(2, 3)).abs().amin() > 0


# ------------------------------------------------------------------------------------------------------ conditions
def eval_pair(f, x, a, b):
    with torch.no_grad():
        return f(x, a), f(x, b)


@every
@pytest.mark.parametrize("name", sorted(KINDS))
def test_keep_is_per_sample(family, cut, name):
    if name not in kinds(family):
        pytest.skip(f"{family} does not take {name}")
    spec = Spec((2, 6, 5), kinds(family, name))
    _, f, x = build(TINY[family], cut, spec)
    cond = conditions(spec)
    keep = torch.tensor([False, True, False])
    with torch.no_grad():
        some, all_, none = f(x, {**cond, "keep": keep}), f(x, cond), f(x, {})
    torch.testing.assert_close(some[keep], all_[keep])
    torch.testing.assert_close(some[~keep], none[~keep])
    assert ((all_ - none).flatten(1).abs().amax(1) > 1e-4).all()


@every
def test_each_condition_has_its_own_null(family, cut):
    spec = Spec((1, 6, 6), kinds(family))
    _, f, x = build(TINY[family], cut, spec)
    cond = conditions(spec)
    without = [{k: v for k, v in cond.items() if k != n and (n != "text" or k != "mask")} for n in spec.cond]
    with torch.no_grad():
        answers = [f(x, c) for c in (cond, {}, *without)]
    for i, a in enumerate(answers):
        for b in answers[:i]:
            assert (a - b).abs().amax() > 1e-4


@pytest.mark.parametrize("family", ["unet", "dit"])
@pytest.mark.parametrize("cut", CUTS)
def test_masks_hide_tokens(family, cut):
    spec = Spec((1, 6, 6), kinds(family, "text"))
    net, f, x = build(TINY[family], cut, spec)
    cond = conditions(spec)
    mask = cond["mask"]
    noise = torch.randn_like(cond["text"])
    with torch.no_grad():
        y = f(x, cond)
        hidden = f(x, {**cond, "text": cond["text"] + noise * ~mask[..., None]})
        shown = f(x, {**cond, "text": cond["text"] + noise * mask[..., None]})
        cut_off = f(x, {"text": cond["text"][:, :2]})
        longer = f(x, {"text": F.pad(cond["text"], (0, 0, 0, 5), value=9.0), "mask": F.pad(mask, (0, 5))})
        blind = f(x, {**cond, "mask": torch.zeros_like(mask)})
        null = f(x, {})
    for same in (hidden, cut_off, longer):
        torch.testing.assert_close(y, same)
    assert ((y - shown).flatten(1).abs().amax(1) > 1e-4).all()
    torch.testing.assert_close(blind, null)
    with torch.no_grad():
        dict(net.named_parameters())[find(net, "on_text.null")].add_(5)
        torch.testing.assert_close(f(x, cond), y)  # who sees tokens does not see their null
        assert ((f(x, {}) - null).flatten(1).abs().amax(1) > 1e-4).all()


def find(net, end: str) -> str:
    (name,) = (n for n, _ in net.named_parameters() if n.endswith(end))
    return name


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


@every
def test_samples_do_not_see_each_other(family, cut):
    spec = Spec((2, 6, 5), kinds(family))
    _, f, x = build(TINY[family], cut, spec)
    cond = {**conditions(spec), "keep": torch.tensor([True, False, True])}
    other = x.clone()
    other[1:] += 1
    changed = {k: torch.cat([v[:1], v[1:].flip(0)]) for k, v in cond.items()}
    with torch.no_grad():
        y = f(x, cond)
        torch.testing.assert_close(f(other, changed)[0], y[0])
        torch.testing.assert_close(f(x[:1], {k: v[:1] for k, v in cond.items()})[0], y[0])


@pytest.mark.parametrize("family", TINY)
def test_the_time_label_matters(family):
    net, _, x = build(TINY[family], "denoiser", Spec((1, 4, 4)))
    with torch.no_grad():
        answers = [net(x, torch.full((BATCH,), t)) for t in (-1.5, 0.0, 0.001, 0.5, 1.0, 1.5)]
    assert all((a - b).abs().amax() > 1e-5 for i, a in enumerate(answers) for b in answers[:i])


# ------------------------------------------------------------------------------------------------ training machinery
@every
def test_checkpointing_gives_the_same_gradients(family, cut, monkeypatch):
    spec = Spec((1, 6, 6), kinds(family))
    plain, f, x = build(TINY[family], cut, spec)
    cond = conditions(spec)
    again, g, _ = build(replace(TINY[family], checkpoint=True), cut, spec)
    calls = []
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(k) or original(*a, **k))
    f(x, cond).square().sum().backward()
    assert not calls
    g(x, cond).square().sum().backward()
    assert calls
    for (name, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


@every
def test_bf16_autocast(family, cut):
    spec = Spec((1, 6, 6), kinds(family))
    net, f, x = build(TINY[family], cut, spec)
    cond = conditions(spec)
    with torch.autocast("cpu", torch.bfloat16):
        y = f(x, cond)
        y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    exact = f(x, cond)
    assert (y.float() - exact).norm() < 0.05 * exact.norm()


@every
def test_second_derivatives(family, cut):
    """A gradient penalty (R1) needs the first; mean flows and exact divergences the second."""
    spec = Spec((1, 4, 4), kinds(family))
    net, f, x = build(TINY[family], cut, spec)
    cond = conditions(spec)
    (g,) = torch.autograd.grad(f(x.requires_grad_(), cond).sum(), x, create_graph=True)
    g.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().amax() > 0 for p in net.parameters())
    net, x = net.double(), x.detach().double()
    cond = {k: v.double() if v.is_floating_point() else v for k, v in cond.items()}
    v, h = torch.randn_like(x), 1e-5
    _, slope = jvp(lambda x: f(x, cond), (x,), (v,))
    with torch.no_grad():
        torch.testing.assert_close(slope, (f(x + h * v, cond) - f(x - h * v, cond)) / (2 * h), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", TINY)
def test_dropout_is_for_training(family):
    spec = Spec((1, 6, 6))
    net, f, x = build(replace(TINY[family], dropout=0.5), "denoiser", spec)
    assert not torch.equal(*eval_pair(f, x, {}, {}))
    net.eval()
    torch.testing.assert_close(*eval_pair(f, x, {}, {}), rtol=0, atol=0)
    net, f, x = build(TINY[family], "denoiser", spec)
    assert torch.equal(*eval_pair(f, x, {}, {}))
    assert not any(isinstance(m, torch.nn.Dropout) for m in net.modules())


@pytest.mark.parametrize("family", TINY)
def test_copies_and_state_dicts(family):
    spec = Spec((1, 5, 6), kinds(family))
    net, f, x = build(TINY[family], "denoiser", spec)
    cond, label = conditions(spec), torch.linspace(-1, 1, BATCH)
    twin = TINY[family].denoiser(spec)
    assert len({id(p) for p in net.parameters()}) == len(net.state_dict())  # nothing shared, no buffers: safetensors
    twin.load_state_dict(net.state_dict())
    for other in (twin, copy.deepcopy(net)):
        torch.testing.assert_close(other(x, label, cond), f(x, cond), rtol=0, atol=0)
    torch.testing.assert_close(functional_call(twin, net.state_dict(), (x, label, cond)), f(x, cond), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------ the pieces
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


# ------------------------------------------------------------------------------------------------------- bad input
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
            "'mine' is of kind Image; allowed here: Label, Vector, Frames; try",
        ),
        (lambda: MLP().encoder(Spec((2,), {"mine": Tokens(3)}), (2,)), "'mine' is of kind Tokens"),
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
def test_yaml_is_checked_by_pydantic(family):
    adapter = TypeAdapter(BACKBONES[family])
    assert adapter.validate_python({"width": 12}) == BACKBONES[family](width=12)
    for bad in ({"width": 0}, {"width": "wide"}, {"dropout": 1.5}):
        with pytest.raises(ValidationError):
            adapter.validate_python(bad)
