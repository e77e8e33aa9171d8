"""Features against clean-fid's own extractor, with the published weights where they are and with random ones anywhere.

The published file is looked for at ``$GENKIT_INCEPTION`` and where genkit looks; the other tests need no file.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cleanfid.downloads_helper
import cleanfid.features
import cleanfid.fid
import cleanfid.inception_pytorch
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from genkit.config import ConfigError, from_dict, parse, table, to_yaml
from genkit.core import Spec
from genkit.data import DATA, InMemory
from genkit.metrics import FEATURES, features
from genkit.metrics.features import WAYS, Classifier, Features, Inception, Raw, Seen, like_tensorflow
from genkit.metrics.inception import NAME, Conv, InceptionV3, read_weights, sha256

MODES = list(WAYS)
PUBLISHED = next((p for p in (os.environ.get("GENKIT_INCEPTION"), features.CLEAN_FID, features.cache() / NAME)
                  if p and Path(p).is_file()), None)  # fmt: skip
published = pytest.mark.skipif(not PUBLISHED, reason=f"no {NAME}: name it with GENKIT_INCEPTION")
CIFAR = Path(os.environ.get("GENKIT_DATA", "data"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GENKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def pictures(n: int, c: int = 3, h: int = 32, w: int = 32, seed: int = 0) -> torch.Tensor:
    """Coloured blobs and some noise, uint8."""
    g = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(n, c, 4, 4, generator=g), (h, w), mode="bicubic") * 255
    return (x + 20 * torch.randn(n, c, h, w, generator=g)).clamp(0, 255).to(torch.uint8)


def as_folder(x: torch.Tensor, folder: Path) -> str:
    folder.mkdir()
    for i, p in enumerate(x):
        Image.fromarray(p.permute(1, 2, 0).numpy().squeeze()).save(folder / f"{i:05d}.png")
    return str(folder)


# --------------------------------------------------------------------------- clean-fid's networks, its way
def torch_names() -> dict[str, str]:
    """Of each convolution: pytorch-fid's name -> the TorchScript file's."""
    towers = lambda kind, tower, n: {f"{kind}_{i + 1}": f"{tower}.conv{f'_{i}' * (i > 0)}" for i in range(n)}  # noqa: E731
    a = {"branch1x1": "conv", **towers("branch5x5", "tower", 2), **towers("branch3x3dbl", "tower_1", 3)}
    b = {"branch3x3": "conv", **towers("branch3x3dbl", "tower", 3)}
    c = {"branch1x1": "conv", **towers("branch7x7", "tower", 3), **towers("branch7x7dbl", "tower_1", 5)}
    d = {**towers("branch3x3", "tower", 2), **towers("branch7x7x3", "tower_1", 4)}
    e = {"branch1x1": "conv", "branch3x3_1": "tower_conv", "branch3x3_2a": "tower_mixed_conv",
         "branch3x3_2b": "tower_mixed_conv_1", "branch3x3dbl_1": "tower_1_conv", "branch3x3dbl_2": "tower_1_conv_1",
         "branch3x3dbl_3a": "tower_1_mixed_conv", "branch3x3dbl_3b": "tower_1_mixed_conv_1",
         "branch_pool": "tower_2_conv"}  # fmt: skip
    pool = {"branch_pool": "tower_2.conv"}
    blocks = [("5b", "mixed", a | pool), ("5c", "mixed_1", a | pool), ("5d", "mixed_2", a | pool), ("6a", "mixed_3", b)]
    blocks += [(f"6{k}", f"mixed_{i}", c | pool) for k, i in zip("bcde", (4, 5, 6, 7), strict=True)]
    blocks += [("7a", "mixed_8", d), ("7b", "mixed_9", e), ("7c", "mixed_10", e)]
    stem = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
    names = {k: f"conv{f'_{i}' * (i > 0)}" for i, k in enumerate(stem)}
    return names | {f"Mixed_{k}.{x}": f"{n}.{y}" for k, n, block in blocks for x, y in block.items()}


PARTS = {"conv.weight": "weight", "bn.bias": "beta", "bn.running_mean": "mean", "bn.running_var": "var"}


def to_state_dict(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the file that pytorch-fid publishes."""
    state = {f"{k}.{a}": weights[f"layers.{v}.{b}"] for k, v in torch_names().items() for a, b in PARTS.items()}
    ones = {f"{k}.bn.weight": torch.ones_like(weights[f"layers.{v}.beta"]) for k, v in torch_names().items()}
    return state | ones | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


