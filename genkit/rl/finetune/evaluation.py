"""What a model's samples are worth by a function, before and after; and what the reward cost in divergence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from genkit.core import Batch, pictures
from genkit.diffusion.samplers import Seeds
from genkit.evaluation.metrics import Estimate
from genkit.rl.finetune.image_rewards import Likeness
from genkit.rl.finetune.rewards import Scoring
from genkit.training.run import Run
from genkit.training.sampling import Sampling

SHOWN = 100  # samples in the picture


@dataclass(frozen=True)
class Judged:
    """``n`` samples of a run as they are drawn later, without noise: sample i from ``seed + i``, whatever the run."""

    task: Scoring
    n: int
    seed: int
    steps: int
    grid: str
    demos: Callable[[int, int], Batch]
    like: Likeness | None = None
    """how alike the data they are, where anything can tell"""

    def __call__(self, run: Run, picture: Path) -> dict[str, Any]:
        """Estimates ready for JSON, and a picture of the first samples."""
        cond = replace(self.task, group=1).conditions(run.spec, self.n, lambda rows: self.demos(0, rows).cond)
        generate = run.generator(Sampling(sampler="ddim", steps=self.steps, grid=self.grid))
        rewards, decoded = [], []
        for rows in torch.arange(self.n).split(250):
            noise, here = Seeds([self.seed + int(i) for i in rows]), {k: v[rows] for k, v in cond.items()}
            with torch.no_grad():
                x = generate(noise(run.spec.shape), here, noise)
                run.require_finite(x, int(rows[0]))
                rewards.append(self.task.reward(x, here).double())
                decoded.append(run.codec.decode(x))
        reward, x = torch.cat(rewards), torch.cat(decoded)
        shown = min(self.n, SHOWN)
        pictures.save(pictures.picture(x[:shown], {k: v[:shown] for k, v in cond.items()}), picture)
        found: dict[str, Any] = {
            "samples": self.n,
            "reward": Estimate.normal(float(reward.mean()), float(reward.var(correction=0)) / self.n)._asdict(),
            "reward_std": float(reward.std(correction=0)),
        }
        wanted = None if self.task.unconditional else cond.get("label")
        return found | ({k: v._asdict() for k, v in self.like(x, wanted).items()} if self.like else {})


def reward_kl(records: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """The reward of an iteration's walks against ``kl_reference`` of the weights that drew them (Gao et al. 2023,
    figure 1); in an environment the share of successes, or the return. None where no divergence is known."""
    walks = [r for r in records if "kl_reference" in r]
    name = next((k for k in ("success", "return", "reward") if any(k in r for r in walks)), "reward")
    points = [(r["kl_reference"], r[name], r["step"]) for r in walks if name in r]
    if len(points) < 2:
        return None
    kl, reward, step = zip(*points, strict=True)

    def draw(axes: Any) -> None:
        axes.plot(kl, reward, color="0.8", lw=1, zorder=1)
        dots = axes.scatter(kl, reward, c=step, cmap="viridis", s=18, zorder=2)
        axes.figure.colorbar(dots, label="iteration")
        axes.set_xlabel("divergence from the pretrained model, nats a walk")
        axes.set_ylabel(f"{name}, of the noisy walks")
        axes.grid(alpha=0.3)

    return pictures.save(pictures.figure(draw, (7, 4)), path)
