"""The settings of a training run: one frozen dataclass, the same thing as a YAML file and as a command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt

from genkit.backbones.compressed import BaseType, Quantization, WeightFormat
from genkit.config import ConfigError, from_dict, load_yaml, table
from genkit.config.names import NameIn
from genkit.config.numbers import CheckpointStep, Count, Fraction, Natural, NonNegative, Positive, Scale, Seed, Threads
from genkit.config.paths import NameText, PathText
from genkit.config.trust import require_trust
from genkit.core.device import DeviceName
from genkit.core.durations import DurationText
from genkit.training.annotations import NoteText, TagText
from genkit.training.power_ema import WIDEST
from genkit.training.recorded import require_recorded_settings

if TYPE_CHECKING:
    from genkit.core import Backbone, Objective
    from genkit.data import DataSource
    from genkit.training.optimizers import OptimizerFamily
    from genkit.training.schedules import Schedule

Parallel = Literal["ddp", "fsdp", "hsdp"]
TrainingPrecision = Literal["auto", "fp32", "bf16", "fp16"]
TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


PowerWidth = Annotated[float, Gt(0), Le(WIDEST)]


def by_objective(default: Any) -> Any:
    """A field whose default the optimizer may change, and the objective (their ``default_settings``)."""
    return field(default=default, metadata={"follows": "optimizer.default_settings objective.default_settings"})


def changeable(default: Any) -> Any:
    """A field that may change when a run is resumed: how long, how often, how fast, not what the weights mean."""
    return field(default=default, metadata={"changeable": True})


@dataclass(frozen=True)
class TrainSettings:
    """Train a model."""

    # -- model and data
    objective: Objective = table("genkit.objectives:OBJECTIVES", "flow", kind="genkit.core:Objective")
    """What is learned."""
    backbone: Backbone = table(
        "genkit.backbones:BACKBONES", "unet", kind="genkit.core:Backbone", follows="data.default_backbone"
    )
    """Network family. Without a NAME, the one that suits the data."""
    data: DataSource = table(
        "genkit.data:DATA", "digits", kind="genkit.data:DataSource", fallback="genkit.data:find_source",
        adapt="genkit.data.torch_dataset:adapt",
    )  # fmt: skip
    """Training data: a NAME, or a path to a folder of images, a .zip or an .npz."""
    # -- optimization
    steps: Count = changeable(2000)
    """Optimizer steps. The default learns the digits in a few minutes on two CPU cores."""
    max_time: DurationText | None = changeable(None)
    """Stop after this time, as a signal would: 90s, 10m, 2h30m. It counts from the start of this process's training;
    a run that is resumed has as much again. None: never."""
    batch: Count = 64
    """Samples per step, over all ranks together."""
    micro_batch: Count | None = changeable(None)
    """Samples per forward pass on one rank, to save memory; the result does not depend on it. None: all at
    once."""
    optimizer: OptimizerFamily = table(
        "genkit.training.optimizers:OPTIMIZERS", "adamw", kind="genkit.training.optimizers:OptimizerFamily",
        adapt="genkit.training.optimizers.external:adapt_optimizer",
    )  # fmt: skip
    """Optimizer. Its dotted options are what only it has; rate, decay and betas are settings of the training."""
    lr: Positive = field(default=1e-3, metadata={"changeable": True, "follows": "optimizer.default_settings"})
    """Peak learning rate. AdamW's 1e-3 suits networks of about a million parameters, 1e-4 large ones; optimizers of
    another scale have a default of their own."""
    warmup: Natural | None = by_objective(None)
    """Steps of linear learning-rate warmup. None: a quarter of the steps, at most 100."""
    schedule: Schedule = table(
        "genkit.training.schedules:SCHEDULES", "cosine", kind="genkit.training.schedules:Schedule",
        follows="optimizer.default_settings objective.default_settings",
    )  # fmt: skip
    """Learning rate after the warmup."""
    weight_decay: NonNegative = 0.0
    """Weight decay: decoupled, but for Adam, SGD and others in which it is a part of the gradient."""
    decay: Literal["matrices", "all"] = "matrices"
    """What decays: matrices and convolutions, but no norms, biases and embeddings; or all."""
    phase_settings: tuple[str, ...] = ()
    """Settings of single phases, as PHASE.SETTING=VALUE with lr, betas or weight-decay: discriminator.lr=4e-4 is a rate
    of its own (TTUR)."""
    betas: tuple[Fraction, Fraction] = by_objective((0.9, 0.99))
    """Adam's decay rates. 0.99 forgets an early, large gradient ten times as fast as the usual 0.999."""
    clip: NonNegative = 1.0
    """Largest gradient norm. 0: no clipping."""
    ema: tuple[Fraction, ...] = field(default=(0.999,), metadata={"follows": "optimizer.default_settings"})
    """EMA decay rates per step; the networks are averaged once for each."""
    power_ema: tuple[PowerWidth, ...] = ()
    """Widths (sigma_rel, a share of the training) of power-function averages, such as 0.05 0.1 0.2. From snapshots of
    them any other width can be had after training, by --ema power-WIDTH."""
    power_ema_every: Count = 100
    """Steps between snapshots of the power-function averages."""
    power_ema_keep: Annotated[int, Ge(2)] = 128
    """Most snapshots to keep: of more, every second one is removed, again and again."""
    # -- computation
    precision: TrainingPrecision = "auto"
    """Forward-pass precision: fp32, bf16, or fp16 with a loss scale, for cards without bf16. auto: bf16 if the device
    supports it natively and samples are not vectors, else fp32."""
    compile: bool = changeable(False)
    """Compile the networks with torch.compile: a minute at the start, then faster steps."""
    seed: Seed = 0
    """Seed. Every random number is a function of (seed, step, row) only."""
    device: DeviceName = changeable("auto")
    """Device. auto: the machine's accelerator, or the CPU if it has none."""
    parallel: Parallel = changeable("ddp")
    """What ranks share. ddp: each has all weights, and its own samples. fsdp: each keeps a share of every weight,
    gradient, average and optimizer state, for networks that one device cannot train. hsdp: shares within a group of
    ranks, copies across groups, for several nodes."""
    shard_size: Count | None = changeable(None)
    """With --parallel hsdp: ranks that share one copy. None: those of a node."""
    rank_timeout: DurationText = changeable("30m")
    """Longest time that ranks wait for each other, also for what the first one does alone, before an error ends
    them."""
    threads: Threads | None = changeable(None)
    """CPU threads per rank. None: one for small batches, where more only wait for each other, else all."""
    # -- saving and logging
    out: PathText = "runs"
    """Directory in which the run directory is made."""
    name: NameText | None = None
    """Name of the run. None: data-objective-backbone."""
    note: NoteText | None = changeable(None)
    """A note that is added to those of the run (genkit note RUN shows them)."""
    tags: tuple[TagText, ...] = changeable(())
    """Tags that are added to those of the run, for genkit list --where tag=TAG."""
    save_every: Count = changeable(500)
    """Steps between checkpoints."""
    sample_every: Natural = changeable(500)
    """Steps between grids of samples. 0: never."""
    sample_prompts: PathText | None = changeable(None)
    """Text file of prompts, one a line, that these grids show. None: classes or captions of the data."""
    sample_guidance: Scale = changeable(1.0)
    """Scale of guidance of these grids. 1: none."""
    # -- evaluation during training
    eval_every: Natural = changeable(0)
    """Steps between evaluations of the slowest average. 0: never."""
    eval_n: Annotated[int, Ge(2)] = changeable(1000)
    """Samples per evaluation, over all ranks together."""
    eval_metrics: Annotated[str, NameIn("genkit.evaluation:METRICS", ",")] | None = changeable(None)
    """Comma-separated metrics, as for genkit eval. None: those that suit the data."""
    eval_steps: Count | None = changeable(None)
    """Steps of the objective's default sampler in evaluations. None: 20, or 1 for a flow map."""
    eval_features: Annotated[str, NameIn("genkit.evaluation:FEATURES")] = changeable("auto")
    """Feature extractor of evaluations."""
    eval_weights: PathText | None = changeable(None)
    """File of Inception weights. None: where clean-fid or genkit keeps it."""
    rollout_every: Natural = changeable(0)
    """Steps between rollouts of a policy (the slowest average): success and return in its environment, on starts that
    genkit rollout does not report, and the error of its actions on held-out demonstrations. 0: never."""
    rollout_episodes: Count = changeable(50)
    """Episodes of each rollout, over all ranks together; the same starts each time."""
    rollout_steps: Count | None = changeable(None)
    """Sampler steps for each chunk of actions in rollouts. None: the policy's default."""
    rollout_max_steps: Count | None = changeable(None)
    """Time limit of an episode of rollouts. None: the environment's."""
    rollout_conditions: tuple[str, ...] = changeable(())
    """Conditions of a policy in rollouts: skill=2, returns=0.9, "text=go left"."""
    val_every: Natural = changeable(0)
    """Steps between validations: the loss of held-out samples (the test split), the same ones with the same noise each
    time, for the slowest average and the raw weights. 0: never."""
    val_n: Count = changeable(1000)
    """Held-out samples per validation, over all ranks together."""
    val_levels: tuple[Annotated[float, Gt(0), Lt(1)], ...] = changeable(())
    """Noise levels sigma / (alpha + sigma), say 0.1 0.3 0.5 0.7 0.9, at which validations also measure the error of the
    velocity: val/velocity, which runs of other objectives, paths and seeds can be compared by."""
    keep_best: str | None = changeable(None)
    """Keep the best checkpoint by this metric, for --step best: val/loss, one of --eval-every, such as fid, or one of
    --rollout-every, such as success."""
    patience: Count | None = changeable(None)
    """Stop after this many evaluations in a row without a better value of --keep-best. None: never."""
    # -- saving and logging
    log_every: Count = changeable(50)
    """Steps between lines of the log."""
    keep_checkpoints: Count = changeable(3)
    """Number of newest checkpoints to keep."""
    # -- computation
    workers: Natural = changeable(2)
    """Threads that read samples from the disk ahead of the training. 0: none."""
    max_nonfinite_steps: Count = changeable(10)
    """Stop after this many consecutive steps with a loss or gradient that is not finite."""
    # -- saving and logging
    tensorboard: bool = changeable(True)
    """Write scalars and images for TensorBoard, besides log.jsonl."""
    trackers: tuple[TrackerName, ...] = changeable(())
    """Further trackers, through Accelerate; a resumed run goes on in the same run of theirs."""
    tracker_project: str = changeable("genkit")
    """Project (wandb, trackio) or experiment (mlflow) of the run."""
    # -- latents, starting weights and resuming
    codec: PathText | None = None
    """Train on latents: the run of a first stage (vae, ae, vq or autoencoder), or diffusers:DIR. Latents have standard
    deviation 1."""
    codec_posterior: Literal["draw", "mean"] = "draw"
    """Latents of a VAE: a new draw of the posterior each time, or its mean."""
    init: PathText | None = None
    """Start from the weights (slowest average) of this run, whose objective and backbone are used unless others are
    given; or from diffusers:DIR, a diffusers model or pipeline, or diffusers:OWNER/NAME on the hub; +FILE after it
    takes the weights of its network, or adds a LoRA, from a safetensors file."""
    lora: Any = table("genkit.backbones.lora:LORA", "lora")
    """Train a low-rank adapter of --init's weights, by --lora.rank."""
    prior: Any = table("genkit.training.prior:PRIOR", "prior")
    """What fine-tuning is to keep: a second data source (--prior.data), or an adapter's base (--prior.preserve)."""
    base_dtype: BaseType = "fp32"
    """Type of the frozen weights under --lora.rank in memory: fp32, or bf16, which halves it. After training the
    adapter is merged into the full weights."""
    quantize: Quantization | None = None
    """Keep the frozen weights of linear layers under --lora.rank in 8 bits (int8, by torchao) or in 4 (nf4, by
    bitsandbytes). None: as --base-dtype says."""
    dry_run: bool = False
    """Write nothing: print these settings as YAML, with the size of the model, its memory, the time of training and the
    disk that it needs, from a few real steps."""
    resume: PathText | None = None
    """Run directory to continue, with its own settings. auto: the newest run in --out that these settings began, or a
    new one if there is none (for jobs that are requeued)."""
    step: CheckpointStep | None = None
    """With --resume: the checkpoint to continue from, by its step or "best"; later ones are set aside. None: the newest
    intact one."""

    @property
    def weight_format(self) -> WeightFormat:
        """How the frozen weights under an adapter are kept in memory. ``ValueError`` without an adapter."""
        weights = WeightFormat(self.base_dtype, self.quantize)
        if weights.active and not self.lora.active:
            name, value = ("quantize", self.quantize) if self.quantize else ("base_dtype", self.base_dtype)
            raise ValueError(f"{name}: given {value}, which is for frozen weights under an adapter; give --lora.rank 8")
        return weights


def stored_settings(run: Path, trust: bool = False) -> TrainSettings:
    """The settings in a run's ``config.yaml``. ``ValueError`` if it is empty, damaged or needs code (``trust``)."""
    tree = load_yaml(run / "config.yaml")
    if not tree:
        raise ValueError(f"run: {run / 'config.yaml'} is empty, so the run's settings are lost; restore the file")
    require_trust(TrainSettings, tree, run / "config.yaml", trust)
    try:
        settings = from_dict(TrainSettings, tree)
    except ConfigError as e:
        raise ConfigError(f"{run / 'config.yaml'}: {e.path}", e.problem) from None
    require_recorded_settings(run, tree, TrainSettings)
    return settings
