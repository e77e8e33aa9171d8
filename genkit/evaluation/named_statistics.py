"""Statistics of references by name: what ``--save-stats stats:NAME`` has stored, and what clean-fid publishes."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any, get_args

import numpy as np

from genkit.config.blocks import suggest
from genkit.core.arrays import open_npz, save_npz
from genkit.core.messages import warn_once
from genkit.core.tensors import cache_folder
from genkit.evaluation.metrics import Moments
from genkit.evaluation.metrics.features import Resize

STORED, PUBLISHED = "stats:", "clean-fid:"  # prefixes of names
FEATURES_KEY = "features"  # of the npz: the settings of the features, as JSON
NAME = re.compile(r"\w[\w.-]*")


def statistics_folder() -> Path:
    """Where statistics are kept by name, in genkit's cache."""
    return cache_folder() / "statistics"


def statistics_path(name: str) -> Path:
    """The file of ``stats:NAME``; any other name is a path. ``ValueError`` for a name that is no file's."""
    if not name.startswith(STORED):
        return Path(name).expanduser()
    if not NAME.fullmatch(name.removeprefix(STORED)):
        raise ValueError(f"save_stats: given {name}; needs stats: and a name of letters, digits, dots and dashes")
    return statistics_folder() / f"{name.removeprefix(STORED)}.npz"


def find_statistics(name: str, resize: str = "clean") -> Path | None:
    """The file of ``stats:NAME`` or ``clean-fid:DATASET-SPLIT-SIDE``; None for a name of another kind.

    ``ValueError`` if there are none of that name. Those of clean-fid are downloaded, for pictures resized as ``resize``
    says.
    """
    if name.startswith(STORED):
        path = statistics_path(name)
        known = sorted(file.stem for file in statistics_folder().glob("*.npz"))
        if not path.is_file():
            hint = suggest(name.removeprefix(STORED), known)
            listed = ", ".join(known) or "none"
            raise ValueError(f"reference: given {name}; stored: {listed}{hint}; --save-stats {name} stores them")
        return path
    return download_statistics(name, resize) if name.startswith(PUBLISHED) else None


def download_statistics(name: str, resize: str) -> Path:
    """The statistics that clean-fid publishes of a data set, in genkit's cache."""
    match = re.fullmatch(r"clean-fid:(\w+)-(\w+)-(\d+)", name)
    if not match:
        raise ValueError(f"reference: given {name}; needs clean-fid:DATASET-SPLIT-SIDE, such as "
                         "clean-fid:cifar10-train-32")  # fmt: skip
    if resize not in get_args(Resize):
        raise ValueError(f"reference: {name} has statistics of Inception's features; take --features inception")
    path = statistics_folder() / f"{name.replace(':', '-')}-{resize}.npz"
    if path.is_file():
        return path
    from cleanfid.features import get_reference_statistics  # lazy: slow to import

    try:
        with contextlib.redirect_stdout(sys.stderr):  # it tells of the download; standard output may be JSON
            found: Any = get_reference_statistics(match[1], int(match[3]), mode=resize, split=match[2])
    except (OSError, HTTPException) as e:
        raise ValueError(f"reference: {name} is not here, and clean-fid cannot download it ({e}); is there a network, "
                         "and are there statistics of this name?") from e  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    features = np.asarray(json.dumps({"name": "inception", "resize": resize, "precision": "fp32"}))
    save_npz(path, {"mu": np.asarray(found[0]), "sigma": np.asarray(found[1]), FEATURES_KEY: features})
    return path


def save_statistics(moments: Moments, features: Mapping[str, Any], path: Path) -> None:
    """Write an npz with mu, sigma, n and the settings of the features. A note says if others are replaced by it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {**moments.to_arrays(), FEATURES_KEY: np.asarray(json.dumps(dict(features), sort_keys=True))}
    if path.is_file():
        with open_npz(path) as stored:
            if not all(k in stored.files and np.array_equal(stored[k], value) for k, value in arrays.items()):
                warn_once(f"{path}: held other statistics, which these replace")
    save_npz(path, arrays)


def require_same_features(path: Path, features: Mapping[str, Any]) -> None:
    """``ValueError`` if the statistics in ``path`` say that they are of other ``features``."""
    with open_npz(path) as file:
        text = str(file[FEATURES_KEY]) if FEATURES_KEY in file.files else None
    stored = json.loads(text) if text else dict(features)
    now = json.loads(json.dumps(dict(features)))
    different = [key for key in stored if stored[key] != now.get(key)]
    if different:
        key = different[0]
        raise ValueError(f"reference: {path} has statistics of features with {key}: {stored.get(key)}; these have "
                         f"{now.get(key)}; measure in the same ones")  # fmt: skip
