"""The backbone contract: checks that every network of every family must pass, as far as its declared cuts, routes and
axes go.

Each ``check_*`` takes a family's name in ``BACKBONES``, and most take one of its cuts. ``tests/backbones`` runs them on
the registry and ``tests/recipes`` on a family that is added to it.
"""

import copy
from dataclasses import fields, replace

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch.func import functional_call, jvp

from genkit.backbones import BACKBONES, EDM2, MLP, DiT, UNet
from genkit.backbones.embed import EMBEDDERS
from genkit.core import Frames, Image, Label, Scalar, Spec, Text, Tokens, Vector

TINY = {
    "mlp": MLP(width=8, depth=1),
    "unet": UNet(width=8, mults=(1, 2), attention=(6, 8), head_size=8),
    "dit": DiT(width=8, depth=1, head_size=4),
    "edm2": EDM2(width=8, mults=(1, 2), attention=(6, 8), head_size=8),
}
"""Small settings, to be fast; families that are not named here are tested with their defaults."""
KINDS = {
    "label": Label(5),
    "state": Vector((2, 3)),
    "image": Image(2),
    "text": Tokens(6),
    "words": Text(9),
    "frames": Frames((2, 3, 9, 5)),
    "number": Scalar(),
}
BATCH = 3


def small(family):
    return TINY[family] if family in TINY else BACKBONES[family]()


def has_field(family, name):
    return name in {f.name for f in fields(BACKBONES[family])}


def kinds(family, *names):
    """The conditions that the family takes: those named, or all."""
    return {n: KINDS[n] for n in names or KINDS if EMBEDDERS[type(KINDS[n])].route in BACKBONES[family].routes}


def shape_of(family, *size):
    """A sample's shape for this family: ``size`` is channels, height and width, the last axes left out if need be."""
    return size[: 1 + max(a for a in BACKBONES[family].axes if a < len(size))]


def conditions(spec: Spec, batch: int = BATCH, length: int = 4):
    """Some conditions for this spec, tokens with a mask that shows the first two."""
    made = {
        "label": lambda: torch.arange(batch) % 5,
        "state": lambda: torch.randn(batch, 2, 3),
        "image": lambda: torch.randn(batch, 2, *spec.shape[1:]),
        "text": lambda: torch.randn(batch, length, 6),
        "frames": lambda: torch.randint(256, (batch, 2, 3, 9, 5), dtype=torch.uint8),
        "number": lambda: torch.linspace(0.2, 1, batch),
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


def eval_pair(f, x, a, b):
    with torch.no_grad():
        return f(x, a), f(x, b)


def find(net, end: str) -> str:
    (name,) = (n for n, _ in net.named_parameters() if n.endswith(end))
    return name


# ---------------------------------------------------------------------------------------------------- the checks
def check_shapes_and_gradients(family, cut, data):
    """Any shape and any set of conditions; ``data`` is hypothesis's."""
    axes = data.draw(st.sampled_from(BACKBONES[family].axes))
    shape = (data.draw(st.integers(1, 4)), *data.draw(st.tuples(*[st.integers(2, 13)] * axes)))
    names = data.draw(st.sets(st.sampled_from(sorted(kinds(family)))))
    spec = Spec(shape, {n: KINDS[n] for n in sorted(names)})
    net, f, x = build(small(family), cut, spec)
    cond = conditions(spec)
    spec.check(cond, BATCH)

    y = f(x.requires_grad_(), {**cond, "keep": torch.tensor([True, False, True])} if cond else {})
    assert y.shape == (BATCH, *((5,) if cut == "encoder" else shape))
    assert y.isfinite().all()
    (y * torch.randn_like(y)).sum().backward()
    assert x.grad.abs().amax() > 0
    dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().amax() > 0]
    assert not dead
    # each scale, shift and gate has its own place in the block
    modulations = [p.grad for n, p in net.named_parameters() if n.endswith("emb.bias")]
    assert all((g != 0).all() for g in modulations)

    net.zero_grad(set_to_none=True)  # without "keep" the nulls have no say, but DDP still needs them in the graph
    f(x, cond).sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


