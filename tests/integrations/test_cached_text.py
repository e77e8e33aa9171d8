"""Fine-tuning of a pipeline on cached latents and texts: the same losses, and no text encoder in memory."""

from __future__ import annotations

import pytest

from genkit.cli import main as cli
from genkit.data import text
from genkit.training import train as training
from genkit.training.directory import read_log
from tests.support.pipelines import CAPTIONS, QUICK

TRAIN = [*QUICK, "--log-every=1", "--lr=1e-3", "--objective.cond-dropout=0.5"]


def losses(run):
    return [record["denoise/loss"] for record in read_log(run)]


@pytest.mark.slow
def test_losses_with_cached_texts_are_those_of_encoding_them(pipeline_folder, photos, tmp_path, monkeypatch):
    pipeline = f"diffusers:{pipeline_folder('sdxl')}"
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "cache"))
    at_start, fit = [], training.fit

    def observed(*values, **options):
        at_start.append(text.open_encoder.cache_info().currsize)
        return fit(*values, **options)

    args = ["train", f"--init={pipeline}", *TRAIN]
    with monkeypatch.context() as patch:
        patch.setattr(training, "fit", observed)
        assert cli.main([*args, f"--data={photos}", CAPTIONS, f"--out={tmp_path}/pictures"]) == 0
    assert at_start == [0], "the text encoders stay in memory"

    encode = ["encode", pipeline, f"--data={photos}", CAPTIONS, f"--data.encoder={pipeline}", "--data.held-out=0"]
    assert cli.main([*encode, f"--out={tmp_path}/latents", "--device=cpu"]) == 0
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path / "empty"))
    cached = [a for a in args if "held-out" not in a] + ["--data=latents", f"--data.root={tmp_path}/latents"]
    with monkeypatch.context() as patch:
        patch.setattr(text, "open_encoder", lambda name: pytest.fail("an encoder was opened"))
        patch.setattr(training, "release_encoders", lambda: None)
        assert cli.main([*cached, f"--out={tmp_path}/runs"]) == 0
    ours, theirs = losses(tmp_path / "runs" / "latest"), losses(tmp_path / "pictures" / "latest")
    assert len(ours) == 2
    assert ours == pytest.approx(theirs, rel=1e-6)
