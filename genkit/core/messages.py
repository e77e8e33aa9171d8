"""Messages for the user, through the logger ``genkit``, which the command line prints."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger("genkit")


@functools.lru_cache(maxsize=1024)
def warn_once(text: str) -> None:
    """Log a warning once per process, however often it occurs (evaluation loads the data again, for example)."""
    logger.warning("note     %s", text)