def check_undeclared_cuts_are_refused(family):
    """A cut that the family does not make, and a condition that it does not take, are a one-line ``ValueError``."""
    spec, backbone = Spec(shape_of(family, 2, 8, 8)), small(family)
    for cut, make in {"encoder": backbone.encoder, "decoder": backbone.decoder}.items():
        if cut not in backbone.cuts:
            with pytest.raises(ValueError, match=f"has no {cut}"):
                make(spec, (3,))
    for name, kind in KINDS.items():
        if EMBEDDERS[type(kind)].route not in backbone.routes:
            with pytest.raises(ValueError, match=f"condition '{name}' is of kind"):
                backbone.denoiser(replace(spec, cond={name: kind}))


def check_start(family):
    """Denoisers start at zero, encoders and decoders do not."""
    shape = shape_of(family, 2, 8, 8)
    spec, backbone = Spec(shape, kinds(family)), small(family)
    assert backbone.denoiser(spec)(torch.randn(2, *shape), torch.rand(2)).abs().amax() == 0
    if "encoder" in backbone.cuts:
        assert backbone.encoder(spec, (3,))(torch.randn(2, *shape)).abs().amin() > 0
    if "decoder" in backbone.cuts:
        assert backbone.decoder(spec, (3,))(torch.randn(2, 3)).abs().amin() > 0


def check_keep_is_per_sample(family, cut, name):
    spec = Spec(shape_of(family, 2, 6, 5), kinds(family, name))
    _, f, x = build(small(family), cut, spec)
    cond = conditions(spec)
    keep = torch.tensor([False, True, False])
    with torch.no_grad():
        some, all_, none = f(x, {**cond, "keep": keep}), f(x, cond), f(x, {})
    if isinstance(KINDS[name], Scalar):  # it is never dropped
        torch.testing.assert_close(some, all_)
        return
    torch.testing.assert_close(some[keep], all_[keep])
    torch.testing.assert_close(some[~keep], none[~keep])
    assert ((all_ - none).flatten(1).abs().amax(1) > 1e-4).all()


def check_each_condition_has_its_own_null(family, cut):
    spec = Spec(shape_of(family, 1, 6, 6), kinds(family))
    _, f, x = build(small(family), cut, spec)
    cond = conditions(spec)
    without = [{k: v for k, v in cond.items() if k != n and (n != "text" or k != "mask")} for n in spec.cond]
    with torch.no_grad():
        answers = [f(x, c) for c in (cond, {}, *without)]
    for i, a in enumerate(answers):
        for b in answers[:i]:
            assert (a - b).abs().amax() > 1e-4


def check_masks_hide_tokens(family, cut):
    spec = Spec(shape_of(family, 1, 6, 6), kinds(family, "text"))
    net, f, x = build(small(family), cut, spec)
    cond = conditions(spec)
    mask = cond["mask"]
    noise = torch.randn_like(cond["text"])
    with torch.no_grad():
        y = f(x, cond)
        hidden = f(x, {**cond, "text": cond["text"] + noise * ~mask[..., None]})
        shown = f(x, {**cond, "text": cond["text"] + noise * mask[..., None]})
        cut_off = f(x, {"text": cond["text"][:, :2]})
        padded = torch.nn.functional.pad(cond["text"], (0, 0, 0, 5), value=9.0)
        longer = f(x, {"text": padded, "mask": torch.nn.functional.pad(mask, (0, 5))})
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


def check_samples_do_not_see_each_other(family, cut):
    spec = Spec(shape_of(family, 2, 6, 5), kinds(family))
    _, f, x = build(small(family), cut, spec)
    cond = {**conditions(spec), "keep": torch.tensor([True, False, True])}
    other = x.clone()
    other[1:] += 1
    changed = {k: torch.cat([v[:1], v[1:].flip(0)]) for k, v in cond.items()}
    with torch.no_grad():
        y = f(x, cond)
        torch.testing.assert_close(f(other, changed)[0], y[0])
        torch.testing.assert_close(f(x[:1], {k: v[:1] for k, v in cond.items()})[0], y[0])


def check_the_time_label_matters(family):
    net, _, x = build(small(family), "denoiser", Spec(shape_of(family, 1, 4, 4)))
    with torch.no_grad():
        answers = [net(x, torch.full((BATCH,), t)) for t in (-1.5, 0.0, 0.001, 0.5, 1.0, 1.5)]
    assert all((a - b).abs().amax() > 1e-5 for i, a in enumerate(answers) for b in answers[:i])


