"""Fine-tuning a run by a reward: :func:`finetune`."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from genkit import config
from genkit.config.trust import require_trust, require_trusted_code
from genkit.core import seed_of
from genkit.core.device import pick_device
from genkit.core.durations import parse_duration
from genkit.core.files import format_error, sweep, write_text
from genkit.core.progress import Progress, reporting
from genkit.core.tensors import sha256
from genkit.evaluation.evaluator import default_features
from genkit.rl.finetune.checkpoint import restore_finetuning, save_finetuning
from genkit.rl.finetune.evaluation import SampleEvaluation, plot_reward_kl
from genkit.rl.finetune.frechet_reward import is_frechet, resolve_frechet
from genkit.rl.finetune.image_rewards import SampleQuality, sample_quality
from genkit.rl.finetune.reward_method import RewardMethod
from genkit.rl.finetune.settings import FinetuneSettings
from genkit.rl.finetune.setup import (
    acting_policy,
    build_env,
    build_learner,
    build_steps,
    build_task,
    check_adapter,
    check_method,
    choose_grid,
    choose_save_interval,
    choose_steps,
    choose_threads,
    default_name,
    sampling_of,
    train_settings,
)
from genkit.rl.finetune.tasks import FunctionTask
from genkit.rl.policies.episodes import run_episodes
from genkit.rl.policies.policy import ACTING_FILE
from genkit.training.annotations import annotate
from genkit.training.base_weights import BASE_FILE, read_base, write_base
from genkit.training.best import BestCheckpoint
from genkit.training.checkpoint import point_latest
from genkit.training.directory import create_run, find_run, list_checkpoints, read_log, rewind_log, step_of
from genkit.training.distributed import join_ranks
from genkit.training.first_stage import LatentCodec
from genkit.training.lock import RunLock
from genkit.training.loop import Diverged, require_same
from genkit.training.pace import Pace
from genkit.training.pipelines import write_pipeline
from genkit.training.ranks import Ranks
from genkit.training.resume import refuse_other_meaning, resume_point
from genkit.training.run import Run, average_name, load_run
from genkit.training.session import Recorder, environment, tracker_names

CHECKPOINT_SEED = 2**29  # first seed of the episodes that choose a checkpoint: neither trained on nor reported
WARN_KL = 100.0  # nats from the pretrained model after which little of it is left
LINE = ("reward", "return", "success", "mode_entropy_bits", "kl_reference", "clipped", "diffusion_loss", "loss")
RESULTS = ("success", "coverage", "return", "mode_entropy_bits", "reward", "frechet", "frechet_class", "precision")

logger = logging.getLogger("genkit")


@dataclass(frozen=True)
class FinetunedRun(Run):
    """A fine-tuned model, and its evaluation without exploration noise; empty if there was none."""

    before: Mapping[str, Any] = field(default_factory=dict)
    """results of the run that was improved"""
    after: Mapping[str, Any] = field(default_factory=dict)
    """results of this run"""
    stopped: bool = False
    """whether ``max_time`` ended it early; it can be resumed"""
    steps: int | None = None
    """the sampler's steps that it was improved at; None: it draws in one pass"""


