"""Where samples come from: ``DATA`` maps a name to the configuration of a source, whose ``load(split)`` gives them."""

from __future__ import annotations

from genkit.data.demonstrations.datasets_hub import LeRobot, Minari
from genkit.data.demonstrations.four_ways import FourWays
from genkit.data.demonstrations.push_t import Pusht
from genkit.data.demonstrations.replay import Replay
from genkit.data.folders import Folder, Npz, Zip, source
from genkit.data.images import InMemory, OnDisk
from genkit.data.latents import InLatents, Latents, world
from genkit.data.pairs import Pairs
from genkit.data.standard_images import Cifar10, Digits, FashionMnist, Mnist
from genkit.data.stream import Stream
from genkit.data.toy import Checkerboard, EightGaussians, Moons, RotatedMoons, Spirals, SwissRoll

__all__ = ["DATA", "InLatents", "InMemory", "OnDisk", "Stream", "source", "world"]

DATA: dict[str, type] = {
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
    "pairs": Pairs,
    "latents": Latents,
    "four-ways": FourWays,
    "replay": Replay,
    "pusht": Pusht,
    "minari": Minari,
    "lerobot": LeRobot,
}
