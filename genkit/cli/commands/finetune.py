"""`genkit finetune RUN`: improve a trained model by a reward, of an environment or of a function."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from accelerate import Accelerator
from annotated_types import Ge, Gt, Lt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from tyro.conf import Positional

from genkit.backbones.lora import LoRA
from genkit.config import parse, table, to_yaml
from genkit.config.command import peek_option
from genkit.core import Batch, seed_of
from genkit.core.files import write_text
from genkit.data import Stream
from genkit.data.codecs import Actions
from genkit.envs import Env, make
from genkit.evaluation.evaluator import default_features
from genkit.rl.finetune.chain import Chain, Noising, denoiser_of
from genkit.rl.finetune.evaluation import Judged, reward_kl
from genkit.rl.finetune.image_rewards import likeness
from genkit.rl.finetune.learner import Critic, Learner, Method, Task, with_reference
from genkit.rl.finetune.rewards import PAYS, Acting, OneWay, Scoring, classes, function_of
from genkit.rl.policies.episodes import require_compatible, run_episodes
from genkit.rl.policies.policy import Policy
from genkit.training.checkpoint import find_checkpoint, read_tensors, restore, save_checkpoint
from genkit.training.directory import append_log, create_run, find_run, read_log, rewind_log
from genkit.training.loop import initial_state as fresh_state
from genkit.training.run import Run, load_run
from genkit.training.session import environment
from genkit.training.settings import TrainSettings

console = Console(highlight=False, soft_wrap=True)
Count = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class Finetune:
    """Improve a trained model by a reward."""

    run: Positional[str] = ""
    """The run's folder, such as runs/latest."""
    reward: str = "env"
    """env: what a policy's environment gives; success: 1 where it says that an episode has succeeded, and nothing
    else; progress: by how much a step is worth more than the one before, and 1 for success; or package.module:function,
    of (samples [B, ...], cond) to [B]."""
    method: Method = table("genkit.rl.finetune.methods:METHODS", "dppo", kind="genkit.rl.finetune.learner:Method")
    """How it learns."""
    noise: Noising = table("genkit.rl.finetune.chain:NOISES", "fixed")
    """How a step of the sampler is made noisy, so that there is something to try."""
    floor: Annotated[float, Ge(0)] = 0.05
    """The least deviation of a step, in the model's numbers; the last step of ddim and sde has no other."""
    steps: Count = 4
    """Steps of the sampler; the trained model wants as many."""
    grid: str = "uniform"
    """Where the steps lie: a name in genkit.diffusion.samplers.GRIDS."""
    iterations: Count = 60
    """Rounds of trying and learning."""
    env: str | None = None
    """four-ways, pusht, or an id of gymnasium; None: that of the demonstrations."""
    mode: Annotated[int, Ge(0)] | None = None
    """Of an environment with several ways: reward this one alone."""
    num: Count = 100
    """Worlds side by side."""
    decisions: Count = 40
    """Decisions of a world in an iteration."""
    act_steps: Count | None = None
    """Actions of a chunk that are carried out; None: as in training."""
    lost: Annotated[float, Gt(0)] | None = None
    """Where an observed number is so many scales from the middle of the demonstrations, an episode that is learned from
    has failed: what has fallen does not lie there until the time limit. Not so where it is measured. None: nowhere."""
    samples: Count = 512
    """Samples in an iteration, where the reward is a function."""
    group: Count = 1
    """Samples of one condition that are compared to each other (GRPO); 1: all are compared to all."""
    ema: Annotated[float, Ge(0), Lt(1)] = 0.99
    """Decay per gradient step of the averaged weights."""
    label: Annotated[int, Ge(0)] | None = None
    """Of a model of classes, where the reward is a function: improve this one alone; None: all in turn."""
    unconditional: bool = False
    """Where the reward is a function: improve what the model draws without conditions."""
    max_kl: Annotated[float, Gt(0)] | None = None
    """Stop where the samplers' laws, of the model and of the pretrained one, are so many nats apart; None: go on."""
    eval_episodes: Annotated[int, Ge(0)] = 200
    """Episodes before and after, without noise, of seeds that are not trained on; 0: none."""
    eval_samples: Annotated[int, Ge(0)] = 500
    """Samples before and after, without noise, where the reward is a function; 0: none."""
    eval_seeds: Annotated[int, Ge(0)] = 100_000
    """The first of them."""
    choose: Annotated[int, Ge(0)] = 0
    """Episodes at each checkpoint, without noise, of starts of their own: the checkpoint with the best return is what
    the run is from then on; 0: the newest is."""
    patience: Count | None = None
    """Checkpoints without a better one after which it ends; None: never."""
    save_every: Count = 10
    """Iterations from one checkpoint to the next. Every one begins new episodes, so that a resumed run is the same."""
    seed: Annotated[int, Ge(0)] = 0
    """Every random number depends on it."""
    out: str = "runs"
    """The folder in which the new run's folder is made."""
    name: str | None = None
    """The new run's name; None: that of the old one and the method's."""
    resume: str | None = None
    """A run of this command, to go on with."""


