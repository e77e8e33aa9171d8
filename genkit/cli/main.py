"""`genkit COMMAND ...`: run a command, and report a user's mistake in one line with exit code 2."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

from genkit.cli.escape import printable
from genkit.cli.ranks import end_process, find_rank, has_said, is_launched, leave_message
from genkit.cli.shortage import explain_shortage
from genkit.training.slurm import adopt_slurm_ranks

PACKAGE = Path(__file__).parents[1]
OWN_CODE = (PACKAGE, PACKAGE.parent / "benchmarks")  # a ValueError raised by it is a user's mistake


@dataclass(frozen=True)
class Command:
    """One command of `genkit`."""

    module: str
    """the module with ``main(argv) -> exit code``"""
    summary: str
    """one line of help"""
    settings: str = ""
    """``module:Class`` of its options; empty if it parses them itself"""
    examples: tuple[str, ...] = ()
    """command lines that its help ends with"""
    shares_work: bool = False
    """whether several ranks share its work; otherwise several are refused"""


COMMANDS = {
    "train": Command(
        "genkit.cli.commands.train",
        "train an objective on a data set; --resume RUN continues a run",
        "genkit.training.settings:TrainSettings",
        (
            "genkit train --objective=flow",
            "genkit train --objective=ddpm --data=path/to/images --data.size 32 --steps 20000",
            "genkit train --resume runs/latest --steps 4000",
        ),
        shares_work=True,
    ),
    "sample": Command(
        "genkit.cli.commands.sample",
        "sample from a run: a grid, PNG files or an .npz",
        "genkit.cli.commands.sample:Sample",
        (
            "genkit sample runs/latest --label 7 --n 16",
            "genkit sample runs/latest --sampler dpmpp_2m --steps 10 --guidance 2 --format png --out samples",
        ),
        shares_work=True,
    ),
    "eval": Command(
        "genkit.cli.commands.evaluate",
        "measure samples of a run or of folders: FID, KID, precision, recall ...",
        "genkit.cli.commands.evaluate:Evaluate",
        (
            "genkit eval runs/latest --metrics fid,kid,prdc --n 1000",
            "genkit eval path/to/samples --reference path/to/images --data.size 32",
        ),
        shares_work=True,
    ),
    "sweep": Command(
        "genkit.cli.commands.sweep",
        "find the best sampler, steps and guidance for each cost in network passes",
        "genkit.cli.commands.sweep:Sweep",
        ("genkit sweep runs/latest --sampler heun dpmpp_2m --steps 5 10 20 --guidance 1 2",),
        shares_work=True,
    ),
    "tune": Command(
        "genkit.cli.commands.tune",
        "search for the settings of a training; --resume STUDY goes on with a search",
        "genkit.training.tuning.tune:TuneSettings",
        (
            "genkit tune --data moons --space lr=log:1e-4..1e-1 backbone.width=32..256",
            "genkit tune --resume runs/0007-tune --trials 40",
        ),
    ),
    "likelihood": Command(
        "genkit.cli.commands.likelihood",
        "compute the bits per dimension of held-out samples under a run",
        "genkit.cli.commands.likelihood:Likelihood",
        ("genkit likelihood runs/latest --n 100",),
    ),
    "encode": Command(
        "genkit.cli.commands.encode",
        "cache the latents of a data set, for training with --data=latents",
        "genkit.cli.commands.encode:Encode",
        ("genkit encode runs/first-stage --out latents",),
        shares_work=True,
    ),
    "reflow": Command(
        "genkit.cli.commands.reflow",
        "save a run's pairs (noise, sample), for training a straighter flow",
        "genkit.cli.commands.reflow:Reflow",
        ("genkit reflow runs/latest --n 50000",),
    ),
    "distill": Command(
        "genkit.cli.commands.distill",
        "learn an adapter of a run that guides in one pass a step, its scale an input",
        "genkit.cli.commands.distill:Distill",
        ("genkit distill runs/latest --guidance 1 6",),
        shares_work=True,
    ),
    "report": Command(
        "genkit.cli.commands.report",
        "write one HTML page about a run, or several: curves, samples, metrics",
        "genkit.cli.commands.report:Report",
        ("genkit report runs/latest",),
    ),
    "list": Command(
        "genkit.cli.commands.list",
        "list runs: progress, loss, best metrics, state, tags",
        "genkit.cli.commands.list:List",
        ("genkit list", 'genkit list runs --where objective=flow "age<2d" --sort loss'),
    ),
    "diff": Command(
        "genkit.cli.commands.diff",
        "show what differs between runs: settings, data, code, metrics",
        "genkit.cli.commands.diff:Diff",
        ("genkit diff runs/0000-a runs/0001-b",),
    ),
    "note": Command(
        "genkit.cli.commands.note",
        "write or show the notes and tags of a run",
        "genkit.cli.commands.note:Note",
        ('genkit note runs/latest "half the learning rate" --tag baseline',),
    ),
    "export": Command(
        "genkit.cli.commands.export",
        "write a run as a diffusers pipeline, a standalone run, or a policy's graph",
        "genkit.cli.commands.export:Export",
        ("genkit export runs/latest --to diffusers pipeline",),
    ),
    "push": Command(
        "genkit.cli.commands.push",
        "upload a run to the Hugging Face Hub, with a model card",
        "genkit.cli.commands.push:Push",
        ("genkit push runs/latest OWNER/NAME --private",),
    ),
    "pull": Command(
        "genkit.cli.commands.pull",
        "download a run from the Hugging Face Hub",
        "genkit.cli.commands.pull:Pull",
        ("genkit pull OWNER/NAME", "genkit sample hf://OWNER/NAME"),
    ),
    "import": Command(
        "genkit.cli.commands.import_weights",
        "make a run of weights of another project",
        "genkit.cli.commands.import_weights:Import",
        ("genkit import torchcfm otcfm_cifar10.pt runs/otcfm", "genkit import dit DiT-XL-2-256x256.pt runs/dit"),
    ),
    "info": Command(
        "genkit.cli.commands.info",
        "show what a run is, its progress and its settings",
        "genkit.cli.commands.info:Info",
        ("genkit info runs/latest",),
    ),
    "rollout": Command(
        "genkit.cli.commands.rollout",
        "run a trained policy: success, return, modes, time per action chunk",
        "genkit.cli.commands.rollout:Rollout",
        ("genkit rollout runs/latest --episodes 100 --film 4",),
    ),
    "serve": Command(
        "genkit.cli.commands.serve",
        "let a trained policy answer control loops, over a socket",
        "genkit.cli.commands.serve:Serve",
        ("genkit serve runs/latest --steps 4 --execution real-time",),
    ),
    "demo": Command(
        "genkit.cli.commands.demo",
        "record an expert's episodes as demonstrations",
        "genkit.cli.commands.demo:Demo",
        ("genkit demo four-ways --out demos.npz",),
    ),
    "finetune": Command(
        "genkit.cli.commands.finetune",
        "improve a run by the reward of an environment or of a function",
        "genkit.rl.finetune.settings:FinetuneSettings",
        (
            "genkit finetune runs/latest --method dppo",
            "genkit finetune runs/latest --reward package.module:function --method ddpo",
        ),
        shares_work=True,
    ),
    "cache": Command(
        "genkit.cli.commands.cache",
        "list what genkit keeps on disk to be faster; --clear removes it",
        "genkit.cli.commands.cache:Cache",
        ("genkit cache", "genkit cache --clear frames text --unused 30d"),
    ),
    "bench": Command(
        "genkit.cli.commands.bench",
        "run a benchmark: quality, toy, reflow, prediction, order, overhead, speed",
    ),
    "completion": Command(
        "genkit.cli.commands.completion",
        "print a script that completes commands and options, for bash, zsh or fish",
        "genkit.cli.commands.completion:Completion",
        ("genkit completion bash > ~/.local/share/bash-completion/completions/genkit",),
    ),
}


def format_usage() -> str:
    """Return the text of ``genkit --help``."""
    lines = "\n".join(f"  {name:<10} {command.summary}" for name, command in COMMANDS.items())
    return f"""usage: genkit COMMAND [options]

