"""Data sources: ``DATA`` maps each name to a :class:`DataSource`, whose ``load(split)`` returns samples."""

from __future__ import annotations

from pathlib import Path

from genkit.data.demonstrations.four_ways import FourWays
from genkit.data.demonstrations.lerobot import LeRobot
from genkit.data.demonstrations.minari import Minari
from genkit.data.demonstrations.push_t import Pusht
from genkit.data.demonstrations.replay import Replay
from genkit.data.demonstrations.robomimic import Robomimic
from genkit.data.images import OnDisk
from genkit.data.in_memory import InMemory
from genkit.data.latents import InLatents, Latents
from genkit.data.local_files import Folder, Npz, Zip
from genkit.data.pairs import Pairs
from genkit.data.shard_paths import is_pattern
from genkit.data.sharded import Parquet, ShardedImages, Webdataset
from genkit.data.source import DataSource
from genkit.data.standard_images import Cifar10, Digits, FashionMnist, Mnist
from genkit.data.stream import Stream
from genkit.data.toy import Checkerboard, EightGaussians, Moons, RotatedMoons, Spirals, SwissRoll

__all__ = ["DATA", "DataSource", "InLatents", "InMemory", "OnDisk", "Stream", "find_source"]

DATA: dict[str, type[DataSource]] = {
    "moons": Moons,
    "rotated-moons": RotatedMoons,
    "8gaussians": EightGaussians,
    "checkerboard": Checkerboard,
    "swissroll": SwissRoll,
    "spirals": Spirals,
    "digits": Digits,
    "mnist": Mnist,
    "fashion-mnist": FashionMnist,
    "cifar10": Cifar10,
    "folder": Folder,
    "zip": Zip,
    "npz": Npz,
    "webdataset": Webdataset,
    "parquet": Parquet,
    "pairs": Pairs,
    "latents": Latents,
    "four-ways": FourWays,
    "replay": Replay,
    "pusht": Pusht,
    "minari": Minari,
    "lerobot": LeRobot,
    "robomimic": Robomimic,
}


def find_source(name_or_path: str) -> tuple[str, dict[str, str]]:
    """Return the name in ``DATA``, and the settings, that a name or a path stands for (``--data=path/to/images``).

    Names come first (``./digits`` is the folder). A file, or a pattern of shards (``train-{00..99}.tar``), is read by
    the source of its suffix. A folder is read by the
    source whose training split it contains (``train.zip``), otherwise as a folder of images. Raise ``ValueError`` if
    ``name_or_path`` is neither a name nor a path that a source reads.
    """
    if name_or_path in DATA:
        return name_or_path, {}
    by_suffix = {kind.suffix: name for name, kind in DATA.items() if kind.suffix is not None}
    path, settings = Path(name_or_path).expanduser(), {"root": name_or_path}
    if path.is_dir():
        inside = [name for suffix, name in by_suffix.items() if suffix and (path / f"train{suffix}").exists()]
        return (inside[0] if inside else by_suffix[""]), settings
    if path.suffix in by_suffix and (path.is_file() or (is_pattern(name_or_path) and is_sharded(path.suffix))):
        return by_suffix[path.suffix], settings
    files = " or ".join(suffix for suffix in by_suffix if suffix)
    raise ValueError(
        f"data {name_or_path!r} is unknown; allowed: {', '.join(DATA)}, or the path of a folder, {files} that exists"
    )


def is_sharded(suffix: str) -> bool:
    """Whether files of this suffix may be shards of one data set."""
    return any(issubclass(kind, ShardedImages) and kind.suffix == suffix for kind in DATA.values())
