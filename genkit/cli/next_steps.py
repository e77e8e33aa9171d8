"""What a command suggests to do next: command lines that run as they are printed."""

from __future__ import annotations

import shlex

from genkit import config
from genkit.config.trust import names_foreign_code
from genkit.core import Label
from genkit.data.text import caption_examples
from genkit.training.run import Run
from genkit.training.sampling import require_one_kind, require_promptable
from genkit.training.settings import TrainSettings

EVALUATE = "genkit eval {run} --n 100"  # for models whose conditions no option of the command line gives


def suggest_use(run: Run) -> list[str]:
    """The command lines that use a trained run: those of its data (a policy acts), or of its objective."""
    data, objective = run.config.data, run.objective
    if data.usage:
        usage = data.usage if data.environment else EVALUATE
    elif objective.is_generative and not can_sample(run):
        usage = EVALUATE
    else:
        usage = objective.usage
    path = config.dump(objective).get("path")
    words = {
        "run": shlex.quote(str(run.directory)),
        "runs": shlex.quote(str(run.directory.parent)),
        "label": condition_options(run),
        "path": path.get("name", "linear") if isinstance(path, dict) else "linear",
    }
    own = names_foreign_code(TrainSettings, config.dump(run.config), data.environment)
    return [line.format(**words) + (" --trust" if own else "") for line in usage.splitlines()]


def can_sample(run: Run) -> bool:
    """Whether ``genkit sample`` can give the model's conditions."""
    try:
        require_promptable(run.spec)
        require_one_kind(run.spec)
    except ValueError:
        return False
    return True


def condition_options(run: Run) -> str:
    """The options of ``genkit sample`` that ask for the second class with samples and the first caption, as far as
    there are any."""
    kind, options = run.spec.cond.get("label"), ""
    if isinstance(kind, Label):
        number = kind.trained[:2][-1]
        name = kind.names[number] if kind.names else str(number)
        options += f" --label {shlex.quote(name)}"
    if captions := caption_examples(run.spec):
        options += f" --prompt {shlex.quote(captions[0])}"
    return options