def main(argv: list[str]) -> int:
    resumed = peek_option(argv, "resume")
    if resumed:
        found = find_run(resumed) / "finetune.yaml"
        if not found.is_file():
            raise ValueError(f"resume: given {resumed}, which genkit finetune did not make; it has no finetune.yaml")
        argv = ["--config", str(found), *argv]
    asked = parse(Finetune, argv, prog="genkit finetune", description="Improve a trained model by a reward.")
    if not asked.run:
        raise ValueError("run: not given; say which: genkit finetune runs/latest")
    return finetune(asked, find_run(asked.resume) if asked.resume else None)


def finetune(asked: Finetune, resumed: Path | None = None) -> int:
    """Improve, in a new run directory or on from the newest checkpoint of ``resumed``; the exit code."""
    torch.set_num_threads(1)
    torch.manual_seed(asked.seed)
    base = load_run(asked.run, device="cpu")
    chain = Chain.over(denoiser_of(base.objective, base.nets).path, asked.steps, asked.noise, asked.floor, asked.grid)
    task, policy = task_of(asked, base)
    torch.manual_seed(asked.seed)
    sigma = asked.noise.network(base.spec, asked.steps)
    if sigma is not None and not asked.method.noisy:
        raise ValueError(
            "noise: learned has no effect on rwr, which takes no log-probability; allowed: fixed, ddim, sde"
        )
    chain = replace(chain, sigma=sigma)
    asked.method.check(chain, task)
    learner = learner_of(asked, base, chain, critic=policy is not None)
    method, cfg = asked.method, learner_config(asked, base)
    named = asked.name or f"{base.directory.name.partition('-')[2]}-{type(method).__name__.lower()}"
    run = resumed or create_run(asked.out, named)
    best = Best()
    if resumed:
        take_up(learner, run, best)
    else:
        (run / "env.json").write_text(json.dumps(environment(Accelerator(cpu=True)), indent=1))
        (run / "config.yaml").write_text(to_yaml(cfg))
    (run / "finetune.yaml").write_text(to_yaml(replace(asked, run=str(base.directory), resume=None)))
    console.print(f"{run}  from {base.directory} ({base.weights})", markup=False)
    measure = measured(asked, base, learner, task, policy, run)
    if not resumed:
        told(run, 0, "before", measure("before"))
    began, worked = time.perf_counter(), time.process_time()
    columns = (TextColumn("iteration {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[said]}"),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        shown = bar.add_task("finetune", total=asked.iterations, completed=learner.state.step, said="")
        while learner.state.step < asked.iterations and not best.stale(asked):
            i = learner.state.step
            if i % asked.save_every == 0 or not began_here(task):
                task.begin(learner, i)
            torch.manual_seed(seed_of(asked.seed, i))  # for the objective's own draws
            seen, far = with_reference(learner, task.collect(learner, i))
            if asked.max_kl is not None and far.get("kl_reference", 0) > asked.max_kl:
                save(run, learner, base, asked, best)
                console.print(f"stopped  at iteration {i}: kl_reference {far['kl_reference']:.3g}", markup=False)
                break
            logs = {**seen.logs, **far, **method.update(learner, task, seen, i)}
            learner.state.step += 1
            took = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
            record = {"step": i + 1, **{k: round(v, 2) for k, v in took.items()}, **logs}
            append_log(run, record)
            said = "  ".join(f"{k} {logs[k]:.3g}" for k in SHOWN if k in logs)
            bar.update(shown, completed=i + 1, said=said)
            if not console.is_terminal and (i % 5 == 4 or i == 0):
                console.print(f"iteration {i + 1}/{asked.iterations}  {said}", markup=False)
            if (i + 1) % asked.save_every == 0 or i + 1 == asked.iterations:
                if asked.choose and policy is not None:
                    found = acted(asked, base, learner.state.emas[asked.ema], range(CHOOSE, CHOOSE + asked.choose))
                    best.note(i + 1, told(run, i + 1, "chosen", found))
                save(run, learner, base, asked, best)
    told(run, learner.state.step, "after", measure("after"))
    reward_kl(read_log(run), run / "reward-kl.png")
    console.print(f"next     genkit {'rollout' if policy else 'sample'} {run} --steps {asked.steps}", markup=False)
    return 0


SHOWN = ("reward", "return", "success", "mode_entropy_bits", "kl_reference", "clipped", "diffusion_loss", "loss")


def began_here(task: Task) -> bool:
    return not isinstance(task, Acting) or bool(task.history)


def task_of(asked: Finetune, base: Run) -> tuple[Task, Policy | None]:
    if asked.reward not in PAYS:
        if asked.mode is not None or asked.env is not None or asked.lost is not None:
            raise ValueError("env, mode, lost: have no effect where the reward is a function; leave them out")
        if asked.label is not None and not classes(base.spec):
            raise ValueError(f"label: given {asked.label}, but this model has no classes; leave it out")
        score = function_of(asked.reward)
        return Scoring(score, asked.reward, base.codec, asked.samples, asked.group, asked.label,
                       asked.unconditional), None  # fmt: skip
    if asked.label is not None or asked.unconditional:
        raise ValueError("label, unconditional: have no effect in an environment; leave them out")
    policy = Policy.load(base, steps=asked.steps, act_steps=asked.act_steps, grid=asked.grid)
    env = world(asked, policy, asked.num)
    require_compatible(policy, env)
    method, codec = asked.method, cast(Actions, base.codec)
    return Acting(env, codec, policy.act_steps, asked.decisions, method.gamma, method.lam, asked.lost), policy


def world(asked: Finetune, policy: Policy, num: int) -> Env:
    env = PAYS[asked.reward](make(asked.env or policy.env, num))
    return env if asked.mode is None else OneWay(env, asked.mode)


def learner_config(asked: Finetune, base: Run) -> TrainSettings:
    """What the new run's config.yaml says: the old one's, from its weights."""
    return replace(base.config, init=str(base.directory), ema=(asked.ema,), lr=asked.method.lr, out=asked.out,
                   seed=asked.seed, resume=None, precision="fp32", lora=LoRA())  # fmt: skip


def learner_of(asked: Finetune, base: Run, chain: Chain, critic: bool) -> Learner:
    cfg = learner_config(asked, base)
    torch.manual_seed(asked.seed)
    nets = {k: v.requires_grad_(True) for k, v in base.config.objective.networks(cfg.backbone, base.spec).items()}
    for k, net in nets.items():
        net.load_state_dict(base.nets[k].state_dict())
    state = fresh_state(cfg.objective, nets, cfg)
    data = base.config.data.load("train")
    stream = Stream(data, 1 << 16, asked.seed, "cpu", workers=0)

    def demos(number: int, rows: int) -> Batch:
        return data.codec.encode(stream(number, 0, 0, rows))

    value = Critic(base.spec) if critic else None
    fit = torch.optim.Adam(value.parameters(), lr=asked.method.critic_lr) if value else None
    sigma = chain.sigma
    louder = torch.optim.Adam(sigma.parameters(), lr=asked.method.critic_lr) if isinstance(sigma, nn.Module) else None
    return Learner(cfg.objective, state, chain, base.spec, demos, asked.seed, value, fit, louder)


CHOOSE = 2**29  # the first of the starts by which checkpoints are chosen: neither trained on nor measured with


@dataclass
class Best:
    """The checkpoint that is kept."""

    step: int = 0
    """its iteration; 0: none was measured"""
    value: float = -math.inf
    """its mean return"""
    worse: int = 0
    """checkpoints since"""

    def note(self, step: int, value: float | None) -> None:
        if value is not None and value > self.value:
            self.step, self.value, self.worse = step, value, 0
        else:
            self.worse += 1

    def stale(self, asked: Finetune) -> bool:
        return asked.patience is not None and self.worse >= asked.patience


def measured(
    asked: Finetune, base: Run, learner: Learner, task: Task, policy: Policy | None, run: Path
) -> Callable[[str], dict[str, Any]]:
    """A measurement of the averaged weights ("before", or "after": of the run as it is from then on)."""
    classified = isinstance(task, Scoring) and default_features(base.spec) == "classifier"
    data = base.config.data.load("train") if classified else None
    like = likeness(data) if data and asked.eval_samples else None

    def measure(when: str) -> dict[str, Any]:
        nets = (
            learner.state.emas[asked.ema] if when == "before" else load_run(run, ema=str(asked.ema), device="cpu").nets
        )
        if isinstance(task, Scoring) and asked.eval_samples:
            judge = Judged(task, asked.eval_samples, asked.eval_seeds, asked.steps, asked.grid, learner.demos, like)
            return judge(replace(base, nets=nets), run / "samples" / f"{when}.png")
        if policy is None or not asked.eval_episodes:
            return {}
        return acted(asked, base, nets, range(asked.eval_seeds, asked.eval_seeds + asked.eval_episodes))

    return measure


def acted(asked: Finetune, base: Run, nets: dict[str, nn.Module], seeds: range) -> dict[str, Any]:
    """What ``nets`` reach as they are used later: without noise, an episode of each seed. The return is the sum of what
    is paid; the largest reward of a step means nothing where that is not the environment's own."""
    policy = Policy.load(replace(base, nets=nets), steps=asked.steps, act_steps=asked.act_steps, grid=asked.grid)
    found = run_episodes(policy, world(asked, policy, min(50, len(seeds))), seeds).summary()
    return {k: v for k, v in found.items() if asked.reward == "env" or k != "best_reward"}


def told(run: Path, step: int, when: str, found: dict[str, Any]) -> float | None:
    """Log it, write it and say it; the mean return."""
    if not found:
        return None
    flat = {k: v["value"] if isinstance(v, dict) else v for k, v in found.items()}
    append_log(run, {"step": step, **{f"{when}/{k}": v for k, v in flat.items() if v is not None}})
    write_text(run / f"{when}.json", json.dumps(found, indent=1) + "\n")
    names = ("success", "coverage", "return", "mode_entropy_bits", "reward", "frechet", "frechet_class", "precision")
    console.print(
        f"{when:<8} " + "  ".join(f"{k} {flat[k]:.3f}" for k in names if flat.get(k) is not None), markup=False
    )
    return flat.get("return")


# ---------------------------------------------------------------------------------------------- checkpoints
EXTRA = "finetune.safetensors"


def save(run: Path, learner: Learner, base: Run, asked: Finetune, best: Best) -> None:
    """An ordinary checkpoint, and in it what only this command needs to go on: the critic, learned noise, their
    optimisers.

    ``latest`` points at the best one, where they are measured; a resumed run goes on from the newest all the same.
    """
    kept = torch.tensor([best.step, best.value, best.worse], dtype=torch.float64)
    extra = {
        "draws": torch.tensor(learner.draws),
        "spread": torch.tensor(learner.spread, dtype=torch.float64),
        "best": kept,
    }
    for name, (net, fit) in learner.beside.items():
        extra |= {f"{name}.{k}": v.clone() for k, v in net.state_dict().items()}
        for i, p in enumerate(net.parameters()):
            extra |= {f"{name}-adam.{i}.{k}": v.clone() for k, v in fit.state.get(p, {}).items()}
    save_checkpoint(run, learner.state, learner.objective, base.spec, base.codec, seed=asked.seed, keep=3,
              extra={EXTRA: extra}, best=best.step or None)  # fmt: skip


def take_up(learner: Learner, run: Path, best: Best) -> None:
    """Put the newest checkpoint back into ``learner``, and what was the best so far into ``best``."""
    find_checkpoint(run)  # there is one
    checkpoint = max(p for p in (run / "checkpoints").glob("step-*") if (p / "state.json").is_file())
    restore(checkpoint, learner.state, learner.objective)
    stored = read_tensors(checkpoint, EXTRA)
    learner.draws, learner.spread = int(stored["draws"]), float(stored["spread"])
    step, best.value, worse = stored["best"].tolist()
    best.step, best.worse = int(step), int(worse)
    for name, (net, fit) in learner.beside.items():
        net.load_state_dict({k.partition(".")[2]: v for k, v in stored.items() if k.startswith(f"{name}.")})
        for i, p in enumerate(net.parameters()):
            slots = {k.split(".", 2)[2]: v for k, v in stored.items() if k.startswith(f"{name}-adam.{i}.")}
            if slots:
                fit.state[p] = slots
    rewind_log(run, learner.state.step)
