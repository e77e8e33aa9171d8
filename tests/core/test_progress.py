"""Progress callbacks: a bar in a terminal, silence elsewhere and on other ranks."""

import io
import sys

import pytest

from genkit.core.progress import StageMessages, reporting, silent, terminal_progress


def test_nothing_is_shown_outside_a_terminal(capsys):
    for stages in (True, False):
        with terminal_progress(stages) as progress:
            assert (progress is silent) != stages
            progress("samples", 3, 10)
    assert capsys.readouterr() == ("", "")


def test_long_stages_are_named_once_and_then_at_intervals_with_the_time_left(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr("genkit.core.progress.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(StageMessages, "QUIET_SECONDS", 0.0)
    caplog.set_level("DEBUG", "genkit.progress")
    lines = StageMessages()
    for done in range(0, 101, 10):  # ten seconds each
        lines("reference", done, 100)
        if done == 0:
            lines.timer.join()
        clock[0] += 10
    lines("samples", 0, None)
    lines.timer.join()
    lines.close()
    assert caplog.messages == ["reference: 0 of 100", "reference: 60 of 100, about 40 s left", "samples"]


def test_a_short_stage_says_nothing(caplog):
    caplog.set_level("DEBUG", "genkit.progress")
    with reporting(None) as progress:
        progress("samples, first 10", 0, 10)
        timer = progress.timer
        progress("samples, next 5", 5, 10)
        assert progress.timer is timer  # the same stage
        progress("metrics", 0, 1)
        assert progress.timer is not timer
    timer.join()
    progress.timer.join()
    assert caplog.messages == []


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
