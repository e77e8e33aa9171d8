"""Words as conditions: bytes and frozen encoders, captions of data, dropout of each condition, prompts."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image as pil

from genkit.backbones.dit import DiT
from genkit.backbones.embed import TextEmbed
from genkit.backbones.mlp import MLP
from genkit.backbones.unet import UNet
from genkit.cli import main as cli
from genkit.core import (
    Batch,
    Draw,
    Image,
    Label,
    Spec,
    Text,
    Tokens,
    Vector,
    pictures,
    spec_from_dict,
    spec_to_dict,
)
from genkit.data import DATA, Stream, text
from genkit.diffusion.guidance import classifier_free
from genkit.objectives import OBJECTIVES
from genkit.training import run as runs

WORDINGS = ("a handwritten {label}", "the digit {label}", "{label}")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TINY = {"unet": UNet(width=8, mults=(1, 2), attention=(6, 8), head_size=8), "dit": DiT(width=8, depth=1, head_size=4)}


# ---------------------------------------------------------------------------------------------------------- bytes
@pytest.mark.parametrize("said", ["", "seven", "sieben, groß", "七", "\x00 and 🙂"])
def test_bytes_say_what_was_said(said):
    row = text.to_bytes([said, "x" * 40], 64)[0]
    assert row.dtype == torch.uint8
    assert text.to_texts(row[None]) == [said]
    assert row[: len(said.encode())].tolist() == [b + 1 for b in said.encode()]
    assert row[len(said.encode()) :].eq(0).all()


def test_a_text_that_is_too_long_is_refused_with_both_lengths():
    with pytest.raises(ValueError, match=r"given 8 bytes \('größer'\); this model reads 7 at most"):
        text.to_bytes(["größer"], 7)
    assert text.to_bytes(["größer"], 8).shape == (1, 8)


def test_specs_of_words_survive_the_file_and_those_of_old_files_are_read():
    spec = Spec((1, 4, 4), {"a": Text(7, ("x", "y")), "b": Tokens(3, "hub/it", "0f", 77, ("z",))})
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec
    old = {"shape": [1, 4, 4], "cond": {"text": {"kind": "tokens", "dim": 3}}}
    assert spec_from_dict(old) == Spec((1, 4, 4), {"text": Tokens(3)})


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.zeros(2, 5), r"given \(2, 5\) of torch.float32; needs \[2, length\] integers"),
        (torch.zeros(3, 5, dtype=torch.long), r"needs \[2, length\] integers"),
        (torch.zeros(2, 9, dtype=torch.uint8), "given 9 bytes of text; this model reads 8"),
        (torch.full((2, 4), 257), r"given 257\.\.257; allowed 0\.\.256"),
    ],
)
def test_bytes_of_another_shape_are_refused(value, says):
    with pytest.raises(ValueError, match=says):
        Spec((1, 4, 4), {"text": Text(8)}).check({"text": value}, 2)


# -------------------------------------------------------------------------------------------- the encoder of bytes
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
def test_padding_is_never_seen_and_what_is_said_is(family):
    net, f = denoiser(family, Spec((1, 6, 6), {"text": Text(32)}))
    said = text.to_bytes(["seven", "a nine", "two"], 32)
    y = f(text=said)
    torch.testing.assert_close(f(text=F.pad(said, (0, 20))), y)
    torch.testing.assert_close(f(text=said.long()), y)
    other = f(text=text.to_bytes(["sevem", "a nina", "twe"], 32))
    assert ((other - y).flatten(1).abs().amax(1) > 1e-4).all()
    swapped = f(text=text.to_bytes(["evens", "nine a", "owt"], 32))  # the order of letters and words says something
    assert ((swapped - y).flatten(1).abs().amax(1) > 1e-4).all()
    with torch.no_grad():
        dict(net.named_parameters())[next(n for n, _ in net.named_parameters() if n.endswith("on_text.null"))].add_(5)
    torch.testing.assert_close(f(text=said), y)  # who reads words does not see their null


@pytest.mark.parametrize("family", TINY)
def test_the_empty_text_is_null_also_beside_others(family):
    _, f = denoiser(family, Spec((1, 6, 6), {"text": Text(32)}))
    some, null = f(text=text.to_bytes(["seven", "", "two"], 32)), f()
    torch.testing.assert_close(some[1], null[1])
    assert ((some - null).flatten(1).abs().amax(1) > 1e-4).tolist() == [True, False, True]
    torch.testing.assert_close(f(text=text.to_bytes([""] * 3, 32)), null)


def test_a_word_means_the_same_wherever_it_stands():
    """Where nothing else is in reach of its convolutions, no position is left in the features of its letters."""
    torch.manual_seed(0)
    embed = TextEmbed(Text(99), 16)
    for block in embed.blocks:
        torch.nn.init.zeros_(block.attention.out.weight)  # attention sees it all
    early, late = text.to_bytes(["-" * 20 + "seven" + "-" * 30, "-" * 30 + "seven" + "-" * 20], 99)[:, None]
    a, b = (embed(v, torch.ones(1, dtype=torch.bool))[0, 1:] for v in (early, late))
    torch.testing.assert_close(a[20:25], b[30:35])


def test_the_mask_belongs_to_frozen_tokens_and_not_to_bytes():
    spec = Spec((1, 6, 6), {"said": Text(9), "seen": Tokens(4)})
    _, f = denoiser("unet", spec)
    said, seen, mask = text.to_bytes(["a", "bb", "ccc"], 9), torch.randn(3, 5, 4), torch.arange(5).expand(3, 5) < 2
    spec.check({"said": said, "seen": seen, "mask": mask}, 3)
    torch.testing.assert_close(f(said=said, seen=seen, mask=mask), f(said=said, seen=seen[:, :2]))


def test_vectors_have_no_use_for_words():
    with pytest.raises(ValueError, match="condition 'text' is of kind Text; allowed here: Label, Vector"):
        MLP().denoiser(Spec((2,), {"text": Text(8)}))


# ------------------------------------------------------------------------------------- dropping one or all of them
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
    torch.testing.assert_close(both[1:], f()[1:])  # who keeps nothing does not keep this one
    torch.testing.assert_close(both[0], without[0])


def test_each_is_dropped_as_often_as_asked_and_the_others_are_not_asked():
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
    assert torch.equal(again.drop(0.1)["keep"], keep)  # what one asks of all alone draws what it always did
    assert set(again.drop(0.1)) == {"label", "text", "keep"}
    assert again.drop(0) == cond
    parts = [Batch(torch.zeros(8, 1), {k: v[:8] for k, v in cond.items()}, draw=Draw((3,), i, i + 8)) for i in (0, 8)]
    assert torch.equal(torch.cat([p.drop(0.1, 0.3)["keep.text"] for p in parts]), words[:16])


@pytest.mark.parametrize("name", ["flow", "ddpm", "edm", "regression"])
def test_the_objectives_drop_each(name):
    seen = {}
    net = {"net": lambda x, t, c: seen.update(c) or x}
    cond = {"label": torch.zeros(64, dtype=torch.long), "obs": torch.zeros(64, 3)}
    objective = OBJECTIVES[name](drop=0.2, drop_each=0.4)
    objective.loss(objective.phases[0].name, net, Batch(torch.randn(64, 1, 4, 4), cond, draw=Draw((0,), 0, 64)))
    assert {"keep", "keep.label", "keep.obs"} <= set(seen)
    assert not torch.equal(seen["keep.label"], seen["keep.obs"])
    seen.clear()
    objective = OBJECTIVES[name](drop=0.2)
    objective.loss(objective.phases[0].name, net, Batch(torch.randn(64, 1, 4, 4), cond, draw=Draw((0,), 0, 64)))
    assert set(seen) == {"label", "obs", "keep"}


def test_guidance_leaves_dropped_what_was_dropped():
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


def test_what_says_nothing_of_who_sees_is_refused():
    spec = Spec((1, 4, 4), {"label": Label(5)})
    with pytest.raises(ValueError, match=r"cond\['keep.label'\]: given \(2, 2\) of torch.bool; needs \[2\] bool"):
        spec.check({"keep.label": torch.ones(2, 2, dtype=torch.bool)}, 2)
    with pytest.raises(ValueError, match=r"condition 'keep\.text' is unknown here"):
        spec.check({"keep.text": torch.ones(2, dtype=torch.bool)}, 2)


# ------------------------------------------------------------------------------------------------ captions of data
def batch_of(data, n: int, start: int = 0, key: int = 0):
    return data.batch(torch.arange(start, start + n), Draw((key,), start, start + n))


def test_wordings_say_the_class_of_each_digit():
    data = DATA["digits"](captions=WORDINGS, labels=True).load()
    batch = batch_of(data, 400)
    said = text.to_texts(batch.cond["text"])
    allowed = [{w.replace("{label}", DIGITS[c]) for w in WORDINGS} for c in batch.cond["label"].tolist()]
    assert all(s in a for s, a in zip(said, allowed, strict=True))
    shares = [sum(s in {w.replace("{label}", d) for d in DIGITS} for s in said) / 400 for w in WORDINGS]
    assert all(abs(s - 1 / 3) < 0.1 for s in shares)
    assert text.to_texts(batch_of(data, 400, key=1).cond["text"]) != said  # another wording, another time
    assert data.spec.cond["text"].examples == (
        "a handwritten zero", "the digit one", "two", "a handwritten three", "the digit four", "five",
        "a handwritten six", "the digit seven", "eight", "a handwritten nine",
    )  # fmt: skip


def test_wordings_are_the_same_for_any_ranks_and_micro_batches():
    stream = Stream(DATA["digits"](captions=WORDINGS).load(), 40, seed=3)
    whole = stream(5, 0, 0, 40).cond["text"]
    parts = [stream(5, 0, *rows).cond["text"] for rows in ((0, 7), (7, 20), (20, 40))]
    assert torch.equal(torch.cat(parts), whole)


def test_words_stand_for_classes_unless_both_are_asked_for():
    of = lambda **how: list(DATA["digits"](**how).load().spec.cond)  # noqa: E731
    assert of() == ["label"]
    assert of(captions=WORDINGS) == ["text"]
    assert of(captions=WORDINGS, labels=True) == ["label", "text"]
    assert of(captions=WORDINGS, labels=False) == ["text"]
    assert of(labels=False) == []


def picture_at(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pil.fromarray(np.full((4, 4), value, np.uint8)).save(path)


NAMES = ("a.png", "b.png", "sub/c.png")
SAID = ("an A", "ein größeres B", "C")


def layout(root: Path, kind: str) -> None:
    for i, name in enumerate(NAMES):
        picture_at(root / name, 10 * i)
        if kind == "txt":
            (root / name).with_suffix(".txt").write_text(f"  {SAID[i]}\n", encoding="utf-8")
    rows = list(zip(NAMES, SAID, strict=True))[::-1]
    if kind in ("captions.jsonl", "metadata.jsonl"):
        lines = [json.dumps({"file_name": n, "text": s}) for n, s in rows]
        (root / kind).write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    if kind == "metadata.csv":
        body = "".join(f'{n},"{s}"\r\n' for n, s in rows)
        (root / kind).write_bytes(b"\xef\xbb\xbf" + f"file_name,text\r\n{body}".encode())


def zipped(root: Path) -> Path:
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(root.rglob("*.*")):
            archive.write(file, file.relative_to(root).as_posix())
    return path


@pytest.mark.parametrize("kind", ["txt", "captions.jsonl", "metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("memory", [0.0, 2.0])
def test_captions_lie_beside_the_pictures(tmp_path, kind, memory):
    layout(tmp_path / "in", kind)
    for source in (DATA["folder"](root=str(tmp_path / "in"), captions=("files",), memory=memory),
                   DATA["zip"](root=str(zipped(tmp_path / "in")), captions=("files",), memory=memory)):  # fmt: skip
        data = source.load()
        batch = batch_of(data, 3)
        assert batch.x[:, 0, 0, 0].tolist() == [0, 10, 20]
        assert text.to_texts(batch.cond["text"]) == list(SAID)
        assert data.spec.cond == {"text": Text(256, SAID)}


def test_class_folders_may_have_captions_too(tmp_path):
    for c in ("cat", "dog"):
        for i in range(2):
            picture_at(tmp_path / c / f"{i}.png", i)
            (tmp_path / c / f"{i}.txt").write_text(f"{c} number {i}")
    batch = batch_of(DATA["folder"](root=str(tmp_path), captions=("files",), labels=True).load(), 4)
    assert text.to_texts(batch.cond["text"]) == ["cat number 0", "cat number 1", "dog number 0", "dog number 1"]
    assert batch.cond["label"].tolist() == [0, 0, 1, 1]
    worded = DATA["folder"](root=str(tmp_path), captions=("a {label}",)).load()
    assert text.to_texts(batch_of(worded, 4).cond["text"]) == ["a cat", "a cat", "a dog", "a dog"]


def ruin(root: Path, how: str) -> None:
    {
        "missing": lambda: (root / "b.txt").unlink(),
        "of nothing": lambda: (root / "README.txt").write_text("hello"),
        "latin": lambda: (root / "b.txt").write_bytes("größer".encode("latin-1")),
        "double": lambda: picture_at(root / "a.bmp", 1),
        "long": lambda: (root / "b.txt").write_text("x" * 257),
        "two tables": lambda: [(root / n).write_text("") for n in ("captions.jsonl", "metadata.csv")],
        "no json": lambda: (root / "captions.jsonl").write_text('{"file_name": "a.png", "text": "A"}\n{"file_na'),
        "no words": lambda: (root / "captions.jsonl").write_text('{"file_name": "a.png", "text": 7}'),
        "twice": lambda: (root / "captions.jsonl").write_text('{"file_name": "a.png", "text": "A"}\n' * 2),
        "absent": lambda: (root / "captions.jsonl").write_text('{"file_name": "z.png", "text": "A"}\n'),
        "not all": lambda: (root / "captions.jsonl").write_text('{"file_name": "a.png", "text": "A"}\n'),
        "no column": lambda: (root / "metadata.csv").write_text("file_name,caption\na.png,A\n"),
        "short": lambda: (root / "metadata.csv").write_text("file_name,text\na.png\n"),
    }[how]()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", r"b.png: has no caption beside it, b.txt"),
        ("of nothing", r"README.txt: captions README.\*, and there is no such picture in "),
        ("latin", r"b.txt: is not UTF-8, at byte 2"),
        ("double", r"a.txt: would caption both a.bmp and a.png"),
        ("long", r"b.txt: this caption has 257 bytes; --data.text-length is 256"),
        ("two tables", r"captions.jsonl: lies beside metadata.csv; keep one"),
        ("no json", r"captions.jsonl:2: needs \{\"file_name\": "),
        ("no words", r"captions.jsonl:1: needs file_name and text, both words"),
        ("twice", r"captions.jsonl:2: captions a.png a second time, after .*captions.jsonl:1"),
        ("absent", r"captions.jsonl:1: captions z.png, and there is no such picture"),
        ("not all", r"b.png: has no caption in captions.jsonl"),
        ("no column", r"metadata.csv: has no column text; needs file_name and text"),
        ("short", r"metadata.csv:2: needs file_name and text, both words"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_bad_captions_are_refused_in_one_line_that_names_the_file(tmp_path, kind, how, says):
    root = tmp_path / "in"
    layout(root, "txt")
    ruin(root, how)
    where = root if kind == "folder" else zipped(root)
    with pytest.raises(ValueError, match=says) as e:
        DATA[kind](root=str(where), captions=("files",)).load()
    assert "\n" not in str(e.value)
    assert str(where) in str(e.value)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (
            {"captions": ("a {lab}",)},
            r"given 'a \{lab\}'; allowed: wordings that hold \{label\}, or the word files",
        ),
        ({"captions": ("files",)}, "given files, but these data are no files"),
        ({"captions": ("files", "a {label}")}, "given files and wordings"),
        ({"captions": ("a {label}",), "text_length": 5}, r"'a \{label\}' of 'zero': this caption has 6 bytes"),
        ({"encoder": "x/y"}, "given x/y, but no captions to encode"),
    ],
)
def test_bad_wordings_are_refused(how, says):
    with pytest.raises(ValueError, match=says):
        DATA["digits"](**how).load()


def test_pictures_without_classes_have_no_wordings(tmp_path):
    picture_at(tmp_path / "a.png", 1)
    with pytest.raises(ValueError, match=r"given 'a \{label\}', but these data have no classes; try files"):
        DATA["folder"](root=str(tmp_path), captions=("a {label}",)).load()


# ------------------------------------------------------------------------------------------- runs that read words
ARGS = ["--backbone.width=8", "--batch=8", "--steps=2", "--no-tensorboard", "--workers=0", "--device=cpu"]


def trained(out: Path, *argv: str) -> Path:
    assert cli.main(["train", "--data=digits", *ARGS, *argv, f"--out={out}"]) == 0
    return (out / "latest").resolve()


@pytest.fixture(scope="session")
def worded(tmp_path_factory):
    """A run on captioned digits, of two steps."""
    out = tmp_path_factory.mktemp("worded")
    return trained(out, "--data.captions", *WORDINGS, "--data.text-length=40")


@pytest.fixture(scope="session")
def both(tmp_path_factory):
    """The same with classes beside the words, each dropped alone."""
    out = tmp_path_factory.mktemp("both")
    more = ["--data.labels=true", "--objective.drop-each=0.2", "--sample-every=0"]
    return trained(out, "--data.captions", *WORDINGS, *more)


def failing(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert cli.main(list(argv)) == 2
    return capsys.readouterr().err


def test_a_prompt_is_what_the_model_sees(worded, monkeypatch):
    run = runs.load(worded)
    assert run.spec.cond["text"] == Text(40, run.spec.cond["text"].examples)
    x, cond = run.sample(4, prompt=["the digit two", "nine"], steps=2)
    assert x.shape == (4, 1, 8, 8)
    assert text.to_texts(cond["text"]) == ["the digit two", "nine"] * 2
    one, _ = run.sample(1, prompt="the digit two", steps=2)
    assert (one[0].int() - x[0].int()).abs().max() <= 1
    given, _ = run.sample(4, cond=cond, steps=2)
    assert torch.equal(given, x)
    null, _ = run.sample(2, prompt="", steps=2)
    absent, _ = run.sample(2, cond={}, steps=2)
    assert (null.int() - absent.int()).abs().max() <= 1
    _, shown = run.sample(12, steps=1)
    assert text.to_texts(shown["text"]) == [*run.spec.cond["text"].examples, "a handwritten zero", "the digit one"]


def test_words_change_what_is_drawn(worded):
    run = runs.load(worded)
    for p in run.nets["net"].parameters():
        p.add_(0.1 * torch.randn_like(p))
    a, b = (run.sample(2, prompt=p, steps=2, guidance=3.0)[0] for p in ("seven", "two"))
    assert (a.int() - b.int()).abs().max() > 1


def test_genkit_sample_takes_prompts(worded, tmp_path, capsys):
    out = tmp_path / "few"
    asked = ["--prompt", "a handwritten seven", "two", "--guidance=3", "--steps=2"]
    assert cli.main(["sample", str(worded), *asked, "--format=png", f"--out={out}", "--n=3"]) == 0
    lines = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["a handwritten seven", "two"] * 3
    again = DATA["folder"](root=str(out), captions=("files",)).load()  # what was drawn is data with captions
    assert text.to_texts(batch_of(again, 6).cond["text"]) == [line["text"] for line in lines]
    assert json.loads((out / "samples.json").read_text())["prompt"] == ["a handwritten seven", "two"]
    names = set()
    for prompts in (["one"], ["a one"], ["A one"], ["a", "one"], ["one" * 13], ["one" * 13 + "x"]):
        assert cli.main(["sample", str(worded), "--steps=1", "--n=2", "--prompt", *prompts]) == 0
        names.add(capsys.readouterr().out.splitlines()[0])
    assert len(names) == 6
    assert cli.main(["sample", str(worded), "--steps=1", "--prompt", *"abcde"]) == 0  # one of each
    assert "5 samples" in capsys.readouterr().out


def test_prompts_that_cannot_be_read_are_refused_in_one_line(worded, tmp_path, capsys):
    error = failing(capsys, "sample", str(worded), "--prompt", "x" * 41)
    assert "given 41 bytes" in error
    assert "this model reads 40" in error
    assert len(error.strip().splitlines()) == 1
    assert "this model has no classes; leave --label out" in failing(capsys, "sample", str(worded), "--label=3")
    with pytest.raises(
        ValueError, match=r"given 'seven', but this model reads no words; its conditions: label \(label\)"
    ):
        runs.labels(Spec((1, 8, 8), {"label": Label(10)}), 4, prompt="seven")
    with pytest.raises(ValueError, match="its conditions: none"):
        runs.labels(Spec((1, 8, 8)), 4, prompt="seven")
    with pytest.raises(ValueError, match="needs more than a class: obs"):
        runs.labels(Spec((1, 8, 8), {"obs": Vector((2,)), "text": Text(9)}), 4, prompt="seven")


def test_classes_and_words_together_or_one_of_them():
    spec = Spec((1, 8, 8), {"label": Label(10), "text": Text(9, ("one",))})
    assert set(runs.labels(spec, 2, label=3)) == {"label"}
    assert set(runs.labels(spec, 2, prompt="six")) == {"text"}
    found = runs.labels(spec, 2, label=3, prompt=["six", "ten"])
    assert found["label"].tolist() == [3, 3]
    assert text.to_texts(found["text"]) == ["six", "ten"]
    with pytest.raises(ValueError, match="text; give --prompt, --label or both"):
        runs.labels(spec, 2)


def test_a_run_with_classes_and_words(both, capsys):
    run = runs.load(both)
    assert run.objective.drop_each == 0.2
    for how in ({"label": 3}, {"prompt": "three"}, {"label": 3, "prompt": "three"}):
        x, cond = run.sample(2, steps=1, guidance=2.0, **how)
        assert x.shape == (2, 1, 8, 8)
        assert set(cond) == {{"label": "label", "prompt": "text"}[k] for k in how}
    assert cli.main(["info", str(both)]) == 0
    assert "conditions: label (label), text (text)" in capsys.readouterr().out


def test_info_and_the_pictures_of_training_show_prompts(worded, capsys):
    assert cli.main(["info", str(worded)]) == 0
    assert "text           up to 40 bytes, such as 'a handwritten zero', 'the digit one'" in capsys.readouterr().out
    assert (worded / "samples" / "step-0000002.png").is_file()
    turn = runs.labels(runs.load(worded).spec, 80)
    assert pictures.in_turn(turn) == 10  # a column each
    assert pictures.in_turn({"text": turn["text"][[0, 1, 1, 0]]}) is None


def test_eval_draws_prompts_of_the_data_and_knows_their_class(worded, tmp_path):
    from genkit.evaluation import ModelSamples, open_run_data

    run = runs.load(worded)
    drawn = ModelSamples(run, config.Sampling(steps=1, seed=3))
    assert drawn.label == "label"
    rows = range(5, 45)
    cond = drawn.cond(rows)
    words = [next(i for i, d in enumerate(DIGITS) if d in said) for said in text.to_texts(cond["text"])]
    assert words == cond["label"].tolist()
    assert drawn.rows(5, 9, 40).labels.tolist() == words[:4]
    assert torch.equal(drawn.cond(range(20, 30))["text"], cond["text"][15:25])  # whatever the blocks
    reference = open_run_data(run)
    assert list(reference.spec.cond) == ["label"]


def test_latents_are_cached_with_one_wording_of_each(tmp_path):
    first = trained(tmp_path / "vae", "--objective=vae", "--objective.latent", "4", "4", "4", "--data.labels=false",
                    "--backbone=dit", "--backbone.depth=1", "--sample-every=0")  # fmt: skip
    out = tmp_path / "latents"
    argv = ["encode", str(first), f"--out={out}", "--data=digits", "--data.captions", *WORDINGS]
    assert cli.main(argv) == 0
    said = text.to_texts(DATA["latents"](root=str(out)).load().cond["text"])
    shares = [sum(s in {w.replace("{label}", d) for d in DIGITS} for s in said) / len(said) for w in WORDINGS]
    assert all(abs(s - 1 / 3) < 0.06 for s in shares)


# ---------------------------------------------------------------------------------------------- frozen encoders
VOCABULARY = ("a", "handwritten", "the", "digit", *DIGITS)


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """Tiny random encoders, as transformers saves them: CLIP's text half, a whole CLIP, T5, a pipeline of diffusers."""
    hf = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    root = tmp_path_factory.mktemp("encoders")
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *VOCABULARY])}
    splitter = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    splitter.pre_tokenizer = pre_tokenizers.Whitespace()
    splitter.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", 2)])
    marks = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=splitter, model_max_length=8, **marks)
    num = len(vocabulary)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    half = hf.CLIPTextConfig(vocab_size=num, max_position_embeddings=8, eos_token_id=2, projection_dim=8, **small)
    eyes = {**small, "image_size": 8, "patch_size": 4, "projection_dim": 8}
    torch.manual_seed(0)
    models_ = {
        "clip": hf.CLIPTextModel(half),
        "whole": hf.CLIPModel(hf.CLIPConfig(text_config=half.to_dict(), vision_config=eyes, projection_dim=8)),
        "t5": hf.T5EncoderModel(hf.T5Config(vocab_size=num, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)),
    }
    for name, model in models_.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    models_["clip"].save_pretrained(root / "pipeline" / "text_encoder")
    tokenizer.save_pretrained(root / "pipeline" / "tokenizer")
    (root / "pipeline" / "model_index.json").write_text("{}")
    return root, tokenizer, models_


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "text"


