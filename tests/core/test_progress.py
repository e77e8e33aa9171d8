"""Progress callbacks: a bar in a terminal, silence elsewhere and on other ranks."""

import io
import sys

import pytest

from genkit.core.progress import reporting, silent, terminal_progress


def test_nothing_is_shown_outside_a_terminal(capsys):
    with terminal_progress() as progress:
        assert progress is silent
        progress("samples", 3, 10)
    assert capsys.readouterr() == ("", "")


def test_a_bar_is_shown_in_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with terminal_progress() as progress:
        progress("reference", 1, None)
        progress("samples", 3, 10)
        progress("samples", 10, 10)
    assert "samples" in sys.stderr.getvalue()
    assert "10/10" in sys.stderr.getvalue()
    with reporting(None, enabled=False) as progress:
        assert progress is silent


@pytest.mark.parametrize("enabled", [True, False])
def test_the_callers_own_callback_is_called_on_one_rank_only(enabled):
    calls = []
    with reporting(lambda *call: calls.append(call), enabled) as progress:
        progress("samples", 3, 10)
    assert calls == ([("samples", 3, 10)] if enabled else [])
