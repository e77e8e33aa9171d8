"""Inception's features of places (sFID), and the extractors of torch-fidelity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from genkit.config.paths import PathText
from genkit.core import Data
from genkit.core.files import format_error
from genkit.core.tensors import sha256
from genkit.evaluation.metrics.features import Device, Extraction, Features, Inception, InceptionExtractor, Resize
from genkit.evaluation.metrics.inception import PLACES


@dataclass(frozen=True)
class InceptionSpatial(Features):
    """The first 7 channels of Inception's 17x17 maps (mixed_6/conv): the features of sFID (Nash et al. 2021)."""

    resize: Resize = "clean"
    """How images become 299x299, as for --features inception."""
    weights: PathText | None = None
    """The file inception-2015-12-05.pt, as for --features inception."""

    def load(self, device: Device, data: Data | None = None) -> SpatialExtractor:
        """The network. ``data`` is not used."""
        return SpatialExtractor(Inception(self.resize, self.weights).load(device))


class SpatialExtractor:
    """See :class:`InceptionSpatial`. Its network may be that of an extractor of pool3 features beside it."""

    def __init__(self, base: InceptionExtractor):
        self.base, self.dim = base, PLACES
        self.settings: Mapping[str, Any] = {**base.settings, "name": "inception-spatial", "dim": PLACES}

    def share(self, base: InceptionExtractor) -> None:
        """Use the maps of ``base``, whose settings are the same, in place of a second pass."""
        self.base = base

    def __call__(self, x: Tensor) -> Extraction:
        """Features ``[B, 2023]``: the 7 channels of all 17x17 places."""
        if self.base.last_input is not x:
            self.base(x)
        assert self.base.last_places is not None
        return Extraction(self.base.last_places, None)


def share_networks(extractors: list[Any]) -> None:
    """Let extractors that need the same network of Inception run it once."""
    for extractor in extractors:
        for base in extractors:
            own = {**extractor.settings, "name": "inception", "dim": getattr(base, "dim", None)}
            if (
                isinstance(extractor, SpatialExtractor)
                and isinstance(base, InceptionExtractor)
                and own == base.settings
            ):
                extractor.share(base)


@dataclass(frozen=True)
class TorchFidelity(Features):
    """An extractor of the package torch-fidelity, with its own resizing and weights."""

    extractor: Literal[
        "inception-v3-compat", "vgg16", "clip-rn50", "clip-vit-b-16", "clip-vit-b-32", "clip-vit-l-14",
        "clip-vit-l-14-336px", "dinov2-vit-s-14", "dinov2-vit-b-14", "dinov2-vit-l-14", "dinov2-vit-g-14",
    ] = "inception-v3-compat"  # fmt: skip
    """Name of the extractor."""
    layer: str | None = None
    """Its features, such as 768 of inception-v3-compat. None: those that it takes for the Frechet distance."""
    weights: PathText | None = None
    """File of its weights, for the extractors that take one. None: it downloads them."""

    def load(self, device: Device, data: Data | None = None) -> FidelityExtractor:
        """The extractor. ``ValueError`` if the package or its weights are missing."""
        return FidelityExtractor(self, torch.device(device))


class FidelityExtractor:
    """See :class:`TorchFidelity`. Takes uint8 images of any size, grey or RGB: ``[B, 1 or 3, H, W]``."""

    def __init__(self, config: TorchFidelity, device: torch.device):
        try:
            from torch_fidelity.utils import create_feature_extractor  # lazy: optional
        except ImportError:
            raise ValueError("torch-fidelity: is not installed; pip install torch-fidelity") from None
        options = {"feature_extractor_weights_path": config.weights, "cuda": device.type == "cuda", "verbose": False}
        try:
            from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY as KNOWN  # lazy: optional

            layer = config.layer or KNOWN[config.extractor].get_default_feature_layer_for_metric("fid")
            self.network: Any = create_feature_extractor(config.extractor, [layer], **options)
        except Exception as e:  # no network, a wrong layer, a damaged file: of many kinds
            raise ValueError(f"torch-fidelity: {config.extractor} cannot be loaded ({format_error(e)[:150]})") from e
        self.device = device
        self.dim = self(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).features.shape[1]
        self.settings: Mapping[str, Any] = {
            "name": "torch-fidelity",
            "extractor": config.extractor,
            "layer": layer,
            "torch_fidelity": version("torch-fidelity"),
            "sha256": None if config.weights is None else sha256(Path(config.weights).expanduser()),
            "dim": self.dim,
        }

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Extraction:
        """Features ``[B, D]``."""
        if x.ndim != 4 or x.dtype != torch.uint8 or x.shape[1] not in (1, 3):
            raise ValueError(f"torch-fidelity: given {x.dtype} {tuple(x.shape)}; needs uint8 [B, 1 or 3, H, W]")
        (features,) = self.network(x.expand(-1, 3, -1, -1).contiguous().to(self.device))
        return Extraction(features.flatten(1).float(), None)
