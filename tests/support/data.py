"""Helpers of the data tests: random images, files of them, and a check of refusals."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import torch
from PIL import Image

from genkit.core import Batch, Draw


class refuses:  # reads as pytest.raises does
    """Expects a ``ValueError`` in one line that contains all of ``words``."""

    def __init__(self, *words: object):
        self.words = [str(w) for w in words]

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, trace) -> bool:
        assert error is not None, "nothing was refused"
        if not isinstance(error, ValueError):
            return False
        assert "\n" not in str(error)
        for word in self.words:
            assert word in str(error), f"{word!r} is not in: {error}"
        return True


def noise_of(n: int) -> Draw:
    return Draw((0,), 0, n)


def everything(data) -> Batch:
    return data.batch(torch.arange(len(data)), noise_of(len(data)))


def batch_of(data, n: int, start: int = 0, key: int = 0):
    return data.batch(torch.arange(start, start + n), Draw((key,), start, start + n))


def picture(seed: int, h: int = 4, w: int = 4, c: int = 3) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, c), dtype=np.uint8)
    return pixels[..., 0] if c == 1 else pixels


def save(path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def chw(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.atleast_3d(pixels).transpose(2, 0, 1).copy())


def make_zip(path, pictures: dict[str, np.ndarray], labels: object = ...) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        for name, pixels in pictures.items():
            with archive.open(name, "w") as f:
                Image.fromarray(pixels).save(f, "png")
        if labels is not ...:
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return str(path)


TOYS = ["moons", "rotated-moons", "8gaussians", "checkerboard", "swissroll", "spirals"]
