"""The parts of fine-tuning, built from its settings: the chain, the task, the learner and the new run's settings."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn

from genkit.backbones import lora
from genkit.config.blocks import find_name
from genkit.core import Batch, Generator
from genkit.core.tensors import to_tensors
from genkit.data import Stream
from genkit.data.codecs import Actions
from genkit.diffusion.samplers import FLOW_MAP_SAMPLERS, find_sampler
from genkit.envs import Env
from genkit.rl.finetune.chain import Chain, find_denoiser, seeded_noise
from genkit.rl.finetune.env_rewards import REWARDS, SingleModeReward
from genkit.rl.finetune.experience import Task
from genkit.rl.finetune.frechet_reward import FrechetReward, is_frechet, load_frechet
from genkit.rl.finetune.learner import Critic, Learner
from genkit.rl.finetune.noise import FixedNoise, unlearned_noises
from genkit.rl.finetune.settings import SAVE_EVERY, FinetuneSettings
from genkit.rl.finetune.tasks import EnvironmentTask, FunctionTask, is_class_conditional, load_reward
from genkit.rl.policies.episodes import require_compatible
from genkit.rl.policies.policy import Policy, default_steps, read_acting
from genkit.rl.policies.rollout import parse_conditions
from genkit.training.distributed import create_sharding
from genkit.training.latents import encoder_of
from genkit.training.loop import copy_for_ema, initial_state, local_batch_size
from genkit.training.optimizers import AdamW
from genkit.training.precision import require_precision
from genkit.training.run import Run, average_name, load_run
from genkit.training.sampling import PIPELINE_GRID, Sampling
from genkit.training.settings import TrainSettings
from genkit.training.train import pick_threads

OF_CHAINS = ("exploration_noise", "min_std", "max_kl")  # settings of the noisy steps
OF_EXPERIENCE = ("num_steps", "terminate_out_of_range", "samples", "group")  # settings of a model's own samples
OF_ENVIRONMENTS = ("num_envs", "workers", "num_steps", "act_steps", "checkpoint_eval_episodes", "patience")
OF_FUNCTIONS = ("samples", "group")
OF_RETURNS = ("gamma", "gae_lambda", "critic_epochs", "critic_batch")  # settings of a method
DEMO_ROWS = 1 << 16  # the stream's batch: no gradient step takes more demonstrations


def method_name(settings: FinetuneSettings) -> str:
    """The method's name in the registry."""
    return find_name({"table": "genkit.rl.finetune.methods:METHODS"}, type(settings.method))


def default_name(settings: FinetuneSettings, base: Path) -> str:
    """The new run's name: that of the directory of the old one, without its number, and the method's."""
    old_name = re.sub(r"^\d{4,}(-|$)", "", base.name)
    return f"{old_name}-{method_name(settings)}" if old_name else method_name(settings)


