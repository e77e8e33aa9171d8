"""Where samples come from: ``DATA`` maps a name to the configuration of a source, and ``load(split)`` gives the data."""

from __future__ import annotations

from genkit.data.images import Digits, InMemory
from genkit.data.stream import Stream
from genkit.data.toy import Checkerboard, EightGaussians, Moons, RotatedMoons, Spirals, SwissRoll

__all__ = ["DATA", "InMemory", "Stream"]

DATA: dict[str, type] = {
    "moons": Moons,
    "rotated-moons": RotatedMoons,
    "8gaussians": EightGaussians,
    "checkerboard": Checkerboard,
    "swissroll": SwissRoll,
    "spirals": Spirals,
    "digits": Digits,
}
