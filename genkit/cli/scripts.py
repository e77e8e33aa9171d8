"""Scripts that use genkit: a user's mistake ends them with one line, as it ends a command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from genkit.cli.main import show_messages


class ScriptParser(argparse.ArgumentParser):
    """A parser of a script's options, described by the first line of its docstring; a mistake is one line."""

    def __init__(self, doc: str | None, prog: str | None = None):
        super().__init__(prog=prog, description=(doc or "").partition("\n")[0])

    def error(self, message: str) -> NoReturn:
        """Print the mistake in one line, and exit with code 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())}; see --help\n")


def run_script(main: Callable[[], None]) -> None:
    """Call ``main`` and print genkit's messages.

    A ``ValueError`` or ``OSError`` becomes one line and exit code 2, unless ``GENKIT_TRACEBACK`` is set, and Ctrl-C
    exit code 130.
    """
    show_messages()
    name = Path(sys.argv[0]).stem
    try:
        main()
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as e:
        if os.environ.get("GENKIT_TRACEBACK"):
            raise
        print(f"{name}: {' '.join((str(e) or type(e).__name__).split())}", file=sys.stderr)
        sys.exit(2)
