"""Scripts that use genkit: a user's mistake ends them with one line, as it ends a command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from genkit.cli.main import show_messages
from genkit.core.files import refuse_foreign
from genkit.data.image_files import is_image


class ScriptParser(argparse.ArgumentParser):
    """A parser of a script's options, described by the first line of its docstring; a mistake is one line.

    A picture ``--out`` that genkit did not write is refused.
    """

    def __init__(self, doc: str | None, prog: str | None = None):
        super().__init__(prog=prog, description=(doc or "").partition("\n")[0])

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """The options; a picture ``--out`` is checked."""
        parsed = super().parse_args(args, namespace)
        out = getattr(parsed, "out", None)
        if isinstance(out, Path) and is_image(out.name):
            try:
                refuse_foreign(out)
            except ValueError as e:
                self.error(str(e))
        return parsed

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
