"""Types of settings that are numbers. Their upper bounds keep a mistyped number from exhausting the machine."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

Count = Annotated[int, Ge(1), Le(10**12)]
"""Steps, samples, episodes: at least one."""
Natural = Annotated[int, Ge(0), Le(10**12)]
"""A number of steps or samples that may be 0."""
CheckpointStep = Natural | Literal["best"]
"""A checkpoint of a run: its step, or the best one by ``keep_best``."""
Seed = Annotated[int, Ge(0), Le(2**62)]
"""Seed of random numbers; sample i has seed + i."""
Layers = Annotated[int, Ge(1), Le(10_000)]
"""Layers, blocks or levels of a network."""
Width = Annotated[int, Ge(1), Le(1_000_000)]
"""Channels, units or heads of a layer, or the side of an image."""
Fraction = Annotated[float, Ge(0), Lt(1)]
"""A probability or a decay rate below 1."""
Positive = Annotated[float, Gt(0)]
"""A number above 0."""
NonNegative = Annotated[float, Ge(0)]
"""A number that may be 0."""
Scale = Annotated[float, Ge(-1000), Le(1000)]
"""Scale of guidance; negative ones guide away from the condition."""
Threads = Annotated[int, Ge(1), Le(1024)]
"""Threads of the CPU."""
