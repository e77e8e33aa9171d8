"""Features of large vision transformers: DINOv2 (FD-DINOv2, Stein et al. 2023) and CLIP (CMMD, Jayasumana et al. 2024).

Weights are those of transformers: a folder on this machine, or a model of the Hugging Face Hub.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge
from PIL import Image
from torch import Tensor

from genkit.config.paths import PathText
from genkit.core import Data
from genkit.core.files import format_error
from genkit.core.hub import call_hub
from genkit.core.tensors import sha256
from genkit.evaluation.metrics.features import Device, Extraction, Features
from genkit.integrations.diffusers_text import silence

Resizer = Callable[[Tensor, int], Tensor]
"""uint8 ``[B, 3, H, W]`` and a side to float32 ``[B, 3, side, side]`` in 0..255"""

BATCH = 16  # images at a time: activations of about 1 GiB
FILE = "model.safetensors"


def resize_pillow(x: Tensor, side: int) -> Tensor:
    """Bicubic with antialiasing by Pillow, rounded to 8 bits, as torchvision's ``Resize`` does to a picture."""

    def resize_one(image: Tensor) -> np.ndarray:
        picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
        return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC))

    return torch.from_numpy(np.stack([resize_one(image) for image in x])).permute(0, 3, 1, 2).float()


def resize_float(x: Tensor, side: int) -> Tensor:
    """Bicubic with antialiasing (Keys' kernel, a = -0.5), without rounding, as ``jax.image.resize`` does."""
    return F.interpolate(x.float(), (side, side), mode="bicubic", antialias=True, align_corners=False)


def resize_tensorflow(x: Tensor, side: int) -> Tensor:
    """TensorFlow 1's bilinear, without antialiasing: pixel j of the result is at ``j w / side``."""
    b, c, h, w = x.shape
    theta = torch.eye(2, 3, device=x.device)
    theta[0, 2], theta[1, 2] = 1 / w - 1 / side, 1 / h - 1 / side
    grid = F.affine_grid(theta.expand(b, 2, 3), [b, c, side, side], align_corners=False)
    return F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)


RESIZERS: Mapping[str, Resizer] = {"pillow": resize_pillow, "float": resize_float, "tensorflow": resize_tensorflow}
ResizerName = Literal["pillow", "float", "tensorflow"]


@dataclass(frozen=True)
class DINOv2(Features):
    """DINOv2's class token, the features of FD-DINOv2 (Stein et al. 2023)."""

    weights: PathText | None = None
    """Folder with config.json and model.safetensors of transformers. None: --features.model of the hub."""
    model: str = "facebook/dinov2-large"
    """Model of the Hugging Face Hub; the published distances are of ViT-L/14."""
    side: Annotated[int, Ge(1)] = 224
    """Side of the pictures that the network sees."""
    resize: ResizerName = "pillow"
    """pillow: as Stein et al. (bicubic, 8 bits); float: without rounding; tensorflow: as torch-fidelity (bilinear)."""

    kind: ClassVar[str] = "dinov2"
    mean: ClassVar[tuple[float, float, float]] = (0.485, 0.456, 0.406)
    std: ClassVar[tuple[float, float, float]] = (0.229, 0.224, 0.225)

    def load(self, device: Device, data: Data | None = None) -> VisionExtractor:
        """The network. ``ValueError`` if its weights are neither a folder here nor on the hub."""

        def embed(network: Any, x: Tensor) -> Tensor:
            return network(pixel_values=x).last_hidden_state[:, 0]

        return load_extractor(self, "Dinov2Model", embed, device)


@dataclass(frozen=True)
class CLIP(Features):
    """CLIP's picture embeddings of length 1, the features of CMMD (Jayasumana et al. 2024)."""

    weights: PathText | None = None
    """Folder with config.json and model.safetensors of transformers. None: --features.model of the hub."""
    model: str = "openai/clip-vit-large-patch14-336"
    """Model of the Hugging Face Hub; the published distances are of ViT-L/14 at 336 pixels."""
    side: Annotated[int, Ge(1)] | None = None
    """Side of the pictures that the network sees. None: that of the network, 336 for the published one."""
    resize: ResizerName = "float"
    """float: as Jayasumana et al. (bicubic); pillow: rounded to 8 bits; tensorflow: as torch-fidelity (bilinear)."""

    kind: ClassVar[str] = "clip"
    mean: ClassVar[tuple[float, float, float]] = (0.48145466, 0.4578275, 0.40821073)
    std: ClassVar[tuple[float, float, float]] = (0.26862954, 0.26130258, 0.27577711)

    def load(self, device: Device, data: Data | None = None) -> VisionExtractor:
        """The network. ``ValueError`` if its weights are neither a folder here nor on the hub."""

        def embed(network: Any, x: Tensor) -> Tensor:
            return F.normalize(network(pixel_values=x).image_embeds, dim=1)

        return load_extractor(self, "CLIPVisionModelWithProjection", embed, device)


