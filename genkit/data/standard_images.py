"""Standard data sets of images: digits, MNIST, Fashion-MNIST and CIFAR-10."""

from __future__ import annotations

import shutil
import socket
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.config.paths import PathText
from genkit.core import Data, Label
from genkit.core.files import format_error
from genkit.data.images import ImageSource
from genkit.data.in_memory import InMemory
from genkit.data.local_files import Zip
from genkit.data.source import Split, check_split

DIGIT_NAMES = tuple("0123456789")
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TIMEOUT = 30  # seconds that a download waits for an answer


@dataclass(frozen=True, kw_only=True)
class Digits(ImageSource):
    """1,797 handwritten digits, 8x8 grey, that come with scikit-learn. A fifth of each class is the test split."""

    class_words = DIGIT_WORDS

    def load(self, split: Split = "train") -> InMemory:
        from sklearn.datasets import load_digits  # lazy: speed

        check_split(split)
        digits: Any = load_digits()
        held_out = np.zeros(len(digits.target), dtype=bool)
        shuffle = np.random.RandomState(0)  # numpy guarantees its numbers; the split must never change
        for c in range(10):
            of_class = shuffle.permutation(np.flatnonzero(digits.target == c))
            held_out[of_class[: round(len(of_class) / 5)]] = True
        rows = np.flatnonzero(held_out == (split == "test"))
        pixels = torch.from_numpy(np.round(digits.images[rows] * 255 / 16).astype(np.uint8))
        labels = torch.from_numpy(digits.target[rows]).long()
        return self.from_array(pixels, {"label": labels}, {"label": Label(10, DIGIT_NAMES)})


@dataclass(frozen=True, kw_only=True)
class Torchvision(ImageSource):
    """Base of the data sets that torchvision reads, and downloads if they are missing."""

    root: PathText = "data"
    """the folder that holds the data set's own folder"""

    def read(self, name: str, files: str, split: Split) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Pixels ``[N, H, W]`` or ``[N, H, W, C]``, classes ``[N]`` and class names of ``torchvision.datasets.<name>``.

        ``files`` describes the files below ``root``. ``ValueError`` if they are damaged, or missing and not available.
        """
        from torchvision import datasets  # lazy: speed

        check_split(split)
        root, kind = Path(self.root).expanduser(), getattr(datasets, name)
        try:
            data = kind(root, train=split == "train")
        except Exception as e:  # damaged files fail in many ways, missing ones in one
            if "Dataset not found" not in str(e):
                raise ValueError(f"{name}: {root / files} cannot be read: {format_error(e)}") from e
            data = download(kind, root, split, files)
        pixels, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets).long()
        if not 0 < len(pixels) == len(labels) or labels.min() < 0 or labels.max() >= len(data.classes):
            raise ValueError(
                f"{name}: {root / files} holds {len(pixels)} images and {len(labels)} labels; "
                f"needs equally many, with labels in 0..{len(data.classes) - 1}"
            )
        return pixels, labels, tuple(data.classes)


def download(kind: Any, root: Path, split: Split, files: str) -> Any:
    """Download torchvision's data set ``kind`` to ``root``. ``ValueError`` if that fails or the server is silent."""
    timeout, is_new = socket.getdefaulttimeout(), not root.exists()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        return kind(root, train=split == "train", download=True)
    except (OSError, RuntimeError) as e:
        hint = f"put {files} there, or name the folder above with --data.root"
        problem = f"{kind.__name__}: not found in {root}, and cannot be downloaded"
        if is_new and not any(p.is_file() for p in root.rglob("*")):
            shutil.rmtree(root, ignore_errors=True)  # the empty folders that torchvision made
        raise ValueError(f"{problem} ({format_error(e)}); {hint}") from e
    finally:
        socket.setdefaulttimeout(timeout)


@dataclass(frozen=True, kw_only=True)
class Mnist(Torchvision):
    """70,000 handwritten digits, 28x28 grey (LeCun et al. 1998)."""

    class_words = DIGIT_WORDS

    def load(self, split: Split = "train") -> InMemory:
        pixels, labels, _ = self.read("MNIST", "MNIST/raw/*-ubyte", split)
        return self.from_array(pixels, {"label": labels}, {"label": Label(10, DIGIT_NAMES)})


@dataclass(frozen=True, kw_only=True)
class FashionMnist(Torchvision):
    """70,000 pieces of clothing, 28x28 grey (Xiao et al. 2017)."""

    def load(self, split: Split = "train") -> InMemory:
        pixels, labels, names = self.read("FashionMNIST", "FashionMNIST/raw/*-ubyte", split)
        return self.from_array(pixels, {"label": labels}, {"label": Label(10, names)})


@dataclass(frozen=True, kw_only=True)
class Cifar10(Torchvision):
    """60,000 photographs, 32x32 colour, of ten classes (Krizhevsky 2009).

    Read from torchvision's ``root/cifar-10-batches-py`` (pickles, which torchvision opens only if their MD5 is the
    published one) or from ``root/cifar10/{train,test}.zip``, the layout of StyleGAN and EDM.
    """

    flip: bool = True
    """mirror half of the images of a batch left to right"""

    NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def load(self, split: Split = "train") -> Data:
        zips = Path(self.root).expanduser() / "cifar10"
        if (zips / "train.zip").exists() and not (zips.parent / "cifar-10-batches-py").exists():
            settings = {f.name: getattr(self, f.name) for f in fields(ImageSource)}
            return Zip(**{**settings, "root": str(zips)}).load(split, class_names=self.NAMES)
        pixels, labels, names = self.read("CIFAR10", "cifar-10-batches-py, or cifar10/{train,test}.zip,", split)
        return self.from_array(pixels, {"label": labels}, {"label": Label(10, names)})
