"""The pictures of training show the prompts of a file, the same ones with the same seeds each time."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from genkit import config
from genkit.cli.main import main
from genkit.data import Stream, text
from genkit.training.settings import TrainSettings
from genkit.training.shown import choose_shown, read_prompts

PROMPTS = "a handwritten two\n\n  nine   eight \n"


def shown_for(path, **settings):
    block = {"name": "digits", "captions": ["a {label}"]}
    chosen = config.from_dict(TrainSettings, {"data": block, "sample_prompts": str(path), **settings})
    data = chosen.data.load()
    return choose_shown(chosen, data, Stream(data, 4, 0))


def test_prompts_come_in_turn_and_fill_the_picture(tmp_path):
    (tmp_path / "p.txt").write_text(PROMPTS)
    shown = shown_for(tmp_path / "p.txt")
    assert shown.names == ("a handwritten two", "nine eight")
    assert shown.n % 2 == 0
    assert 40 <= shown.n <= 120
    assert text.to_texts(shown.cond["text"]) == [*shown.names] * (shown.n // 2)
    (tmp_path / "many.txt").write_text("\n".join(f"the digit {i}" for i in range(100)))
    assert shown_for(tmp_path / "many.txt").n == 100


@pytest.mark.parametrize(("content", "message"), [
    (None, "cannot be read as a text of prompts"), (b"\n \n", "holds 0 prompts; allowed: 1 to 256"),
    (b"\xff\xfe\xff", "cannot be read"), (b"a\n" * 257, "holds 257 prompts"),
])  # fmt: skip
def test_files_without_prompts_are_refused(tmp_path, content, message):
    path = tmp_path / "p.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(path)


def test_training_draws_the_prompts_of_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("genkit.training.shown.GRID_SIZE", 2)
    (tmp_path / "p.txt").write_text(PROMPTS)
    args = ["train", "--data=digits", "--data.captions", "a {label}", "--backbone=dit", "--backbone.depth=1",
            "--backbone.width=8", "--batch=4", "--steps=2", "--no-tensorboard", "--workers=0", "--device=cpu",
            "--sample-every=1", "--lr=1e-12", "--ema"]  # fmt: skip
    prompts = f"--sample-prompts={tmp_path}/p.txt"
    assert main([*args, prompts, f"--out={tmp_path}/a"]) == 0
    assert f"pictures 2 prompts of {tmp_path}/p.txt" in capsys.readouterr().out
    pictures = sorted((tmp_path / "a" / "latest" / "samples").glob("*.png"))
    assert [p.name for p in pictures] == ["step-0000001.png", "step-0000002.png"]
    first, second = (torch.tensor(list(Image.open(p).convert("L").getdata())) for p in pictures)
    assert first.shape == second.shape
    assert float((first - second).abs().float().mean()) < 0.1, "other seeds or prompts"
    assert main([*args, prompts, f"--out={tmp_path}/b", "--sample-guidance=3", "--objective.cond-dropout=0"]) == 2
    assert "never trained without its conditions" in capsys.readouterr().err
