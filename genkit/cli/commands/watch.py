"""Evaluation while training: the slowest average, every so many steps, its samples drawn by all ranks together."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from accelerate import Accelerator
from torch import nn

from genkit.cli.commands.evaluate import VECTORS, draw
from genkit.config.blocks import suggest
from genkit.core import Data
from genkit.core.tensors import to_tensors
from genkit.evaluation import FEATURES, Drawn, Ranks, Ruler, cards, data_of, is_picture, named, ruler
from genkit.training.loop import State
from genkit.training.run import Run
from genkit.training.sampling import Sampling
from genkit.training.settings import TrainSettings


@dataclass
class Watch:
    """What a training run is measured by. Set up before the first step, so that a mistake is found before the work."""

    held: Ruler
    cfg: TrainSettings
    data: Data

    def __call__(self, state: State, run: Path) -> cards.Card | None:
        """The card of this state, written below ``run``, on the main rank. All ranks draw; only that one computes.

        ``ValueError``, on all ranks where the samples are at fault.
        """
        nets, name = average_of(state)
        for net in nets.values():
            net.eval()
        try:
            samples = drawn(self.cfg, nets, self.data, run, state.step, name, self.held)
            found = self.held.look(samples, self.cfg.eval_n)
        finally:
            for net in state.nets.values():
                net.train()
        if not self.held.ranks.main:
            return None
        card = self.held.card(samples, self.cfg.eval_n, found)
        cards.write(card, run / "eval" / cards.name_of(card["settings"]))
        return card


def average_of(state: State) -> tuple[dict[str, nn.Module], str]:
    """The networks that are measured, and the file that they would be saved in."""
    if not state.emas:
        return state.nets, "nets.safetensors"
    slowest = max(state.emas)
    return state.emas[slowest], f"ema-{slowest}.safetensors"


def drawn(
    cfg: TrainSettings, nets: dict[str, nn.Module], data: Data, run: Path, step: int, name: str, held: Ruler | None
) -> Drawn:
    device = next(p for net in nets.values() for p in net.parameters()).device
    weights = f"checkpoints/step-{step:07d}/{name}"
    now = Run(run, cfg, nets, data.spec, data.codec, step, weights, device)
    digest = hashlib.sha256(safetensors.torch.save(to_tensors(nets))).hexdigest() if held else "of no card"
    return draw(now, Sampling(steps=cfg.eval_steps), digest)


def watch(cfg: TrainSettings, state: State, data: Data, accelerator: Accelerator) -> Watch:
    """What ``--eval-every`` asks for."""
    if cfg.eval_features not in FEATURES:
        near = suggest(cfg.eval_features, FEATURES)
        raise ValueError(f"eval_features: given {cfg.eval_features!r}; allowed: {', '.join(FEATURES)}{near}")
    nets, name = average_of(state)
    samples = drawn(cfg, nets, data, Path(), state.step, name, None)
    with accelerator.main_process_first():
        against = data_of(samples.run)
    held = ruler(
        samples,
        against,
        None if cfg.eval_metrics is None else named(cfg.eval_metrics),
        FEATURES[cfg.eval_features](),
        weights=cfg.eval_weights,
        reference_n=None if is_picture(data.spec) else max(cfg.eval_n, VECTORS),
        batch=min(cfg.batch, 64),
        device=accelerator.device,
        ranks=Ranks.of(accelerator),
    )
    return Watch(held, cfg, data)