@pytest.mark.parametrize("name", ["clip", "whole", "t5", "pipeline"])
def test_a_frozen_encoder_says_what_transformers_says(encoders, name):
    root, tokenizer, models_ = encoders
    frozen = text.open_encoder(str(root / name))
    states, mask = frozen(["the digit two", "", "seven"], batch=2)
    assert (frozen.dim, frozen.length, states.shape, states.dtype) == (16, 8, (3, 5, 16), torch.float16)
    assert mask.tolist() == [[True] * 5, [False] * 5, [True] * 3 + [False] * 2]
    half = {"whole": lambda: models_["whole"].text_model, "pipeline": lambda: models_["clip"]}
    peer = half.get(name, lambda: models_[name])().eval()
    for said, state, seen in zip(["the digit two", "", "seven"], states, mask, strict=True):
        with torch.no_grad():
            alone = peer(**tokenizer(said, return_tensors="pt")).last_hidden_state[0]
        if said:
            torch.testing.assert_close(state[seen].float(), alone, atol=4e-3, rtol=4e-3)
    assert text.open_encoder(str(root / "pipeline")).sha256 == text.open_encoder(str(root / "clip")).sha256
    assert text.open_encoder(str(root / "t5")).sha256 != text.open_encoder(str(root / "clip")).sha256
    with pytest.raises(ValueError, match=r"given 10 tokens \('a a a a a a a a'\); .*t5 reads 8"):
        text.open_encoder(str(root / "t5"))(["a a a a a a a a"])


