"""The training loop: devices, ranks, optimizers and EMA. It contains no mathematics and names no objective."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from genkit.backbones.dropout import install_dropout
from genkit.core import Batch, Codec, Draw, Loss, Objective, Phase, seed_of
from genkit.core.tensors import unsaved_buffers
from genkit.training.averages import Average
from genkit.training.divergence import find_bad_layer
from genkit.training.loss_scale import LossScale
from genkit.training.meter import Meter, SkippedSteps
from genkit.training.optimizers.family import reads_flag
from genkit.training.optimizers.groups import create_optimizer, phase_parameters, require_phases, settings_of_phase
from genkit.training.optimizers.modes import evaluation_weights
from genkit.training.power_ema import average_names
from genkit.training.precision import use_codec_precision, use_precision
from genkit.training.schedules import learning_rate
from genkit.training.settings import TrainSettings
from genkit.training.state import State
from genkit.training.stopping import StopAgreement

if TYPE_CHECKING:
    from genkit.training.sharding import Sharding

Stream = Callable[[int, int, int, int], Batch]  # (step, draw, start, stop) -> rows start..stop of the global batch
DROPOUT = 2  # last number of the key of the masks, so that they do not shift the loss's draws


class Diverged(RuntimeError):
    """Too many steps in a row without a finite gradient."""


def initial_state(
    objective: Objective, nets: dict[str, nn.Module], settings: TrainSettings, sharding: Sharding | None = None
) -> State:
    """Return the state before the first step. ``nets`` are sharded in place if a ``sharding`` is given."""
    keys: list[float | str] = [*settings.ema, *average_names(settings.power_ema)]
    emas = {key: {k: copy_for_ema(v).requires_grad_(False).eval() for k, v in nets.items()} for key in keys}
    if sharding:
        sharding.split(nets, emas.values(), objective.needs_whole_networks)
    require_phases(settings, objective)
    optimizers = {
        phase.name: create_optimizer(phase, nets, settings, sharding)
        for phase in objective.phases
        if any(True for _ in phase_parameters(phase, nets))  # an adapter of one network leaves other phases without
    }
    return State(nets, emas, optimizers, sharding=sharding)


def copy_for_ema(net: nn.Module) -> nn.Module:
    """Copy a network, but share the buffers that are not saved: tables, and the frozen weights under a LoRA."""
    return copy.deepcopy(net, unsaved_buffers(net))


def local_batch_size(batch: int, world: int, name: str = "batch") -> int:
    """Return the rows of a global batch that each rank takes.

    Raises ``ValueError``, about the setting ``name``, if the ranks cannot share it equally.
    """
    if batch % world:
        raise ValueError(f"{name}: given {batch} on {world} ranks; needs a multiple of {world}")
    return batch // world


def split_batch(rows: int, size: int | None) -> list[tuple[int, int]]:
    """Return ``(start, stop)`` of micro-batches of ``size`` rows; None: one micro-batch."""
    size = size or rows
    return [(i, min(i + size, rows)) for i in range(0, rows, size)]


Log = Callable[[dict[str, Any]], None]
Hook = Callable[[State], None]


def fit(
    objective: Objective,
    state: State,
    stream: Stream,
    codec: Codec,
    settings: TrainSettings,
    accelerator: Accelerator,
    *,
    log: Log = lambda record: None,
    sample: Hook = lambda state: None,
    validate: Hook = lambda state: None,
    measurements: Sequence[tuple[int, Hook]] = (),
    save: Hook = lambda state: None,
    snapshot: Hook = lambda state: None,
    progress: Callable[[int, float | None], None] = lambda step, loss: None,
    stop: Callable[[], bool] = lambda: False,
    is_best: Callable[[int], bool] = lambda step: False,
    is_over: Callable[[], bool] = lambda: False,
    preserve: Callable[[Mapping[str, nn.Module], Batch], Tensor] | None = None,
    rate_share: Callable[[], float] = lambda: 1.0,
) -> bool:
    """Train ``state`` from ``state.step`` to ``settings.steps``. Returns False if ``stop()`` or ``is_over()`` ended
    it.

    ``validate`` and ``measurements`` (steps between two, and what is called then) may find that the step is the best so
    far (``is_best(step)``, which is saved then), or that training is over (``is_over()``): it has not improved for too
    long, or they were interrupted. Learning rates are multiplied by ``rate_share()``;
    ``preserve`` is a further loss ``[B]``.

    A step is a pure function of (state, seed, step), so a resumed run is bit-identical to one that never stopped. Each
    phase draws its batches, runs ``loss`` and backward in micro-batches, clips, and steps its optimizer; the averages
    are updated last. Ranks split the rows of the global batch. A gradient that is not finite skips that optimizer step,
    without synchronising the device; after ``settings.max_nonfinite_steps`` in a row :class:`Diverged` names the first
    bad layer.
    """
    loop, agreement = _Loop(objective, state, stream, codec, settings, accelerator), StopAgreement(accelerator)
    hooks = (settings.val_every, validate), (settings.sample_every, sample), *measurements
    while state.step < settings.steps and not is_over():
        step = state.step
        share = rate_share()
        for phase, nets, draw in loop.updates(step):
            for perturbed in loop.passes(phase):
                for piece in loop.pieces:
                    # ranks exchange gradients once, with the last micro-batch
                    with loop.accumulating(phase, piece):
                        batch = loop.rows(step, draw, piece)
                        with use_precision(settings.precision, accelerator.device):
                            loss = objective.loss(phase.name, nets, batch)
                            if preserve is not None:
                                loss = add_loss(loss, "preservation", preserve(nets, batch))
                        loop.backward(phase, batch, loss, log=not perturbed)
            loop.optimize(phase, share * learning_rate(loop.settings_of[phase.name], step))
        loop.finish(step)
        if loop.is_due(settings.log_every):
            log(loop.record(share * learning_rate(settings, step)))
        progress(state.step, loop.recent_loss())
        stopping = agreement.is_reached(state.step, stop())
        with loop.meter.paused(), ExitStack() as hooked:
            # the checkpoint comes first: if drawing pictures or evaluating fails, no work is lost
            saved = stopping or loop.is_due(settings.save_every)
            due = [hook for every, hook in hooks if every and loop.is_due(every)]
            if saved or due:
                hooked.enter_context(evaluation_weights(state.optimizers.values()))
            if saved:
                loop.prepare_checkpoint()
                save(state)
            if stopping and state.step < settings.steps:
                return False
            if settings.power_ema and loop.is_due(settings.power_ema_every):
                snapshot(state.gather(all_averages=True))
            whole = state.gather() if due else state
            for hook in due:
                hook(whole)
            del whole
            if not saved and (is_best(state.step) or is_over()):
                loop.prepare_checkpoint()
                save(state)
    return state.step >= settings.steps


def add_loss(loss: Loss, name: str, further: Tensor) -> Loss:
    """``loss`` plus a ``further`` one ``[B]``, whose mean is logged as ``name``."""
    return loss._replace(per_sample=loss.per_sample + further, logs={**loss.logs, name: further.detach().mean()})


class _Loop:
    """The parts of a training step; :func:`fit` calls them in order."""

    def __init__(
        self,
        objective: Objective,
        state: State,
        stream: Stream,
        codec: Codec,
        settings: TrainSettings,
        accelerator: Accelerator,
    ):
        self.objective, self.state, self.stream, self.codec = objective, state, stream, codec
        self.settings, self.accelerator = settings, accelerator
        self.device = accelerator.device
        self.local = local_batch_size(settings.batch, accelerator.num_processes)
        self.pieces = split_batch(self.local, settings.micro_batch)
        self.skipped = SkippedSteps(self.device)
        scaled = state.optimizers if settings.precision == "fp16" else ()
        self.scales = {name: LossScale(self.device, state.loss_scales.get(name)) for name in scaled}
        self.dropouts = [layer for layer in install_dropout(state.nets) if layer.p]
        modules = [module for net in state.nets.values() for module in net.modules()]
        self.projections: list[Any] = [m.project_weights for m in modules if hasattr(m, "project_weights")]
        if settings.compile:
            for net in state.nets.values():
                state.compile_network(net)
        # DDP refuses networks without parameters, such as a memory of past losses
        trainable = [k for k, net in state.nets.items() if any(True for _ in net.parameters())]
        wrap = accelerator.prepare_model if state.sharding is None else lambda net: net
        self.wrapped = {k: wrap(v) if k in trainable else v for k, v in state.nets.items()}
        trained = [phase for phase in objective.phases if phase.name in state.optimizers]
        self.parameters = {phase.name: [p for _, p in phase_parameters(phase, state.nets)] for phase in trained}
        # a walk over the modules of a network takes longer than its small kernels, so there is none in a step
        self.owned = {k: list(net.parameters()) for k, net in state.nets.items()}
        self.averages = [Average(decay, ema, state.nets) for decay, ema in state.emas.items()]
        self.settings_of = {phase.name: settings_of_phase(settings, phase.name) for phase in objective.phases}
        self.meter = Meter(self.device, state.step, state.meter)
        for net in state.nets.values():
            net.train()

    def updates(self, step: int) -> Iterator[tuple[Phase, dict[str, nn.Module], int]]:
        """Yield the optimizer updates of one step: ``(phase, networks, number of the batch)``."""
        seed = seed_of(self.settings.seed, self.accelerator.process_index, step)
        # for networks that draw numbers themselves; torch.manual_seed costs half a millisecond where CUDA is not in use
        (torch.default_generator.manual_seed if self.device.type == "cpu" else torch.manual_seed)(seed)
        draw = 0
        for phase in self.objective.phases:
            if step % phase.every:
                continue
            if phase.name not in self.state.optimizers:  # nothing to train; other phases keep their batches
                draw += phase.repeats
                continue
            nets = {k: self.wrapped[k] if k in phase.trains else v for k, v in self.state.nets.items()}
            for name, parameters in self.owned.items():
                for p in parameters:
                    p.requires_grad = name in phase.trains
            for _ in range(phase.repeats):
                yield phase, nets, draw
                draw += 1

    def rows(self, step: int, draw: int, piece: tuple[int, int]) -> Batch:
        """Return this rank's rows ``piece`` (start, stop) of a batch, encoded; layers of dropout follow them."""
        first, last = (self.accelerator.process_index * self.local + row for row in piece)
        if self.dropouts:
            keys = Draw((self.settings.seed, step, draw, DROPOUT), first, last, self.device).integers()
            for layer in self.dropouts:
                layer.keys = keys
        batch = self.stream(step, draw, first, last).to(self.device)
        with use_codec_precision(self.settings.precision, self.device):
            return self.codec.encode(batch)

    def accumulating(self, phase: Phase, piece: tuple[int, int]) -> ExitStack:
        """Return a context that keeps gradients on this rank, except for the last micro-batch."""
        stack = ExitStack()
        if piece is not self.pieces[-1] and self.state.sharding is None:  # a share has no room for a whole gradient
            for name in phase.trains:
                stack.enter_context(self.accelerator.no_sync(self.wrapped[name]))
        return stack

    def passes(self, phase: Phase) -> Iterator[bool]:
        """Yield False for each gradient of a step, and then, if the phase's optimizer moves the weights for a second
        one, True. That repetition is of the same samples, so what networks gathered of them in buffers stays as it was.
        """
        optimizer: Any = self.state.optimizers[phase.name]
        if not hasattr(optimizer, "perturb"):
            yield False
            return
        versions = [(b, b._version) for net in self.state.nets.values() for b in net.buffers()]
        yield False
        gathered = [(b, b.clone()) for b, version in versions if b._version != version]
        optimizer.perturb()
        yield True
        for buffer, value in gathered:
            buffer.copy_(value)

    def backward(self, phase: Phase, batch: Batch, loss: Loss, log: bool = True) -> None:
        """Accumulate the gradient of a micro-batch's share of the mean loss, which is logged unless it is a repetition
        with perturbed weights."""
        weighted = loss.per_sample if batch.weight is None else loss.per_sample * batch.weight
        mean = weighted.sum() / self.local
        self.accelerator.backward(mean * self.scales[phase.name].scale if self.scales else mean)
        if not log:
            return
        share = len(batch) / self.local
        self.meter.add(f"{phase.name}/loss", weighted.detach().sum() / self.local, share)
        for key, value in loss.logs.items():
            self.meter.add(f"{phase.name}/{key}", value.detach() * share, share)

    def optimize(self, phase: Phase, lr: float) -> None:
        """Clip the gradient and step the phase's optimizer; skip the step if the gradient is not finite."""
        if sharding := self.state.sharding:
            parameters, norm = sharding.take_gradients(self.state.nets, phase.trains)
        else:
            parameters, norm = self.parameters[phase.name], None
        scale = self.scales.get(phase.name)
        if scale:
            scale.unscale(parameters)
            norm = norm if norm is None else norm / scale.scale
        norm, bad = optimizer_step(self.state.optimizers[phase.name], parameters, lr, self.settings.clip, norm=norm)
        self.meter.add(f"{phase.name}/grad_norm", norm, 1.0)
        self.skipped.add(bad, hopeless=scale.is_exhausted if scale else 1.0)
        if scale:
            scale.update(bad)

    def finish(self, step: int) -> None:
        """Finish a step: updates without a gradient, projections, averages, and the check for divergence."""
        self.objective.after_step(self.state.nets, step)
        for project_weights in self.projections:
            project_weights()
        self.state.step += 1
        for average in self.averages:
            average.update(step)
        # on an accelerator the count is read only when a log line synchronises the device anyway
        if self.device.type != "cpu" and not self.is_due(self.settings.log_every):
            return
        if float(self.skipped.streak) >= self.settings.max_nonfinite_steps:
            batch = self.rows(step, 0, self.pieces[0])
            layer = find_bad_layer(self.objective, self.state.gather().nets, batch, self.settings.precision)
            count = int(self.skipped.streak)
            raise Diverged(f"step {self.state.step}: no finite gradient for {count} steps in a row; first bad: {layer}")

    def is_due(self, every: int) -> bool:
        """Return whether the number of finished steps is a multiple of ``every``, or training is complete."""
        return self.state.step % every == 0 or self.state.step == self.settings.steps

    def record(self, lr: float) -> dict[str, Any]:
        """Return a line of the log, with means since the last one."""
        self.count_skipped()
        return self.meter.read(self.accelerator, self.state.step, self.state.skipped, self.settings.batch, lr)

    def recent_loss(self) -> float | None:
        """Return the first phase's mean loss since the last log line; on an accelerator, the one in that line."""
        return self.meter.peek(self.objective.phases[0].name) if self.device.type == "cpu" else self.meter.last

    def prepare_checkpoint(self) -> None:
        """Bring the state up to date, and check that the weights are the same on all ranks."""
        self.count_skipped()
        require_same(self.accelerator, self.state)
        self.state.meter = self.meter.dump(self.accelerator)
        self.state.loss_scales = {name: scale.dump() for name, scale in self.scales.items()}

    def count_skipped(self) -> None:
        """Move the count of skipped steps into the state."""
        self.state.skipped += self.skipped.take()


