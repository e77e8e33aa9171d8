"""Words as conditions: bytes for an encoder that is trained along, or what a frozen one of transformers makes of them.

A model's spec says which (:data:`WORDED`): :class:`~genkit.core.Text` is bytes; :class:`~genkit.core.Tokens` with an
``encoder`` names a folder or hub id, and the sha256 of the weights and vocabulary that were seen in training, without
which a prompt would mean something else. Only safetensors are read, and no code that comes with a model is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from genkit.core import Spec, Text, Tokens
from genkit.core.files import atomic_write, one_line
from genkit.core.tensors import cache


# ------------------------------------------------------------------------------------------------------- bytes
def to_bytes(texts: Sequence[str], length: int) -> Tensor:
    """UTF-8 bytes plus 1, then zeros: uint8 ``[N, L]``, L the longest. ``ValueError`` for one over ``length``."""
    encoded = [text.encode() for text in texts]
    for text, found in zip(texts, encoded, strict=True):
        if len(found) > length:
            raise ValueError(f"text: given {len(found)} bytes ({start(text)}); this model reads {length} at most")
    out = torch.zeros(len(texts), max([1, *map(len, encoded)]), dtype=torch.uint8)
    for row, found in zip(out, encoded, strict=True):
        row[: len(found)] = torch.tensor([byte + 1 for byte in found], dtype=torch.uint8)
    return out


def to_texts(value: Tensor) -> list[str]:
    """The inverse of :func:`to_bytes`."""
    return [bytes(byte - 1 for byte in row if byte).decode(errors="replace") for row in value.tolist()]


def start(text: str) -> str:
    """Enough of a text to know it by, for messages."""
    return repr(text if len(text) <= 40 else text[:37] + "...")


# ------------------------------------------------------------------------------------------------ frozen encoders
class Frozen:
    """A text encoder of transformers: ``(texts) -> (states [N, L, dim], mask [N, L])``, on the CPU, float16.

    States are those of the last layer; the mask hides padding, and all of an empty text.
    """

    def __init__(self, name: str, tokenizer: Any, model: Any):
        self.name, self.tokenizer, self.model = name, tokenizer, model.eval().requires_grad_(False)
        self.dim = int(model.config.hidden_size)
        places = getattr(model.config, "max_position_embeddings", None) or LONGEST  # T5 has no table of positions
        self.length = min(int(places), int(tokenizer.model_max_length), LONGEST)
        self.sha256 = fingerprint(tokenizer, model)

    def __call__(self, texts: Sequence[str], batch: int = 64) -> tuple[Tensor, Tensor]:
        ids: list[list[int]] = [self.tokenizer(text)["input_ids"] for text in texts]
        for text, found in zip(texts, ids, strict=True):
            if len(found) > self.length:
                raise ValueError(f"text: given {len(found)} tokens ({start(text)}); {self.name} reads {self.length}")
        longest = max([1, *map(len, ids)])
        mask = torch.zeros(len(ids), longest, dtype=torch.bool)
        states = torch.zeros(len(ids), longest, self.dim, dtype=torch.float16)
        for first in range(0, len(ids), batch):
            rows = range(first, min(first + batch, len(ids)))
            width = max(1, max(len(ids[i]) for i in rows))
            fill = torch.full((len(rows), width), self.tokenizer.pad_token_id or 0)
            seen = torch.zeros(len(rows), width, dtype=torch.long)
            for row, i in enumerate(rows):
                fill[row, : len(ids[i])], seen[row, : len(ids[i])] = torch.tensor(ids[i]), 1
            with torch.no_grad():
                said = self.model(input_ids=fill, attention_mask=seen).last_hidden_state
            states[rows.start : rows.stop, :width] = said.clamp(-HALF, HALF).half() * seen[..., None]
            mask[rows.start : rows.stop, :width] = seen.bool()
        return states, mask & torch.tensor([bool(text) for text in texts])[:, None]


LONGEST = 512  # tokens, of encoders that know no bound
HALF = 65504.0  # the largest float16


def fingerprint(tokenizer: Any, model: Any) -> str:
    """sha256 of an encoder's weights and vocabulary, wherever they lie."""
    digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@lru_cache(maxsize=2)