def test_captions_are_encoded_once(encoders, own_cache, monkeypatch):
    root, _, _ = encoders
    said = []
    frozen = text.open_encoder(str(root / "clip"))
    inner = type(frozen).__call__
    monkeypatch.setattr(type(frozen), "__call__", lambda self, texts: said.extend(texts) or inner(self, texts))
    source = DATA["digits"](captions=WORDINGS, encoder=str(root / "clip"))
    data = source.load()
    assert sorted(said) == sorted(w.replace("{label}", d) for w in WORDINGS for d in DIGITS)
    batch = batch_of(data, 32)
    assert batch.cond["text"].shape == (32, 5, 16)
    again = source.load()
    assert len(said) == 30
    assert torch.equal(batch_of(again, 32).cond["text"], batch.cond["text"])
    (file,) = own_cache.glob("*")
    assert file.suffix == ".safetensors"
    file.write_bytes(b"cut off")
    source.load()
    assert len(said) == 60
    kind = data.spec.cond["text"]
    assert (kind.dim, kind.encoder, kind.sha256, kind.length) == (16, str(root / "clip"), frozen.sha256, 8)


def test_a_run_with_a_frozen_encoder_names_it(encoders, own_cache, tmp_path, capsys):
    import shutil

    root, _, _ = encoders
    where = tmp_path / "mine"
    shutil.copytree(root / "clip", where)
    run = trained(tmp_path / "out", "--data.captions", *WORDINGS, f"--data.encoder={where}", "--backbone=dit",
                  "--backbone.depth=1")  # fmt: skip
    record = json.loads((run / "latest" / "state.json").read_text())["spec"]["cond"]["text"]
    assert record["encoder"] == str(where)
    assert record["sha256"] == text.open_encoder(str(where)).sha256
    loaded = runs.load(run)
    _, cond = loaded.sample(4, prompt=["the digit two", "nine"], steps=1)
    data = loaded.config.data.load()
    table = {tuple(said): i for i, said in enumerate(data.captions.table["text"].flatten(1).tolist())}
    assert tuple(cond["text"][0].flatten().tolist()) in table  # a prompt is encoded as the caption was
    assert set(cond) == {"text", "mask"}
    assert cli.main(["info", str(run)]) == 0
    assert f"text           by {where}, such as 'a handwritten zero'" in capsys.readouterr().out

    shutil.rmtree(where)
    text.open_encoder.cache_clear()
    error = failing(capsys, "sample", str(run), "--prompt", "seven")
    assert f"reads words by {where}, sha256 {record['sha256'][:12]}" in error
    assert "cannot be opened" in error
    assert len(error.strip().splitlines()) == 1
    shutil.copytree(root / "whole", where)
    assert "put the former back" in failing(capsys, "sample", str(run), "--prompt", "seven")
    text.open_encoder.cache_clear()


