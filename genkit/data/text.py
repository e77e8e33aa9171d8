"""Text as a condition: bytes for an encoder that is trained with the model, or the states of a frozen one.

The spec of a model says which: :class:`~genkit.core.Text` is bytes; :class:`~genkit.core.Tokens` with an ``encoder``
names a folder or hub id of transformers, or ``diffusers:DIR``, all encoders of a pipeline; and the sha256 of the
weights and vocabulary that were used in training (with others a prompt would mean something else). Only safetensors are
read, and no code that comes with a model is run.
"""

from __future__ import annotations

import gc
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from genkit.config import load_object
from genkit.core import Condition, Spec, Text, Tokens, Vector
from genkit.core.files import format_error
from genkit.core.tensors import cache_folder
from genkit.data.text_states import MappedTexts, TextTable, find_texts, open_texts

MAX_TOKENS = 512  # of encoders without a limit of their own
FLOAT16_MAX = 65504.0


# ------------------------------------------------------------------------------------------------------- bytes
def to_bytes(texts: Sequence[str], length: int) -> Tensor:
    """UTF-8 bytes plus 1, padded with 0: uint8 ``[N, L]``, L the longest. ``ValueError`` for a text over ``length``."""
    contents = [text.encode() for text in texts]
    for text, content in zip(texts, contents, strict=True):
        if len(content) > length:
            raise ValueError(f"text: given {len(content)} bytes ({shorten(text)}); this model reads at most {length}")
    out = torch.zeros(len(texts), max([1, *map(len, contents)]), dtype=torch.uint8)
    for row, content in zip(out, contents, strict=True):
        row[: len(content)] = torch.tensor([byte + 1 for byte in content], dtype=torch.uint8)
    return out


def to_texts(value: Tensor) -> list[str]:
    """The inverse of :func:`to_bytes`."""
    return [bytes(byte - 1 for byte in row if byte).decode(errors="replace") for row in value.tolist()]


def shorten(text: str) -> str:
    """The start of a text, quoted, for messages."""
    return repr(text if len(text) <= 40 else text[:37] + "...")


# ------------------------------------------------------------------------------------------------ frozen encoders
class Encoder(ABC):
    """Frozen text encoders, of one library."""

    name: str
    """where they are from, for messages"""
    sha256: str
    """of the weights and vocabularies"""

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The conditions of N texts: ``"text"`` ``[N, L, dim]`` and those that go with it (``"mask"`` ``[N, L]``,
        ``"pooled"`` ``[N, dim]``), on the CPU. ``ValueError`` for a text that is too long."""

    @abstractmethod
    def kinds(self, examples: tuple[str, ...]) -> dict[str, Condition]:
        """The kinds of these conditions, with some captions of the data."""


class TextEncoder(Encoder):
    """A frozen text encoder of transformers: ``(texts) -> (states [N, L, dim], mask [N, L])``, float16 on the CPU.

    States are those of the last layer. The mask is False for padding, and for all of an empty text.
    """

    def __init__(self, name: str, tokenizer: Any, model: Any):
        self.name, self.tokenizer, self.model = name, tokenizer, model.eval().requires_grad_(False)
        self.dim = int(model.config.hidden_size)
        positions = getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS  # T5 has no such table
        self.length = min(int(positions), int(tokenizer.model_max_length), MAX_TOKENS)
        self.sha256 = fingerprint(tokenizer, model)

    def __call__(self, texts: Sequence[str], batch: int = 64) -> tuple[Tensor, Tensor]:
        ids: list[list[int]] = [self.tokenizer(text)["input_ids"] for text in texts]
        for text, tokens in zip(texts, ids, strict=True):
            if len(tokens) > self.length:
                raise ValueError(f"text: given {len(tokens)} tokens ({shorten(text)}); {self.name} reads {self.length}")
        longest = max([1, *map(len, ids)])
        mask = torch.zeros(len(ids), longest, dtype=torch.bool)
        states = torch.zeros(len(ids), longest, self.dim, dtype=torch.float16)
        for first in range(0, len(ids), batch):
            rows = range(first, min(first + batch, len(ids)))
            width = max(1, max(len(ids[i]) for i in rows))
            padded = torch.full((len(rows), width), self.tokenizer.pad_token_id or 0)
            attended = torch.zeros(len(rows), width, dtype=torch.long)
            for row, i in enumerate(rows):
                padded[row, : len(ids[i])], attended[row, : len(ids[i])] = torch.tensor(ids[i]), 1
            with torch.no_grad():
                hidden = self.model(input_ids=padded, attention_mask=attended).last_hidden_state
            finite = hidden.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
            states[rows.start : rows.stop, :width] = finite * attended[..., None]
            mask[rows.start : rows.stop, :width] = attended.bool()
        return states, mask & torch.tensor([bool(text) for text in texts])[:, None]

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        states, mask = self(texts)
        return {"text": states, "mask": mask}

    def kinds(self, examples: tuple[str, ...]) -> dict[str, Condition]:
        return {"text": Tokens(self.dim, canonical_name(self.name), self.sha256, self.length, examples)}


def fingerprint(tokenizer: Any, model: Any) -> str:
    """sha256 of an encoder's weights and vocabulary, independent of the files that hold them."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


