"""Text as the encoders of a pretrained pipeline read it, for networks that were trained on just that.

Such a network knows no learned null: without text it was given something definite, mostly the states of the empty text
(``docs/pretrained.md`` has the table). Here these are buffers, so they are saved with the network.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from genkit.core import Cond, Spec, Tokens, Vector


class EncodedText(nn.Module):
    """The states of a text, ``{"tokens": [B, L, dim], "mask": [B, L], "pooled": [B, P]}``, or in their place the null.

    A mask is present if the encoder hides its padding, a pooled state if it computes one. Null takes the place of a
    condition that is absent, and of the samples that ``cond["keep"]`` or ``cond["keep.NAME"]`` drops. It is zero until
    :meth:`set_null`.
    """

    def __init__(self, spec: Spec):
        super().__init__()
        self.name, kind = next((k, v) for k, v in spec.cond.items() if isinstance(v, Tokens) and v.padding)
        self.encoder, self.sha256 = kind.encoder, kind.sha256
        self.sources = {"tokens": self.name}  # where each state is in ``cond``
        self.register_buffer("null_tokens", torch.zeros(1, kind.length, kind.dim))
        if kind.padding == "masked":
            self.sources["mask"] = "mask"
            self.register_buffer("null_mask", torch.zeros(1, kind.length, dtype=torch.bool))
        for name, pooled in spec.cond.items():
            if isinstance(pooled, Vector) and pooled.encoder:
                self.sources["pooled"] = name
                self.register_buffer("null_pooled", torch.zeros(1, *pooled.shape))

    @torch.no_grad()
    def set_null(self, states: Mapping[str, Tensor]) -> None:
        """Take the states of one empty text, conditions by name ``[1, ...]``, as the null."""
        for role, source in self.sources.items():
            null = self.get_buffer(f"null_{role}")
            null.copy_(states["text" if role == "tokens" else source])

    def forward(self, x: Tensor, cond: Cond) -> dict[str, Tensor]:
        states = {}
        for role, source in self.sources.items():
            null = self.get_buffer(f"null_{role}").expand(len(x), *(-1,) * (self.get_buffer(f"null_{role}").ndim - 1))
            states[role] = null
            if source in cond:
                keep = torch.ones(len(x), dtype=torch.bool, device=x.device)
                for name in ("keep", f"keep.{self.name if role == 'mask' else source}"):
                    keep = keep & cond[name] if name in cond else keep
                given = cond[source].to(null.dtype)
                states[role] = torch.where(keep.view(-1, *(1,) * (null.ndim - 1)), given, null)
        return states


def has_encoded_text(spec: Spec) -> bool:
    """Whether a condition is text that a pipeline's encoders have read."""
    return any(isinstance(kind, Tokens) and kind.padding for kind in spec.cond.values())