def open_encoder(name: str) -> Frozen:
    """The encoder in a local folder (of ``save_pretrained``, or of a pipeline of diffusers), or of a hub id.

    ``ValueError`` in one line where transformers, the folder, the network or the weights are missing.
    """
    try:
        import transformers as hf
    except ImportError as e:
        raise ValueError(f"encoder: {name} needs transformers; install it: pip install 'genkit[hub]'") from e
    folder = Path(name).expanduser()
    pipeline = (folder / "model_index.json").is_file()
    within = [{"subfolder": sub} if pipeline else {} for sub in ("text_encoder", "tokenizer")]
    where, safe = str(folder) if folder.is_dir() else name, {"trust_remote_code": False}
    before = hf.logging.get_verbosity()
    hf.logging.set_verbosity_error()  # a text half of a larger model leaves weights unused, which is no news here
    try:
        config = hf.AutoConfig.from_pretrained(where, **safe, **within[0])
        config = HALVES.get(config.model_type, lambda whole: whole)(config)
        model = hf.AutoModelForTextEncoding.from_pretrained(
            where, config=config, use_safetensors=True, dtype=torch.float32, **safe, **within[0]
        )
        return Frozen(name, hf.AutoTokenizer.from_pretrained(where, **safe, **within[1]), model)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as e:
        why = one_line(e)[:160]
        kind = "the folder" if folder.is_dir() else "neither a folder, nor to be had from the hub:"
        raise ValueError(f"encoder: {name} cannot be opened ({kind} {why}); needs a text encoder of transformers with "
                         "safetensors: CLIP's text half, T5, BERT ...") from e  # fmt: skip
    finally:
        hf.logging.set_verbosity(before)


HALVES: Mapping[str, Callable[[Any], Any]] = {"clip": lambda whole: whole.text_config}


def place(name: str) -> str:
    """An encoder's name as a spec keeps it: the same from everywhere."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


def encoded(encoder: Frozen, texts: Sequence[str]) -> dict[str, Tensor]:
    """``encoder(texts)`` as ``{"text", "mask"}``, from the cache, or made and put there."""
    content = hashlib.sha256(json.dumps([encoder.sha256, *texts]).encode()).hexdigest()
    path = cache() / "text" / f"{content[:32]}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError):  # absent, or cut off
        pass
    states, mask = encoder(texts)
    made = {"text": states, "mask": mask}
    try:
        with atomic_write(path) as part:
            save_file(made, part)
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{path.parent}: cannot be written ({e}); set GENKIT_CACHE to another folder") from e
    return made


# ------------------------------------------------------------------------------------------------------ prompts
def by_bytes(name: str, kind: Text, prompts: Sequence[str]) -> dict[str, Tensor]:
    return {name: to_bytes(prompts, kind.length)}


def by_encoder(name: str, kind: Tokens, prompts: Sequence[str]) -> dict[str, Tensor]:
    """``ValueError`` where the encoder is missing, or not the one of the training."""
    try:
        encoder = open_encoder(kind.encoder)
    except ValueError as e:
        raise ValueError(f"prompt: this model reads words by {kind.encoder}, sha256 {kind.sha256[:12]}: {e}") from e
    if encoder.sha256 != kind.sha256:
        raise ValueError(f"prompt: this model reads words by {kind.encoder}, sha256 {kind.sha256[:12]}, and what is "
                         f"there has {encoder.sha256[:12]}; put the former back")  # fmt: skip
    states, mask = encoder(prompts)
    return {name: states, "mask": mask}


WORDED: Mapping[type, Callable[[str, Any, Sequence[str]], dict[str, Tensor]]] = {Text: by_bytes, Tokens: by_encoder}


def worded(spec: Spec) -> dict[str, Text | Tokens]:
    """The conditions that a prompt can give."""
    found = {k: v for k, v in spec.cond.items() if isinstance(v, (Text, Tokens))}
    return {k: v for k, v in found.items() if isinstance(v, Text) or v.encoder}


def examples(spec: Spec) -> tuple[str, ...]:
    """Some captions of the data that a model was trained on; () where it reads no words."""
    return next((kind.examples for kind in worded(spec).values()), ())


def conditions(spec: Spec, prompts: Sequence[str]) -> dict[str, Tensor]:
    """What ``prompts`` are as conditions of N samples. ``ValueError`` where the model has none for words."""
    found = worded(spec)
    if not found:
        known = ", ".join(f"{k} ({type(v).__name__.lower()})" for k, v in spec.cond.items()) or "none"
        raise ValueError(f"prompt: given {start(prompts[0])}, but this model reads no words; its conditions: {known}; "
                         "train one with --data.captions")  # fmt: skip
    return {k: v for name, kind in found.items() for k, v in WORDED[type(kind)](name, kind, prompts).items()}