def optimizer_step(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    lr: float,
    clip: float,
    bad: Tensor | None = None,
    norm: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Clip the gradients to norm ``clip`` (0: no clipping) and step, unless they are not finite; then clear them.

    ``bad`` = 1.0 skips the step too, for instance because the gradient of a network trained together with this one is
    not finite; ``norm`` is the gradient's norm if it is known, for ``parameters`` may be shares. Returns the gradient's
    norm before clipping, and 1.0 if the step was skipped, else 0.0. Both are scalars on the device, which is not
    synchronised.
    """
    if norm is None:
        norm = nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    else:
        nn.utils.clip_grads_with_norm_(parameters, clip or math.inf, norm)
    nonfinite = (~torch.isfinite(norm)).float()
    bad = nonfinite if bad is None else torch.maximum(bad, nonfinite)
    for group in optimizer.param_groups:
        group["lr"] = lr
    guarded_step(optimizer, bad)
    optimizer.zero_grad(set_to_none=True)
    return norm, bad


def guarded_step(optimizer: torch.optim.Optimizer, bad: Tensor) -> None:
    """Step the optimizer unless ``bad`` is 1. The fused kernels read the flag on the device; for other optimizers the
    device is synchronised."""
    if not reads_flag(optimizer):
        if not bool(bad):
            optimizer.step()
        return
    optimizer.found_inf = bad  # type: ignore[attr-defined]  # the protocol of torch.amp.GradScaler
    optimizer.step()
    optimizer.found_inf = None  # type: ignore[attr-defined]


@torch.no_grad()
def require_same(accelerator: Accelerator, state: State) -> None:
    """Assert that the weights are the same on every rank, to the last bit."""
    if state.sharding:
        assert state.sharding.copies_agree(state.nets), f"step {state.step}: the copies of weights have drifted apart"
        return
    if accelerator.num_processes == 1:
        return
    parts = [p.double().sum() for net in state.nets.values() for p in net.parameters()]
    sums = accelerator.gather(torch.stack(parts)[None])
    assert isinstance(sums, Tensor)
    assert bool((sums == sums[0]).all()), f"step {state.step}: the ranks' weights have drifted apart"


def sample_rows(n: int, accelerator: Accelerator) -> Sequence[int]:
    """Return this rank's share of samples 0..n-1, padded with the last so that all ranks have equally many."""
    share = -(-n // accelerator.num_processes)
    first = accelerator.process_index * share
    return [min(i, n - 1) for i in range(first, first + share)]