def choose_threads(settings: FinetuneSettings, base: Run, world: int) -> int:
    """CPU threads of a rank. A policy's networks are called with small batches, for which one thread is fastest."""
    if settings.threads or settings.reward in REWARDS:
        return settings.threads or 1
    return pick_threads(settings.method.batch // world * math.prod(base.spec.shape))


def choose_steps(settings: FinetuneSettings, base: Run) -> int | None:
    """The sampler's steps: those that are given, the policy's own, 1 of a flow map, else 4; None: it draws in one
    pass."""
    if settings.steps or base.objective.sampler is None:
        return settings.steps
    if settings.reward in REWARDS:
        return default_steps(base)
    return find_sampler(base.objective.sampler).default_steps if jumps(base) else settings.sampler_steps


def choose_grid(settings: FinetuneSettings, base: Run) -> str | None:
    """The grid of the sampler's steps: the one that is given, the policy's own, else that of ``genkit sample``; None:
    it has no steps."""
    if settings.grid or base.objective.sampler is None:
        return settings.grid
    acting = read_acting(base) if settings.reward in REWARDS else {}
    return acting.get("grid", Sampling().grid_for(base))


def jumps(base: Run) -> bool:
    """Whether a model's own sampler jumps by a flow map."""
    return base.objective.sampler in FLOW_MAP_SAMPLERS


def sampling_of(settings: FinetuneSettings, base: Run) -> Sampling:
    """How samples are drawn without exploration noise: as they are trained, so that no prediction is clipped."""
    grid = None if settings.grid == Sampling().grid_for(base) else settings.grid
    if base.objective.sampler is None:
        return Sampling(steps=settings.steps, grid=grid)
    return Sampling(sampler=None if jumps(base) else "ddim", steps=settings.steps, grid=grid, clip=False)


def build_steps(settings: FinetuneSettings, base: Run) -> Chain | Callable[[Mapping[str, nn.Module]], Generator]:
    """The denoising chain or, for a method that needs none, a function from networks to their generator."""
    if settings.method.files:
        refuse_unused(
            settings, (*OF_CHAINS, *OF_EXPERIENCE), f"learns from {', '.join(settings.method.files)} of a file"
        )
    if settings.method.uses_chain:
        return build_chain(settings, base)
    refuse_unused(settings, OF_CHAINS, "has no chain of noisy steps")
    sampling = sampling_of(settings, base)
    base.generator(sampling, differentiable=True)  # refuses what does not fit
    return lambda nets: replace(base, nets=dict(nets)).generator(sampling, differentiable=True)


def refuse_unused(settings: FinetuneSettings, names: Collection[str], reason: str) -> None:
    """``ValueError`` if one of these settings is given, which have no effect on the method."""
    for f in fields(FinetuneSettings):
        usual = FixedNoise() if f.name == "exploration_noise" else f.default
        if f.name in names and getattr(settings, f.name) != usual:
            raise ValueError(
                f"{f.name}: has no effect on the method {method_name(settings)}, which {reason}; leave it out"
            )


def check_method(settings: FinetuneSettings, learner: Learner, task: Task) -> None:
    """``ValueError`` if the method cannot learn from such a chain or task, or there is no gradient for it."""
    if isinstance(learner.steps, Chain):
        settings.method.check(learner.steps, task)
        return
    if not isinstance(task, FunctionTask):
        raise ValueError(f"method: given {method_name(settings)}, but an environment has no gradient; allowed: dppo")
    z, cond = task.draw(learner, 0, 2)
    if learner.objective.chosen_condition not in (None, *cond):
        raise ValueError(
            f"run: {type(learner.objective).__name__} chooses its {learner.objective.chosen_condition} before the "
            "first step, which has no gradient; allowed: another --method"
        )
    x = learner.generate(z, cond, seeded_noise(2, learner.generator(0), z.device))
    if not x.requires_grad:
        raise ValueError(f"run: samples of {type(learner.objective).__name__} have no gradient to follow")
    if not isinstance(task.function, FrechetReward) and not task.reward(x, cond).requires_grad:
        raise ValueError(f"reward: {task.name} has no gradient to follow; try --method ddpo, for a model with a chain")


def build_chain(settings: FinetuneSettings, base: Run) -> Chain:
    """The denoising chain, with the network of learned noise. ``ValueError`` if the method cannot train that noise."""
    path = find_denoiser(base.objective, base.nets).path
    noise, method = settings.exploration_noise, settings.method
    if settings.grid == PIPELINE_GRID:
        times = Sampling(grid=PIPELINE_GRID).times(base, settings.sampler_steps)
        assert isinstance(times, torch.Tensor)
        chain = Chain(path, tuple(times.tolist()), noise, settings.min_std, from_noise=True)
    else:
        chain = Chain.on_grid(path, settings.sampler_steps, noise, settings.min_std, settings.grid or "uniform")
    torch.manual_seed(settings.seed)
    sigma = noise.network(base.spec, settings.sampler_steps)
    if sigma is None:
        return chain
    if not method.needs_log_prob:
        raise ValueError(
            f"exploration_noise: {noise.name} has no effect on {method_name(settings)}, which uses no log-probability; "
            f"allowed: {unlearned_noises()}"
        )
    return replace(chain, sigma=sigma.to(base.device))


def build_task(settings: FinetuneSettings, base: Run, world: int = 1) -> tuple[Task, Policy | None]:
    """The source of rewards and, for an environment, the policy. ``ValueError`` for settings that have no effect."""
    refuse_idle(settings)
    if settings.reward in REWARDS:
        return build_environment_task(settings, base, world)
    given = (settings.mode, settings.env, settings.terminate_out_of_range)
    if any(value is not None for value in given) or settings.env_args or settings.conditions:
        raise ValueError(
            "env, env_args, conditions, mode, terminate_out_of_range: have no effect if the reward is a function; "
            "leave them out"
        )
    if settings.label is not None and not is_class_conditional(base.spec):
        raise ValueError(f"label: given {settings.label}, but this model has no classes; leave it out")
    local_batch_size(settings.samples, world, "samples")
    function = load_frechet(settings.reward, base) if is_frechet(settings.reward) else load_reward(settings.reward)
    task = FunctionTask(
        function,
        settings.reward,
        base.codec,
        settings.samples,
        settings.group,
        settings.label,
        settings.unconditional,
    )
    return task, None


def refuse_idle(settings: FinetuneSettings) -> None:
    """``ValueError`` for the first setting, also of the method, that has no effect on such a reward."""
    acts = settings.reward in REWARDS
    reason = "in an environment" if acts else "if the reward is a function"
    refuse_changed(settings, OF_FUNCTIONS if acts else OF_ENVIRONMENTS, reason)
    if not acts:
        refuse_changed(settings.method, OF_RETURNS, reason, prefix="method.")
    if settings.patience is not None and not settings.checkpoint_eval_episodes:
        raise ValueError(f"patience: given {settings.patience}, but no checkpoint is evaluated; give "
                         "--checkpoint-eval-episodes, say 50")  # fmt: skip


def refuse_changed(settings: Any, names: Collection[str], reason: str, prefix: str = "") -> None:
    """``ValueError`` for the first of these settings that differs from its default."""
    for f in fields(settings):
        value = getattr(settings, f.name)
        if f.name in names and value != f.default:
            raise ValueError(f"{prefix}{f.name}: given {value}, which has no effect {reason}; leave it out")


def build_environment_task(settings: FinetuneSettings, base: Run, world: int) -> tuple[Task, Policy]:
    """This rank's environments, and the policy that acts in them."""
    if settings.label is not None or settings.unconditional:
        raise ValueError("label, unconditional: have no effect in an environment; leave them out")
    policy = acting_policy(settings, base)
    if type(policy) is not Policy:
        raise ValueError(f"run: {base.directory.name} plans, or sees pictures; allowed: policies of actions given obs")
    env = build_env(settings, policy, local_batch_size(settings.num_envs, world, "num_envs"))
    require_compatible(policy, env)
    task = EnvironmentTask(
        env,
        cast(Actions, base.codec),
        policy.act_steps,
        settings.num_steps,
        settings.method.gamma,
        settings.method.gae_lambda,
        settings.terminate_out_of_range,
        policy.conditions,
    )
    return task, policy


def acting_policy(settings: FinetuneSettings, run: Run) -> Policy:
    """The policy of a run, without noise, as it acts in fine-tuning."""
    return Policy.load(
        run,
        steps=settings.sampler_steps,
        act_steps=settings.act_steps,
        grid=settings.grid,
        conditions=parse_conditions(settings.conditions),
    )


def build_env(settings: FinetuneSettings, policy: Policy, num: int) -> Env:
    """``num`` copies of the environment, with the rewards that the settings ask for."""
    env = REWARDS[settings.reward](policy.make_env(num, settings.env, settings.env_args, workers=settings.workers))
    return env if settings.mode is None else SingleModeReward(env, settings.mode)


def train_settings(settings: FinetuneSettings, base: Run) -> TrainSettings:
    """The new run's config.yaml: that of the old run, initialized with its weights."""
    return replace(
        base.config,
        init=str(base.directory),
        ema=(settings.ema,),
        power_ema=(),
        lr=settings.method.lr,
        optimizer=AdamW(),  # whatever the run was trained with: rates of fine-tuning are AdamW's
        phase_settings=(),
        out=settings.out,
        seed=settings.seed,
        resume=None,
        precision=settings.precision,
        parallel=settings.parallel,
        shard_size=settings.shard_size,
        lora=settings.lora,
        base_dtype="fp32",
        quantize=None,
    )


def choose_save_interval(settings: FinetuneSettings, task: Task, note: Callable[[str], None]) -> int:
    """Iterations between checkpoints. Episodes begin anew after each, so that the end of one that takes longer would
    never be learned from: the default has room for a whole episode in each row, whose first one is cut; a given number
    that has none is mentioned."""
    if not isinstance(task, EnvironmentTask) or settings.method.files:
        return settings.checkpoint_interval
    steps = task.num_steps * task.act_steps
    if settings.save_every is None:
        return max(SAVE_EVERY, -(-2 * task.env.max_steps // steps))
    if settings.save_every * steps < task.env.max_steps:
        note(f"note     episodes begin anew at each checkpoint, after {settings.save_every * steps} of up to "
             f"{task.env.max_steps} steps, and their ends are not learned from; "
             f"try --save-every {-(-2 * task.env.max_steps // steps)}")  # fmt: skip
    return settings.save_every


def check_adapter(settings: FinetuneSettings, base: Run) -> None:
    """``ValueError`` if a run cannot be fine-tuned, or not by this adapter."""
    if isinstance(base.config.lora, lora.GuidanceLoRA):
        raise ValueError(f"run: {base.directory.name} is an adapter of guidance; improve the run that it adapts: "
                         f"{base.config.init}")  # fmt: skip
    if not settings.lora.active:
        return
    if type(settings.lora) is not lora.LoRA:
        raise ValueError("lora: rewards train no adapter of guidance; allowed: lora, with --lora.rank 8")
    if settings.lora.dropout:
        raise ValueError(
            f"lora.dropout: given {settings.lora.dropout}, which has no effect, since the probability of a sample must "
            "be that with which it was drawn; leave it out"
        )
    stored = load_run(base.directory, ema=average_name(base.weights), step=base.step, device=base.device.type)
    ours, theirs = (to_tensors(nets) for nets in (base.nets, stored.nets))
    if ours.keys() != theirs.keys() or any(not torch.equal(v, theirs[k]) for k, v in ours.items()):
        raise ValueError(f"lora: this model is not what {base.directory} holds, which an adapter would refer to; "
                         "fine-tune it without --lora.rank, or export it as a run of its own")  # fmt: skip


def build_learner(
    settings: FinetuneSettings,
    base: Run,
    steps: Chain | Callable[[Mapping[str, nn.Module]], Generator],
    needs_critic: bool,
    accelerator: Accelerator | None = None,
) -> Learner:
    """A learner whose networks start from the weights of ``base``, on its device."""
    config, device = train_settings(settings, base), base.device
    torch.manual_seed(settings.seed)
    nets = base.objective.networks(config.backbone, base.spec)
    for name, net in nets.items():
        net.to(device).requires_grad_(True).load_state_dict(base.nets[name].state_dict())
    if settings.lora.active:
        lora.adapt(nets, settings.lora)
    frozen = {k: copy_for_ema(v).requires_grad_(False).eval() for k, v in nets.items()}
    sharding = create_sharding(config, accelerator) if accelerator else None
    if sharding:
        sharding.stay_whole = True  # ranks may make different numbers of passes for a gradient step
        for net in frozen.values():
            sharding.split_network(net)
    state = initial_state(config.objective, nets, config, sharding)

    data = base.config.data.load("train")
    stream = Stream(data, DEMO_ROWS, settings.seed, device, workers=0)
    encoder = encoder_of(data, base.codec)

    def demos(number: int, start: int, stop: int) -> Batch:
        return encoder.encode(stream(number, 0, start, stop))

    require_precision(settings.precision, device)
    critic = Critic(base.spec).to(device) if needs_critic else None
    sigma, lr = steps.sigma if isinstance(steps, Chain) else None, settings.method.critic_lr
    return Learner(
        config.objective,
        state,
        steps,
        base.spec,
        demos,
        settings.seed,
        critic,
        torch.optim.Adam(critic.parameters(), lr=lr) if critic else None,
        torch.optim.Adam(sigma.parameters(), lr=lr) if isinstance(sigma, nn.Module) else None,
        frozen=frozen,
        accelerator=accelerator,
        micro_batch=settings.micro_batch,
        bf16=settings.precision == "bf16",
    )
