"""What samples are measured in: ``FEATURES`` maps a name to a configuration, whose ``load`` gives an extractor.

    see = Inception(mode="clean").load("cpu", None)
    features, logits = see(pictures)                    # uint8 [B, C, H, W] -> [B, 2048], [B, 1008] or None

A number without its settings cannot be compared: ``see.settings`` holds all that it depends on, ready for JSON.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path as File
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from genkit.core import Data
from genkit.metrics.inception import DIM, NAME, SIZE, InceptionV3, read_weights, sha256

Device = torch.device | str


class Seen(NamedTuple):
    """Float32 ``[B, D]``, and the scores of K classes ``[B, K]`` where the extractor has any."""

    features: Tensor
    logits: Tensor | None


class Extractor(Protocol):
    """A network (or nothing at all) that turns decoded samples into features."""

    @property
    def dim(self) -> int:
        """D."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that the features depend on, for JSON: two sets of features compare where these are equal."""
        ...

    def __call__(self, x: Tensor) -> Seen:
        """Decoded samples: pictures uint8 ``[B, C, H, W]``, or vectors ``[B, D]``. ``ValueError`` for others."""
        ...


class Features(ABC):
    """A frozen dataclass of settings. ``data``: the labelled training split, for networks that train themselves."""

    @abstractmethod
    def load(self, device: Device, data: Data | None = None) -> Extractor: ...


def cache() -> File:
    """Where genkit keeps what it can make or fetch again: ``$GENKIT_CACHE``, else ``~/.cache/genkit``."""
    return File(os.environ.get("GENKIT_CACHE") or "~/.cache/genkit").expanduser()


# --------------------------------------------------------------------------------------------------- inception
Mode = Literal["clean", "legacy_tensorflow", "legacy_pytorch"]


def by_clean_fid(mode: str) -> Callable[[Tensor], Tensor]:
    """clean-fid's own resizer, for pictures one by one; as many threads as torch has."""
    from cleanfid.resize import build_resizer

    with warnings.catch_warnings():  # build_resizer silences all warnings of the process, for ever
        resizer = build_resizer(mode)

    def one(picture: Tensor) -> Tensor:
        return torch.from_numpy(resizer(picture.permute(1, 2, 0).numpy())).permute(2, 0, 1)

    def resize(x: Tensor) -> Tensor:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return torch.stack(list(pool.map(one, x.cpu())))

    return resize


def like_tensorflow(x: Tensor) -> Tensor:
    """TensorFlow 1's ``resize_bilinear``: pixel j of 299 lies at ``j w / 299``, half a pixel off the centre's place."""
    b, c, h, w = x.shape
    theta = torch.eye(2, 3, device=x.device)
    theta[0, 2], theta[1, 2] = 1 / w - 1 / SIZE, 1 / h - 1 / SIZE
    grid = F.affine_grid(theta.expand(b, 2, 3), [b, c, SIZE, SIZE], align_corners=False)
    return F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class Way:
    """How a mode brings a picture to the network: the words of it, the resizing, then ``x / scale - 1``."""

    words: str
    resizer: Callable[[], Callable[[Tensor], Tensor]]
    scale: float


WAYS: dict[str, Way] = {
    "clean": Way("bicubic, antialiased, float (Pillow, by clean-fid)", lambda: by_clean_fid("clean"), 128),
    "legacy_tensorflow": Way("bilinear, no antialiasing (TensorFlow 1)", lambda: like_tensorflow, 128),
    "legacy_pytorch": Way(
        "bilinear, no antialiasing (PyTorch, by clean-fid)", lambda: by_clean_fid("legacy_pytorch"), 127.5
    ),
}


@dataclass(frozen=True)
class Inception(Features):
    """Inception-v3 through clean-fid (Parmar et al. 2022): the features of the FID, resizing included."""

    mode: Mode = "clean"
    """How pictures become 299x299; FIDs of different modes do not compare (Parmar et al. 2022)."""
    weights: str | None = None
    """The file inception-2015-12-05.pt, or safetensors; None: where clean-fid keeps it, or genkit's cache."""
    fast: bool = False
    """bf16: for watching a training, not for publishing."""

    def load(self, device: Device, data: Data | None = None) -> InceptionExtractor:
        return InceptionExtractor(self, torch.device(device))


