"""Standard data sets of images, the same for everybody: digits, MNIST, Fashion-MNIST and CIFAR-10."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit.core import Data, Label
from genkit.core.files import one_line
from genkit.data.folders import Zip
from genkit.data.images import ImageSource, InMemory
from genkit.data.source import Split, check_split

DIGITS = tuple("0123456789")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True, kw_only=True)
class Digits(ImageSource):
    """1,797 handwritten digits, 8x8 grey, that come with scikit-learn. A fifth of each class is held out."""

    words = WORDS

    def load(self, split: Split = "train") -> InMemory:
        from sklearn.datasets import load_digits

        check_split(split)
        digits: Any = load_digits()
        held_out = np.zeros(len(digits.target), dtype=bool)
        shuffle = np.random.RandomState(0)  # numpy promises its numbers for ever; the split must never change
        for c in range(10):
            of_class = shuffle.permutation(np.flatnonzero(digits.target == c))
            held_out[of_class[: round(len(of_class) / 5)]] = True
        rows = np.flatnonzero(held_out == (split == "test"))
        pixels = torch.from_numpy(np.round(digits.images[rows] * 255 / 16).astype(np.uint8))
        labels = torch.from_numpy(digits.target[rows]).long()
        return self.from_array(pixels, {"label": labels}, {"label": Label(10, DIGITS)})


@dataclass(frozen=True, kw_only=True)
class Torchvision(ImageSource):
    """A classic that torchvision knows how to read, and downloads to ``root`` where it is absent."""

    root: str = "data"

    def read(self, name: str, files: str, split: Split) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Pixels ``[N, H, W]`` or ``[N, H, W, C]``, classes ``[N]`` and the names of ``torchvision.datasets.<name>``.

        ``files`` says where they are expected. ``ValueError`` in one line where they are neither there nor to be had.
        """
        from torchvision import datasets

        check_split(split)
        root, kind = Path(self.root).expanduser(), getattr(datasets, name)
        try:
            found = kind(root, train=split == "train")
        except Exception as e:  # damaged files trip it up in many ways, absent ones in one
            if "Dataset not found" not in str(e):
                raise ValueError(f"{name}: {root / files} cannot be read: {one_line(e)}") from e
            found = download(kind, root, split, files)
        pixels, labels = torch.as_tensor(found.data), torch.as_tensor(found.targets).long()
        if not 0 < len(pixels) == len(labels) or labels.min() < 0 or labels.max() >= len(found.classes):
            raise ValueError(
                f"{name}: {root / files} holds {len(pixels)} pictures and {len(labels)} labels; "
                f"needs as many, in 0..{len(found.classes) - 1}"
            )
        return pixels, labels, tuple(found.classes)


def download(kind: Any, root: Path, split: Split, files: str) -> Any:
    """torchvision's data set ``kind``, fetched to ``root``. ``ValueError`` where that fails; no waiting for ever."""
    import shutil
    import socket

    patience, fresh = socket.getdefaulttimeout(), not root.exists()
    socket.setdefaulttimeout(30)
    try:
        return kind(root, train=split == "train", download=True)
    except (OSError, RuntimeError) as e:
        hint = f"put {files} there, or name the folder above with --data.root"
        where = f"{kind.__name__}: not found in {root}, and cannot be downloaded"
        if fresh and not any(p.is_file() for p in root.rglob("*")):
            shutil.rmtree(root, ignore_errors=True)  # the empty folders that torchvision made
        raise ValueError(f"{where} ({one_line(e)}); {hint}") from e
    finally:
        socket.setdefaulttimeout(patience)


@dataclass(frozen=True, kw_only=True)
class Mnist(Torchvision):
    """70,000 handwritten digits, 28x28 grey (LeCun et al. 1998)."""

    words = WORDS

    def load(self, split: Split = "train") -> InMemory:
        pixels, labels, _ = self.read("MNIST", "MNIST/raw/*-ubyte", split)
        return self.from_array(pixels, {"label": labels}, {"label": Label(10, DIGITS)})


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
    published one) or from ``root/cifar10/{train,test}.zip``, which StyleGAN and EDM made popular.
    """

    flip: bool = True

    NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def load(self, split: Split = "train") -> Data:
        zips = Path(self.root).expanduser() / "cifar10"
        if (zips / "train.zip").exists() and not (zips.parent / "cifar-10-batches-py").exists():
            same = {f.name: getattr(self, f.name) for f in fields(ImageSource)}
            return Zip(**{**same, "root": str(zips)}).load(split, names=self.NAMES)
        pixels, labels, names = self.read("CIFAR10", "cifar-10-batches-py, or cifar10/{train,test}.zip,", split)
        return self.from_array(pixels, {"label": labels}, {"label": Label(10, names)})