Generative models on shared backbones: one command trains, another samples.

commands:
{lines}

examples:
  genkit train --objective=flow                  handwritten digits, a few minutes on a CPU
  genkit train --objective=ddpm --data=cifar10 --backbone.width 128
  genkit sample runs/latest --label 7 --n 16
  genkit eval runs/latest --metrics fid,kid,prdc --n 1000
  genkit report runs/latest                      one HTML page with curves, samples and numbers
  genkit COMMAND RUN --trust                     import the classes of other packages that RUN names
  genkit COMMAND --help                          every option of a command, with its default
"""


def format_epilog(name: str) -> str:
    """Return what the help of a command ends with: the meaning of its names, and examples."""
    from genkit.config.blocks import load_object  # lazy: needed for this option only
    from genkit.config.help_text import describe_choices  # lazy: needed for this option only

    command = COMMANDS[name]
    choices = describe_choices(load_object(command.settings)) if command.settings else ""
    lines = "".join(f"  {line}\n" for line in command.examples)
    return choices + (f"\nexamples:\n{lines}" if lines else "")


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 2 for a user's mistake, 1 if the machine lacks memory or space, or 130
    after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    # Set before torch is imported, so that waiting threads sleep instead of spinning. On a core that another process
    # uses, spinning made a step 5 to 20 times slower (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if argv[:1] == ["help"] and len(argv) > 1:
        argv = [argv[1], "--help"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(format_usage())
        return 0
    if argv[0] in ("-V", "--version"):
        from genkit import __version__  # lazy: needed for this option only

        print(f"genkit {__version__}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return refuse(f"command: given {name!r}; allowed: {', '.join(COMMANDS)}{hint}")
    if "--trust" in argv:
        os.environ["GENKIT_TRUST"] = "1"
        argv = [token for token in argv if token != "--trust"]
    show_messages()
    try:
        adopt_slurm_ranks()
        with terminate_as_interrupt():
            return run_command(name, argv[1:])
    except KeyboardInterrupt:
        print("genkit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has exited: `genkit info ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        shortage = explain_shortage(e, command_options(name))
        if os.environ.get("GENKIT_TRACEBACK") or not (shortage or is_user_error(e)):
            raise
        return report_error(shortage, 1) if shortage else refuse(str(e) or type(e).__name__)


def run() -> NoReturn:
    """The process of ``genkit`` and of ``python -m genkit``."""
    end_process(main())


def run_command(name: str, argv: list[str]) -> int:
    """Run a command, and print the end of its help if it prints help. Returns the exit code."""
    if is_launched():
        arrange_ranks(name, argv)
    try:
        return importlib.import_module(COMMANDS[name].module).main(argv)
    except SystemExit as e:
        if e.code in (0, None) and {"-h", "--help"}.intersection(argv):
            print(format_epilog(name), end="", flush=True)
        raise


def command_options(name: str) -> list[str]:
    """The names of a command's options; empty if it parses them itself."""
    module, _, kind = COMMANDS[name].settings.partition(":")
    return [f.name for f in fields(getattr(importlib.import_module(module), kind))] if kind else []


