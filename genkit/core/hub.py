"""Calls of the Hugging Face Hub, and one line for whatever goes wrong with one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

from genkit.core.files import format_error

HUB_NAME = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")  # OWNER/NAME
Result = TypeVar("Result")


def call_hub(option: str, repo: str, call: Callable[[Any], Result], hint: str = "") -> Result:
    """``call(huggingface_hub)``. Whatever the hub answers that is no success becomes a ``ValueError`` of one line.

    The line begins with ``option`` and ends with ``hint``.
    """
    try:
        import huggingface_hub  # lazy: optional, slow to import
        import huggingface_hub.constants
    except ImportError as e:
        raise ValueError(f"{option}: needs the package huggingface_hub: pip install 'genkit-torch[hub]'") from e
    try:
        return call(huggingface_hub)
    except Exception as e:  # of many kinds: no network, no such model, no permission
        raise ValueError(f"{option}: {explain(e, repo, huggingface_hub.constants.ENDPOINT)}{hint}") from e


def explain(error: Exception, repo: str, endpoint: str) -> str:
    """One line on what the hub answered, and what to try."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"{endpoint} does not let you at {repo} ({status}); log in with hf auth login, or set HF_TOKEN"
    if status == 404:
        return f"{endpoint} has no {repo}, or it is private; look at the name, or log in with hf auth login"
    return f"{endpoint} cannot be reached for {repo} ({format_error(error)[:150]}); is there a network?"