def check_checkpointing_gives_the_same_gradients(family, cut, monkeypatch):
    """For families with a field ``checkpoint``."""
    spec = Spec(shape_of(family, 1, 6, 6), kinds(family))
    plain, f, x = build(small(family), cut, spec)
    cond = conditions(spec)
    again, g, _ = build(replace(small(family), checkpoint=True), cut, spec)
    calls = []
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(k) or original(*a, **k))
    f(x, cond).square().sum().backward()
    assert not calls
    g(x, cond).square().sum().backward()
    assert calls
    for (name, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def check_bf16_autocast(family, cut):
    spec = Spec(shape_of(family, 1, 6, 6), kinds(family))
    net, f, x = build(small(family), cut, spec)
    cond = conditions(spec)
    with torch.autocast("cpu", torch.bfloat16):
        y = f(x, cond)
        y.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    exact = f(x, cond)
    assert (y.float() - exact).norm() < 0.05 * exact.norm()


def check_second_derivatives(family, cut):
    """A gradient penalty (R1) needs the first; mean flows and exact divergences the second."""
    spec = Spec(shape_of(family, 1, 4, 4), kinds(family))
    net, f, x = build(small(family), cut, spec)
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


def check_dropout_is_for_training(family):
    """For families with a field ``dropout``."""
    spec = Spec(shape_of(family, 1, 6, 6))
    net, f, x = build(replace(small(family), dropout=0.5), "denoiser", spec)
    assert not torch.equal(*eval_pair(f, x, {}, {}))
    net.eval()
    torch.testing.assert_close(*eval_pair(f, x, {}, {}), rtol=0, atol=0)
    net, f, x = build(small(family), "denoiser", spec)
    assert torch.equal(*eval_pair(f, x, {}, {}))
    assert not any(isinstance(m, torch.nn.Dropout) for m in net.modules())


def check_copies_and_state_dicts(family):
    spec = Spec(shape_of(family, 1, 5, 6), kinds(family))
    net, f, x = build(small(family), "denoiser", spec)
    cond, label = conditions(spec), torch.linspace(-1, 1, BATCH)
    twin = small(family).denoiser(spec)
    assert len({id(p) for p in net.parameters()}) == len(net.state_dict())  # nothing shared, no buffers: safetensors
    twin.load_state_dict(net.state_dict())
    for other in (twin, copy.deepcopy(net)):
        torch.testing.assert_close(other(x, label, cond), f(x, cond), rtol=0, atol=0)
    torch.testing.assert_close(functional_call(twin, net.state_dict(), (x, label, cond)), f(x, cond), rtol=0, atol=0)


def check_fields_are_validated(family):
    """YAML is checked by pydantic: a wrong type or a value out of range is refused."""
    adapter = TypeAdapter(BACKBONES[family])
    assert adapter.validate_python({}) == BACKBONES[family]()
    wrong = {"width": [0, "wide"], "depth": [0, "deep"], "dropout": [1.5, "some"], "checkpoint": ["perhaps"]}
    for name, values in wrong.items():
        for value in values if has_field(family, name) else ():
            with pytest.raises(ValidationError):
                adapter.validate_python({name: value})


PER_CUT = (check_each_condition_has_its_own_null, check_samples_do_not_see_each_other, check_bf16_autocast,
           check_second_derivatives)  # fmt: skip
PER_FAMILY = (check_undeclared_cuts_are_refused, check_start, check_the_time_label_matters,
              check_copies_and_state_dicts, check_fields_are_validated)  # fmt: skip


def check_all(family, monkeypatch):
    """The whole contract, but for :func:`check_shapes_and_gradients`, which needs hypothesis."""
    for check in PER_FAMILY:
        check(family)
    if has_field(family, "dropout"):
        check_dropout_is_for_training(family)
    for cut in BACKBONES[family].cuts:
        for check in PER_CUT:
            check(family, cut)
        for name in kinds(family):
            check_keep_is_per_sample(family, cut, name)
        if "tokens" in BACKBONES[family].routes:
            check_masks_hide_tokens(family, cut)
        if has_field(family, "checkpoint"):
            check_checkpointing_gives_the_same_gradients(family, cut, monkeypatch)
