"""The rows of the benchmark: what each trains within the shared budget, and how its samples are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt

from genkit.config import parse, table
from genkit.core.device import DeviceName
from genkit.training.schedules import warmup_steps
from genkit.training.settings import TrainSettings

Count = Annotated[int, Ge(1)]
PROG = "genkit bench quality"


@dataclass(frozen=True)
class Row:
    """The options of ``genkit train`` besides the budget, and how samples are drawn.

    The sampler evaluates the network once a step, so its steps are the number of evaluations. All rows but a flow map,
    which jumps, use the same sampler and grid: for ddpm and edm on digits, at 5 and 10 evaluations, neither ddim, nor
    heun, nor the grids karras and logsnr were better by more than their intervals. A one-pass model has neither, and is
    measured at NFE 1.

    With ``first_stage`` (the options of its training), ``first_stage_share`` of the steps trains that, and the rest a
    model of its latents.
    """

    options: tuple[str, ...]
    grid: str = "uniform"
    sampler: str = "dpmpp_2m"
    first_stage: tuple[str, ...] = ()
    first_stage_share: float = 0.4


ROWS: Mapping[str, Row] = {
    "ddpm": Row(("--objective=ddpm",)),
    "edm": Row(("--objective=edm",)),
    "flow": Row(("--objective=flow",)),
    "flow-ot": Row(("--objective=flow", "--objective.coupling=ot")),
    "flow-map": Row(("--objective=flow-map",), sampler="flow_map"),
    "drift": Row(("--objective=drift",)),
    "vae": Row(("--objective=vae",)),
    "gan": Row(("--objective=gan",)),
    "latent": Row(("--objective=flow",), first_stage=("--objective=autoencoder",)),
}


def find_row(name: str) -> Row:
    """The row of this name; for any other name, the row that trains the objective NAME."""
    return ROWS.get(name) or Row((f"--objective={name}",))


@dataclass(frozen=True)
class Quality:
    """Train several objectives on the same network, data and budget, and measure them with the same evaluator."""

    objectives: str = "ddpm,edm,flow,flow-ot"
    """Rows separated by commas: ddpm, edm, flow, flow-ot, flow-map, drift, vae, gan, latent, or any other
    objective's NAME."""
    backbone: Any = table(
        "genkit.backbones:BACKBONES", "unet", kind="genkit.core:Backbone", follows="data.default_backbone"
    )
    """The network of all rows; without a NAME, the one that suits the data."""
    data: Any = table("genkit.data:DATA", "digits", kind="genkit.data:DataSource", fallback="genkit.data:find_source")
    """The data of all rows."""
    steps: Count = 2000
    """Optimizer steps of each row."""
    batch: Count = 64
    """Samples per step."""
    lr: Annotated[float, Gt(0)] = 1e-3
    """Peak learning rate."""
    nfe: str = "5,10,20,50"
    """Network evaluations per sample, separated by commas."""
    n: Annotated[int, Ge(2)] = 1000
    """Samples that are measured."""
    seeds: Count = 1
    """Trainings of each row. With several, the numbers are means, and intervals go from the smallest to the largest."""
    features: Any = table("genkit.evaluation:FEATURES", "auto", kind="genkit.evaluation.metrics.features:Features")
    """Feature space of distances. auto: classifier for small grey images, inception for others, raw for vectors."""
    out: str = "runs/quality"
    """The folder of all results, in which existing ones are found."""
    device: DeviceName = "auto"
    """Device. auto: the machine's accelerator, or the CPU if it has none."""
    threads: Count | None = None
    """CPU threads; None: one for small batches, else all."""

    @property
    def row_names(self) -> list[str]:
        """The names in ``objectives``. ``ValueError`` if there are none."""
        names = list(dict.fromkeys(filter(None, map(str.strip, self.objectives.split(",")))))
        if not names:
            raise ValueError(f"objectives: given none; allowed: {', '.join(ROWS)}, or any objective's NAME")
        return names

    @property
    def nfe_values(self) -> list[int]:
        """The numbers in ``nfe``, sorted. ``ValueError`` if they are not whole numbers from 1 on."""
        words = [word.strip() for word in self.nfe.split(",")]
        if not all(word.isdecimal() and int(word) for word in words):
            raise ValueError(f"nfe: given {self.nfe!r}; allowed: whole numbers from 1 on, such as 5,10,20,50")
        return sorted(set(map(int, words)))

    def train_config(self, name: str, seed: int) -> TrainSettings:
        """The configuration of a row's training; with a first stage, of the model of its latents.

        ``ValueError`` if there is no such objective, or it draws no samples.
        """
        row = find_row(name)
        cfg = parse(TrainSettings, row.options, prog=PROG)
        if not cfg.objective.is_generative:
            raise ValueError(f"objectives: given {name}, which draws no samples")
        return self.with_budget(cfg, name, seed, self.steps - self.first_stage_steps(row))

    def first_stage_config(self, name: str, seed: int) -> TrainSettings | None:
        """The configuration of a row's first stage; None if the row has none."""
        row = find_row(name)
        if not row.first_stage:
            return None
        spec = self.data.load("train").spec
        latent = ["--objective.latent", *map(str, latent_shape(spec.shape))]
        cfg = parse(TrainSettings, [*row.first_stage, *latent], prog=PROG)
        return self.with_budget(cfg, f"{name}-stage", seed, self.first_stage_steps(row))

    def first_stage_steps(self, row: Row) -> int:
        """The steps of a row's first stage; 0 if it has none."""
        if not row.first_stage:
            return 0
        if self.steps < 2:
            raise ValueError(f"steps: given {self.steps}; a first stage and a model of its latents need 2 or more")
        return min(self.steps - 1, max(1, round(row.first_stage_share * self.steps)))

    def with_budget(self, cfg: TrainSettings, name: str, seed: int, steps: int) -> TrainSettings:
        """``cfg`` with the settings that all rows share."""
        every = max(1, steps // 4)
        return replace(
            cfg,
            backbone=self.backbone,
            data=self.data,
            steps=steps,
            batch=self.batch,
            lr=self.lr,
            warmup=min(warmup_steps(cfg), steps // 10),
            seed=seed,
            device=self.device,
            threads=self.threads,
            out=str(Path(self.out) / "runs"),
            name=f"{name.replace(':', '-')}-seed{seed}",
            save_every=every,
            sample_every=every,
            log_every=max(1, min(cfg.log_every, steps // 20)),
            tensorboard=False,
        )


def latent_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The latent shape for images: sides halved until at most 8, up to 4 channels, at most half of the numbers.

    ``ValueError`` if ``shape`` is not that of images.
    """
    if len(shape) != 3:
        raise ValueError(f"objectives: given latent, whose first stage is for images; samples are {list(shape)}")
    sides = [-(-n // 2) for n in shape[1:]]
    while max(sides) > 8:
        sides = [-(-n // 2) for n in sides]
    return (max(1, min(4, math.prod(shape) // (2 * math.prod(sides)))), *sides)
