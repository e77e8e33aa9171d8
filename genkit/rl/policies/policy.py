"""A trained run that acts.

policy = Policy.load("runs/latest")
policy.reset(seeds=[100000])
actions = policy.act(obs)          # [N, To, Do] -> [N, Ta, A], in the environment's units
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from genkit.config import load_object
from genkit.config.numbers import CheckpointStep
from genkit.config.trust import require_trusted_code
from genkit.core import Cond, Denoiser, Frames, Generator, Guidance, Label, Noise, Objective, Prediction, Spec, Vector
from genkit.data.codecs import Actions, Plans
from genkit.data.demonstrations.windows import Demonstrations, ExtraCondition, check_horizons
from genkit.data.text import encode_prompts
from genkit.diffusion.checks import require_finite
from genkit.diffusion.guidance import LINEAR, Guided, compose, keep_mask
from genkit.diffusion.samplers import Seeds
from genkit.envs import Env, Rows, make, parse_arguments
from genkit.envs.processes import ProcessEnv
from genkit.training.run import Run, load_run
from genkit.training.sampling import Sampling

logger = logging.getLogger("genkit")
BLOCK = 8  # rows that are drawn at least in episodes side by side
ACTING_FILE = "policy.json"  # in the directory of a fine-tuned policy: how it acted in training
POLICY_CLASSES: Mapping[tuple[type, bool], str] = {  # (codec, whether it sees pictures) -> "module:Class"
    (Actions, False): "genkit.rl.policies.policy:Policy",
    (Actions, True): "genkit.rl.policies.policy:VisualPolicy",
    (Plans, False): "genkit.rl.policies.planner:Planner",
    (Plans, True): "genkit.rl.policies.planner:Planner",
}


def read_acting(run: Run) -> dict[str, Any]:
    """``steps``, ``grid`` and ``act_steps`` that a fine-tuned policy acted with in training; empty for other runs."""
    file = run.file_used_with(ACTING_FILE)
    if file is None:
        return {}
    try:
        acting = json.loads(file.read_text())
        return {"steps": int(acting["steps"]), "grid": str(acting["grid"]), "act_steps": int(acting["act_steps"])}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file}: is damaged; write it again: genkit finetune --resume {file.parent}") from None


def default_steps(run: Run) -> int:
    """The sampler steps of a policy if none are asked for: those that it was fine-tuned with, else its objective's."""
    return read_acting(run).get("steps", run.objective.policy_steps)


