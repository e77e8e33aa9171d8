"""`genkit finetune RUN`: improve a trained model by a reward, of an environment or of a function."""

from __future__ import annotations

import shlex

from genkit.cli.output import console
from genkit.config import parse
from genkit.config.command import peek_option
from genkit.rl.finetune.env_rewards import REWARDS
from genkit.rl.finetune.loop import finetune, name_method, settings_file, stored_finetuning
from genkit.rl.finetune.settings import FinetuneSettings
from genkit.training.directory import find_run
from genkit.training.distributed import is_main_process


def main(argv: list[str]) -> int:
    """Run the command; the exit code."""
    resume = peek_option(argv, "resume")
    if resume:
        stored_finetuning(find_run(resume))  # refuses foreign code before the file is parsed with the command line
        argv = ["--config", str(settings_file(find_run(resume))), *argv]
    elif not peek_option(argv, "config") and not peek_option(argv, "method"):
        chosen = name_method({"reward": peek_option(argv, "reward")}).get("method", {})
        argv = [*(f"--method={name}" for name in chosen.values()), *argv]
    settings = parse(FinetuneSettings, argv, prog="genkit finetune", description="Improve a trained model by a reward.")
    run = finetune(settings=settings, resume=resume)
    directory = shlex.quote(str(run.directory))
    if is_main_process() and run.stopped:
        say = f"stopped at iteration {run.step} for --max-time {settings.max_time}, saved; continue with:"
        console.print(f"{say} genkit finetune --resume {directory}", markup=False)
    elif is_main_process():
        sample = f"sample {directory}" + (f" --steps {run.steps}" if run.steps else "")
        conditions = f" --conditions {shlex.join(settings.conditions)}" if settings.conditions else ""
        command = f"rollout {directory}{conditions}" if settings.reward in REWARDS else sample
        console.print(f"next     genkit {command}", markup=False)
    return 0
