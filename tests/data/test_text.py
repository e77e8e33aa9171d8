"""Text as a condition: its bytes, the encoder of bytes, and dropout of each condition."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F

from genkit.backbones.blocks import TokenPool
from genkit.backbones.dit import DiT
from genkit.backbones.embed import TextEmbed
from genkit.backbones.mlp import MLP
from genkit.backbones.unet import UNet
from genkit.core import (
    Batch,
    Draw,
    Image,
    Label,
    Spec,
    Text,
    Tokens,
    Vector,
    spec_from_dict,
    spec_to_dict,
)
from genkit.data import text
from genkit.data.demonstrations.four_ways import FourWays
from genkit.diffusion.guidance import classifier_free
from genkit.objectives import OBJECTIVES

TINY = {"unet": UNet(width=8, mults=(1, 2), attention=(6, 8), head_size=8), "dit": DiT(width=8, depth=1, head_size=4)}


# --------------------------------------------------------------------------------------------------------- bytes
@pytest.mark.parametrize("prompt", ["", "seven", "sieben, groß", "七", "\x00 and 🙂"])
def test_bytes_are_the_text_and_come_back(prompt):
    row = text.to_bytes([prompt, "x" * 40], 64)[0]
    assert row.dtype == torch.uint8
    assert text.to_texts(row[None]) == [prompt]
    assert row[: len(prompt.encode())].tolist() == [b + 1 for b in prompt.encode()]
    assert row[len(prompt.encode()) :].eq(0).all()


def test_a_text_that_is_too_long_is_refused_with_both_lengths():
    with pytest.raises(ValueError, match=r"given 8 bytes \('größer'\); this model reads at most 7"):
        text.to_bytes(["größer"], 7)
    assert text.to_bytes(["größer"], 8).shape == (1, 8)


def test_specs_of_text_survive_the_file():
    spec = Spec((1, 4, 4), {"a": Text(7, ("x", "y")), "b": Tokens(3, "hub/it", "0f", 77, ("z",))})
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec
    old = {"shape": [1, 4, 4], "cond": {"text": {"kind": "tokens", "dim": 3}}}
    assert spec_from_dict(old) == Spec((1, 4, 4), {"text": Tokens(3)})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2, 5), r"given \(2, 5\) of torch.float32; needs \[2, length\] integers"),
        (torch.zeros(3, 5, dtype=torch.long), r"needs \[2, length\] integers"),
        (torch.zeros(2, 9, dtype=torch.uint8), "given 9 bytes of text; this model reads 8"),
        (torch.full((2, 4), 257), r"given 257\.\.257; allowed 0\.\.256"),
    ],
)
def test_bytes_of_another_shape_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        Spec((1, 4, 4), {"text": Text(8)}).check({"text": value}, 2)


# ------------------------------------------------------------------------------------------ the encoder of bytes
def denoiser(family: str, spec: Spec):
    torch.manual_seed(0)
    net = TINY[family].denoiser(spec).eval()
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn_like(p)
    x, t = torch.randn(3, *spec.shape), torch.linspace(0.1, 0.9, 3)

    def f(**cond):
        with torch.no_grad():
            return net(x, t, cond)

    return net, f


@pytest.mark.parametrize("family", TINY)
def test_padding_is_ignored_and_the_text_is_not(family):
    net, f = denoiser(family, Spec((1, 6, 6), {"text": Text(32)}))
    encoded = text.to_bytes(["seven", "a nine", "two"], 32)
    y = f(text=encoded)
    torch.testing.assert_close(f(text=F.pad(encoded, (0, 20))), y)
    torch.testing.assert_close(f(text=encoded.long()), y)
    other = f(text=text.to_bytes(["sevem", "a nina", "twe"], 32))
    assert ((other - y).flatten(1).abs().amax(1) > 1e-4).all()
    swapped = f(text=text.to_bytes(["evens", "nine a", "owt"], 32))  # the order of letters and words matters
    assert ((swapped - y).flatten(1).abs().amax(1) > 1e-4).all()
    with torch.no_grad():
        dict(net.named_parameters())[next(n for n, _ in net.named_parameters() if n.endswith("on_text.null"))].add_(5)
    torch.testing.assert_close(f(text=encoded), y)  # samples with text do not see its null


@pytest.mark.parametrize("family", TINY)
def test_the_empty_text_is_null_also_beside_others(family):
    _, f = denoiser(family, Spec((1, 6, 6), {"text": Text(32)}))
    some, null = f(text=text.to_bytes(["seven", "", "two"], 32)), f()
    torch.testing.assert_close(some[1], null[1])
    assert ((some - null).flatten(1).abs().amax(1) > 1e-4).tolist() == [True, False, True]
    torch.testing.assert_close(f(text=text.to_bytes([""] * 3, 32)), null)


def test_a_word_means_the_same_at_any_position():
    """If nothing else is within reach of the convolutions, the features of a word do not depend on its position."""
    torch.manual_seed(0)
    embed = TextEmbed(Text(99), 16)
    for block in embed.blocks:
        torch.nn.init.zeros_(block.attention.out.weight)  # attention reaches everything
    early, late = text.to_bytes(["-" * 20 + "seven" + "-" * 30, "-" * 30 + "seven" + "-" * 20], 99)[:, None]
    a, b = (embed(v, torch.ones(1, dtype=torch.bool))[0, 1:] for v in (early, late))
    torch.testing.assert_close(a[20:25], b[30:35])


def test_the_mask_belongs_to_frozen_tokens_and_not_to_bytes():
    spec = Spec((1, 6, 6), {"encoded": Text(9), "tokens": Tokens(4)})
    _, f = denoiser("unet", spec)
    encoded, tokens, mask = text.to_bytes(["a", "bb", "ccc"], 9), torch.randn(3, 5, 4), torch.arange(5).expand(3, 5) < 2
    spec.check({"encoded": encoded, "tokens": tokens, "mask": mask}, 3)
    torch.testing.assert_close(f(encoded=encoded, tokens=tokens, mask=mask), f(encoded=encoded, tokens=tokens[:, :2]))


def test_a_network_of_vectors_reads_text_as_the_average_of_learned_queries():
    torch.manual_seed(0)
    pool, tokens, mask = TokenPool(4), torch.randn(2, 5, 4), torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 0, 0]]).bool()
    alone = pool.layers(tokens[1, 2].repeat(pool.HEADS))  # of one token, each query's average is that token
    torch.testing.assert_close(pool(tokens, mask)[1], alone)
    torch.testing.assert_close(pool(tokens, mask)[:1], pool(tokens[:1, [3, 1, 0]], mask[:1, [3, 1, 0]]))  # a set

    net = MLP(width=8, depth=1).denoiser(Spec((2,), {"text": Text(8)}))
    for p in net.parameters():
        torch.nn.init.normal_(p)
    x, t, value = torch.randn(1, 2).expand(4, 2), torch.full((4,), 0.5), text.to_bytes(["a b", "b a", "a b", ""], 8)
    y, dropped = net(x, t, {"text": value}), {"text": value, "keep": torch.zeros(4, dtype=torch.bool)}
    assert torch.equal(y[0], y[2])
    assert (y[0] - y[1]).abs().max() > 1e-2
    torch.testing.assert_close(net(x, t, dropped), net(x, t))  # without text
    torch.testing.assert_close(y[3], net(x, t)[3])  # an empty text is none


def test_equal_texts_of_a_batch_are_read_once_and_count_as_often_as_they_occur():
    torch.manual_seed(0)
    embed, value = TextEmbed(Text(8), 3), text.to_bytes(["to", "be", "to", "or", "to"], 8)
    read, rows = embed.read, []
    embed.read = lambda texts: rows.append(len(texts)) or read(texts)  # type: ignore[method-assign]  # counts
    tokens = embed(value, torch.ones(5, dtype=torch.bool))[:, 1:]
    assert rows == [3]
    torch.testing.assert_close(tokens, read(value))
    (gradient,) = torch.autograd.grad(tokens.square().sum(), embed.table.weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(read(value).square().sum(), embed.table.weight)[0])


# ----------------------------------------------------------------------------------- dropping one or all of them
ALL = {"label": Label(5), "obs": Vector((3,)), "image": Image(1), "tokens": Tokens(4), "text": Text(8)}


def everything(batch: int = 3):
    return {
        "label": torch.arange(batch) % 5,
        "obs": torch.randn(batch, 3),
        "image": torch.randn(batch, 1, 6, 6),
        "tokens": torch.randn(batch, 4, 4),
        "text": text.to_bytes(["one", "three", "zero"][:batch], 8),
    }


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("name", ALL)
def test_each_condition_is_dropped_alone(family, name):
    spec = Spec((1, 6, 6), ALL)
    _, f = denoiser(family, spec)
    cond, stay = everything(), torch.tensor([False, True, False])
    spec.check({**cond, f"keep.{name}": stay}, 3)
    some = f(**cond, **{f"keep.{name}": stay})
    full, without = f(**cond), f(**{k: v for k, v in cond.items() if k != name})
    torch.testing.assert_close(some[stay], full[stay])
    torch.testing.assert_close(some[~stay], without[~stay])
    assert ((full - without).flatten(1).abs().amax(1) > 1e-4).all()
    both = f(**cond, **{f"keep.{name}": stay, "keep": torch.tensor([True, False, False])})
    torch.testing.assert_close(both[1:], f()[1:])  # samples that keep nothing do not keep this one
    torch.testing.assert_close(both[0], without[0])


def test_each_is_dropped_with_its_probability_independently():
    n = 20_000
    cond = {"label": torch.zeros(n, dtype=torch.long), "text": torch.ones(n, 2, dtype=torch.uint8)}
    batch = Batch(torch.zeros(n, 1), cond, draw=Draw((3,), 0, n))
    dropped = batch.drop(0.1, 0.3)
    keep, label, words = (dropped[k] for k in ("keep", "keep.label", "keep.text"))
    error = 4 * math.sqrt(0.25 / n)
    assert abs(float((~keep).float().mean()) - 0.1) < error
    assert abs(float((~label).float().mean()) - 0.3) < error
    assert abs(float((~label & ~words).float().mean()) - 0.09) < error  # independent
    assert abs(float((~label & ~keep).float().mean()) - 0.03) < error
    again = Batch(torch.zeros(n, 1), cond, draw=Draw((3,), 0, n))
    assert torch.equal(again.drop(0.1)["keep"], keep)  # dropping all together draws the same numbers as before
    assert set(again.drop(0.1)) == {"label", "text", "keep"}
    assert again.drop(0) == cond
    parts = [Batch(torch.zeros(8, 1), {k: v[:8] for k, v in cond.items()}, draw=Draw((3,), i, i + 8)) for i in (0, 8)]
    assert torch.equal(torch.cat([p.drop(0.1, 0.3)["keep.text"] for p in parts]), words[:16])


@pytest.mark.parametrize("name", ["flow", "ddpm", "edm", "regression"])
def test_the_objectives_drop_each(name):
    tokens = {}
    net = {"net": lambda x, t, c: tokens.update(c) or x}
    cond = {"label": torch.zeros(64, dtype=torch.long), "obs": torch.zeros(64, 3)}
    objective = OBJECTIVES[name](cond_dropout=0.2, cond_dropout_each=0.4)
    objective.loss(objective.phases[0].name, net, Batch(torch.randn(64, 1, 4, 4), cond, draw=Draw((0,), 0, 64)))
    assert {"keep", "keep.label", "keep.obs"} <= set(tokens)
    assert not torch.equal(tokens["keep.label"], tokens["keep.obs"])
    tokens.clear()
    objective = OBJECTIVES[name](cond_dropout=0.2)
    objective.loss(objective.phases[0].name, net, Batch(torch.randn(64, 1, 4, 4), cond, draw=Draw((0,), 0, 64)))
    assert set(tokens) == {"label", "obs", "keep"}


def test_guidance_keeps_dropped_conditions_dropped():
    from genkit.diffusion.parametrization import Velocity
    from genkit.diffusion.paths import Linear

    net, _ = denoiser("unet", Spec((1, 6, 6), ALL))
    denoise = OBJECTIVES["flow"]().denoiser(net)
    assert isinstance(denoise.path, Linear)
    assert isinstance(OBJECTIVES["flow"]().parametrization, Velocity)
    x, t, cond = torch.randn(3, 1, 6, 6), torch.full((3,), 0.5), everything()
    alone = {**cond, "keep.label": torch.zeros(3, dtype=torch.bool)}
    absent = {k: v for k, v in cond.items() if k != "label"}
    with torch.no_grad():
        for passes in ("together", "apart"):
            a, b = (classifier_free(2.0, passes=passes)(denoise)(x, t, c).x0 for c in (alone, absent))
            torch.testing.assert_close(a, b)


def test_keep_masks_of_unknown_conditions_are_refused():
    spec = Spec((1, 4, 4), {"label": Label(5)})
    with pytest.raises(ValueError, match=r"cond\['keep.label'\]: given \(2, 2\) of torch.bool; needs \[2\] bool"):
        spec.check({"keep.label": torch.ones(2, 2, dtype=torch.bool)}, 2)
    with pytest.raises(ValueError, match=r"condition 'keep\.text' is unknown here"):
        spec.check({"keep.text": torch.ones(2, dtype=torch.bool)}, 2)


def test_wordings_that_are_held_out_are_read_in_the_test_split_only():
    source = FourWays(n=4, conditions=("text",), held_out_wordings=9, seed=3)
    shown = [set(text.to_texts(source.load(split).captions.table.values["text"])) for split in ("train", "test")]
    asked = [{w for texts in source.task_texts(split) for w in texts} for split in ("train", "test")]
    assert shown == asked
    assert [len(s) for s in shown] == [4 * 27, 4 * 9]
    assert not shown[0] & shown[1]
    every = FourWays().task_texts("train")
    assert every == FourWays().task_texts("test")
    assert shown[0] | shown[1] == {w for texts in every for w in texts}
    for way, texts in enumerate(source.task_texts("test")):
        assert set(texts) <= set(every[way])
