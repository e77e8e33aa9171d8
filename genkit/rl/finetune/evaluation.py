"""Evaluation of a fine-tuned model without exploration noise: returns of a policy, rewards of samples, and what the
reward cost in KL divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genkit.core import Cond, pictures
from genkit.diffusion.samplers import Seeds
from genkit.evaluation.metrics import Estimate
from genkit.rl.finetune.frechet_reward import FrechetReward
from genkit.rl.finetune.image_rewards import SampleQuality
from genkit.rl.finetune.learner import Demos
from genkit.rl.finetune.tasks import FunctionTask
from genkit.training.run import Run
from genkit.training.sampling import Sampling, picture_names

PICTURE_SAMPLES = 100  # samples in the picture
BATCH = 250  # samples drawn at a time


@dataclass(frozen=True)
class SampleEvaluation:
    """The rewards of ``n`` samples of a run, drawn without noise: sample i from ``seed + i``, whatever the run."""

    task: FunctionTask
    n: int
    seed: int
    sampling: Sampling
    demos: Demos
    quality: SampleQuality | None = None
    """further metrics of images, if the data have a classifier"""

    def __call__(self, run: Run, picture: Path) -> dict[str, Any]:
        """Estimates ready for JSON; the first samples are drawn to the file ``picture``."""
        cond = replace(self.task, group=1).conditions(
            run.spec, self.n, lambda n: self.demos(0, 0, n).cond, run.objective.chosen_condition
        )
        generate, shape = run.generator(self.sampling), run.objective.noise_shape(run.spec)
        drawn, decoded = [], []
        for rows in torch.arange(self.n).split(BATCH):
            noise = Seeds([self.seed + int(i) for i in rows], run.device)
            batch_cond = {k: v[rows].to(run.device) for k, v in cond.items()}
            with torch.no_grad():
                x = generate(noise(shape), batch_cond, noise)
                run.require_finite(x, int(rows[0]))
                drawn.append(x)
                decoded.append(run.codec.decode(x).cpu())
        reward, x = self.score(torch.cat(drawn), cond), torch.cat(decoded)
        shown = min(self.n, PICTURE_SAMPLES)
        shown_cond = {k: v[:shown].cpu() for k, v in cond.items()}
        pictures.save_image(pictures.draw_samples(x[:shown], shown_cond, picture_names(run.spec)), picture)
        results: dict[str, Any] = {
            "samples": self.n,
            "reward": Estimate.normal(float(reward.mean()), float(reward.var(correction=0)) / self.n)._asdict(),
            "reward_std": float(reward.std(correction=0)),
        }
        if self.quality:
            requested = None if self.task.unconditional else cond.get("label")
            results |= {k: v._asdict() for k, v in self.quality(x, requested).items()}
        return results

    @torch.no_grad()
    def score(self, x: Tensor, cond: Cond) -> Tensor:
        """The rewards ``[N]`` of samples ``[N, *S]``, float64 on the CPU; a distance is that of all together."""
        together = isinstance(self.task.function, FrechetReward)
        rows = torch.arange(self.n).split(self.n if together else BATCH)
        parts = [self.task.reward(x[part], {k: v[part].to(x.device) for k, v in cond.items()}) for part in rows]
        return torch.cat(parts).cpu().double()


def plot_reward_kl(records: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """Plot the reward of each iteration's trajectories against ``kl_reference`` of the weights that drew them (Gao et
    al. 2023, figure 1); for an environment the success rate, or the return. None if no divergence was logged."""
    iterations = [r for r in records if "kl_reference" in r]
    name = next((k for k in ("success", "return", "reward") if any(k in r for r in iterations)), "reward")
    points = [(r["kl_reference"], r[name], r["step"]) for r in iterations if name in r]
    if len(points) < 2:
        return None
    kl, reward, step = zip(*points, strict=True)

    def draw(axes: Any) -> None:
        axes.plot(kl, reward, color="0.8", lw=1, zorder=1)
        dots = axes.scatter(kl, reward, c=step, cmap="viridis", s=18, zorder=2)
        axes.figure.colorbar(dots, label="iteration")
        axes.set_xlabel("KL divergence from the pretrained model, nats per trajectory")
        axes.set_ylabel(f"{name} of the noisy trajectories")
        axes.grid(alpha=0.3)

    return pictures.save_image(pictures.draw_figure(draw, (7, 4)), path)
