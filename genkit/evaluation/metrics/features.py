"""What samples are measured in: ``FEATURES`` maps a name to a configuration, whose ``load`` gives an extractor.

    see = Inception(mode="clean").load("cpu", None)
    features, logits = see(pictures)                    # uint8 [B, C, H, W] -> [B, 2048], [B, 1008] or None

A number without its settings cannot be compared: ``see.settings`` holds all that it depends on, ready for JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from genkit.core import Data, Draw, Label
from genkit.core.files import atomic_write
from genkit.core.tensors import cache, sha256
from genkit.evaluation.metrics.inception import DIM, NAME, SIZE, InceptionV3, read_weights

Device = torch.device | str
CHUNK = 100  # pictures at a time: activations of about 1 GiB
CLEAN_FID = Path("." if platform.system() == "Windows" else "/tmp") / NAME  # the place is cleanfid.features' choice


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
    """Inception-v3 through clean-fid (Parmar et al. 2022): the features of the FID, resizing included.

    ``fast`` wants a CPU with bf16 instructions, or a GPU; without, it is slower than fp32. It shifts the FID: between
    the first 600 pictures of CIFAR-10's test split and the next 600 (``Moments.of(see(x).features)`` of each,
    legacy_tensorflow) from 68.72 to 68.55; between fp32 and bf16 of the same 1,200 it is 0.28, so do not mix them.
    """

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
        if x.ndim != 4 or x.dtype != torch.uint8 or x.shape[1] not in (1, 3) or not x.numel():
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


def find_weights(given: str | None) -> Path:
    """``given``, else where clean-fid keeps the file, else genkit's cache, else downloaded there by clean-fid."""
    places = [Path(given)] if given is not None else [p for p in (CLEAN_FID, cache() / NAME) if p.is_file()]
    return places[0] if places else download()


def download() -> Path:
    """The weights, fetched by clean-fid into genkit's cache. ``ValueError`` where that fails; nothing half-written."""
    import socket
    from http.client import HTTPException

    from cleanfid import downloads_helper

    wanted, patience = cache() / NAME, socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=wanted.parent) as part:
            fetched = downloads_helper.check_download_inception(part)
            read_weights(fetched)  # a connection may end early without a word
            os.replace(fetched, wanted)
    except (OSError, HTTPException) as e:
        raise ValueError(
            f"weights: no {NAME} here, and it cannot be downloaded ({' '.join(str(e).split())}); get it from "
            f"{downloads_helper.inception_url} and put it at {wanted}, or name it with --features.weights"
        ) from e
    finally:
        socket.setdefaulttimeout(patience)
    return wanted


# -------------------------------------------------------------------------------------------------- classifier
SIDE, BATCH, RATE, HELD_OUT, MOST = 32, 128, 3e-3, 10, 100_000
"""largest picture, pictures a step, peak learning rate, one in so many is held out, pictures looked at"""


