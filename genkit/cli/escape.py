"""Escaping what a terminal would obey. This module imports nothing, for it serves ``genkit --help`` too."""

from __future__ import annotations

import re

CONTROL = re.compile(  # C0, DEL, C1, separators of lines, marks and overrides of direction, bytes that are no UTF-8
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str, lines: bool = False) -> str:
    r"""``text`` with its control characters escaped, ``\x1b`` for instance; with ``lines``, all but ``\n``.

    Names of classes, files and runs may hold any character, and a terminal obeys some.
    """
    parts = text.split("\n") if lines else [text]
    return "\n".join(CONTROL.sub(lambda match: ascii(match[0])[1:-1], part) for part in parts)