FOREIGN_ENCODERS = {  # KIND of KIND:WHERE -> "module:function" of a higher room, imported on demand
    "diffusers": "genkit.integrations.diffusers_text:open_pipeline_encoder",
}


@lru_cache(maxsize=2)
def open_encoder(name: str) -> Encoder:
    """Open the encoder in a local folder (of ``save_pretrained``, or a diffusers pipeline) or of a hub id, or all those
    of a pipeline, ``diffusers:DIR``.

    ``ValueError`` in one line if transformers, the folder, the network or the weights are missing.
    """
    kind, colon, where = name.partition(":")
    if colon and kind in FOREIGN_ENCODERS:
        return load_object(FOREIGN_ENCODERS[kind])(where)
    try:
        import transformers as hf  # lazy: optional
    except ImportError as e:
        raise ValueError(f"encoder: {name} needs transformers; install it: pip install 'genkit-torch[hub]'") from e
    folder = Path(name).expanduser()
    pipeline = (folder / "model_index.json").is_file()
    subfolders = [{"subfolder": sub} if pipeline else {} for sub in ("text_encoder", "tokenizer")]
    source, safe = str(folder) if folder.is_dir() else name, {"trust_remote_code": False}
    before = hf.logging.get_verbosity()
    hf.logging.set_verbosity_error()  # the text half of a larger model leaves weights unused, as expected
    try:
        config = hf.AutoConfig.from_pretrained(source, **safe, **subfolders[0])
        config = TEXT_CONFIGS[config.model_type](config) if config.model_type in TEXT_CONFIGS else config
        model = hf.AutoModelForTextEncoding.from_pretrained(
            source, config=config, use_safetensors=True, dtype=torch.float32, **safe, **subfolders[0]
        )
        return TextEncoder(name, hf.AutoTokenizer.from_pretrained(source, **safe, **subfolders[1]), model)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as e:
        reason = format_error(e)[:160]
        kind = "the folder" if folder.is_dir() else "neither a folder nor available from the hub:"
        raise ValueError(
            f"encoder: {name} cannot be opened ({kind} {reason}); needs a text encoder of transformers with "
            "safetensors: CLIP's text half, T5, BERT ...; or diffusers:PIPELINE, the root of a pipeline"
        ) from e
    finally:
        hf.logging.set_verbosity(before)


TEXT_CONFIGS: Mapping[str, Callable[[Any], Any]] = {"clip": lambda config: config.text_config}  # of larger models


def canonical_name(name: str) -> str:
    """An encoder's name as a spec stores it: the absolute path of a folder, or the hub id."""
    kind, colon, where = name.partition(":")
    prefix = kind + colon if colon and kind in FOREIGN_ENCODERS else ""
    folder = Path(where if prefix else name).expanduser()
    return f"{prefix}{folder.resolve()}" if folder.is_dir() else name


def states_folder(sha256: str) -> Path:
    """The folder of genkit's cache with the states of an encoder."""
    return cache_folder() / "text" / sha256[:32]


