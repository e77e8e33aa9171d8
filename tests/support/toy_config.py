"""A small configuration with every kind of setting. The registries of this module stand in for genkit's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pytest
from annotated_types import Ge, Gt, Lt
from tyro.conf import Positional

from genkit.config import ConfigError, parse, table

if TYPE_CHECKING:
    from genkit.core import ProbabilityPath as Curve  # absent when the annotations are evaluated

MODULE = __name__


class Shape: ...


@dataclass(frozen=True)
class Line: ...


@dataclass(frozen=True)
class Arc:
    """A part of a circle."""

    radius: Annotated[float, Gt(0)] = 1.0
    """in metres"""
    points: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Wave:
    """A wave. And more."""

    path: Curve = field(default_factory=Line, metadata={"table": f"{MODULE}:PATHS"})
    times: Literal["uniform", "logit-normal"] = "uniform"
    t_std: Annotated[float, Gt(0)] = 1.0
    low: float = 0.0
    mirror_x: bool = False

    def __post_init__(self) -> None:
        if self.low > self.t_std:
            raise ValueError(f"low: given {self.low};\nallowed up to t_std = {self.t_std}")


@dataclass(frozen=True)
class Pulse:
    width: int = 3  # in steps
    path: Any = field(default_factory=lambda: Arc(radius=7.0), metadata={"table": f"{MODULE}:PATHS"})


@dataclass(frozen=True)
class Flat(Shape):
    depth: int = 2


@dataclass(frozen=True)
class Deep(Shape):
    depth: int = 5
    attention: bool = True


@dataclass(frozen=True)
class Points:
    default_net: ClassVar[str] = "flat"
    step: int = 10


@dataclass(frozen=True)
class Folder:
    root: str
    default_net: ClassVar[str] = "deep"


class NotADataclass: ...


PATHS = {"line": Line, "arc": Arc}
WAVES = {"wave": Wave, "short_pulse": Pulse}
NETS = {"flat": Flat, "deep": Deep}
DATA = {"points": Points, "folder": Folder}


def find_source(path: str) -> tuple[str, dict]:
    """The data that a path stands for."""
    if path.endswith("empty"):
        raise ValueError(f"{path} holds no samples")
    return "folder", {"root": path}


@dataclass(frozen=True)
class Job:
    """All kinds of settings."""

    wave: Any = table(f"{MODULE}:WAVES", "wave")
    """What moves."""
    net: Any = table(f"{MODULE}:NETS", "deep", follows="data.default_net", kind=f"{MODULE}:Shape")
    data: Any = table(f"{MODULE}:DATA", "points", fallback=f"{MODULE}:find_source")
    steps: Annotated[int, Ge(1)] = 100
    lr: Annotated[float, Gt(0)] = 1e-3
    micro_batch: Annotated[int, Ge(1)] | None = None
    betas: tuple[Annotated[float, Ge(0), Lt(1)], float] = (0.9, 0.99)
    ema: tuple[float, ...] = (0.999,)
    size: int | tuple[int, int] | None = None
    channels: Literal[1, 3] | None = None
    flip: bool = False
    tensorboard: bool = True
    out: str = "runs"
    name: str | None = None


@dataclass(frozen=True)
class Draw:
    """A command with a positional argument."""

    run: Positional[str]
    n: int = 3
    mix: tuple[float, float] = (0.5, 0.5)
    clip: bool = False


@dataclass(frozen=True)
class Jobs:
    first: Any = field(default_factory=lambda: Job(net=Deep()), metadata={"table": f"{MODULE}:JOBS"})


JOBS = {"job": Job}


def parse_job(*argv: str) -> Job:
    """The job that a command line describes."""
    return parse(Job, argv, "genkit job")


def refusal(*argv: str, cls: type = Job) -> str:
    """The one line that refuses a command line."""
    with pytest.raises(ConfigError) as e:
        parse(cls, argv, "genkit job")
    assert "\n" not in str(e.value)
    return str(e.value)
