"""Data of any size on one core: the first batch of a large folder, decoding, and the memory of mapped latents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from genkit.core import Spec, spec_to_dict
from genkit.core.tensors import sha256
from genkit.data import Stream
from genkit.data.local_files import Folder

LINKS = 1000  # hard links to one file, of which file systems allow some ten thousand
MEMORY = """
import sys, psutil, torch
from genkit.core import Draw
from genkit.data.latents import Latents
data = Latents(root=sys.argv[1]).load()
order = torch.randperm(len(data), generator=torch.Generator().manual_seed(int(sys.argv[2])))
peak = 0
for i in range(0, len(data), 256):
    data.batch(order[i : i + 256], Draw((0,), 0, len(order[i : i + 256])))
    memory = psutil.Process().memory_info()
    peak = max(peak, memory.rss - memory.shared)
print(peak)
"""


def measure_folder(num: int = 200_000, classes: int = 1000) -> list[dict[str, Any]]:
    """CPU seconds from nothing to the first batch of 64 pictures of a folder."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_folder(root, num, classes)
        begun = time.process_time()
        data = Folder(root=folder, size=32, memory=0).load("train")
        listed = time.process_time()
        Stream(data, 64, 0, workers=0)(0, 0, 0, 64)
        first = time.process_time()
    return [{"files": num, "classes": classes, "list_s": listed - begun, "first_batch_s": first - begun}]


def make_folder(root: Path, num: int, classes: int) -> None:
    """``num`` pictures in class folders: hard links to as few files as a file system allows."""
    for c in range(classes):
        (root / f"n{c:05d}").mkdir()
    source = root
    for i in range(num):
        path = root / f"n{i % classes:05d}" / f"{i:07d}.png"
        if i % LINKS:
            os.link(source, path)
        else:
            noise_picture(i, (32, 32)).save(path)
            source = path


def noise_picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """A smooth picture of random colours."""
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def measure_decoding(num: int = 256) -> list[dict[str, Any]]:
    """JPEGs of 500x375 a CPU second and core, as batches for training, at two sizes."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(num):
            noise_picture(i, (500, 375)).save(Path(folder) / f"{i}.jpg", quality=90)
        for size in (64, 256):
            stream = Stream(Folder(root=folder, size=size, memory=0).load("train"), 64, 0, workers=0)
            begun = time.process_time()
            for step in range(num // 64):
                stream(step, 0, 0, 64)
            rows.append({"size": size, "images_per_s": num / (time.process_time() - begun)})
    return rows


def measure_memory(shards: tuple[int, ...] = (2, 20), rows: int = 800) -> list[dict[str, Any]]:
    """The most memory of two processes that draw an epoch of latents, without the pages that they share."""
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        for num in shards:
            root = Path(folder) / str(num)
            write_latents(root, num, rows)
            size = sum(path.stat().st_size for path in root.glob("*.safetensors"))
            both = [
                subprocess.Popen([sys.executable, "-c", MEMORY, str(root), str(rank)], stdout=subprocess.PIPE)
                for rank in range(2)
            ]
            own = max(int(process.communicate()[0]) for process in both)
            measured.append({"latents_MB": size / 1e6, "own_MB": own / 1e6})
    return measured


def write_latents(root: Path, num: int, rows: int) -> None:
    """Shards of random moments 4x32x32 in two views, as ``genkit encode`` writes them."""
    root.mkdir()
    for k in range(num):
        moments = {name: torch.randn(rows, 2, 4, 32, 32) for name in ("mean", "log_var")}
        save_file(moments, root / f"{k}.safetensors")
    names = [f"{k}.safetensors" for k in range(num)]
    split = {"spec": spec_to_dict(Spec((4, 32, 32))), "shards": {n: sha256(root / n) for n in names}, "statistics": {}}
    (root / "latents.json").write_text(json.dumps({"stage": {}, "data": {}, "splits": {"train": split}}))
