"""A trained run that acts.

policy = Policy.load("runs/latest", steps=4)
policy.reset(seeds=[100000])
actions = policy.act(obs)          # [N, To, Do] -> [N, Ta, A], in the world's units
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genkit import runs
from genkit.codecs import Actions
from genkit.core import Generator, Noise, Vector
from genkit.data.trajectories import Demonstrations, check_horizons
from genkit.sampling import Seeds


def carried_out(shape: Sequence[int], to: int, act_steps: int) -> Tensor:
    """Which numbers of a chunk ``[A, T]`` the world gets to see, 1 or 0: the first ``to - 1`` actions are past."""
    used = torch.zeros(*shape)
    used[:, to - 1 : to - 1 + act_steps] = 1
    return used


@dataclass
class Policy:
    """A generator of action chunks, given the newest ``obs_steps`` observations. Receding horizon: of a chunk, the
    ``act_steps`` actions from now on are carried out."""

    run: runs.Run
    generate: Generator
    act_steps: int
    noise: Noise | None = field(default=None)
    """where each row's random numbers come from (:meth:`reset`); None: torch's global generator"""

    @classmethod
    def load(
        cls,
        run: str | File | runs.Run,
        *,
        steps: int = 4,
        sampler: str | None = None,
        act_steps: int | None = None,
        ema: str | None = None,
        step: int | None = None,
        device: str = "cpu",
        **how: Any,
    ) -> Policy:
        """The policy of a run that was trained on demonstrations.

        ``steps`` of ``sampler`` (None: ddim, one evaluation a step) draw a chunk; a one-pass objective takes neither.
        ``act_steps`` None is what the data said; ``how`` goes to ``Run.generator`` (guidance, grid).
        ``ValueError`` where the run's samples are no action chunks, or the horizons do not nest.
        """
        found = run if isinstance(run, runs.Run) else runs.load(run, ema=ema, step=step, device=device)
        seen = found.spec.cond.get("obs")
        if not isinstance(found.codec, Actions) or not isinstance(seen, Vector) or len(found.spec.shape) != 2:
            raise ValueError(
                f"run: {found.directory.name} draws samples of shape {found.spec.shape}, not actions given obs; "
                "train one: genkit train --data=four-ways"
            )
        if found.objective.sampler is not None:
            how |= {"sampler": sampler or "ddim", "steps": steps}
        elif sampler is not None:
            how |= {"sampler": sampler}  # refused with a word
        data = found.config.data
        usual = data.act_steps if isinstance(data, Demonstrations) else found.spec.shape[1] - seen.shape[0] + 1
        chosen = usual if act_steps is None else act_steps
        check_horizons(seen.shape[0], found.spec.shape[1], chosen)
        return cls(found, found.generator(**how), chosen)

    @property
    def obs_shape(self) -> tuple[int, int]:
        """(To, Do)."""
        kind = self.run.spec.cond["obs"]
        assert isinstance(kind, Vector)
        return kind.shape[0], kind.shape[1]

    @property
    def action_dim(self) -> int:
        return self.run.spec.shape[0]

    @property
    def env(self) -> str:
        """The environment that the demonstrations came from; "" where they do not say."""
        return self.run.config.data.env if isinstance(self.run.config.data, Demonstrations) else ""

    def reset(self, seeds: Sequence[int]) -> None:
        """Begin episodes: row i draws from its own seed from now on."""
        self.noise = Seeds(seeds, self.run.device)

    def act(self, obs: np.ndarray) -> np.ndarray:
        """Actions ``[N, Ta, A]`` in the world's units for observations ``[N, To, Do]``.

        For a single one, ``[To, Do]`` or ``[Do]`` (seen To times), ``[Ta, A]``.
        """
        to, do = self.obs_shape
        given = np.asarray(obs, np.float32)
        single = given.ndim < 3
        if given.shape == (do,):
            given = np.repeat(given[None], to, 0)
        rows = given[None] if single else given
        if rows.shape[1:] != (to, do):
            raise ValueError(f"obs: given shape {np.shape(obs)}; this policy needs [N, {to}, {do}]")
        if not np.isfinite(rows).all():
            bad = int(np.flatnonzero(~np.isfinite(rows).all((1, 2)))[0])
            raise ValueError(f"obs: row {bad} is not finite")
        actions = self.chunk(torch.from_numpy(rows))[:, :, to - 1 : to - 1 + self.act_steps]
        out = actions.transpose(1, 2).cpu().numpy()
        return out[0] if single else out

    def chunk(self, obs: torch.Tensor) -> torch.Tensor:
        """Whole chunks ``[N, A, Tp]`` in the world's units, the past steps among them, for ``[N, To, Do]``."""
        obs = obs.to(self.run.device)
        shape = self.run.spec.shape
        noise = self.noise
        z = noise(shape) if noise else torch.randn(len(obs), *shape, device=obs.device)
        with torch.no_grad():
            x = self.generate(z, {"obs": obs}, noise)
            assert isinstance(self.run.codec, Actions)
            return self.run.codec.world(x.float(), obs)
