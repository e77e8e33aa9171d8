"""Runs that read text: prompts, frozen encoders of transformers, and the recipe."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from genkit.cli import main as cli
from genkit.core import (
    Label,
    Spec,
    Text,
    Vector,
)
from genkit.core.grids import count_cycle
from genkit.data import DATA, text
from genkit.training.run import load_run
from genkit.training.sampling import sample_conditions
from tests.support.data import batch_of

TEMPLATES = ("a handwritten {label}", "the digit {label}", "{label}")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


# ------------------------------------------------------------------------------------------ runs that read words
ARGS = ["--backbone.width=8", "--batch=8", "--steps=2", "--no-tensorboard", "--workers=0", "--device=cpu"]


def trained(out: Path, *argv: str) -> Path:
    assert cli.main(["train", "--data=digits", *ARGS, *argv, f"--out={out}"]) == 0
    return (out / "latest").resolve()


@pytest.fixture(scope="session")
def worded(tmp_path_factory):
    """A run of two steps on digits with captions."""
    out = tmp_path_factory.mktemp("worded")
    return trained(out, "--data.captions", *TEMPLATES, "--data.text-length=40")


@pytest.fixture(scope="session")
def both(tmp_path_factory):
    """The same with classes and captions, each dropped independently."""
    out = tmp_path_factory.mktemp("both")
    more = ["--data.labels=true", "--objective.cond-dropout-each=0.2", "--sample-every=0"]
    return trained(out, "--data.captions", *TEMPLATES, *more)


def failing(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert cli.main(list(argv)) == 2
    return capsys.readouterr().err


def test_a_prompt_reaches_the_network(worded, monkeypatch):
    run = load_run(worded)
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


def test_prompts_change_the_samples(worded):
    run = load_run(worded)
    for p in run.nets["net"].parameters():
        p.add_(0.1 * torch.randn_like(p))
    a, b = (run.sample(2, prompt=p, steps=2, guidance=3.0).x for p in ("seven", "two"))
    assert (a.int() - b.int()).abs().max() > 1


def test_genkit_sample_takes_prompts(worded, tmp_path, capsys):
    out = tmp_path / "few"
    options = ["--prompt", "a handwritten seven", "two", "--guidance=3", "--steps=2"]
    assert cli.main(["sample", str(worded), *options, "--format=png", f"--out={out}", "--n=3"]) == 0
    lines = [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["a handwritten seven", "two"] * 3
    again = DATA["folder"](root=str(out), captions=("files",)).load()  # samples are data with captions
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
    assert "this model reads at most 40" in error
    assert len(error.strip().splitlines()) == 1
    assert "this model has no classes; leave --label out" in failing(capsys, "sample", str(worded), "--label=3")
    with pytest.raises(
        ValueError, match=r"given 'seven', but this model reads no text; its conditions: label \(label\)"
    ):
        sample_conditions(Spec((1, 8, 8), {"label": Label(10)}), 4, prompt="seven")
    with pytest.raises(ValueError, match="its conditions: none"):
        sample_conditions(Spec((1, 8, 8)), 4, prompt="seven")
    with pytest.raises(ValueError, match="needs more than a class: obs"):
        sample_conditions(Spec((1, 8, 8), {"obs": Vector((2,)), "text": Text(9)}), 4, prompt="seven")


def test_classes_and_prompts_together_or_alone():
    spec = Spec((1, 8, 8), {"label": Label(10), "text": Text(9, ("one",))})
    assert set(sample_conditions(spec, 2, label=3)) == {"label"}
    assert set(sample_conditions(spec, 2, prompt="six")) == {"text"}
    both_conditions = sample_conditions(spec, 2, label=3, prompt=["six", "ten"])
    assert both_conditions["label"].tolist() == [3, 3]
    assert text.to_texts(both_conditions["text"]) == ["six", "ten"]
    with pytest.raises(ValueError, match="text; give --prompt, --label or both"):
        sample_conditions(spec, 2)


def test_a_run_with_classes_and_captions(both, capsys):
    run = load_run(both)
    assert run.objective.cond_dropout_each == 0.2
    for given in ({"label": 3}, {"prompt": "three"}, {"label": 3, "prompt": "three"}):
        x, cond = run.sample(2, steps=1, guidance=2.0, **given)
        assert x.shape == (2, 1, 8, 8)
        assert set(cond) == {{"label": "label", "prompt": "text"}[k] for k in given}
    assert cli.main(["info", str(both)]) == 0
    assert "conditions: label (label), text (text)" in capsys.readouterr().out


def test_info_and_training_pictures_show_prompts(worded, capsys):
    assert cli.main(["info", str(worded)]) == 0
    assert "text           up to 40 bytes, such as 'a handwritten zero', 'the digit one'" in capsys.readouterr().out
    assert (worded / "samples" / "step-0000002.png").is_file()
    turn = sample_conditions(load_run(worded).spec, 80)
    assert count_cycle(turn) == 10  # one column each
    assert count_cycle({"text": turn["text"][[0, 1, 1, 0]]}) is None


def test_evaluation_draws_the_captions_of_the_data_and_knows_their_class(worded, tmp_path):
    from genkit.evaluation import ModelSamples, open_run_data
    from genkit.training.sampling import Sampling

    run = load_run(worded)
    samples = ModelSamples(run, Sampling(steps=1, seed=3))
    assert samples.label == "label"
    rows = range(5, 45)
    cond = samples.cond(rows)
    words = [next(i for i, d in enumerate(DIGITS) if d in texts) for texts in text.to_texts(cond["text"])]
    assert words == cond["label"].tolist()
    assert samples.rows(5, 9, 40).labels.tolist() == words[:4]
    assert torch.equal(samples.cond(range(20, 30))["text"], cond["text"][15:25])  # for any blocks
    reference = open_run_data(run)
    assert list(reference.spec.cond) == ["label"]


def test_cached_latents_have_all_captions_of_a_sample(tmp_path):
    """Each text is stored once, and a batch draws the captions that it would draw with the pictures."""
    first = trained(tmp_path / "vae", "--objective=vae", "--objective.latent", "4", "4", "4", "--data.labels=false",
                    "--backbone=dit", "--backbone.depth=1", "--sample-every=0")  # fmt: skip
    out = tmp_path / "latents"
    argv = ["encode", str(first), f"--out={out}", "--data=digits", "--data.captions", *TEMPLATES]
    assert cli.main(argv) == 0
    pictures = DATA["digits"](captions=TEMPLATES).load()
    data = DATA["latents"](root=str(out)).load()
    assert len(data.captions.table) == 30
    for key in range(2):
        assert torch.equal(batch_of(data, len(data), key=key).cond["text"],
                           batch_of(pictures, len(data), key=key).cond["text"])  # fmt: skip
    (file,) = (out / "texts").glob("*")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="is damaged"):
        DATA["latents"](root=str(out)).load()


# ----------------------------------------------------------------------------------------------- frozen encoders
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
def test_a_frozen_encoder_agrees_with_transformers(encoders, name):
    root, tokenizer, models_ = encoders
    frozen = text.open_encoder(str(root / name))
    states, mask = frozen(["the digit two", "", "seven"], batch=2)
    assert (frozen.dim, frozen.length, states.shape, states.dtype) == (16, 8, (3, 5, 16), torch.float16)
    assert mask.tolist() == [[True] * 5, [False] * 5, [True] * 3 + [False] * 2]
    half = {"whole": lambda: models_["whole"].text_model, "pipeline": lambda: models_["clip"]}
    peer = half.get(name, lambda: models_[name])().eval()
    for texts, state, visible in zip(["the digit two", "", "seven"], states, mask, strict=True):
        with torch.no_grad():
            alone = peer(**tokenizer(texts, return_tensors="pt")).last_hidden_state[0]
        if texts:
            torch.testing.assert_close(state[visible].float(), alone, atol=4e-3, rtol=4e-3)
    assert text.open_encoder(str(root / "pipeline")).sha256 == text.open_encoder(str(root / "clip")).sha256
    assert text.open_encoder(str(root / "t5")).sha256 != text.open_encoder(str(root / "clip")).sha256
    with pytest.raises(ValueError, match=r"given 10 tokens \('a a a a a a a a'\); .*t5 reads 8"):
        text.open_encoder(str(root / "t5"))(["a a a a a a a a"])


def test_captions_are_encoded_once(encoders, own_cache, monkeypatch):
    root, _, _ = encoders
    encoded = []
    frozen = text.open_encoder(str(root / "clip"))
    inner = type(frozen).__call__
    monkeypatch.setattr(type(frozen), "__call__", lambda self, texts: encoded.extend(texts) or inner(self, texts))
    source = DATA["digits"](captions=TEMPLATES, encoder=str(root / "clip"))
    data = source.load()
    assert sorted(encoded) == sorted(["", *(w.replace("{label}", d) for w in TEMPLATES for d in DIGITS)])
    batch = batch_of(data, 32)
    assert batch.cond["text"].shape == (32, 5, 16)
    again = source.load()
    assert len(encoded) == 31
    assert torch.equal(batch_of(again, 32).cond["text"], batch.cond["text"])
    replace(source, captions=("one more {label}",)).load()  # other captions are added, those that are there stay
    assert encoded[31:] == [f"one more {d}" for d in DIGITS]
    files = sorted(own_cache.glob("*/*"), key=lambda file: file.stat().st_size)
    assert [file.suffix for file in files] == [".safetensors"] * 2
    files[1].write_bytes(b"cut off")
    source.load()
    assert len(encoded) == 41 + 31
    kind = data.spec.cond["text"]
    assert (kind.dim, kind.encoder, kind.sha256, kind.length) == (16, str(root / "clip"), frozen.sha256, 8)


def test_a_run_with_a_frozen_encoder_names_it(encoders, own_cache, tmp_path, capsys):
    import shutil

    root, _, _ = encoders
    folder = tmp_path / "mine"
    shutil.copytree(root / "clip", folder)
    run = trained(tmp_path / "out", "--data.captions", *TEMPLATES, f"--data.encoder={folder}", "--backbone=dit",
                  "--backbone.depth=1")  # fmt: skip
    record = json.loads((run / "latest" / "state.json").read_text())["spec"]["cond"]["text"]
    assert record["encoder"] == str(folder)
    assert record["sha256"] == text.open_encoder(str(folder)).sha256
    loaded = load_run(run)
    _, cond = loaded.sample(4, prompt=["the digit two", "nine"], steps=1)
    data = loaded.config.data.load()
    every = data.captions.table.select(torch.arange(len(data.captions.table)))
    table = {tuple(texts): i for i, texts in enumerate(every["text"].flatten(1).tolist())}
    assert tuple(cond["text"][0].flatten().tolist()) in table  # a prompt is encoded like the caption
    assert set(cond) == {"text", "mask"}
    assert cli.main(["info", str(run)]) == 0
    assert f"text           by {folder}, such as 'a handwritten zero'" in capsys.readouterr().out

    shutil.rmtree(folder)
    text.open_encoder.cache_clear()
    error = failing(capsys, "sample", str(run), "--prompt", "seven digit")
    assert f"reads text by {folder}, sha256 {record['sha256'][:12]}" in error
    assert "cannot be opened" in error
    assert len(error.strip().splitlines()) == 1
    shutil.copytree(root / "whole", folder)
    assert "restore the former" in failing(capsys, "sample", str(run), "--prompt", "seven digit")
    shutil.rmtree(folder)  # captions are in the cache, by the SHA-256 of their encoder
    assert cli.main(["sample", str(run), "--prompt", "seven", "--steps=1", "--n=1"]) == 0
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
        with pytest.raises(ValueError, match=r"neither a folder nor available from the hub"):
            text.open_encoder(absent)


# ----------------------------------------------------------------------------------------------- what it reaches
@pytest.mark.slow
def test_the_configuration_draws_the_requested_digit(tmp_path):
    from genkit.evaluation.metrics.features import Classifier

    recipe = Path(__file__).parents[2] / "configs" / "digits_text.yaml"
    assert cli.main(["train", "--config", str(recipe), "--sample-every=0", f"--out={tmp_path}"]) == 0
    run = load_run(tmp_path / "latest")
    judge = Classifier().load("cpu", DATA["digits"]().load())
    x, _ = run.sample(500, prompt=[f"a handwritten {d}" for d in DIGITS], steps=10, guidance=3.0)
    right = judge(x).logits.argmax(1) == torch.arange(500) % 10
    assert float(right.double().mean()) >= 0.95