class InceptionExtractor:
    """See :class:`Inception`. Pictures uint8, grey or RGB, of any size and shape: ``[B, 1 or 3, H, W]``."""

    def __init__(self, how: Inception, device: torch.device):
        if how.mode not in WAYS:
            raise ValueError(f"mode: given {how.mode!r}; allowed: {', '.join(WAYS)}")
        file = find_weights(how.weights)
        self.network = InceptionV3(read_weights(file), torch.bfloat16 if how.fast else torch.float32).to(device)
        self.device, self.way, self.dim = device, WAYS[how.mode], self.network.dim
        if self.dim != DIM:
            raise ValueError(f"weights: {file} gives {self.dim} features; needs the {DIM} of {NAME}")
        self.resize = self.way.resizer()
        self.settings: Mapping[str, Any] = {
            "name": "inception",
            "mode": how.mode,
            "resize": f"{self.way.words}, to {SIZE}x{SIZE}",
            "non_square": "stretched, as clean-fid does",
            "grey": "the same in all three channels",
            "clean_fid": version("clean-fid"),
            "sha256": sha256(file),
            "precision": "bf16" if how.fast else "fp32",
            "dim": self.dim,
        }

    def __call__(self, x: Tensor) -> Seen:
        if x.ndim != 4 or x.dtype != torch.uint8 or x.shape[1] not in (1, 3):
            raise ValueError(
                f"inception: given {x.dtype} {tuple(x.shape)}; needs pictures, uint8 [B, 1 or 3, H, W] without "
                "transparency; for vectors take --features raw"
            )
        parts = [self._see(part) for part in x.split(CHUNK)]
        logits = [part.logits for part in parts if part.logits is not None]
        return Seen(torch.cat([part.features for part in parts]), torch.cat(logits) if logits else None)

    def _see(self, x: Tensor) -> Seen:
        resized = self.resize(x.expand(-1, 3, -1, -1)).to(self.device)
        return Seen(*self.network(resized / self.way.scale - 1))


CHUNK = 100  # pictures at a time: activations of about 1 GiB


def find_weights(given: str | None) -> File:
    """``given``, else where clean-fid keeps the file, else genkit's cache, else downloaded there by clean-fid."""
    import platform

    if given is not None:
        return File(given)
    theirs = File("." if platform.system() == "Windows" else "/tmp") / NAME  # as in cleanfid.features
    for place in (theirs, cache() / NAME):
        if place.is_file():
            return place
    return download()


def download() -> File:
    """The weights, fetched by clean-fid into genkit's cache. ``ValueError`` where that fails; nothing half-written."""
    import socket

    from cleanfid import downloads_helper

    wanted, patience = cache() / NAME, socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=wanted.parent) as part:
            os.replace(downloads_helper.check_download_inception(part), wanted)
    except OSError as e:
        raise ValueError(
            f"weights: no {NAME} here, and it cannot be downloaded ({' '.join(str(e).split())}); get it from "
            f"{downloads_helper.inception_url} and put it at {wanted}, or name it with --features.weights"
        ) from e
    finally:
        socket.setdefaulttimeout(patience)
    return wanted


# --------------------------------------------------------------------------------------------------------- raw
@dataclass(frozen=True)
class Raw(Features):
    """The samples themselves, flattened: for vectors, or for distances between pixels."""

    def load(self, device: Device, data: Data | None = None) -> RawExtractor:
        return RawExtractor(torch.device(device), 0 if data is None else prod(data.spec.shape))


class RawExtractor:
    """See :class:`Raw`. ``dim`` is 0, not known, until the first samples where there was no ``data``."""

    def __init__(self, device: torch.device, dim: int):
        self.device, self.dim = device, dim
        self.settings: Mapping[str, Any] = {"name": "raw", "units": "those of the decoded samples (pixels: 0..255)"}

    def __call__(self, x: Tensor) -> Seen:
        if x.ndim < 2:
            raise ValueError(f"raw: given shape {tuple(x.shape)}; needs samples [B, ...]")
        features = x.to(self.device, torch.float32).flatten(1)
        if features.shape[1] != (self.dim or features.shape[1]):
            raise ValueError(f"raw: given samples of {features.shape[1]} numbers; needs {self.dim}")
        self.dim = features.shape[1]
        return Seen(features, None)


FEATURES: dict[str, type[Features]] = {"inception": Inception, "raw": Raw}