class VisionExtractor:
    """See :class:`DINOv2` and :class:`CLIP`. Takes uint8 images of any size, grey or RGB: ``[B, 1 or 3, H, W]``."""

    def __init__(
        self,
        config: DINOv2 | CLIP,
        network: Any,
        digest: str,
        embed: Callable[[Any, Tensor], Tensor],
        device: torch.device,
    ):
        self.network, self.embed, self.device = network.to(device).float().eval(), embed, device
        self.kind, self.resize = config.kind, RESIZERS[config.resize]
        self.side: int = config.side or network.config.image_size
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) * 255 for v in (config.mean, config.std))
        try:
            self.dim = self(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).features.shape[1]
        except (ValueError, RuntimeError) as e:
            raise ValueError(
                f"side: given {self.side}, which this network of {config.kind} cannot see ({format_error(e)[:150]}); "
                f"take --features.side {network.config.image_size}"
            ) from e
        self.settings: Mapping[str, Any] = {
            "name": config.kind,
            "model": config.model if config.weights is None else "folder",
            "resize": config.resize,
            "side": self.side,
            "non_square": "stretched",
            "grey": "the same in all three channels",
            "sha256": digest,
            "dim": self.dim,
        }

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Extraction:
        """Features ``[B, D]`` float32, without class scores."""
        if x.ndim != 4 or x.dtype != torch.uint8 or x.shape[1] not in (1, 3) or not x.numel():
            raise ValueError(
                f"{self.kind}: given {x.dtype} {tuple(x.shape)}; needs images, uint8 [B, 1 or 3, H, W] without "
                "transparency; for vectors take --features raw"
            )
        return Extraction(torch.cat([self._extract(part) for part in x.split(BATCH)]), None)

    def _extract(self, x: Tensor) -> Tensor:
        resized = self.resize(x.expand(-1, 3, -1, -1), self.side).to(self.device)
        return self.embed(self.network, (resized - self.mean) / self.std).float()


def load_extractor(
    config: DINOv2 | CLIP, network_class: str, embed: Callable[[Any, Tensor], Tensor], device: Device
) -> VisionExtractor:
    """The extractor of ``config``, whose features are ``embed(network, pictures)``."""
    network, digest = load_transformer(network_class, config.weights, config.model, config.kind)
    return VisionExtractor(config, network, digest, embed, torch.device(device))


def load_transformer(kind: str, weights: str | None, model: str, owner: str) -> tuple[Any, str]:
    """A network of transformers from the folder ``weights``, else from the hub, and the sha256 of its weights.

    ``ValueError`` in one line if transformers, the folder or the network is missing.
    """
    try:
        import transformers  # lazy: an extra, slow to import
    except ImportError:
        raise ValueError(f"{owner}: needs transformers; pip install 'genkit-torch[hub]'") from None
    if weights is not None:
        folder = Path(weights).expanduser()
        if not (folder / "config.json").is_file():
            raise ValueError(f"weights: given {weights}, which holds no config.json; needs a folder of transformers")
    else:
        hint = (
            f"; on a machine with a network: hf download {model} --local-dir DIR, then name that folder with "
            "--features.weights DIR"
        )
        patterns = ["config.json", "*.safetensors"]
        folder = Path(call_hub(owner, model, lambda hub: cached_or_downloaded(hub, model, patterns), hint))
    file = folder / FILE
    if not file.is_file():
        source = weights or model
        raise ValueError(
            f"weights: {folder} holds no {FILE}, and other files are not read; where you trust them, "
            f"transformers.{kind}.from_pretrained({source!r}).save_pretrained(DIR) writes it"
        )
    try:
        with silence():
            network, loading = getattr(transformers, kind).from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise ValueError(f"weights: {folder} is no {kind} of transformers ({format_error(e)[:150]})") from e
    if missing := sorted(loading["missing_keys"]):  # transformers would leave them random
        raise ValueError(f"weights: {folder} is no {kind} of transformers: it lacks {len(missing)} of the network's "
                         f"tensors, such as {missing[0]}")  # fmt: skip
    return network, sha256(file)


def cached_or_downloaded(hub: Any, model: str, patterns: list[str]) -> str:
    """The folder of a model in the hub library's cache, downloaded if it, or its file of weights, is not there: an
    earlier download may have been interrupted."""
    with contextlib.suppress(hub.errors.LocalEntryNotFoundError):
        folder = hub.snapshot_download(model, allow_patterns=patterns, local_files_only=True)
        if (Path(folder) / FILE).is_file():
            return folder
    return hub.snapshot_download(model, allow_patterns=patterns)
