"""Progress callbacks: silent outside a terminal, one bar a task inside one."""

import io
import sys

import pytest

from genkit.core.progress import choose_progress, silent, terminal_progress


def test_nothing_is_shown_outside_a_terminal(capsys):
    with terminal_progress() as progress:
        assert progress is silent
        progress("samples", 3, 10)
    assert capsys.readouterr() == ("", "")


def test_each_task_has_a_bar_in_a_terminal(monkeypatch):
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
    assert "100%" in sys.stderr.getvalue()
    with terminal_progress(enabled=False) as progress:
        assert progress is silent


@pytest.mark.parametrize("enabled", [True, False])
def test_a_callback_of_the_callers_own_is_used_by_one_process_only(enabled):
    calls = []
    with choose_progress(lambda *call: calls.append(call), enabled) as progress:
        progress("samples", 3, 10)
    assert calls == ([("samples", 3, 10)] if enabled else [])
