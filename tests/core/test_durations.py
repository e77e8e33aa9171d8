"""Lengths of time and amounts of memory in words, and the peak of memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genkit.core.durations import estimate_duration, format_duration, parse_duration
from genkit.core.memory import format_bytes, peak_memory, reset_peak_memory

CPU = torch.device("cpu")
REFUSED = ["", " ", "0", "0s", "5x", "-3", "3 h", "30m2h", "2:30", "1e3", "nan", "inf", "h", "9" * 400]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("10m", 600),
        ("2h30m", 9000),
        ("1d", 86400),
        ("90", 90),
        ("0.5", 0.5),
        ("1.5H", 5400),
        (" 1h1s ", 3601),
    ],
)
def test_a_duration_is_read(text, seconds):
    assert parse_duration(text) == seconds


@given(st.integers(0, 30), st.integers(0, 99), st.integers(0, 99), st.integers(1, 99))
def test_units_add_up(d, h, m, s):
    assert parse_duration(f"{d}d{h}h{m}m{s}s") == d * 86400 + h * 3600 + m * 60 + s


@pytest.mark.parametrize(
    "text", ["", " ", "0", "0s", "5x", "-3", "3 h", "30m2h", "2:30", "1e3", "nan", "inf", "h", "9" * 400]
)
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match="no length of time; allowed: 90s"):
        parse_duration(text)


def test_durations_in_words():
    assert [format_duration(s) for s in (3.24, 75, 7500)] == ["3.2 s", "1 min 15 s", "2 h 5 min"]
    words = [estimate_duration(s) for s in (0.2, 40, 59.7, 725, 7200, 7530, 86400 * 3.1)]
    assert words == [f"about {w}" for w in ("1 s", "40 s", "60 s", "12 min", "2 h", "2 h 6 min", "3 days")]


def test_memory_in_words():
    assert [format_bytes(b) for b in (12, 4_100, 530e6, 1.24e9)] == ["12 B", "4 kB", "530 MB", "1.2 GB"]


def test_the_peak_of_memory_is_that_of_an_allocation_that_is_gone():
    reset_peak_memory(CPU)
    before = peak_memory(CPU)
    x = torch.ones(50_000_000)  # 200 MB
    del x
    assert 180e6 < peak_memory(CPU) - before < 260e6
    reset_peak_memory(CPU)
    assert peak_memory(CPU) - before < 100e6