@dataclass(frozen=True)
class Classifier(Features):
    """A small network that trains itself on the labelled training split: for digits, and pictures up to 32 pixels.

    It trains once per data set, on the CPU, in seconds; afterwards the cache knows it by the content of the data. A
    tenth is held out, and its accuracy there is in ``settings``. Every process trains its own where the cache has none
    yet: with several ranks, load it on one of them first. ``GENKIT_CACHE`` says where the cache is.
    """

    steps: Annotated[int, Ge(1)] = 500
    """Optimiser steps, of 128 pictures each."""
    seed: Annotated[int, Ge(0)] = 0
    """Of its first weights, of what is held out, and of the order of the pictures."""

    def load(self, device: Device, data: Data | None = None) -> ClassifierExtractor:
        if data is None:
            raise ValueError("classifier: trains itself, and there are no data; take --features inception or raw")
        shape, n = tuple(data.spec.shape), len(data)
        labels = {k: v.num for k, v in data.spec.cond.items() if isinstance(v, Label)}
        if not labels:
            raise ValueError("classifier: these data have no labels; take --features inception or raw")
        if len(shape) != 3 or max(shape[1:]) > SIDE or n < 2 * HELD_OUT:
            raise ValueError(
                f"classifier: given {n} samples of shape {shape}; needs {2 * HELD_OUT} pictures or more, of at most "
                f"{SIDE} pixels a side; take --features inception, or raw for vectors"
            )
        some = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))[:MOST]
        batch, label = data.batch(some, Draw((self.seed,), 0, len(some))), min(labels)
        if batch.x.dtype != torch.uint8:
            raise ValueError(f"classifier: given {batch.x.dtype}; needs uint8 pictures; take --features raw")
        return self._trained(batch.x, batch.cond[label], labels[label], torch.device(device))

    def _trained(self, x: Tensor, y: Tensor, classes: int, device: torch.device) -> ClassifierExtractor:
        """From the cache, or trained and put there."""
        settings = {"name": "classifier", **asdict(self), "classes": classes, "shape": list(x.shape[1:])}
        content = hashlib.sha256(json.dumps(settings).encode())
        for part in (x, y):
            content.update(part.numpy().tobytes())
        settings["sha256"] = content.hexdigest()
        file = cache() / f"classifier-{settings['sha256'][:16]}.safetensors"
        with torch.random.fork_rng(devices=[]):  # nobody else's random numbers change
            torch.default_generator.manual_seed(self.seed)
            network = Digit(x.shape[1:], classes)
            if not restored(network, file):
                self._train(network, x, y)
                keep(network, file)
        held_out = len(x) // HELD_OUT
        settings |= {"dim": Digit.DIM, "held_out": held_out, "accuracy": accuracy(network, x[:held_out], y[:held_out])}
        return ClassifierExtractor(network, device, settings)

    def _train(self, network: nn.Module, x: Tensor, y: Tensor) -> None:
        """AdamW, one cycle, on all but the first tenth, moved by up to a pixel."""
        held_out, (height, width) = len(x) // HELD_OUT, x.shape[2:]
        optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, self.steps)
        with torch.enable_grad():
            for _ in range(self.steps):
                rows = torch.randint(held_out, len(x), (BATCH,))
                top, left = torch.randint(3, (2,)).tolist()
                moved = F.pad(x[rows], (1, 1, 1, 1))[..., top : top + height, left : left + width]
                loss = F.cross_entropy(network(moved).logits, y[rows], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()


class Digit(nn.Module):
    """Three convolutions down to 4x4 or less, 64 features, the scores; ``x`` uint8 ``[B, C, H, W]``."""

    DIM = WIDTH = 64

    def __init__(self, shape: Sequence[int], classes: int):
        super().__init__()
        inp, height, width = shape
        layers: list[nn.Module] = []
        for i, out in enumerate((self.WIDTH // 2, self.WIDTH, self.WIDTH)):
            stride = 2 if max(height, width) > (8, 4, 4)[i] else 1
            layers += [nn.Conv2d(inp, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            inp, height, width = out, -(-height // stride), -(-width // stride)
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inp * height * width, self.DIM), nn.ReLU())
        self.scores = nn.Linear(self.DIM, classes)

    def forward(self, x: Tensor) -> Seen:
        features = self.features(x.float() / 127.5 - 1)
        return Seen(features, self.scores(features))


class ClassifierExtractor:
    """See :class:`Classifier`. Pictures uint8 ``[B, *shape]``, of the shape that it was trained on."""

    def __init__(self, network: nn.Module, device: torch.device, settings: Mapping[str, Any]):
        self.network, self.device = network.to(device).eval(), device
        self.dim, self.settings = Digit.DIM, settings

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Seen:
        wanted = self.settings["shape"]
        if x.dtype != torch.uint8 or list(x.shape[1:]) != wanted:
            raise ValueError(f"classifier: given {x.dtype} {tuple(x.shape)}; needs uint8 pictures [B, *{wanted}]")
        parts = [self.network(part.to(self.device)) for part in x.split(CHUNK)]
        return Seen(*(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    network.eval()
    found = torch.cat([network(part).logits.argmax(1) for part in x.split(CHUNK)])
    return round(float((found == y).double().mean()), 4)


def restored(network: nn.Module, file: Path) -> bool:
    """Whether ``network`` now has the weights of ``file``; a damaged one is as good as none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        network.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError):
        return False
    return True


def keep(network: nn.Module, file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with atomic_write(file) as part:
            save_file({k: v.contiguous() for k, v in network.state_dict().items()}, part)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{file.parent}: cannot be written ({e}); set GENKIT_CACHE to another folder") from e


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


FEATURES: dict[str, type[Features]] = {"inception": Inception, "classifier": Classifier, "raw": Raw}