def open_states(encoder: Encoder, texts: Sequence[str]) -> MappedTexts:
    """The states of ``texts`` on disk, where those that are not there yet are written."""
    return open_texts(states_folder(encoder.sha256), texts, encoder.encode)


def read_states(name: str, sha256: str, texts: Sequence[str], known: TextTable | None = None) -> dict[str, Tensor]:
    """The states of ``texts`` by the encoder ``name``: of ``known`` ones or in the cache, else computed.

    The encoder is opened in the last case only. ``ValueError`` if it is missing or differs from that of ``sha256``.
    """
    if isinstance(known, MappedTexts) and (rows := known.find(texts)) is not None:
        return known.select(rows)
    if (cached := find_texts(states_folder(sha256), texts)[0]) is not None:
        return cached.select(torch.arange(len(texts)))
    try:
        encoder = open_encoder(name)
    except ValueError as e:
        raise ValueError(f"encoder: this model reads text by {name}, sha256 {sha256[:12]}: {e}") from e
    if encoder.sha256 != sha256:
        raise ValueError(
            f"encoder: this model reads text by {name}, sha256 {sha256[:12]}, but the one found has "
            f"{encoder.sha256[:12]}; restore the former"
        )
    return encoder.encode(texts)


def release_encoders() -> None:
    """Give back the memory of all encoders that were opened; one that is needed again is opened again."""
    if open_encoder.cache_info().currsize:
        open_encoder.cache_clear()
        gc.collect()  # slow in a process that holds many objects


# ------------------------------------------------------------------------------------------------------ prompts
def prompts_to_bytes(
    name: str, kind: Text, prompts: Sequence[str], known: TextTable | None = None
) -> dict[str, Tensor]:
    """The condition of prompts that the model reads as bytes."""
    return {name: to_bytes(prompts, kind.length)}


def prompts_to_states(
    name: str, kind: Tokens, prompts: Sequence[str], known: TextTable | None = None
) -> dict[str, Tensor]:
    """The condition and mask of prompts that a frozen encoder reads. ``ValueError`` if it differs from training's."""
    states = read_states(kind.encoder, kind.sha256, prompts, known)
    return {name if k == "text" else k: v for k, v in states.items()}


PROMPT_READERS: Mapping[type, Callable[[str, Any, Sequence[str], TextTable | None], dict[str, Tensor]]] = {
    Text: prompts_to_bytes,
    Tokens: prompts_to_states,
}


def text_conditions(spec: Spec) -> dict[str, Text | Tokens]:
    """The conditions of a model that a prompt can give."""
    readable = {k: v for k, v in spec.cond.items() if isinstance(v, (Text, Tokens))}
    return {k: v for k, v in readable.items() if isinstance(v, Text) or v.encoder}


def conditions_of_prompts(spec: Spec) -> set[str]:
    """The names of all conditions that a prompt gives: those of :func:`text_conditions` and what comes with them."""
    pooled = {k for k, v in spec.cond.items() if isinstance(v, Vector) and v.encoder}
    return {*text_conditions(spec), *pooled}


def caption_examples(spec: Spec) -> tuple[str, ...]:
    """Some captions of the data that a model was trained on; () if it reads no text."""
    return next((kind.examples for kind in text_conditions(spec).values()), ())


def encode_prompts(spec: Spec, prompts: Sequence[str], known: TextTable | None = None) -> dict[str, Tensor]:
    """``prompts`` as the conditions of N samples; the states of some texts may be ``known``.

    ``ValueError`` if the model reads no text.
    """
    kinds = text_conditions(spec)
    if not kinds:
        names = ", ".join(f"{k} ({type(v).__name__.lower()})" for k, v in spec.cond.items()) or "none"
        raise ValueError(f"prompt: given {shorten(prompts[0])}, but this model reads no text; its conditions: {names}; "
                         "train one with --data.captions")  # fmt: skip
    read = (PROMPT_READERS[type(kind)](name, kind, prompts, known) for name, kind in kinds.items())
    return {k: v for values in read for k, v in values.items()}
