"""`genkit COMMAND ...`: finds the command, and turns a user's mistake into one line and exit code 2."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
OURS = (PACKAGE, PACKAGE.parent / "benchmarks")  # code whose ValueErrors are a user's mistakes

COMMANDS = {  # name -> (module with main(argv), one line of help)
    "train": ("genkit.cli.commands.train", "train any objective on any data; --resume RUN continues one"),
    "sample": ("genkit.cli.commands.sample", "draw samples from a run, as a grid, PNG files or an npz"),
    "eval": (
        "genkit.cli.commands.evaluate",
        "measure samples: FID, KID, precision and recall ..., of a run or of folders",
    ),
    "sweep": ("genkit.cli.commands.sweep", "which sampler, steps and guidance draw a run's samples well and fast"),
    "likelihood": ("genkit.cli.commands.likelihood", "bits per dimension of held-out samples under a run"),
    "encode": ("genkit.cli.commands.encode", "cache the latents of a data set, to train on them with --data=latents"),
    "reflow": ("genkit.cli.commands.reflow", "a run's own pairs (noise, sample), to train a straighter flow on"),
    "report": ("genkit.cli.commands.report", "a run on one HTML page: curves, samples, quality, settings"),
    "export": ("genkit.cli.commands.export", "write a run as a pipeline of diffusers, or as a run that stands alone"),
    "info": ("genkit.cli.commands.info", "say what a run is, how far it got and what it holds"),
    "rollout": ("genkit.cli.commands.rollout", "let a trained policy act: success, return, ways taken, time per chunk"),
    "demo": ("genkit.cli.commands.demo", "record an expert, as demonstrations to learn from"),
    "finetune": ("genkit.cli.commands.finetune", "improve a run by the reward of an environment, or of a function"),
    "bench": ("genkit.cli.commands.bench", "measure: quality, toy, reflow, prediction, order, overhead, speed"),
}


def usage() -> str:
    lines = "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
    return f"""usage: genkit COMMAND [options]

Generative models on shared backbones: one command trains, another samples.

commands:
{lines}

examples:
  genkit train --objective=flow                  handwritten digits, some minutes on a CPU
  genkit train --objective=ddpm --data=cifar10 --backbone.width 128
  genkit sample runs/latest --label 7 --n 16
  genkit eval runs/latest --metrics fid,kid,prdc --n 1000
  genkit report runs/latest                      one HTML page of curves, samples and numbers
  genkit COMMAND --help                          every option of a command, with its default
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit code: 0, or 2 for a mistake in what was asked, or 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    # Before torch is imported: threads that wait for each other sleep instead of spinning. On a core that another
    # process holds, spinning made a step 5 to 20 times slower (docs/log.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        from genkit import __version__

        print(f"genkit {__version__}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return refuse(f"command: given {name!r}; allowed: {', '.join(COMMANDS)}{hint}")
    show_messages()
    try:
        return importlib.import_module(COMMANDS[name][0]).main(argv[1:])
    except KeyboardInterrupt:
        print("genkit: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: `genkit info ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as e:
        if not ours(e) or os.environ.get("GENKIT_TRACEBACK"):
            raise
        return refuse(str(e) or type(e).__name__)


class MessagePrinter(logging.Handler):
    """The library's messages (logger ``genkit``) on standard output; warnings on standard error, by the first rank."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        if record.levelno < logging.WARNING:
            print(record.getMessage(), flush=True)
        elif os.environ.get("RANK", "0") == "0":
            print(record.getMessage(), file=sys.stderr, flush=True)


def show_messages() -> None:
    """Print what the library says; where a bar cannot be drawn, its lines about progress too."""
    logger = logging.getLogger("genkit")
    logger.setLevel(logging.INFO if sys.stderr.isatty() else logging.DEBUG)
    if not any(isinstance(handler, MessagePrinter) for handler in logger.handlers):
        logger.addHandler(MessagePrinter())


def ours(e: BaseException) -> bool:
    """Whether genkit itself refused (a user's mistake), or the system did (a full disk, a missing right)."""
    if isinstance(e, OSError):
        return True
    trace = e.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    if trace is None:
        return False
    file = Path(trace.tb_frame.f_code.co_filename)
    return any(file.is_relative_to(folder) for folder in OURS)


def refuse(message: str) -> int:
    print("genkit: " + " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
