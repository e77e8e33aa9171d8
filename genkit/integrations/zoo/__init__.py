"""Weights of other projects as runs (``genkit import KIND FILE OUT``): ``KINDS`` maps each layout to its reader."""

from __future__ import annotations

from collections.abc import Mapping

from genkit.integrations.zoo.edm import read_edm
from genkit.integrations.zoo.foreign import Reader
from genkit.integrations.zoo.transformers import read_dit, read_sit
from genkit.integrations.zoo.unets import read_torchcfm

__all__ = ["KINDS"]

KINDS: Mapping[str, Reader] = {"dit": read_dit, "edm": read_edm, "sit": read_sit, "torchcfm": read_torchcfm}
