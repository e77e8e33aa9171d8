"""Messages for the user, by the logger ``genkit``, which the command line prints."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger("genkit")


@functools.lru_cache(maxsize=1024)
def warn_once(text: str) -> None:
    """Warn of something, once a process however often it is met (data are loaded again for an evaluation)."""
    logger.warning("note     %s", text)
