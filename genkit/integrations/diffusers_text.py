"""``--data.encoder diffusers:DIR``: the words of a pipeline, read by its own text encoders.

Every family of diffusers reads a prompt in its own way: one to three encoders, the last layer or the one before it,
padding that is seen or masked, and something definite in place of no words. All this is in ``encode_prompt`` of the
pipeline, which is called here with its denoiser and autoencoder left out. The module is an entry of
``genkit.data.text.FOREIGN_ENCODERS``.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit.backbones.diffusers import diffusers_class
from genkit.core import Condition, Tokens, Vector
from genkit.core.files import format_error
from genkit.core.tensors import sha256
from genkit.data.text import Encoder, canonical_name, shorten
from genkit.integrations.diffusers_folder import locate, read_json

OPTIONS = ("max_sequence_length", "clean_caption", "complex_human_instruction")  # a pipeline's own defaults are taken
PARTS = ("text_encoder", "tokenizer")  # how the folders that read words begin


@dataclass(frozen=True)
class Reader:
    """What ``encode_prompt`` of a pipeline returns, and how it is called."""

    outputs: tuple[str, ...]
    """names of what it returns, in order, those of null with the prefix null; "" is not used"""

    @property
    def padding(self) -> str:
        """Whether the network sees the padding: see ``genkit.core.Tokens``."""
        return "masked" if "mask" in self.outputs else "seen"


READERS: Mapping[str, Reader] = {  # classes of pipelines
    "StableDiffusionPipeline": Reader(("text", "null text")),
    "StableDiffusionXLPipeline": Reader(("text", "null text", "pooled", "null pooled")),
    "StableDiffusion3Pipeline": Reader(("text", "null text", "pooled", "null pooled")),
    "FluxPipeline": Reader(("text", "pooled", "")),
    "PixArtSigmaPipeline": Reader(("text", "mask", "null text", "null mask")),
    "SanaPipeline": Reader(("text", "mask", "null text", "null mask")),
    "ChromaPipeline": Reader(("text", "", "mask", "null text", "", "null mask")),
    "AuraFlowPipeline": Reader(("text", "", "null text", "")),
    "Lumina2Pipeline": Reader(("text", "mask", "null text", "null mask")),
}


class PipelineEncoder(Encoder):
    """The text encoders of the pipeline ``pipe`` in the folder ``root``; states are float32, as the pipeline has them.

    The empty text is null: what the pipeline gives its network without words.
    """

    def __init__(self, name: str, root: Path, pipe: Any, reader: Reader):
        self.name, self.pipe, self.reader = name, pipe, reader
        for part, module in pipe.components.items():
            if part.startswith("text_encoder") and module is not None:
                module.eval().requires_grad_(False)
        self.sha256 = files_sha256(root)
        call = inspect.signature(pipe.__call__).parameters
        self.options = {name: call[name].default for name in OPTIONS if name in call}
        self.null = self.call([""], null=True)
        self.length, self.dim = self.null["text"].shape[1:]

    def call(self, texts: Sequence[str], null: bool = False) -> dict[str, Tensor]:
        """What ``encode_prompt`` returns for these texts, or what it returns for null."""
        known = inspect.signature(self.pipe.encode_prompt).parameters
        given = {
            "prompt": list(texts), "device": torch.device("cpu"), "num_images_per_prompt": 1,
            "do_classifier_free_guidance": null, **self.options,
        }  # fmt: skip
        required = {k: None for k, p in known.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        with torch.no_grad():
            out = self.pipe.encode_prompt(**{**required, **{k: v for k, v in given.items() if k in known}})
        prefix = "null " if null and any(name.startswith("null ") for name in self.reader.outputs) else ""
        named = {k: v for k, v in zip(self.reader.outputs, out, strict=True) if k and v is not None}
        chosen = {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}
        states = {k: v for k, v in chosen.items() if not k.startswith("null ")}
        return {k: v.bool() if k == "mask" else v.float() for k, v in states.items()}

    def encode(self, texts: Sequence[str], batch: int = 16) -> dict[str, Tensor]:
        for text in texts:
            self.require_length(text)
        parts = [self.call(texts[i : i + batch]) for i in range(0, len(texts), batch)]
        states = {k: torch.cat([part[k] for part in parts]) for k in self.null}
        empty = torch.tensor([not text for text in texts])
        return {k: torch.where(empty.view(-1, *(1,) * (v.ndim - 1)), self.null[k], v) for k, v in states.items()}

    def require_length(self, text: str) -> None:
        """``ValueError`` for a text of which the pipeline would leave out the end."""
        tokenizer = [v for k, v in sorted(self.pipe.components.items()) if k.startswith("tokenizer") and v][-1]
        count = len(tokenizer(text)["input_ids"])
        limit = min(self.options.get("max_sequence_length", self.length), tokenizer.model_max_length)
        if count > limit:
            raise ValueError(f"text: given {count} tokens ({shorten(text)}); {self.name} reads {limit}")

    def kinds(self, examples: tuple[str, ...]) -> dict[str, Condition]:
        name = canonical_name(self.name)
        kinds: dict[str, Condition] = {
            "text": Tokens(self.dim, name, self.sha256, self.length, examples, self.reader.padding)
        }
        if "pooled" in self.null:
            kinds["pooled"] = Vector(tuple(self.null["pooled"].shape[1:]), encoder=name)
        return kinds


def open_pipeline_encoder(where: str) -> PipelineEncoder:
    """The text encoders of the pipeline in a folder, or of the hub. ``ValueError`` if it has none that are served."""
    root = locate(where, "encoder")
    if not (root / "model_index.json").is_file():
        raise ValueError(f"encoder: {root} holds no model_index.json; needs the root of a pipeline")
    index = read_json(root / "model_index.json", "encoder")
    name = index.get("_class_name")
    if not isinstance(name, str) or name not in READERS:
        raise ValueError(f"encoder: {root} is a {name}; allowed: {', '.join(READERS)}")
    # all but what reads words is left out; the scheduler is a file of numbers that some pipelines ask for
    others = {k: None for k in index if not k.startswith(("_", "scheduler", *PARTS)) and isinstance(index[k], list)}
    pipeline = diffusers_class(name)
    try:
        with silence():
            pipe = pipeline.from_pretrained(
                root, **others, use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
        return PipelineEncoder(f"diffusers:{where}", root, pipe, READERS[name])
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as e:
        reason = format_error(e)[:200]
        raise ValueError(f"encoder: the text encoders in {root} cannot be read: {reason}") from e


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Hide the warnings of diffusers about parts that are left out, and the progress bars of both libraries."""
    import diffusers  # lazy: it takes seconds
    import transformers

    logs = [diffusers.utils.logging, transformers.utils.logging]
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (verbosity, bars) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


def files_sha256(root: Path) -> str:
    """One SHA-256 of all files of a pipeline that read words, with their names."""
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and p.name.startswith(PARTS)]
    digest = hashlib.sha256()
    for path in sorted(p for folder in folders for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(root)} {sha256(path)}\n".encode())
    return digest.hexdigest()
