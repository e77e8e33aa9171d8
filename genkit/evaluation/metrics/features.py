"""Feature extractors: configurations whose ``load`` gives one (``genkit.evaluation.metrics.FEATURES`` names them).

    extract = Inception(resize="clean").load("cpu")
    features, logits = extract(images)                  # uint8 [B, C, H, W] -> [B, 2048], [B, 1008] or None

A distance cannot be compared without the settings of its features: ``extract.settings`` has everything that the
features depend on, ready for JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from http.client import HTTPException
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genkit.config.numbers import Count, Seed
from genkit.config.paths import PathText
from genkit.core import Data, Draw, Label
from genkit.core.device import warn_of_emulated_bf16
from genkit.core.files import atomic_write
from genkit.core.tensors import cache_folder, sha256
from genkit.evaluation.metrics.inception import DIM, NAME, SIZE, InceptionV3, read_weights

Device = torch.device | str
CHUNK = 100  # images at a time: activations of about 1 GiB
CLEAN_FID = Path("." if platform.system() == "Windows" else "/tmp") / NAME  # where cleanfid.features keeps the file


class Extraction(NamedTuple):
    """Features, float32 ``[B, D]``, and class scores ``[B, K]`` if the extractor has any."""

    features: Tensor
    logits: Tensor | None


class Extractor(Protocol):
    """A network, or just a reshape, that turns decoded samples into features."""

    @property
    def dim(self) -> int:
        """The number of features D; 0 if it is not known before the first samples."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that the features depend on, for JSON. Two sets of features compare if these are equal."""
        ...

    def __call__(self, x: Tensor) -> Extraction:
        """Features of decoded samples: images uint8 ``[B, C, H, W]`` or vectors ``[B, D]``. ``ValueError`` for others.

        Each row's features depend on that row alone.
        """
        ...


class Features(ABC):
    """The contract of a feature space: a frozen dataclass of settings (a YAML block) that loads an extractor."""

    @abstractmethod
    def load(self, device: Device, data: Data | None = None) -> Extractor:
        """The extractor, on ``device``. ``data`` is a labelled training split, for networks that train themselves.

        ``ValueError`` if weights are missing, or the data do not suit.
        """


# --------------------------------------------------------------------------------------------------- inception
Resize = Literal["clean", "legacy_tensorflow", "legacy_pytorch"]


def clean_fid_resizer(mode: str) -> Callable[[Tensor], Tensor]:
    """clean-fid's own resizer, applied to each image, in as many threads as torch has."""
    from cleanfid.resize import build_resizer  # lazy: slow to import

    with warnings.catch_warnings():  # build_resizer silences all warnings of the process for good
        resizer = build_resizer(mode)

    def resize_one(image: Tensor) -> Tensor:
        return torch.from_numpy(resizer(image.permute(1, 2, 0).numpy())).permute(2, 0, 1)

    def resize(x: Tensor) -> Tensor:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            return torch.stack(list(pool.map(resize_one, x.cpu())))

    return resize


def resize_like_tensorflow(x: Tensor) -> Tensor:
    """TensorFlow 1's ``resize_bilinear``: pixel j of 299 is at ``j w / 299``, half a pixel away from its centre.

    ``[B, C, H, W]`` to float32 ``[B, C, 299, 299]``.
    """
    b, c, h, w = x.shape
    theta = torch.eye(2, 3, device=x.device)
    theta[0, 2], theta[1, 2] = 1 / w - 1 / SIZE, 1 / h - 1 / SIZE
    grid = F.affine_grid(theta.expand(b, 2, 3), [b, c, SIZE, SIZE], align_corners=False)
    return F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class ResizeMode:
    """How images become the network's input: a description, the resizer, then ``x / scale - 1``."""

    description: str
    resizer: Callable[[], Callable[[Tensor], Tensor]]
    scale: float


RESIZE_MODES: dict[str, ResizeMode] = {
    "clean": ResizeMode("bicubic, antialiased, float (Pillow, by clean-fid)", lambda: clean_fid_resizer("clean"), 128),
    "legacy_tensorflow": ResizeMode("bilinear, no antialiasing (TensorFlow 1)", lambda: resize_like_tensorflow, 128),
    "legacy_pytorch": ResizeMode(
        "bilinear, no antialiasing (PyTorch, by clean-fid)", lambda: clean_fid_resizer("legacy_pytorch"), 127.5
    ),
}