def finetune(
    run: str | Path | Run | None = None,
    settings: FinetuneSettings | None = None,
    *,
    resume: str | Path | None = None,
    progress: Progress | None = None,
    **changes: Any,
) -> FinetunedRun:
    """Improve ``run`` by a reward, in a new run directory, and return the model as it is used from then on.

    ``changes`` are settings by name, in the form of YAML: ``finetune("runs/latest", reward="success", method="dppo",
    num_envs=50)``, or ``method={"name": "dppo", "bc_coef": 0}``. ``resume`` continues a fine-tuning run from its newest
    checkpoint, bit-identically, with its own settings and these changes. Messages go to the logger ``genkit``. Raises
    ``ValueError`` for settings that do not fit the run, and if the gradient stays non-finite.
    """
    directory = find_run(resume) if resume is not None else None
    if settings is None:
        if not directory:
            changes = name_method(changes)
        settings = config.from_dict(FinetuneSettings, stored_finetuning(directory) if directory else {})
    settings = config.override(settings, **changes)
    if run is not None:
        settings = replace(settings, run=str(run.directory if isinstance(run, Run) else run))
    if not settings.run:
        raise ValueError("run: not given; say which: genkit finetune runs/latest")
    if directory:
        refuse_changes(directory, settings)
    accelerator = join_ranks(run.device if isinstance(run, Run) else pick_device(settings.device))
    if directory:
        base = load_base(directory, settings.run, accelerator.device.type)
    else:
        base = run if isinstance(run, Run) else load_run(settings.run, device=accelerator.device.type)
    settings = replace(settings, steps=choose_steps(settings, base), grid=choose_grid(settings, base))
    if is_frechet(settings.reward):
        settings = replace(settings, reward=resolve_frechet(settings.reward, base))
    with contextlib.ExitStack() as locks:
        if directory and accelerator.is_main_process:
            locks.enter_context(RunLock(directory))
        tuning = FineTuning(settings, base, accelerator, locks, directory)
        if tuning.learner.state.sharding and base is not run:
            for net in base.nets.values():  # they are whole, and only what they are called with is needed now
                net.to("cpu")
        return tuning.run(progress)


