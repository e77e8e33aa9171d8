"""The contract of a data source: a frozen configuration whose ``load(split)`` returns the samples.

docs/contributing/data-source.md shows how to add one.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

from genkit.core import Data

Split = Literal["train", "test"]
S = TypeVar("S", bound="DataSource")


def check_split(split: str) -> None:
    """Raise ``ValueError`` unless ``split`` is train or test."""
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r} is unknown; allowed: train, test")


@dataclass(frozen=True, kw_only=True)
class DataSource(ABC):
    """A source of samples. Only :meth:`load` is required; everything else here has a default.

    A source is a frozen dataclass. Its fields are its settings: options of the command line (``--data.root``) and keys
    of config.yaml, with the text under each field as help. Fields of these names have a fixed meaning wherever they
    exist, and evaluation changes them:

    ``root: str``                  the file or folder that is read
    ``size``, ``channels``         the shape to which images are converted; None: as stored
    ``held_out: float``            the share of the training split that is its test split
    ``flip: bool``                 mirror half of the images of a batch at random
    ``labels: bool``               condition on the class of each sample
    ``captions``, ``encoder``      condition on text, and the frozen text encoder that reads it
    """

    default_backbone: ClassVar[str] = "unet"
    """name in ``BACKBONES`` of the network that is trained on these samples if no other is named"""
    suffix: ClassVar[str | None] = None
    """suffix of the files that select this source when a path stands for a name (``--data=photos.zip``); "" means any
    folder, None that a path never selects it"""
    usage: ClassVar[str | None] = None
    """command that is suggested after training, with ``{run}`` and ``{label}`` filled in; None: the objective's own"""

    @abstractmethod
    def load(self, split: Split = "train") -> Data:
        """Return the samples of a split. Raise ``ValueError`` if something is missing or damaged."""

    @property
    def environment(self) -> str:
        """The name of the environment that the demonstrations come from; "" if unknown, or if they are none."""
        return ""

    @property
    def environment_arguments(self) -> Sequence[str]:
        """Keyword arguments of that environment, each as NAME=VALUE."""
        return ()

    @property
    def random_flip(self) -> bool:
        """Whether batches contain mirrored samples."""
        return False

    @property
    def captions_from_labels(self) -> bool:
        """Whether the captions are made of the class names."""
        return False

    def decoded_source(self) -> DataSource:
        """The source of decoded samples: for cached latents the data that were encoded, otherwise this source."""
        return self

    @classmethod
    def applicable(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of ``settings`` that this source has a field for."""
        names = {f.name for f in fields(cls)}
        return {name: value for name, value in settings.items() if name in names}

    def with_fields(self: S, **settings: Any) -> S:
        """A copy with these settings, without those that this source has no field for."""
        return replace(self, **self.applicable(settings))

    def with_absolute_root(self: S) -> S:
        """A copy whose ``root``, if it is a path that exists, does not depend on the working directory."""
        root = getattr(self, "root", None)
        if not isinstance(root, str) or not root or not os.path.exists(os.path.expanduser(root)):
            return self
        return self.with_fields(root=os.path.abspath(os.path.expanduser(root)))

    def preview(self) -> tuple[tuple[int, ...], int] | None:
        """Shape and number of a person's own samples, by which settings of the training are chosen; None for data sets
        that the defaults suit."""
        return None

    def with_decisions(self: S) -> S:
        """A copy in which what is left open is decided, for a run that begins: the share of held-out samples of a
        source without a test split, or the environment that a recording names."""
        return self

    def with_decisions_of(self: S, earlier: DataSource) -> S:
        """A copy in which what is left open is what it was for a run on ``earlier``, which goes on."""
        return self

    def unaugmented(self: S) -> S:
        """A copy without random augmentation."""
        return self.with_fields(flip=False)

    def with_labels(self: S) -> S:
        """A copy that is conditioned on the classes of the samples, if they have any."""
        return self.with_fields(labels=True)

    def with_default_conditions(self: S) -> S:
        """A copy without captions and with ``labels`` at its default: the reference of every model of these samples,
        whatever the model was conditioned on."""
        defaults = {f.name: f.default for f in fields(self)}
        return self.with_fields(**{k: defaults[k] for k in ("captions", "encoder", "labels") if k in defaults})