def test_no_pickle_and_no_foreign_code_is_opened(encoders, tmp_path):
    _, tokenizer, models_ = encoders
    bad = tmp_path / "bad"
    tokenizer.save_pretrained(bad)
    models_["clip"].config.save_pretrained(bad)
    torch.save(models_["clip"].state_dict(), bad / "pytorch_model.bin")
    with pytest.raises(ValueError, match="bad cannot be opened") as e:
        text.open_encoder(str(bad))
    assert "\n" not in str(e.value)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"auto_map": {"AutoConfig": "mine.Mine"}, "model_type": "mine"}')
    (foreign / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="foreign cannot be opened"):
        text.open_encoder(str(foreign))
    for absent in ("nobody/nothing", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match=r"neither a folder, nor to be had from the hub"):
            text.open_encoder(absent)


# ---------------------------------------------------------------------------------------------------- what it reaches
@pytest.mark.slow
def test_the_recipe_draws_the_digit_that_is_named(tmp_path):
    from genkit.evaluation.metrics.features import Classifier

    recipe = Path(__file__).parents[2] / "configs" / "digits_text.yaml"
    assert cli.main(["train", "--config", str(recipe), "--sample-every=0", f"--out={tmp_path}"]) == 0
    run = runs.load(tmp_path / "latest")
    judge = Classifier().load("cpu", DATA["digits"]().load())
    x, _ = run.sample(500, prompt=[f"a handwritten {d}" for d in DIGITS], steps=10, guidance=3.0)
    right = judge(x).logits.argmax(1) == torch.arange(500) % 10
    assert float(right.double().mean()) >= 0.95
