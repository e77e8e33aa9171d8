"""The experience that a reward method learns from, and the tasks that it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from torch import Tensor

from genkit.core import Cond
from genkit.rl.finetune.chain import DenoisingTrajectory

if TYPE_CHECKING:
    from genkit.rl.finetune.learner import Learner


class Experience(NamedTuple):
    """M trajectories of the chain with their advantages."""

    trajectory: DenoisingTrajectory
    """``xs`` [K + 1, M, *S] and ``means`` [K, M, *S], as they were when drawn"""
    cond: Mapping[str, Tensor]
    """the conditions of each, [M, ...]"""
    advantages: Tensor
    """[M], in the units of the rewards"""
    returns: Tensor | None
    """[M], the critic's targets; None if there is no critic"""
    logs: dict[str, float]
    used: Tensor | None = None
    """1 for the entries of a sample that the environment received, else 0, [*S]; None: all"""
    reference_means: Tensor | None = None
    """the steps' means under the model before any reward, [K, M, *S]; None: not computed yet"""
    reference_choice: Tensor | None = None
    """log-probabilities of the first choice under the model before any reward, [1, M, A], if there is one"""


class Task(Protocol):
    """A source of rewards."""

    differentiable: ClassVar[bool]
    """whether :meth:`draw` and :meth:`reward` exist"""

    def collect(self, learner: Learner, iteration: int) -> Experience:
        """Draw trajectories with the learner's weights and score them."""
        ...

    def begin(self, learner: Learner, iteration: int) -> None:
        """Start afresh, as a function of ``iteration`` only: a resumed run and an uninterrupted one do the same."""
        ...

    def draw(self, learner: Learner, iteration: int, n: int) -> tuple[Tensor, Cond]:
        """Normals ``[n, *S]`` and conditions to start trajectories from."""
        ...

    def reward(self, x: Tensor, cond: Cond) -> Tensor:
        """The rewards ``[B]`` of samples ``[B, *S]`` in the model's units."""
        ...