def name_method(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the name of the method of their reward, if it is not the usual one and none is named."""
    method = changes.get("method", {})
    unnamed = isinstance(method, Mapping) and "name" not in method
    named = {"method": {"name": "direct", **method}} if is_frechet(str(changes.get("reward", ""))) and unnamed else {}
    return {**changes, **named}


def load_base(directory: Path, run: str, device: str) -> Run:
    """The run that a fine-tuning run began from, with the weights of then: it may have trained on, or be moved."""
    origin = read_base(directory, run if (Path(run) / "config.yaml").is_file() else None)
    return load_run(
        origin["run"], ema=average_name(origin["weights"]), step=step_of(Path(origin["weights"]).parent), device=device
    )


def file_digests(method: RewardMethod) -> dict[str, str]:
    """The SHA-256 of each file that a method learns from. ``ValueError`` if one cannot be read."""
    digests = {}
    for name, path in method.files.items():
        try:
            digests[f"{name}_sha256"] = sha256(path)
        except OSError as e:
            raise ValueError(f"{name}: {path} cannot be read: {format_error(e)}") from None
    return digests


def stored_finetuning(directory: Path) -> dict[str, Any]:
    """The settings of a fine-tuning run, in the form of YAML. ``ValueError`` if its code is not trusted."""
    file = settings_file(directory)
    stored = config.load_yaml(file)
    require_trust(FinetuneSettings, stored, file)
    for name in ("reward", "env"):
        value = str(stored.get(name) or "")
        if not is_frechet(value):  # whose features are named after a colon, as no code is
            require_trusted_code(value, f"{file}: {name}", directory)
    return stored


def refuse_changes(directory: Path, settings: FinetuneSettings) -> None:
    """``ValueError`` if ``settings`` would continue a run as another one, or from other weights; what may change is
    said. A run to improve that has moved may be given with its new place.
    """
    old = config.from_dict(FinetuneSettings, stored_finetuning(directory))
    begun = Path(old.run)
    moved = not (begun / "config.yaml").is_file() or find_run(settings.run) == begun
    new = replace(settings, run=old.run if moved else settings.run, resume=None, note=None, tags=())
    refuse_other_meaning(directory, old, new, f"begin another run: genkit finetune {directory}", logger.info)


def refuse_changed_files(directory: Path, method: RewardMethod, digests: Mapping[str, str]) -> None:
    """``ValueError`` if a file that a fine-tuning run learns from is not the one that it began with."""
    begun = json.loads((directory / BASE_FILE).read_text())
    for name, path in method.files.items():
        if begun.get(f"{name}_sha256") not in (None, digests[f"{name}_sha256"]):
            raise ValueError(f"{name}: {path} has changed since {directory.name} began (another sha256); put it back, "
                             f"or begin another run: genkit finetune {directory}")  # fmt: skip


def settings_file(directory: Path) -> Path:
    """The settings of a fine-tuning run. ``ValueError`` if it is another run."""
    file = directory / "finetune.yaml"
    if not file.is_file():
        raise ValueError(f"resume: given {directory}, which genkit finetune did not make; it has no finetune.yaml")
    return file


class FineTuning:
    """One fine-tuning run, from the weights of another one, ``base``."""

    def __init__(
        self,
        settings: FinetuneSettings,
        base: Run,
        accelerator: Accelerator,
        locks: contextlib.ExitStack,
        resumed: Path | None = None,
    ):
        """``resumed`` is the directory of the run to continue, whose lock is one of ``locks``; else that of the new
        directory becomes one.
        """
        self.settings, self.base, self.accelerator, self.resumed = settings, base, accelerator, resumed
        limit = parse_duration(settings.max_time) if settings.max_time else math.inf
        self.deadline = time.monotonic() + limit
        tracker_names(settings)
        self.locks = locks
        self.digests = file_digests(settings.method)
        if resumed:
            refuse_changed_files(resumed, settings.method, self.digests)
        self.notes: list[str] = []
        world, self.ranks = accelerator.num_processes, Ranks.of(accelerator)
        torch.set_num_threads(choose_threads(settings, base, world))
        torch.manual_seed(settings.seed)
        check_adapter(settings, base)
        steps = build_steps(settings, base)
        with accelerator.main_process_first():  # a reward may train its classifier, once
            self.task, self.policy = build_task(settings, base, world)
        save_every = choose_save_interval(settings, self.task, self.notes.append)
        self.settings = settings = replace(settings, save_every=save_every)
        needs_critic = self.policy is not None and settings.method.needs_critic
        self.learner = build_learner(settings, base, steps, needs_critic, accelerator)
        check_method(settings, self.learner, self.task)
        self.learner.drop_gathered()
        self.best, self.warned = BestCheckpoint("checkpoint/return", "higher"), False
        # None: a new run, or one that was killed before its first checkpoint and begins again
        self.checkpoint = resume_point(resumed, None, self.notes.append) if resumed else None
        if self.checkpoint:
            restore_finetuning(self.checkpoint, self.learner, self.best)
            if accelerator.is_main_process and resumed:
                saved = {step_of(path): path for path in list_checkpoints(resumed)}
                point_latest(resumed, saved.get(self.best.step or -1, self.checkpoint))
        self.directory: Path = self.ranks.once(self.open_directory)
        self.recorder = Recorder(self.directory, accelerator)
        for note in self.notes:
            self.recorder.say(note)
        self.quality = self.image_quality()

    @property
    def averaged(self) -> dict[str, nn.Module]:
        """The averaged networks, which every use of the run draws from, whole; all ranks call it."""
        return self.learner.gather_state().emas[self.settings.ema]

    def run(self, progress: Progress | None) -> FinetunedRun:
        """Evaluate, fine-tune, evaluate again and return the model."""
        self.recorder.say(f"{self.directory}  from {self.base.directory} ({self.base.weights})")
        with (
            reporting(progress, self.accelerator.is_main_process, stages=False) as report,
            self.recorder.tracking(self.settings, self.learner.state.step),
        ):
            if self.checkpoint is None:
                self.record_results("before", self.evaluate("before", self.averaged))
                if self.chooses_checkpoint:  # the start is a candidate too
                    self.save_checkpoint()
            try:
                stopped = self.iterate(report)
            except Diverged as e:
                raise ValueError(f"{e}; the last good checkpoint stays in {self.directory}") from e
            return self.conclude(stopped)

    def open_directory(self) -> Path:
        """The new run's directory, made or reopened."""
        settings, directory = self.settings, self.resumed
        if directory is None:
            directory = create_run(settings.out, settings.name or default_name(settings, self.base.directory))
            self.locks.enter_context(RunLock(directory))
            write_text(directory / "env.json", json.dumps(environment(self.accelerator), indent=1))
        else:
            sweep(directory)
            rewind_log(directory, self.learner.state.step if self.checkpoint else -1, "after", self.notes.append)
        stored = replace(settings, run=str(self.base.directory), resume=None, note=None, tags=())
        write_text(directory / "finetune.yaml", config.to_yaml(stored))
        if self.policy is not None:
            acting = {"steps": settings.sampler_steps, "grid": settings.grid, "act_steps": self.policy.act_steps}
            write_text(directory / ACTING_FILE, json.dumps(acting) + "\n")
        if isinstance(self.base.codec, LatentCodec):
            self.base.codec.stage.write(directory / "codec")
        write_pipeline(directory, self.base.pipeline)
        write_base(directory, {"run": str(self.base.directory), "weights": self.base.weights, **self.digests})
        if not (directory / "config.yaml").is_file():  # last: with it the directory is a run, which can be resumed
            write_text(directory / "config.yaml", config.to_yaml(train_settings(settings, self.base)))
        if settings.note or settings.tags:
            annotate(directory, settings.note, tags=settings.tags)
        return directory

    def image_quality(self) -> SampleQuality | None:
        """Metrics of image quality, on the main process, if samples are evaluated and their data has a classifier."""
        wanted = isinstance(self.task, FunctionTask) and self.settings.eval_samples and self.recorder.main
        if not wanted or default_features(self.base.data_spec) != "classifier":
            return None
        return sample_quality(self.base.config.data.decoded_source().load("train"))

    # --------------------------------------------------------------------------------------------------- learning
    def iterate(self, report: Progress) -> bool:
        """Collect experience and learn from it until an iteration, a divergence or the patience ends it.

        Returns whether ``max_time`` ended it.
        """
        settings, learner, task = self.settings, self.learner, self.task
        pace = Pace(learner.state.step, settings.iterations, self.base.device, self.recorder.say, self.recorder.note,
                    "iteration")  # fmt: skip
        saved = time.monotonic()
        start, cpu_start, begun = time.perf_counter(), time.process_time(), False
        while learner.state.step < settings.iterations and not self.best.is_stale(settings.patience):
            i = learner.state.step
            if i % settings.checkpoint_interval == 0 or not begun:
                task.begin(learner, i)
                begun = True
            torch.manual_seed(seed_of(settings.seed, i))  # for the objective's own draws
            experience, logs = settings.method.collect(learner, task, i)
            kl = logs.get("kl_reference", 0)
            if settings.max_kl is not None and kl > settings.max_kl:
                self.save()
                self.recorder.say(f"stopped  at iteration {i}: kl_reference {kl:.3g}")
                break
            self.warn_of_divergence(kl)
            logs |= settings.method.update(learner, task, experience, i)
            learner.refuse_divergence(self.base.config.max_nonfinite_steps)
            learner.state.step += 1
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            clocks = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_seconds, 2)}
            self.log({"step": i + 1, **clocks, **logs}, report, pace)
            if (i + 1) % settings.checkpoint_interval == 0 or i + 1 == settings.iterations:
                self.save_checkpoint()
                now = time.monotonic()
                if i + 1 < settings.iterations and self.is_late(now + (now - saved)):
                    return True
                saved = now
        return False

    def is_late(self, end: float) -> bool:
        """Whether the next checkpoint, expected at the time ``end``, is too late; the main process decides."""
        return broadcast_object_list([end > self.deadline])[0] is True

    def warn_of_divergence(self, kl: float) -> None:
        """Say once that the model is no longer like the pretrained one."""
        if kl > WARN_KL and not self.warned:
            self.warned = True
            self.recorder.say(f"warning  kl_reference is {kl:.3g} nats: the samples have left the pretrained model's; "
                              f"try a lower --method.lr, or stop there: --max-kl {WARN_KL:g}")  # fmt: skip

    def log(self, record: dict[str, Any], report: Progress, pace: Pace) -> None:
        """A line of the log, and progress."""
        step, iterations = record["step"], self.settings.iterations
        self.recorder.log(record)
        line = "  ".join(f"{k} {record[k]:.3g}" for k in LINE if k in record)
        report(line, step, iterations)
        pace(step, line)

    @property
    def chooses_checkpoint(self) -> bool:
        """Whether the run is the best of its checkpoints, rather than the newest."""
        return self.settings.checkpoint_eval_episodes > 0 and self.policy is not None

    def save_checkpoint(self) -> None:
        """Write a checkpoint, evaluated first if a best one is to be chosen."""
        episodes = self.settings.checkpoint_eval_episodes
        if self.chooses_checkpoint:
            seeds = range(CHECKPOINT_SEED, CHECKPOINT_SEED + episodes)
            nets = self.averaged
            results = self.ranks.once(lambda: evaluate_policy(self.settings, self.base, nets, seeds))
            self.best.update(self.learner.state.step, self.record_results("checkpoint", results))
        self.save()

    def save(self) -> None:
        """Write a checkpoint."""
        self.learner.drop_gathered()
        require_same(self.accelerator, self.learner.state)
        if self.learner.state.sharding:
            save_finetuning(self.directory, self.learner, self.base, self.best)
        else:
            self.ranks.once(save_finetuning, self.directory, self.learner, self.base, self.best)
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------------------------------------- evaluation
    def evaluate(self, name: str, nets: dict[str, nn.Module]) -> dict[str, Any]:
        """Evaluate ``nets`` without exploration noise. Results ready for JSON; empty if no evaluation is asked for."""
        settings = self.settings
        if isinstance(self.task, FunctionTask):
            if not settings.eval_samples:
                return {}
            evaluation = SampleEvaluation(
                self.task,
                settings.eval_samples,
                settings.eval_seed,
                sampling_of(settings, self.base),
                self.learner.demos,
                self.quality,
            )
            picture = self.directory / "samples" / f"{name}.png"
            return self.ranks.once(lambda: evaluation(replace(self.base, nets=nets), picture))
        if not settings.eval_episodes:
            return {}
        seeds = range(settings.eval_seed, settings.eval_seed + settings.eval_episodes)
        return self.ranks.once(lambda: evaluate_policy(settings, self.base, nets, seeds))

    def record_results(self, name: str, results: Mapping[str, Any]) -> float | None:
        """Log the results, write them to NAME.json and report them; the mean return, if there is one."""
        if not results:
            return None
        values = {k: v["value"] if isinstance(v, dict) else v for k, v in results.items()}
        scalars = {f"{name}/{k}": v for k, v in values.items() if v is not None}
        self.recorder.log({"step": self.learner.state.step, **scalars})
        if self.accelerator.is_main_process:
            write_text(self.directory / f"{name}.json", json.dumps(results, indent=1) + "\n")
        line = "  ".join(f"{k} {values[k]:.3f}" for k in RESULTS if values.get(k) is not None)
        self.recorder.say(f"{name:<8} {line}")
        return values.get("return")

    def conclude(self, stopped: bool = False) -> FinetunedRun:
        """Evaluate the run as it is from now on, unless it was ``stopped`` to be resumed, and return it."""
        if self.best.step == 0 and self.learner.state.step:
            self.recorder.say("chosen   the start: no checkpoint had a better return; try a lower --method.lr")
        run = load_run(self.directory, ema=self.settings.ema, device=self.accelerator.device.type)
        after = {} if stopped else self.evaluate("after", run.nets)
        self.record_results("after", after)
        if self.accelerator.is_main_process:
            plot_reward_kl(read_log(self.directory), self.directory / "reward-kl.png")
        file = self.directory / "before.json"
        before = json.loads(file.read_text()) if file.is_file() else {}
        values: dict[str, Any] = {f.name: getattr(run, f.name) for f in fields(Run)}
        return FinetunedRun(**{**values, "directory": self.directory}, before=before, after=after, stopped=stopped,
                             steps=self.settings.steps)  # fmt: skip


def evaluate_policy(settings: FinetuneSettings, base: Run, nets: dict[str, nn.Module], seeds: range) -> dict[str, Any]:
    """Results of the policy with these networks, without noise: one episode for each seed. The return is the sum of the
    rewards that were learned from; the largest reward of a step is left out unless it is the environment's own."""
    policy = acting_policy(settings, replace(base, nets=nets))
    results = run_episodes(policy, build_env(settings, policy, min(50, len(seeds))), seeds).summary()
    return {k: v for k, v in results.items() if settings.reward == "env" or k != "best_reward"}
