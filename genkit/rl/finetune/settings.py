"""The settings of fine-tuning: one dataclass, the same thing as a YAML file and as a command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from genkit.config import table
from genkit.config.numbers import Count, Fraction, Natural, NonNegative, Positive, Seed, Threads
from genkit.config.paths import NameText, PathText
from genkit.core.device import DeviceName
from genkit.core.durations import DurationText
from genkit.training.annotations import NoteText, TagText
from genkit.training.sampling import GridName
from genkit.training.settings import Parallel, TrackerName, changeable

SAVE_EVERY = 10  # iterations between checkpoints

if TYPE_CHECKING:
    from genkit.rl.finetune.noise import ExplorationNoise
    from genkit.rl.finetune.reward_method import RewardMethod


@dataclass(frozen=True)
class FinetuneSettings:
    """Improve a trained model by a reward."""

    run: Positional[PathText] = ""
    """Directory of the run to improve, such as runs/latest."""
    # -- model and method
    reward: str = "env"
    """env: the environment's own reward; success: 1 for the first success of an episode; progress: the increase of the
    environment's reward from step to step, and 1 for success; frechet, minus the Fréchet distance to the data in the
    features that suit them (frechet:classifier, frechet:raw), by the method direct unless another is named; or
    package.module:function, (samples [B, ...], cond) to [B]."""
    method: RewardMethod = table(
        "genkit.rl.finetune.methods:METHODS", "dppo", kind="genkit.rl.finetune.reward_method:RewardMethod"
    )
    """Learning method."""
    exploration_noise: ExplorationNoise = table(
        "genkit.rl.finetune.noise:NOISES", "fixed", kind="genkit.rl.finetune.noise:ExplorationNoise"
    )
    """Noise added to the sampler's steps, for exploration."""
    lora: Any = table("genkit.backbones.lora:LORA", "lora")
    """Train a low-rank adapter of the run's weights, by --lora.rank, and not the weights. The new run holds the adapter
    alone and refers to the run that is improved."""
    min_std: NonNegative = 0.05
    """Smallest standard deviation of a step, in the model's units; the only noise of the last step of ddim and sde."""
    steps: Count | None = None
    """Sampler steps; the fine-tuned model needs the same number, which its policies use by default. None: those of the
    policy that is improved (1 of an anchored flow), 1 of a flow map, else 4; a model that draws in one pass has
    none."""
    grid: GridName | None = None
    """Time grid of the steps. None: uniform, or pipeline, the scheduler's, for a run that began from a pretrained one,
    as genkit sample."""
    # -- experience
    iterations: Count = changeable(60)
    """Rounds of collecting experience and learning from it."""
    env: str | None = None
    """Environment: four-ways, pusht, a gymnasium id or module:id of your own; None: that of the demonstrations."""
    env_args: tuple[str, ...] = ()
    """Keyword arguments of an environment of gymnasium: reward_type=dense; they add to those of the demonstrations."""
    conditions: tuple[str, ...] = ()
    """Conditions that the policy was trained with (--data.conditions), for all episodes: skill=2."""
    mode: Natural | None = None
    """Reward only episodes of this mode, in an environment that has several."""
    num_envs: Count = 100
    """Parallel environments, over all ranks together."""
    workers: Natural = changeable(0)
    """Processes that step the environments of each rank, for those that are slower than the policy; results are the
    same. 0: the rank's own process alone."""
    num_steps: Count = 40
    """Decisions (action chunks) in each environment per iteration."""
    act_steps: Count | None = None
    """Actions of each chunk that are executed before the next decision; None: as in training."""
    terminate_out_of_range: Positive | None = None
    """End a training episode when any observation is more than this many scales of the demonstrations from
    their centre (a fallen robot, say). Evaluation is not affected. None: never."""
    samples: Count = 512
    """Samples per iteration over all ranks together, if the reward is a function."""
    group: Count = 1
    """Samples per condition whose rewards are normalised together (GRPO); 1: all samples are normalised together."""
    ema: Fraction = 0.99
    """EMA decay per gradient step."""
    label: str | int | None = None
    """Improve only this class (name or number) of a class-conditional model, if the reward is a function; None: all in
    turn."""
    unconditional: bool = False
    """Improve the samples drawn without conditions, if the reward is a function."""
    max_kl: Positive | None = changeable(None)
    """Stop when the KL divergence of the sampler from the pretrained model's exceeds this, in nats; None: never."""
    # -- evaluation
    eval_episodes: Natural = changeable(200)
    """Episodes before and after, without noise, from seeds that are not trained on; 0: none."""
    eval_samples: Natural = changeable(500)
    """Samples before and after, without noise, if the reward is a function; 0: none."""
    eval_seed: Seed = 100_000
    """Seed of the first of these episodes or samples."""
    checkpoint_eval_episodes: Natural = 0
    """Episodes at the start and at each checkpoint, without noise, from separate seeds: the run is then the one of
    these with the best return; 0: the run is the newest checkpoint."""
    patience: Count | None = changeable(None)
    """Stop after this many checkpoints without a better return; None: never."""
    # -- saving and computation
    save_every: Count | None = None
    """Iterations between checkpoints. New episodes begin after each, so that a resumed run is the same. None: 10, or
    more if whole episodes would not fit in between."""
    seed: Seed = 0
    """Seed of every random number."""
    device: DeviceName = changeable("auto")
    """Device of the networks. auto: the machine's accelerator, or the CPU if it has none."""
    threads: Threads | None = changeable(None)
    """CPU threads per rank. None: one for policies and small batches, where more only wait for each other, else all."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Forward-pass precision. Probability ratios near 1 need more digits than bf16 has: try it for images only."""
    parallel: Parallel = changeable("ddp")
    """What ranks share. ddp: each has all weights, and its own samples or environments. fsdp: each keeps a share of
    every weight, average and optimizer state, and of the model before any reward; all weights are on each rank from an
    iteration's first pass to the gradient step. hsdp: shares within a group of ranks, copies across groups."""
    shard_size: Count | None = changeable(None)
    """With --parallel hsdp: ranks that share one copy. None: those of a node."""
    micro_batch: Count | None = changeable(None)
    """Rows per forward pass of a gradient step on one rank, to save memory; None: all at once."""
    tensorboard: bool = changeable(True)
    """Write scalars for TensorBoard, besides log.jsonl."""
    trackers: tuple[TrackerName, ...] = changeable(())
    """Further trackers, through Accelerate; a resumed run goes on in the same run of theirs."""
    tracker_project: str = changeable("genkit")
    """Project (wandb, trackio) or experiment (mlflow) of the run."""
    max_time: DurationText | None = changeable(None)
    """Stop at the last checkpoint that fits into this time: 90s, 10m, 2h30m. It counts from the start of this process's
    fine-tuning; a run that is resumed has as much again. None: never."""
    out: PathText = "runs"
    """Directory in which the new run's directory is made."""
    name: NameText | None = None
    """Name of the new run; None: that of the old one and the method's."""
    note: NoteText | None = changeable(None)
    """A note that is added to those of the new run."""
    tags: tuple[TagText, ...] = changeable(())
    """Tags that are added to those of the new run."""
    resume: PathText | None = None
    """Directory of a fine-tuning run to resume."""

    @property
    def checkpoint_interval(self) -> int:
        """``save_every``, or the usual number if it is left open."""
        return self.save_every or SAVE_EVERY

    @property
    def sampler_steps(self) -> int:
        """``steps``, or the usual number if it is left open."""
        return self.steps or 4