@pytest.fixture(scope="session")
def random_weights() -> dict[str, torch.Tensor]:
    """A network of full size whose weights are random, its batch norms too; with the layer of the logits."""
    g = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False).state_dict()
    weights = {}
    for theirs, ours in torch_names().items():
        out, inp, h, w = shapes[f"{theirs}.conv.weight"].shape
        noise = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
        weights[f"layers.{ours}.weight"] = noise(out, inp, h, w) * (2 / (inp * h * w)) ** 0.5
        weights[f"layers.{ours}.mean"], weights[f"layers.{ours}.beta"] = 0.3 * noise(out), 0.3 * noise(out)
        weights[f"layers.{ours}.var"] = (0.5 * noise(out)).exp()
    return {**weights, "output.weight": torch.randn(1008, 2048, generator=g), "output.bias": torch.ones(1008)}


class Script(nn.Module):
    """The outside of NVlabs' TorchScript network: TensorFlow 1's resizing, from its formula, and the features."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x, size = img.float(), 299
        for dim in (2, 3):
            n = x.shape[dim]
            place = torch.arange(size, dtype=torch.float64) * n / size
            low = place.floor().long()
            shape = [size, 1] if dim == 2 else [1, size]
            part = (place - low).float().reshape(shape)
            x = x.index_select(dim, low) * (1 - part) + x.index_select(dim, (low + 1).clamp(max=n - 1)) * part
        return self.layers((x - 128) / 128).reshape(-1, 2048)


def let_clean_fid_find(monkeypatch, folder: Path, weights: dict[str, torch.Tensor], layers: Any = None) -> None:
    """clean-fid loads these weights, in both of its layouts, instead of downloading them."""
    state = to_state_dict(weights)
    monkeypatch.setattr(cleanfid.inception_pytorch, "load_state_dict_from_url", lambda *a, **k: state)
    if layers is None:
        whole = cleanfid.inception_pytorch.InceptionV3(resize_input=False, normalize_input=False)
        layers = torch.jit.trace(nn.Sequential(*whole.blocks).eval(), torch.zeros(1, 3, 299, 299), check_trace=False)
    torch.jit.script(Script(layers)).save(str(folder / NAME))
    theirs = cleanfid.features.InceptionV3W
    monkeypatch.setattr(cleanfid.features, "InceptionV3W", lambda path, **k: theirs(str(folder), **k))


def by_clean_fid(folder: str, mode: str) -> np.ndarray:
    with warnings.catch_warnings():  # it changes the filters of the whole process
        network = cleanfid.features.build_feature_extractor(mode, torch.device("cpu"), use_dataparallel=False)
        return cleanfid.fid.get_folder_features(
            folder, network, num_workers=0, batch_size=8, device=torch.device("cpu"), mode=mode, verbose=False
        )


def assert_same(ours: torch.Tensor, theirs: np.ndarray, relative: float) -> None:
    """Of how much the features differ between pictures, not of their size."""
    spread = float(np.sqrt(np.square(theirs - theirs.mean(0)).mean()))
    assert ours.shape == theirs.shape
    assert float(np.abs(ours.numpy() - theirs).max()) < relative * spread


KINDS = {"rgb": pictures(2), "grey": pictures(2, c=1), "tall and large": pictures(2, h=330, w=41)}


def test_the_three_modes_are_clean_fids_with_random_weights(random_weights, tmp_path, monkeypatch):
    """Files of colour, grey and oblong pictures, read by clean-fid, through its two networks and all of its resizing."""
    let_clean_fid_find(monkeypatch, tmp_path, random_weights)
    save_file(random_weights, tmp_path / "random.safetensors")
    folders = {kind: as_folder(x, tmp_path / kind.replace(" ", "-")) for kind, x in KINDS.items()}
    for mode in MODES:
        see = Inception(mode, str(tmp_path / "random.safetensors")).load("cpu")
        kinds = KINDS if mode != "legacy_pytorch" else {"tall and large": KINDS["tall and large"]}
        for kind, x in kinds.items():
            assert_same(see(x).features, by_clean_fid(folders[kind], mode), 1e-3)
