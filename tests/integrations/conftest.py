"""Tiny pipelines of diffusers, and runs that began from them, each made once a session, at first use."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genkit.cli import main as cli

SIZES = {"sana": 32}


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a pipeline by its name in ``tests.support.pipelines.PIPELINES``."""
    from tests.support.pipelines import save_pipeline

    root = tmp_path_factory.mktemp("pipelines")
    return lru_cache(maxsize=None)(lambda name: save_pipeline(name, root))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures with captions."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(4):
        pixels = np.random.RandomState(i).randint(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(["a red square", "a blue circle"][i % 2])
    return folder


@pytest.fixture(scope="session")
def run_of(
    pipeline_folder: Callable[[str], Path], photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A run of two steps without effect that began from a pipeline, by the command line; each is made once."""
    from tests.support.pipelines import CAPTIONS, QUICK

    @cache
    def make(name: str, *args: str) -> Path:
        out = tmp_path_factory.mktemp(name)
        init, size = f"--init=diffusers:{pipeline_folder(name)}", f"--data.size={SIZES.get(name, 16)}"
        words = [] if name == "ddim" else [CAPTIONS]
        assert cli.main(["train", init, f"--data={photos}", size, f"--out={out}", *QUICK, *words, *args]) == 0
        return (out / "latest").resolve()

    return make