@dataclass(frozen=True)
class Inception(Features):
    """Inception-v3 with the resizing of clean-fid (Parmar et al. 2022): the features of the FID.

    ``fast`` needs a CPU with bf16 instructions or a GPU; otherwise it is slower than fp32 (7.5 times with AVX2), and a
    warning says so. It changes the FID: between the first 600 images of CIFAR-10's test split and the next 600
    (``Moments.of(extract(x).features)`` of each, legacy_tensorflow) from 68.72 to 68.55; between fp32 and bf16 of the
    same 1,200 it is 0.28, so do not mix them.
    """

    resize: Resize = "clean"
    """How images become 299x299; FIDs of different modes do not compare (Parmar et al. 2022)."""
    weights: PathText | None = None
    """The file inception-2015-12-05.pt, or safetensors; None: where clean-fid keeps it, or genkit's cache."""
    fast: bool = False
    """Use bf16: to monitor a training, not to publish."""

    def load(self, device: Device, data: Data | None = None) -> InceptionExtractor:
        """The network, downloaded once if it is not found. ``data`` is not used."""
        return InceptionExtractor(self, torch.device(device))


class InceptionExtractor:
    """See :class:`Inception`. Takes uint8 images of any size, grey or RGB: ``[B, 1 or 3, H, W]``."""

    def __init__(self, config: Inception, device: torch.device):
        if config.resize not in RESIZE_MODES:
            raise ValueError(f"resize: given {config.resize!r}; allowed: {', '.join(RESIZE_MODES)}")
        file = find_weights(config.weights)
        if config.fast:
            warn_of_emulated_bf16("features.fast: bf16", device)
        self.network = InceptionV3(read_weights(file), torch.bfloat16 if config.fast else torch.float32).to(device)
        self.device, self.dim = device, self.network.dim
        if self.dim != DIM:
            raise ValueError(f"weights: {file} gives {self.dim} features; needs the {DIM} of {NAME}")
        mode = RESIZE_MODES[config.resize]
        self.resize, self.scale = mode.resizer(), mode.scale
        self.last_input: Tensor | None = None
        self.last_places: Tensor | None = None
        """``[B, 2023]``, the features of places (sFID) of the last input"""
        self.settings: Mapping[str, Any] = {
            "name": "inception",
            "resize": config.resize,
            "resize_method": f"{mode.description}, to {SIZE}x{SIZE}",
            "non_square": "stretched, as clean-fid does",
            "grey": "the same in all three channels",
            "clean_fid": version("clean-fid"),
            "sha256": sha256(file),
            "precision": "bf16" if config.fast else "fp32",
            "dim": self.dim,
        }

    def __call__(self, x: Tensor) -> Extraction:
        """Pool3 features ``[B, 2048]`` and, if the weights have them, logits ``[B, 1008]``."""
        if x.ndim != 4 or x.dtype != torch.uint8 or x.shape[1] not in (1, 3) or not x.numel():
            raise ValueError(
                f"inception: given {x.dtype} {tuple(x.shape)}; needs images, uint8 [B, 1 or 3, H, W] without "
                "transparency; for vectors take --features raw"
            )
        parts, places = [], []
        for part in x.split(CHUNK):
            parts.append(self._extract(part))
            assert self.network.places is not None
            places.append(self.network.places.flatten(1))
        self.last_input, self.last_places = x, torch.cat(places)
        logits = [part.logits for part in parts if part.logits is not None]
        return Extraction(torch.cat([part.features for part in parts]), torch.cat(logits) if logits else None)

    def _extract(self, x: Tensor) -> Extraction:
        resized = self.resize(x.expand(-1, 3, -1, -1)).to(self.device)
        return Extraction(*self.network(resized / self.scale - 1))


def find_weights(given: str | None) -> Path:
    """``given``, or where clean-fid keeps the file, or genkit's cache, to which it is downloaded if necessary."""
    places = [Path(given)] if given is not None else [p for p in (CLEAN_FID, cache_folder() / NAME) if p.is_file()]
    return places[0] if places else download_weights()


