"""A trained run that acts.

policy = Policy.load("runs/latest", steps=4)
policy.reset(seeds=[100000])
actions = policy.act(obs)          # [N, To, Do] -> [N, Ta, A], in the world's units
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from genkit.core import Cond, Denoiser, Frames, Generator, Guidance, Label, Noise, Prediction, Spec, Vector
from genkit.data.codecs import Actions
from genkit.data.demonstrations.windows import Demonstrations, Further, check_horizons
from genkit.diffusion.guidance import LINEAR, Guided, compose, finite, keep
from genkit.diffusion.samplers import Seeds
from genkit.training.run import Run, load_run
from genkit.training.sampling import Sampling


def carried_out(shape: Sequence[int], to: int, act_steps: int) -> Tensor:
    """Which numbers of a chunk ``[A, T]`` the world gets to see, 1 or 0: the first ``to - 1`` actions are past."""
    used = torch.zeros(*shape)
    used[:, to - 1 : to - 1 + act_steps] = 1
    return used


def observed(spec: Spec) -> tuple[int, int]:
    """(To, Do) of what a run sees."""
    obs, frames = spec.cond.get("obs"), spec.cond.get("frames")
    if isinstance(obs, Vector):
        return obs.shape[0], obs.shape[1]
    assert isinstance(frames, Frames)
    return frames.shape[0], 0


def told(spec: Spec, given: Mapping[str, Sequence[float]]) -> dict[str, Tensor]:
    """What a policy is told besides obs, each as one row. ``ValueError`` where it is nothing that this run knows."""
    found: dict[str, Tensor] = {}
    for name, value in given.items():
        kind = spec.cond.get(name)
        if name not in get_args(Further) or kind is None:
            known = ", ".join(k for k in get_args(Further) if k in spec.cond) or "nothing, as trained"
            raise ValueError(f"given: {name!r} is nothing that this run is told; allowed: {known}")
        whole = isinstance(kind, Label)
        if whole and (len(value) != 1 or value[0] != int(value[0])):
            raise ValueError(f"given: {name} is {', '.join(map(str, value))}; needs one whole number")
        found[name] = torch.tensor([int(value[0])]) if whole else torch.tensor([list(value)], dtype=torch.float32)
        kind.check(name, found[name], 1)
    return found


def toward(names: Sequence[str], scale: float) -> Guidance:
    """From the prediction without these conditions through that with them; the others stay (Brooks et al. 2023)."""
    finite("guidance", scale)

    def guide(denoise: Denoiser) -> Denoiser:
        def pair(x: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Prediction]:
            without = {f"keep.{name}": torch.zeros_like(keep(x, cond)) for name in names}
            return denoise(x, t, cond), denoise(x, t, {**cond, **without})

        return Guided(denoise, pair, scale, LINEAR)

    return guide


@dataclass
class Policy:
    """A generator of action chunks, given the newest ``obs_steps`` observations. Receding horizon: of a chunk, the
    ``act_steps`` actions from now on are carried out."""

    run: Run
    generate: Generator
    act_steps: int
    noise: Noise | None = field(default=None)
    """where each row's random numbers come from (:meth:`reset`); None: torch's global generator"""
    given: Mapping[str, Tensor] = field(default_factory=dict)
    """what it is told besides obs, each as one row"""

    @classmethod
    def load(
        cls,
        run: str | File | Run,
        *,
        steps: int = 4,
        sampler: str | None = None,
        act_steps: int | None = None,
        ema: str | None = None,
        step: int | None = None,
        device: str = "cpu",
        given: Mapping[str, Sequence[float]] | None = None,
        guidance: float = 1.0,
        guide: Guidance | None = None,
        **how: Any,
    ) -> Policy:
        """The policy of a run that was trained on demonstrations.

        ``steps`` of ``sampler`` (None: ddim, one evaluation a step) draw a chunk; a one-pass objective takes neither.
        ``act_steps`` None is what the data said. ``given`` is what it is told besides obs: ``{"skill": [2]}``.
        ``guidance`` goes toward that, where the run was trained without each of it too (drop_each), else from the null
        of all conditions; ``how`` are further fields of :class:`Sampling`.
        ``ValueError`` where the run's samples are no action chunks, or the horizons do not nest.
        """
        found = run if isinstance(run, Run) else load_run(run, ema=ema, step=step, device=device)
        cls.require(found)
        to, asked = observed(found.spec)[0], told(found.spec, given or {})
        apart = getattr(found.objective, "drop_each", 0.0) > 0
        if missing := [k for k in get_args(Further) if k in found.spec.cond and k not in asked and not apart]:
            raise ValueError(f"given: {missing[0]} is missing, and this run was always told it; give it, or train one "
                             "that may do without: --objective.drop-each 0.2")  # fmt: skip
        guides = [guide] if guide else []
        if found.objective.sampler is not None:
            how |= {"sampler": sampler or "ddim", "steps": steps}
            if guidance != 1 and asked and apart:
                guides, guidance = [toward(list(asked), guidance), *guides], 1.0
            guides += cls.guides(found)
        elif sampler is not None:
            how |= {"sampler": sampler}  # refused with a word
        sampling = Sampling(**how, guidance=guidance)
        outer = compose(*guides) if guides else None
        data = found.config.data
        usual = data.act_steps if isinstance(data, Demonstrations) else found.spec.shape[1] - to + 1
        chosen = usual if act_steps is None else act_steps
        check_horizons(to, found.spec.shape[1], chosen)
        return cls(found, found.generator(sampling, outer=outer), chosen, given=asked, **cls.further(found))

    @classmethod
    def require(cls, found: Run) -> None:
        """``ValueError`` unless its samples are chunks of actions given obs."""
        seen = found.spec.cond.get("obs")
        if "frames" in found.spec.cond:
            raise ValueError(f"run: {found.directory.name} sees pictures, which only genkit rollout can show it so far")
        if not isinstance(found.codec, Actions) or not isinstance(seen, Vector) or len(found.spec.shape) != 2:
            raise ValueError(
                f"run: {found.directory.name} draws samples of shape {found.spec.shape}, not actions given obs; "
                "train one: genkit train --data=four-ways"
            )

    @classmethod
    def guides(cls, found: Run) -> list[Guidance]:
        """Guidance that belongs to such samples, after all other."""
        return []

    @classmethod
    def further(cls, found: Run) -> dict[str, Any]:
        """What else a policy of this kind needs."""
        return {}

    @property
    def valued(self) -> bool:
        """Whether a Q can be learned of its samples and what it sees."""
        return True

    @property
    def obs_shape(self) -> tuple[int, int]:
        """(To, Do); Do is 0 where pictures are all it sees."""
        return observed(self.run.spec)

    @property
    def frame_shape(self) -> tuple[int, ...] | None:
        """(C, H, W) of the pictures that it sees; None where it sees none."""
        kind = self.run.spec.cond.get("frames")
        return kind.shape[1:] if isinstance(kind, Frames) else None

    @property
    def action_dim(self) -> int:
        return self.run.spec.shape[0]

    @property
    def env(self) -> str:
        """The environment that the demonstrations came from; "" where they do not say."""
        return self.run.config.data.env if isinstance(self.run.config.data, Demonstrations) else ""

    @property
    def about(self) -> dict[str, Any]:
        """What a report of its episodes should say of it, ready for JSON."""
        return {}

    def reset(self, seeds: Sequence[int]) -> None:
        """Begin episodes: row i draws from its own seed from now on."""
        self.noise = Seeds(seeds, self.run.device)

    def act(self, obs: np.ndarray, frames: np.ndarray | None = None) -> np.ndarray:
        """Actions ``[N, Ta, A]`` in the world's units for observations ``[N, To, Do]``, and uint8 pictures ``frames``
        ``[N, To, C, H, W]`` where it sees them.

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
        pictures = self.pictures(frames, len(rows), single)
        actions = self.chunk(torch.from_numpy(rows), pictures)[:, :, to - 1 : to - 1 + self.act_steps]
        out = actions.transpose(1, 2).cpu().numpy()
        return out[0] if single else out

    def pictures(self, frames: np.ndarray | None, batch: int, single: bool) -> Tensor | None:
        """``ValueError`` where they are not what was seen in training."""
        shape = self.frame_shape
        if (shape is None) != (frames is None):
            raise ValueError("frames: this policy sees pictures; give them" if shape else "frames: it sees no pictures")
        if frames is None or shape is None:
            return None
        rows, needed = (frames[None] if single else frames), (batch, self.obs_shape[0], *shape)
        if rows.shape != needed or rows.dtype != np.uint8:
            given = f"{frames.shape} of {frames.dtype}"
            raise ValueError(f"frames: given {given}; this policy needs {needed} of uint8, the size it was trained on")
        return torch.from_numpy(rows)

    def chunk(self, obs: Tensor, frames: Tensor | None = None) -> Tensor:
        """Whole chunks ``[N, A, Tp]`` in the world's units, the past steps among them, for ``[N, To, Do]``."""
        assert isinstance(self.run.codec, Actions)
        return self.run.codec.world(self.sample(obs, frames), obs.to(self.run.device))

    def sample(self, obs: Tensor, frames: Tensor | None = None) -> Tensor:
        """Samples ``[N, *S]`` in the model's own numbers."""
        noise, shape = self.noise, self.run.spec.shape
        z = noise(shape) if noise else torch.randn(len(obs), *shape, device=self.run.device)
        with torch.no_grad():
            return self.generate(z, self.cond(obs, frames), noise).float()

    def cond(self, obs: Tensor, frames: Tensor | None = None) -> dict[str, Tensor]:
        """All that the networks are told."""
        found = {k: v.expand(len(obs), *v.shape[1:]) for k, v in self.given.items()}
        found |= {"obs": obs} if obs.shape[2] else {}
        found |= {} if frames is None else {"frames": frames}
        return {k: v.to(self.run.device) for k, v in found.items()}


class Watcher(Policy):
    """A policy that sees pictures, besides what is observed or alone."""

    @property
    def valued(self) -> bool:
        return False

    @classmethod
    def require(cls, found: Run) -> None:
        if not isinstance(found.codec, Actions) or len(found.spec.shape) != 2:
            Policy.require(found)
