"""Diffusion-DPO (Wallace et al. 2024): learn from pairs of samples, of which one is preferred."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genkit.config.numbers import Count, NonNegative, Positive
from genkit.config.paths import PathText
from genkit.core import Batch, Codec, Cond, Spec
from genkit.core.arrays import open_npz
from genkit.core.files import format_error
from genkit.data.codecs import Actions
from genkit.rl.finetune.chain import Chain
from genkit.rl.finetune.experience import Experience, Task
from genkit.rl.finetune.learner import Learner, Share, random_states, restore_random_states
from genkit.rl.finetune.reward_method import RewardMethod
from genkit.rl.finetune.tasks import EnvironmentTask, FunctionTask
from genkit.rl.policies.policy import droppable_conditions


class Pairs(NamedTuple):
    """N pairs of samples, in the model's units, whose conditions are the same except for what the model chose."""

    chosen: Tensor
    """[N, *S], the preferred ones"""
    rejected: Tensor
    chosen_cond: Mapping[str, Tensor]
    """[N, ...]"""
    rejected_cond: Mapping[str, Tensor]


def pair_by_rank(experience: Experience, group: int) -> Pairs:
    """The samples of each ``group`` of rows in pairs: the best with the worst, the second with the second to last, and
    so on; pairs of equal advantage are left out."""
    x, advantages = experience.trajectory.xs[-1], experience.advantages
    order = advantages.view(-1, group).argsort(dim=1, descending=True, stable=True)
    order = order + group * torch.arange(len(order), device=order.device)[:, None]
    better, worse = order[:, : group // 2].flatten(), order.flip(1)[:, : group // 2].flatten()
    differ = advantages[better] > advantages[worse]
    better, worse = better[differ], worse[differ]
    better_cond, worse_cond = ({k: v[rows] for k, v in experience.cond.items()} for rows in (better, worse))
    return Pairs(x[better], x[worse], better_cond, worse_cond)


def read_pairs(
    file: str | Path, codec: Codec, spec: Spec, choice: str | None = None, optional: Collection[str] = ()
) -> Pairs:
    """The pairs of an .npz: arrays ``chosen`` and ``rejected`` ``[N, *S]``, samples as the data have them (a policy's
    chunks as its environment takes them), and one of each condition's name, except that ``optional`` ones may be
    missing.

    A model's own ``choice`` is one of them, or two: ``chosen_NAME`` and ``rejected_NAME``. ``ValueError`` if the file
    cannot be read or does not fit the model.
    """
    path = Path(file).expanduser()
    try:
        with open_npz(path) as stored:
            arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
    except (OSError, ValueError, TypeError) as e:  # TypeError: of text, not numbers
        raise ValueError(f"pairs: {path} cannot be read: {format_error(e)[:150]}") from e
    sides = ("chosen", "rejected")
    choices = [f"{side}_{choice}" for side in sides] if choice and choice not in arrays else []
    if missing := {*sides, *choices} - arrays.keys():
        raise ValueError(f"pairs: {path} has no array {min(missing)}; needs chosen and rejected, [N, *sample]")
    num = len(arrays["chosen"]) if arrays["chosen"].ndim else 0
    if not num:
        raise ValueError(f"pairs: {path} holds none; needs chosen and rejected, [N, *sample]")
    samples, own = [arrays.pop(side) for side in sides], [arrays.pop(name) for name in choices]
    shared = {k: v.float() if v.is_floating_point() else v for k, v in arrays.items()}
    conds = [{**shared, choice: value} for value in own] if choice and own else [shared, shared]
    for cond in conds:
        spec.check(cond, num)
        if missing := spec.cond.keys() - cond.keys() - {*optional}:
            raise ValueError(
                f"pairs: {path} has no array {min(missing)}; needs each condition of the model by its name"
            )
        if bad := [name for name, v in cond.items() if v.is_floating_point() and not v.isfinite().all()]:
            raise ValueError(f"pairs: {bad[0]} of {path} has numbers that are not finite")
    shape = (num, *spec.shape)
    chosen, rejected = (encode_samples(x, side, shape, codec, shared) for x, side in zip(samples, sides, strict=True))
    return Pairs(chosen, rejected, *conds)


def encode_samples(values: Tensor, name: str, shape: Sequence[int], codec: Codec, cond: Cond) -> Tensor:
    """Samples as the data have them, in the model's units, ``[N, *S]``. ``ValueError`` if they do not fit the model."""
    try:
        if isinstance(codec, Actions) and codec.reference and "obs" in cond:
            x = codec.from_absolute(values, cond["obs"]).float()
        else:
            x = codec.encode(Batch(values)).x.float()
    except (RuntimeError, IndexError):  # of a codec for samples of another shape
        x = values
    if x.shape != shape:
        raise ValueError(f"pairs: {name} has shape {tuple(values.shape)}; needs {shape[0]} samples of {shape[1:]}")
    if values.is_floating_point() and codec.decode(x[:1]).dtype == torch.uint8:
        raise ValueError(f"pairs: {name} are {values.dtype}; pictures are uint8 in 0..255, as the data are")
    if not x.isfinite().all():
        raise ValueError(f"pairs: {name} has numbers that are not finite")
    return x


@dataclass(frozen=True, kw_only=True)
class DPO(RewardMethod):
    """Preference optimisation without a reward model: the loss of the preferred sample of a pair is to fall, relative
    to the model before, by more than that of the other one (Wallace et al. 2024, eq. 14).

    The pairs are those of a file (of a policy from ``genkit rollout --pairs``), or of the model's own samples of one
    condition (``--group``), ranked by the reward.
    Both samples of a pair, and both models, see the same times and noise. There are no log-probabilities, so samples
    may be drawn without exploration noise. The choice of an anchor has a probability, and a term of its own (Rafailov
    et al. 2023, eq. 7).
    """

    lr: Positive = 1e-4
    """Learning rate of the networks."""
    batch: Count = 128
    """Pairs of a gradient step."""
    epochs: Count = 1
    """Passes over the pairs of an iteration."""
    beta: Positive = 1000.0
    """Strength of the pull towards the model before: smaller moves the model further. In the paper 2000 to 5000."""
    choice_beta: Positive = 0.1
    """The same for the choice of an anchor."""
    chosen_coef: NonNegative = 0.0
    """Weight of the loss of the preferred samples themselves, in units of beta / 2, and of their choices, in units of
    choice_beta (Pang et al. 2024, eq. 1): the difference of losses alone may fall while both rise."""
    pairs: PathText | None = None
    """An .npz of pairs: chosen and rejected [N, *sample], as the data are (chunks as the environment takes them), and
    conditions by name. None: pairs of the model's own samples."""

    needs_log_prob: ClassVar[bool] = False
    needs_critic: ClassVar[bool] = False

    @property
    def files(self) -> Mapping[str, Path]:
        return {} if self.pairs is None else {"pairs": Path(self.pairs).expanduser()}

    def check(self, chain: Chain, task: Task) -> None:
        if not isinstance(task, FunctionTask) and self.pairs is None:
            raise ValueError("method: dpo compares chunks of actions for one observation; make pairs of them: genkit "
                             "rollout RUN --pairs pairs.npz, and give them: --method.pairs pairs.npz")  # fmt: skip

    def collect(self, learner: Learner, task: Task, iteration: int) -> tuple[Any, dict[str, float]]:
        assert isinstance(task, FunctionTask | EnvironmentTask)
        if self.pairs is not None:
            chosen = learner.objective.chosen_condition
            pairs = read_pairs(self.pairs, task.codec, learner.spec, chosen, droppable_conditions(learner.objective))
            conds = ({k: v.to(learner.device) for k, v in cond.items()} for cond in pairs[2:])
            return Pairs(pairs.chosen.to(learner.device), pairs.rejected.to(learner.device), *conds), {}
        assert isinstance(task, FunctionTask)
        if task.group == 1 and learner.spec.cond and not task.unconditional:
            raise ValueError("method: dpo compares samples of one condition; give --group 8, or --method.pairs FILE")
        return super().collect(learner, task, iteration)

    def improve(self, learner: Learner, task: Task, experience: Any, iteration: int) -> dict[str, float]:
        if isinstance(experience, Experience):
            assert isinstance(task, FunctionTask)
            experience = pair_by_rank(experience, task.group if task.group > 1 else len(experience.advantages))
        pairs: Pairs = experience
        if not len(pairs.chosen):
            return {"loss": 0.0}

        def loss(share: Share) -> tuple[Tensor, Tensor]:
            value = self.loss(learner, pairs, share)
            return value, value

        return {"loss": self.learn_in_epochs(learner, len(pairs.chosen), loss, iteration, self.epochs)}

    def loss(self, learner: Learner, pairs: Pairs, share: Share) -> Tensor:
        """The mean loss of the pairs of a share."""
        states, rows = random_states(learner.device), share.rows

        def losses(nets: Mapping[str, nn.Module], x: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
            restore_random_states(learner.device, states)  # the same times and noise for all four
            batch = Batch(x[rows], {k: v[rows] for k, v in cond.items()}, draw=share.draw)
            loss = learner.objective.loss(learner.phase, dict(nets), batch)
            choice = torch.zeros_like(loss.per_sample) if loss.choice is None else loss.choice
            return torch.stack([loss.per_sample - choice, choice])

        def of_both(nets: Mapping[str, nn.Module]) -> tuple[Tensor, Tensor]:
            chosen = losses(nets, pairs.chosen, pairs.chosen_cond)
            return chosen, chosen - losses(nets, pairs.rejected, pairs.rejected_cond)

        with torch.no_grad():
            _, before = of_both(learner.frozen)
        chosen, margins = of_both(learner.state.nets)
        steps, choice = margins - before
        value = -F.logsigmoid(-self.beta / 2 * steps).mean() + self.chosen_coef * self.beta / 2 * chosen[0].mean()
        if learner.objective.chosen_condition is not None:
            value = value - F.logsigmoid(-self.choice_beta * choice).mean()
            value = value + self.chosen_coef * self.choice_beta * chosen[1].mean()
        return value