def arrange_ranks(name: str, argv: list[str]) -> None:
    """Start the ranks that a launcher has not. ``ValueError`` for several ranks of a command that has one process."""
    from genkit.training.distributed import missing_ranks, start_ranks  # lazy: most processes have no launcher

    missing = missing_ranks()
    if (num := max(missing, find_rank()[1])) > 1 and not COMMANDS[name].shares_work:
        several = ", ".join(other for other, command in COMMANDS.items() if command.shares_work)
        raise ValueError(
            f"{name}: works in one process, and a launcher started {num}; run it without torchrun or accelerate "
            f"launch; several share the work of: {several}"
        )
    if missing > 1:
        start_ranks(missing, name, argv)


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM, which schedulers send, end a command as Ctrl-C does: temporary files are removed, exit code 130.

    Ranks end at once, as before: they may wait for one that has ended.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if ranks or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class MessagePrinter(logging.Handler):
    """Prints the library's messages (logger ``genkit``) to standard output.

    Progress and warnings go to standard error.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message of the first rank; the others say the same."""
        if find_rank()[0] > 0:
            return
        if record.levelno < logging.WARNING and record.name != "genkit.progress":
            print(printable(record.getMessage()), flush=True)
        else:
            print(printable(record.getMessage()), file=sys.stderr, flush=True)


def show_messages() -> None:
    """Print the library's messages. If standard error is not a terminal, and so shows no bar, print progress too."""
    logger = logging.getLogger("genkit")
    logger.setLevel(logging.INFO if sys.stderr.isatty() else logging.DEBUG)
    if not any(isinstance(handler, MessagePrinter) for handler in logger.handlers):
        logger.addHandler(MessagePrinter())


def is_user_error(e: BaseException) -> bool:
    """Return whether genkit itself refused something, or the system did (a missing file or permission).

    Any other error is a bug, and keeps its traceback.
    """
    if isinstance(e, OSError):
        return True
    if not isinstance(e, ValueError):
        return False
    trace = e.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if trace is None:
        return False
    file = Path(trace.tb_frame.f_code.co_filename)
    return any(file.is_relative_to(folder) for folder in OWN_CODE)


def refuse(message: str) -> int:
    """Print a user's mistake in one line to standard error, and return exit code 2."""
    return report_error(message, 2)


def report_error(message: str, code: int) -> int:
    """Print an error in one line to standard error, and return ``code``. Ranks that say the same say it once."""
    text = printable(" ".join(message.split()))
    rank = find_rank()[0]
    if not has_said(text):
        print(f"genkit: {f'rank {rank}: ' if rank else ''}{text}", file=sys.stderr, flush=True)
    leave_message(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
