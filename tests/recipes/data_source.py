"""A data source in one file and one line: vectors in a CSV file, with a class in the last column."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from genkit.core import Label, Spec
from genkit.data import DataSource, InMemory
from genkit.data.codecs import Standardize
from genkit.data.source import Split, check_split


@dataclass(frozen=True, kw_only=True)
class Csv(DataSource):
    """Vectors in a CSV file without a header: numbers, and the class 0, 1, ... in the last column."""

    default_backbone: ClassVar[str] = "mlp"
    suffix: ClassVar[str] = ".csv"

    root: str
    """the file; every fifth row is the test split"""
    labels: bool = True
    """condition on the class"""

    def load(self, split: Split = "train") -> InMemory:
        check_split(split)
        path = Path(self.root).expanduser()
        try:
            table = np.loadtxt(path, delimiter=",", dtype=np.float32, ndmin=2)
        except (OSError, ValueError) as e:
            raise ValueError(f"{path}: cannot be read as rows of numbers with commas between: {e}") from e
        values, classes = torch.from_numpy(table[:, :-1]), torch.from_numpy(table[:, -1]).long()
        test = torch.arange(len(table)) % 5 == 4
        chosen = test if split == "test" else ~test
        cond, kinds = {}, {}
        if self.labels:
            cond, kinds = {"label": classes[chosen]}, {"label": Label(int(classes.max()) + 1)}
        spec = Spec(tuple(values.shape[1:]), kinds)
        return InMemory(values[chosen], cond, spec, Standardize.fit(values[~test]))
