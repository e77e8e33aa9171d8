"""Tiny pipelines of diffusers, each made once a session, at first use."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a pipeline by its name in ``tests.support.pipelines.PIPELINES``."""
    from tests.support.pipelines import save_pipeline

    root = tmp_path_factory.mktemp("pipelines")
    return lru_cache(maxsize=None)(lambda name: save_pipeline(name, root))