def download_weights() -> Path:
    """Download the weights with clean-fid into genkit's cache, atomically. ``ValueError`` if that fails."""
    from cleanfid import downloads_helper  # lazy: slow to import

    target, timeout = cache_folder() / NAME, socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=target.parent) as folder:
            file = downloads_helper.check_download_inception(folder)
            read_weights(file)  # a connection may end early without an error
            os.replace(file, target)
    except (OSError, HTTPException) as e:
        raise ValueError(
            f"weights: no {NAME} here, and it cannot be downloaded ({' '.join(str(e).split())}); get it from "
            f"{downloads_helper.inception_url} and put it at {target}, or name it with --features.weights"
        ) from e
    finally:
        socket.setdefaulttimeout(timeout)
    return target


# -------------------------------------------------------------------------------------------------- classifier
MAX_SIDE = 32  # pixels
BATCH, PEAK_LR = 128, 3e-3
HELD_OUT = 10  # one image in 10 is held out
MAX_IMAGES = 100_000  # a random subset of larger data sets


@dataclass(frozen=True)
class Classifier(Features):
    """A small network that trains itself on the labelled training split: for digits, and images up to 32 pixels.

    It trains once per data set, on the CPU, in seconds; afterwards it is found in the cache by the content of the data.
    A tenth of the data is held out, and the accuracy there is in ``settings``. Processes that load it at the same time
    each train their own: with several ranks, load it on one of them first. ``GENKIT_CACHE`` sets the cache's folder.
    """

    steps: Count = 500
    """Optimizer steps, of 128 images each."""
    seed: Seed = 0
    """Seed of the initial weights, of the held-out set, and of the order of the images."""

    def load(self, device: Device, data: Data | None = None) -> ClassifierExtractor:
        """The classifier of these ``data``, which need labels and images uint8 of at most 32 pixels a side."""
        if data is None:
            raise ValueError("classifier: trains itself, and there are no data; take --features inception or raw")
        shape, n = tuple(data.spec.shape), len(data)
        labels = {name: kind.num for name, kind in data.spec.cond.items() if isinstance(kind, Label)}
        if not labels:
            raise ValueError("classifier: these data have no labels; take --features inception or raw")
        if len(shape) != 3 or max(shape[1:]) > MAX_SIDE or n < 2 * HELD_OUT:
            raise ValueError(
                f"classifier: given {n} samples of shape {shape}; needs {2 * HELD_OUT} images or more, of at most "
                f"{MAX_SIDE} pixels a side; take --features inception, or raw for vectors"
            )
        rows = torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))[:MAX_IMAGES]
        batch, label = data.batch(rows, Draw((self.seed,), 0, len(rows))), min(labels)
        if batch.x.dtype != torch.uint8:
            raise ValueError(f"classifier: given {batch.x.dtype}; needs uint8 images; take --features raw")
        return self._load_or_train(batch.x, batch.cond[label], labels[label], torch.device(device))

    def _load_or_train(self, x: Tensor, y: Tensor, classes: int, device: torch.device) -> ClassifierExtractor:
        settings = {"name": "classifier", **asdict(self), "classes": classes, "shape": list(x.shape[1:])}
        content = hashlib.sha256(json.dumps(settings).encode())
        for part in (x, y):
            content.update(part.numpy().tobytes())
        settings["sha256"] = content.hexdigest()
        file = cache_folder() / f"classifier-{settings['sha256'][:16]}.safetensors"
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers do not change
            torch.default_generator.manual_seed(self.seed)
            network = SmallClassifier(x.shape[1:], classes)
            if not load_weights(network, file):
                self._train(network, x, y)
                save_weights(network, file)
        held_out = len(x) // HELD_OUT
        settings |= {"dim": SmallClassifier.DIM, "held_out": held_out}
        settings["accuracy"] = measure_accuracy(network, x[:held_out], y[:held_out])
        return ClassifierExtractor(network, device, settings)

    def _train(self, network: nn.Module, x: Tensor, y: Tensor) -> None:
        """AdamW with a one-cycle schedule, on all but the first tenth, shifted by up to a pixel."""
        held_out, (height, width) = len(x) // HELD_OUT, x.shape[2:]
        optimizer = torch.optim.AdamW(network.parameters(), PEAK_LR, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, self.steps)
        with torch.enable_grad():
            for _ in range(self.steps):
                rows = torch.randint(held_out, len(x), (BATCH,))
                top, left = torch.randint(3, (2,)).tolist()
                shifted = F.pad(x[rows], (1, 1, 1, 1))[..., top : top + height, left : left + width]
                loss = F.cross_entropy(network(shifted).logits, y[rows], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()


class SmallClassifier(nn.Module):
    """Three convolutions down to 4x4 or less, 64 features, the class scores; ``x`` uint8 ``[B, C, H, W]``."""

    DIM = WIDTH = 64

    def __init__(self, shape: Sequence[int], classes: int):
        super().__init__()
        channels, height, width = shape
        layers: list[nn.Module] = []
        for i, out in enumerate((self.WIDTH // 2, self.WIDTH, self.WIDTH)):
            stride = 2 if max(height, width) > (8, 4, 4)[i] else 1
            layers += [nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            channels, height, width = out, -(-height // stride), -(-width // stride)
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * width, self.DIM), nn.ReLU())
        self.scores = nn.Linear(self.DIM, classes)

    def forward(self, x: Tensor) -> Extraction:
        """Features ``[B, 64]`` and class scores."""
        features = self.features(x.float() / 127.5 - 1)
        return Extraction(features, self.scores(features))


class ClassifierExtractor:
    """See :class:`Classifier`. Takes uint8 images ``[B, *shape]`` of the shape it was trained on."""

    def __init__(self, network: nn.Module, device: torch.device, settings: Mapping[str, Any]):
        self.network, self.device = network.to(device).eval(), device
        self.dim, self.settings = SmallClassifier.DIM, settings

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Extraction:
        """Features ``[B, 64]`` and class scores ``[B, K]``."""
        shape = self.settings["shape"]
        if x.dtype != torch.uint8 or list(x.shape[1:]) != shape:
            raise ValueError(f"classifier: given {x.dtype} {tuple(x.shape)}; needs uint8 images [B, *{shape}]")
        parts = [self.network(part.to(self.device)) for part in x.split(CHUNK)]
        return Extraction(*(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.no_grad()
def measure_accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of images ``x`` that ``network`` assigns to their class ``y``, rounded to four digits."""
    network.eval()
    predicted = torch.cat([network(part).logits.argmax(1) for part in x.split(CHUNK)])
    return round(float((predicted == y).double().mean()), 4)


def load_weights(network: nn.Module, file: Path) -> bool:
    """Load ``file`` into ``network``. False if the file is missing or damaged."""
    try:
        network.load_state_dict(load_file(file))
    except (OSError, SafetensorError, RuntimeError):
        return False
    return True


def save_weights(network: nn.Module, file: Path) -> None:
    """Write the weights of ``network`` atomically. ``ValueError`` if the folder cannot be written."""
    try:
        with atomic_write(file) as part:
            save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, part)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{file.parent}: cannot be written ({e}); set GENKIT_CACHE to another folder") from e


# --------------------------------------------------------------------------------------------------------- raw
@dataclass(frozen=True)
class Raw(Features):
    """The samples themselves, flattened: for vectors, or for distances between pixels."""

    def load(self, device: Device, data: Data | None = None) -> RawExtractor:
        """The extractor; with ``data`` it knows the number of features in advance."""
        return RawExtractor(torch.device(device), 0 if data is None else prod(data.spec.shape))


class RawExtractor:
    """See :class:`Raw`. ``dim`` is 0 until the first samples if there were no ``data``."""

    def __init__(self, device: torch.device, dim: int):
        self.device, self.dim = device, dim
        self.settings: Mapping[str, Any] = {"name": "raw", "units": "those of the decoded samples (pixels: 0..255)"}

    def __call__(self, x: Tensor) -> Extraction:
        """``x`` ``[B, ...]`` as float32 ``[B, D]`` (float64 if it is that), without logits."""
        if x.ndim < 2:
            raise ValueError(f"raw: given shape {tuple(x.shape)}; needs samples [B, ...]")
        features = x.to(self.device, torch.promote_types(x.dtype, torch.float32)).flatten(1)
        if features.shape[1] != (self.dim or features.shape[1]):
            raise ValueError(f"raw: given samples of {features.shape[1]} numbers; needs {self.dim}")
        self.dim = features.shape[1]
        return Extraction(features, None)
