"""Whatever the hub answers is one line, whoever asks: runs, models of diffusers, demonstrations."""

import types

import pytest

from genkit.core.hub import call_hub
from genkit.data.demonstrations.lerobot import lerobot_folder
from genkit.integrations.diffusers_folder import download
from genkit.integrations.hub import find_hub_run
from tests.support.refusals import refuses

hub = pytest.importorskip("huggingface_hub")
ANSWERS = {
    401: "log in with hf auth login, or set HF_TOKEN",
    404: "has no me/x, or it is private",
    None: "is there a network?",
}
ASKING = {  # who calls the hub, and what the line begins with
    "run": (lambda: find_hub_run("me/x"), "run: "),
    "model": (lambda: download.__wrapped__("me/x", "codec"), "codec: there is no folder me/x: "),
    "demonstrations": (lambda: lerobot_folder("me/x"), "me/x: is not a folder: "),
}


@pytest.mark.parametrize("status", ANSWERS)
@pytest.mark.parametrize("name", ASKING)
def test_one_line_for_each_answer(name, status, monkeypatch, tmp_path):
    def answer(*args, **options):
        error = OSError("of\nseveral lines")
        error.response = types.SimpleNamespace(status_code=status)
        raise error

    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "snapshot_download", answer)
    monkeypatch.setattr(hub, "HfApi", answer)
    call, begin = ASKING[name]
    refuses(call, begin, ANSWERS[status])


def test_a_success_is_passed_on():
    assert call_hub("pull", "me/x", lambda module: module.__name__) == "huggingface_hub"