def in_blocks(generate: Generator) -> Generator:
    """A generator that draws at least ``BLOCK`` rows and returns those asked for: no row then depends on their number.

    Matrix products of one to three rows take other kernels than those of more, which round differently.
    """

    def generate_block(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
        missing = BLOCK - len(z)
        if missing <= 0:
            return generate(z, cond, noise)

        def fill(x: Tensor) -> Tensor:
            return torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if len(x) == len(z) else x

        filled = {k: fill(v) for k, v in cond.items()}
        return generate(fill(z), filled, noise and (lambda shape: fill(noise(shape))))[: len(z)]

    return generate_block


def executed_mask(shape: Sequence[int], obs_steps: int, act_steps: int) -> Tensor:
    """1 for the entries of a chunk ``[A, T]`` that are executed, else 0: the first ``obs_steps - 1`` are past."""
    mask = torch.zeros(*shape)
    mask[:, obs_steps - 1 : obs_steps - 1 + act_steps] = 1
    return mask


def observation_shape(spec: Spec) -> tuple[int, int]:
    """(To, Do), the observations that a run of this spec is conditioned on; Do is 0 if it sees pictures only."""
    obs, frames = spec.cond.get("obs"), spec.cond.get("frames")
    if isinstance(obs, Vector):
        return obs.shape[0], obs.shape[1]
    assert isinstance(frames, Frames)
    return frames.shape[0], 0


ConditionValue = Sequence[float] | str  # numbers, or the text of a task


def condition_tensors(spec: Spec, values: Mapping[str, ConditionValue]) -> dict[str, Tensor]:
    """Conditions besides obs (``{"skill": [2]}``, ``{"text": "go left"}``), each as one row. ``ValueError`` for one
    that the run has not."""
    tensors: dict[str, Tensor] = {}
    for name, value in values.items():
        kind = spec.cond.get(name)
        if name not in get_args(ExtraCondition) or kind is None:
            allowed = ", ".join(k for k in get_args(ExtraCondition) if k in spec.cond) or "none, as trained"
            raise ValueError(f"conditions: {name!r} is not a condition of this run; allowed: {allowed}")
        if isinstance(value, str):
            tensors |= encode_prompts(spec, [value])
            continue
        integer = isinstance(kind, Label)
        if integer and (len(value) != 1 or value[0] != int(value[0])):
            raise ValueError(f"conditions: {name} is {', '.join(map(str, value))}; needs one whole number")
        tensors[name] = torch.tensor([int(value[0])]) if integer else torch.tensor([list(value)], dtype=torch.float32)
        kind.check(name, tensors[name], 1)
    return tensors


def droppable_conditions(objective: Objective) -> tuple[str, ...]:
    """The conditions besides obs that a policy can do without: each, if each was left out at times in training."""
    return get_args(ExtraCondition) if getattr(objective, "cond_dropout_each", 0.0) > 0 else ()


def condition_guidance(names: Sequence[str], scale: float) -> Guidance:
    """Extrapolate from the prediction without the conditions ``names`` through the one with them; the other conditions
    are in both (Brooks et al. 2023, section 3.2.1)."""
    require_finite("guidance", scale)

    def guide(denoise: Denoiser) -> Denoiser:
        def pair(x: Tensor, t: Tensor, cond: Cond) -> tuple[Prediction, Prediction]:
            without = {f"keep.{name}": torch.zeros_like(keep_mask(x, cond)) for name in names}
            return denoise(x, t, cond), denoise(x, t, {**cond, **without})

        return Guided(denoise, pair, scale, LINEAR)

    return guide


@dataclass
class Policy:
    """A generator of action chunks given the newest ``obs_steps`` observations. Receding horizon: of each chunk, the
    ``act_steps`` actions from now on are carried out."""

    run: Run
    generate: Generator
    act_steps: int
    noise: Seeds | None = field(default=None)
    """source of each row's random numbers (:meth:`reset`); None: torch's global generator"""
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    """conditions besides obs, each as one row"""
    steps: int = 1
    """sampler steps for each chunk; 1 for a one-pass objective"""
    generate_with: Callable[[Guidance], Generator] | None = None
    """``generate`` with a further guidance, applied after all others; None: it takes none"""
    history: list[tuple[np.ndarray, np.ndarray | None]] = field(default_factory=list, init=False, repr=False)
    """the newest observations and pictures that :meth:`step` was given"""
    queue: list[np.ndarray] = field(default_factory=list, init=False, repr=False)
    """the actions of the last chunk that :meth:`step` has not returned yet"""

    @classmethod
    def load(
        cls,
        run: str | Path | Run,
        *,
        steps: int | None = None,
        sampler: str | None = None,
        act_steps: int | None = None,
        ema: str | None = None,
        step: CheckpointStep | None = None,
        device: str = "cpu",
        conditions: Mapping[str, ConditionValue] | None = None,
        guidance: float = 1.0,
        guide: Guidance | None = None,
        **options: Any,
    ) -> Policy:
        """The policy of a run that was trained on demonstrations, of the class that fits its samples and observations.

        ``steps`` of ``sampler`` (None: ddim or flow_map, one evaluation each) draw a chunk; a one-pass objective takes
        neither. ``steps`` and ``act_steps`` None are those that a fine-tuned policy acted with in training, else the
        objective's and the data's; another ``steps`` than it was trained with is warned of. ``conditions`` are those
        besides obs: ``{"skill": [2]}``, ``{"text": "go left"}``. ``guidance`` strengthens them if the run was trained
        without each of them too (cond_dropout_each), else all together; ``options`` are further fields of
        :class:`Sampling`.
        ``ValueError`` if the run's samples are not actions or plans, or the horizons do not nest.
        """
        run = run if isinstance(run, Run) else load_run(run, ema=ema, step=step, device=device)
        kind: type[Policy] = cls
        if cls is Policy:
            kind = load_object(
                POLICY_CLASSES.get((type(run.codec), "frames" in run.spec.cond), POLICY_CLASSES[Actions, False])
            )
        kind.require_suitable(run)
        obs_steps, tensors = observation_shape(run.spec)[0], condition_tensors(run.spec, conditions or {})
        droppable = droppable_conditions(run.objective)
        extra = [k for k in get_args(ExtraCondition) if k in run.spec.cond]
        missing = [k for k in extra if k not in tensors and k not in droppable]
        if missing:
            raise ValueError(f"conditions: {missing[0]} is missing, and this run was never trained without it; give "
                             "it, or train one that can do without: --objective.cond-dropout-each 0.2")  # fmt: skip
        guides = [guide] if guide else []
        acting = read_acting(run)
        options = {"grid": acting["grid"], **options} if "grid" in acting else options
        if steps is None:
            steps = default_steps(run)
        elif run.objective.sampler is None:
            drawn = type(run.objective).__name__
            raise ValueError(
                f"steps: given {steps}, which has no effect on {drawn}: it draws in one pass; leave it out"
            )
        elif steps != acting.get("steps", steps):
            logger.warning(f"steps: given {steps}, but {run.directory.name} was fine-tuned with {acting['steps']}")
        if run.objective.sampler is not None:
            options |= {"sampler": sampler or run.objective.policy_sampler, "steps": steps}
            if guidance != 1 and tensors and droppable:
                names = [name for name in tensors if name in run.spec.cond]
                guides, guidance = [condition_guidance(names, guidance), *guides], 1.0
            guides += kind.guides(run)
        elif sampler is not None:
            options |= {"sampler": sampler}  # for the generator to refuse
        sampling = Sampling(**options, guidance=guidance)
        if act_steps is None:
            act_steps = acting.get("act_steps")
        if act_steps is None:
            data = run.config.data
            act_steps = data.act_steps if isinstance(data, Demonstrations) else run.spec.shape[1] - obs_steps + 1
        check_horizons(obs_steps, run.spec.shape[1], act_steps)

        def generate_with(*further: Guidance) -> Generator:
            return run.generator(sampling, outer=compose(*guides, *further) if guides or further else None)

        sampled = run.objective.sampler is not None
        return kind(run, generate_with(), act_steps, conditions=tensors, steps=steps if sampled else 1,
                    generate_with=generate_with if sampled else None, **kind.extra_fields(run))  # fmt: skip

    @classmethod
    def require_suitable(cls, run: Run) -> None:
        """``ValueError`` unless the run's samples are chunks of actions given obs."""
        obs = run.spec.cond.get("obs")
        if not isinstance(run.codec, Actions) or not isinstance(obs, Vector) or len(run.spec.shape) != 2:
            raise ValueError(
                f"run: {run.directory.name} draws samples of shape {run.spec.shape}, not actions given obs; "
                "train one: genkit train --data=four-ways"
            )

    @classmethod
    def guides(cls, run: Run) -> list[Guidance]:
        """Guidance that such samples always need, applied after all other."""
        return []

    @classmethod
    def extra_fields(cls, run: Run) -> dict[str, Any]:
        """Values of the fields that a subclass adds."""
        return {}

    @property
    def supports_q(self) -> bool:
        """Whether a Q-function of its observations and samples can be learned."""
        return True

    @property
    def obs_shape(self) -> tuple[int, int]:
        """(To, Do); Do is 0 if pictures are all it sees."""
        return observation_shape(self.run.spec)

    @property
    def frame_shape(self) -> tuple[int, ...] | None:
        """(C, H, W) of the pictures that it sees; None if it sees none."""
        kind = self.run.spec.cond.get("frames")
        return kind.shape[1:] if isinstance(kind, Frames) else None

    @property
    def action_dim(self) -> int:
        """Dimension of an action."""
        return self.run.spec.shape[0]

    @property
    def future_steps(self) -> int:
        """Number of actions of a chunk from now on."""
        return self.run.spec.shape[1] - self.obs_shape[0] + 1

    @property
    def env(self) -> str:
        """Name of the environment of the demonstrations; "" if they name none."""
        return self.run.config.data.environment

    def make_env(
        self,
        num: int,
        env: str | None = None,
        arguments: Sequence[str] = (),
        max_steps: int | None = None,
        workers: int = 0,
    ) -> Env:
        """``num`` copies whose observations have the entries that it was trained on, in as many processes as
        ``workers`` (0: in this one).

        ``env`` None is the environment of the demonstrations, with the keyword arguments that they name; ``arguments``,
        each NAME=VALUE, replace or add to these. ``ValueError`` says what does not fit, or that a module that only the
        run names must be trusted.
        """
        if env is None:
            require_trusted_code(self.env, f"{self.run.directory}: data.env", self.run.directory)
        own = env is None or env == self.env
        known = parse_arguments(self.run.config.data.environment_arguments) if own else {}
        kind = self.run.spec.cond.get("obs")
        entries = kind.entries if isinstance(kind, Vector) else ()
        merged = known | parse_arguments(arguments)
        build = partial(make, env or self.env, max_steps=max_steps, entries=entries, **merged)
        return ProcessEnv(build, num, min(workers, num)) if workers else build(num)

    @property
    def details(self) -> dict[str, Any]:
        """Further entries of a report of its episodes, ready for JSON."""
        return {}

    def guided(self, guide: Guidance) -> Policy:
        """This policy with a further guidance, applied after all others. ``ValueError`` if it draws in one pass."""
        if self.generate_with is None:
            raise ValueError(f"guidance: has no effect on {type(self.run.objective).__name__}, which draws in one pass")
        return replace(self, generate=self.generate_with(guide))

    def reset(self, seeds: Sequence[int], rows: Rows | None = None) -> None:
        """Begin episodes in ``rows`` (None: all): they draw from their own seeds from now on, and :meth:`step` begins
        anew."""
        if rows is None:
            self.noise = Seeds(seeds, self.run.device)
        else:
            assert self.noise is not None, "begin with all rows"
            self.noise.restart(rows, seeds)
        self.history, self.queue = [], []

    def select(self, rows: Rows) -> Policy:
        """This policy for some rows of the episodes alone; it goes on drawing from their random numbers."""
        assert self.noise is not None, "begin episodes first"
        return replace(self, noise=self.noise.select(rows), generate=in_blocks(self.generate))

    def step(self, obs: np.ndarray, frames: np.ndarray | None = None) -> np.ndarray:
        """The next action ``[N, A]``, given the newest observation ``[N, Do]`` (pictures uint8 ``[N, C, H, W]``).

        Called once for each step of an episode: it keeps the observations that the policy needs (the first is repeated
        before the start), draws a chunk when that is due, and returns its actions one by one. One environment's
        ``[Do]`` gives ``[A]``.
        """
        obs_steps = self.obs_shape[0]
        newest = (np.asarray(obs, np.float32), frames)
        self.history = [*(self.history or [newest] * (obs_steps - 1)), newest][-obs_steps:]
        if not self.queue:
            window = np.stack([seen for seen, _ in self.history], -2)
            images = [v for _, v in self.history if v is not None]
            chunk = self.act(window, np.stack(images, -4) if images else None)
            self.queue = list(np.moveaxis(chunk, -2, 0))
        return self.queue.pop(0)

    def act(self, obs: np.ndarray, frames: np.ndarray | None = None, rows: Rows | None = None) -> np.ndarray:
        """Actions ``[N, Ta, A]`` in the environment's units, for observations ``[N, To, Do]`` and, if it sees pictures,
        uint8 ``frames`` ``[N, To, C, H, W]``.

        A single observation, ``[To, Do]`` or ``[Do]`` (repeated To times), gives ``[Ta, A]``. ``rows`` ``[N]`` are
        those of the episodes that :meth:`reset` began which are asked; None: all. ``ValueError`` for another shape or
        numbers that are not finite.
        """
        if rows is not None:
            return self.select(rows).act(obs, frames)
        obs_steps, obs_dim = self.obs_shape
        windows = np.asarray(obs, np.float32)
        single = windows.ndim < 3
        if windows.shape == (obs_dim,):
            windows = np.repeat(windows[None], obs_steps, 0)
        if single:
            windows = windows[None]
        if windows.shape[1:] != (obs_steps, obs_dim):
            raise ValueError(f"obs: given shape {np.shape(obs)}; this policy needs [N, {obs_steps}, {obs_dim}]")
        if not np.isfinite(windows).all():
            bad = int(np.flatnonzero(~np.isfinite(windows).all((1, 2)))[0])
            raise ValueError(f"obs: row {bad} is not finite")
        pictures = self.check_frames(frames, len(windows), single)
        chunk = self.chunk(torch.from_numpy(windows), pictures)
        actions = chunk[:, :, obs_steps - 1 : obs_steps - 1 + self.act_steps].transpose(1, 2).cpu().numpy()
        return actions[0] if single else actions

    def check_frames(self, frames: np.ndarray | None, batch: int, single: bool) -> Tensor | None:
        """``frames`` as a tensor ``[N, To, C, H, W]``. ``ValueError`` unless they are as in training."""
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
        """Whole chunks ``[N, A, Tp]`` in the environment's units, past steps included, for ``[N, To, Do]``."""
        assert isinstance(self.run.codec, Actions)
        return self.run.codec.to_absolute(self.sample(obs, frames), obs.to(self.run.device))

    def sample(self, obs: Tensor, frames: Tensor | None = None) -> Tensor:
        """Samples ``[N, *S]`` in the model's units."""
        noise, shape = self.noise, self.run.spec.shape
        z = noise(shape) if noise else torch.randn(len(obs), *shape, device=self.run.device)
        with torch.no_grad():
            return self.generate(z, self.cond(obs, frames), noise).float()

    def cond(self, obs: Tensor, frames: Tensor | None = None) -> dict[str, Tensor]:
        """All conditions of the networks, ``[N, ...]`` each."""
        cond = {k: v.expand(len(obs), *v.shape[1:]) for k, v in self.conditions.items()}
        if obs.shape[2]:
            cond["obs"] = obs
        if frames is not None:
            cond["frames"] = frames
        return {k: v.to(self.run.device) for k, v in cond.items()}


class VisualPolicy(Policy):
    """A policy that sees pictures, with or without observed numbers."""

    @property
    def supports_q(self) -> bool:
        return False

    @classmethod
    def require_suitable(cls, run: Run) -> None:
        if not isinstance(run.codec, Actions) or len(run.spec.shape) != 2:
            Policy.require_suitable(run)
