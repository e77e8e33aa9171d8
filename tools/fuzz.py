"""Give genkit generated command lines, and report tracebacks, hangs, wrong exit codes and errors of several lines.

    python tools/fuzz.py [--configurations 10000] [--commands 500] [--seed 0] [--json FILE]

*Configurations* are command lines and YAML files for every command, valid values mixed with absurd, mistyped, empty and
huge ones; they are parsed, and no work is done. One that is accepted must survive the way to YAML and back; any other
must be refused in one line. *Commands* run whole, each in a forked process with a limit of time and of memory, on small
runs made before. They must end with 0, with 2 and one line (a mistake), or with 1 and one line (no memory or no
space). A refused training must leave nothing behind. Amounts of work are small or absurd, so that a command that is
still busy at its limit hangs. Exit code: 1 if something failed.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shlex
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from genkit.cli.main import COMMANDS
from genkit.cli.main import main as genkit_main
from genkit.cli.scripts import ScriptParser
from genkit.config import ConfigError, dump, from_dict, parse
from genkit.config.blocks import find_types, get_fields, load_object, parse_block
from genkit.config.command import FlagParser, to_flag
from genkit.config.help_text import find_marks
from genkit.config.names import NameIn
from genkit.config.paths import expand_path

ROOT = Path(__file__).resolve().parents[1]
WITH_SETTINGS = [name for name, command in COMMANDS.items() if command.settings]
TIME_LIMIT = 120.0  # seconds that a whole command may take
PARSE_LIMIT = 5.0  # seconds that a configuration may take
MEMORY_LIMIT = 12 * 2**30  # bytes of address space of a whole command
INTEGERS = ["0", "1", "2", "3", "5", "-1", str(10**13), str(2**63), str(10**30), "1.5", "1e3", "x", ""]
FLOATS = ["0", "0.5", "0.9", "1", "1.5", "-1", "1e-8", "1e29", "-1e29", "1e300", "1e400", "nan", "inf", "x", ""]
TEXTS = [
    "",
    "x",
    "0",
    "null",
    "true",
    "ä€😀",
    "a\nb",
    "\x1b[31mred",
    "a/b",
    "../x",
    "~",
    "a:b",
    "genkit:Nothing",
    "%s{}",
]
PATHS = [
    "",
    "nowhere",
    "file.txt",
    "empty",
    "images",
    "runs/flow",
    "runs/flow/config.yaml",
    ".",
    "~nobody",
    "x" * 300,
    "a\nb",
]
DANGEROUS = {"threads"}  # changes the process itself; its bounds are tested in tests/config


# ---------------------------------------------------------------------------------------------- generated values
def invent(hint: Any, rng: random.Random) -> list[str]:
    """Words of a value for a setting of type ``hint``: valid, on a bound, absurd, or of another type."""
    marks = find_marks(hint)
    if rng.random() < 0.08:
        return [rng.choice(TEXTS)]
    for mark in marks:
        if isinstance(mark, NameIn) and rng.random() < 0.8:
            names = mark.names()
            words = rng.choices(names, k=rng.randint(1, 3)) if mark.separator else [rng.choice(names)]
            return [(mark.separator or "").join(words)]
    if any(getattr(mark, "func", None) is expand_path for mark in marks):
        return [rng.choice(PATHS)]
    if literals := list(find_literals(hint)):
        return [str(rng.choice(literals))]
    types = find_types(hint)
    if tuple in types:
        return [word for _ in range(rng.randint(0, 4)) for word in invent_scalar(types, rng)]
    return invent_scalar(types, rng)


def invent_scalar(types: set[Any], rng: random.Random) -> list[str]:
    """One word for a number or a text."""
    kinds = [values for kind, values in ((int, INTEGERS), (float, FLOATS), (str, TEXTS)) if kind in types]
    return [rng.choice(rng.choice(kinds or [TEXTS]))]


def find_literals(hint: Any) -> Iterator[Any]:
    """The values of the ``Literal`` in a type."""
    if get_origin(hint) is Literal:
        yield from get_args(hint)
        return
    for part in get_args(hint)[:1] if get_origin(hint) is Annotated else get_args(hint):
        yield from find_literals(part)


def invent_flags(cls: type, rng: random.Random, num: int, fixed: dict[str, Any] | None = None) -> list[str]:
    """``num`` flags with values, among those of ``cls`` with blocks chosen at random (or ``fixed``)."""
    tree: dict[str, Any] = dict(fixed or {})
    argv: list[str] = []
    for name, f in get_fields(cls).items():
        if "table" in f.metadata and not fixed and rng.random() < 0.4:
            tree[name] = {"name": rng.choice(list(load_object(f.metadata["table"])))}
            argv.append(f"{to_flag(name)}={tree[name]['name']}")
    parser = FlagParser(parse_block(cls, tree), help=False)
    for path in rng.sample(sorted(parser.settings), min(num, len(parser.settings))):
        setting = parser.settings[path]
        if path in DANGEROUS or "Positional" in str(setting.hint):
            continue
        if setting.hint is bool:
            argv.append(rng.choice([to_flag(path), f"{to_flag(path)}=false", f"{to_flag(path)}=maybe"]))
            continue
        words = invent(setting.hint, rng)
        if words and rng.random() < 0.7 and len(words) == 1:
            argv.append(f"{to_flag(path)}={words[0]}")
        else:
            argv += [to_flag(path), *words]
    return argv


def invent_tree(cls: type, rng: random.Random) -> dict[Any, Any]:
    """A mapping as a YAML file holds it: settings of ``cls`` with values of any kind, misspelled ones too."""
    tree: dict[Any, Any] = {}
    for name in rng.sample(sorted(get_fields(cls)), rng.randint(0, min(6, len(get_fields(cls))))):
        if rng.random() < 0.1:
            name = rng.choice([name + "x", name.upper(), "name", 3, None])
        values: list[Any] = [
            None,
            True,
            [],
            {},
            [1, 2],
            {"name": "x"},
            {"x": 1},
            -1,
            0,
            1,
            0.5,
            10**30,
            float("nan"),
            "x",
            "",
            "1e-4",
        ]
        tree[name] = rng.choice(values)
    return tree


# ---------------------------------------------------------------------------------------------- configurations
@dataclass
class Tally:
    """Outcomes, counted, and the failures in full."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, str]] = field(default_factory=list)

    def fail(self, kind: str, line: str, detail: str) -> None:
        """Count a failure and print it."""
        self.counts[kind] += 1
        self.failures.append({"kind": kind, "command": line, "detail": detail[-3000:]})
        print(f"FAILED ({kind}): {line}\n{detail[-1500:]}", flush=True)


def fuzz_configurations(num: int, seed: int, folder: Path) -> Tally:
    """Parse ``num`` generated configurations of all commands in turn."""
    tally = Tally()
    file = folder / "generated.yaml"
    for i in range(num):
        rng = random.Random(f"{seed}/configuration/{i}")
        name = WITH_SETTINGS[i % len(WITH_SETTINGS)]
        cls = load_object(COMMANDS[name].settings)
        argv = ["x"] if any("Positional" in str(f.type) for f in get_fields(cls).values()) else []
        if rng.random() < 0.3:
            file.write_text(yaml.safe_dump(invent_tree(cls, rng), allow_unicode=True))
            argv.append(f"--config={file}")
        began = time.monotonic()
        try:
            argv += invent_flags(cls, rng, rng.randint(0, 5))
            cfg = parse(cls, argv, prog=f"genkit {name}")
        except ConfigError as e:
            message = str(e)
            tally.counts["refused"] += 1
            if len(message.splitlines()) != 1 or len(message) > 1000:
                tally.fail("not one line", shlex.join([name, *argv]), message)
        except (Exception, SystemExit):
            tally.fail("traceback", shlex.join([name, *argv]), traceback.format_exc())
        else:
            tally.counts["accepted"] += 1
            if from_dict(cls, yaml.safe_load(yaml.safe_dump(dump(cfg)))) != cfg:
                tally.fail("no round trip", shlex.join([name, *argv]), str(cfg))
        if time.monotonic() - began > PARSE_LIMIT:
            tally.fail("slow", shlex.join([name, *argv]), f"{time.monotonic() - began:.1f} s")
    return tally


# -------------------------------------------------------------------------------------------------- whole commands
TINY = "--steps 2 --batch 8 --workers 0 --no-tensorboard --sample-every 0 --device cpu --log-every 1"
MLP = "--backbone=mlp --backbone.width 8 --backbone.depth 1"
SETUP = {
    "flow": f"train {TINY} {MLP} --data=digits",
    "ddpm": f"train {TINY} {MLP} --data=moons --data.n 64 --objective=ddpm",
    "vae": f"train {TINY} {MLP} --data=digits --objective=vae",
    "gan": f"train {TINY} {MLP} --data=digits --objective=gan",
    "stage": f"train {TINY} {MLP} --data=digits --data.labels=false --objective=autoencoder --objective.latent 4 4 4",
    "policy": f"train {TINY} --backbone.width 8 --data=four-ways --data.n 8",
}
RUN = [
    "runs/flow",
    "runs/ddpm",
    "runs/vae",
    "runs/gan",
    "runs/stage",
    "runs/policy",
    "runs/missing",
    "images",
    "file.txt",
]
TEMPLATES = {  # command -> arguments that keep the work small; {run} is one of RUN, mostly one that fits
    "train": [
        f"{TINY} {MLP} --data=moons --data.n 64",
        f"{TINY} {MLP} --data=digits --objective=ddpm",
        f"{TINY} {MLP} --data=digits --objective=vae",
        f"{TINY} {MLP} --data=digits --objective=gan",
        f"{TINY} --data=digits --backbone=unet --backbone.width 8 --backbone.mults 1 2",
        f"{TINY} --data=digits --backbone=dit --backbone.width 16 --backbone.depth 1 --objective=edm",
        f"{TINY} {MLP} --data=images --data.size 8",
        "--resume={run}",
    ],
    "sample": ["{run} --n 2 --steps 2 --batch 2"],
    "eval": ["{run} --n 40 --steps 2 --metrics fid --features raw", "images --reference images --n 2 --metrics prdc"],
    "sweep": ["{run} --steps 1 2 --n 20 --confirm-n 20 --features raw"],
    "likelihood": ["{run} --n 2 --steps 2"],
    "encode": ["{run} --batch 8"],
    "reflow": ["{run} --n 8 --steps 2"],
    "report": ["{run}"],
    "export": ["{run} --to run out", "{run} --to diffusers out"],
    "info": ["{run}"],
    "rollout": ["{run} --episodes 2 --max-steps 4 --num-envs 2"],
    "demo": ["four-ways --out demo.npz --episodes 2"],
    "finetune": ["{run} --iterations 1 --num-envs 2 --num-steps 2 --eval-episodes 0 --eval-samples 0 --samples 4"],
    "list": ["runs"],
    "diff": ["{run} runs/flow", "runs/flow runs/ddpm {run}"],
    "note": ["{run} words --tag a", "{run}"],
    "distill": ["{run} --steps 2 --batch 4 --points 2 --rank 2 --device cpu"],
    "completion": ["bash"],
}
FITTING = {"encode": "runs/stage", "rollout": "runs/policy", "finetune": "runs/policy", "reflow": "runs/ddpm"}


def prepare(folder: Path) -> None:
    """Make the small runs and files that the commands work on, in ``folder``, which becomes the working directory."""
    from PIL import Image  # lazy: not needed for configurations

    os.chdir(folder)
    (folder / "empty").mkdir()
    (folder / "file.txt").write_text("precious")
    for i in range(6):
        (folder / f"images/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * i, 20, 200)).save(folder / f"images/{'ab'[i % 2]}/{i}.png")
    for name, line in SETUP.items():
        code, output = run([*line.split(), f"--name={name}"], TIME_LIMIT)
        assert code == 0, f"{line}\n{output}"
        made = next(path for path in (folder / "runs").iterdir() if path.name.endswith(f"-{name}"))
        made.rename(folder / "runs" / name)


def run(argv: list[str], limit: float) -> tuple[int | None, str]:
    """Exit code and standard error of a command in a forked process; None if it was stopped at its limit of time."""
    errors = Path("stderr.txt").absolute()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)  # not a test's
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        code = 70
        try:
            code = genkit_main(argv)
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(bool(e.code))
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), errors.read_text(errors="replace")
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, errors.read_text(errors="replace")


def fuzz_commands(num: int, seed: int) -> Tally:
    """Run ``num`` generated commands in the working directory that :func:`prepare` has filled."""
    tally = Tally()
    names = list(TEMPLATES)
    for i in range(num):
        rng = random.Random(f"{seed}/command/{i}")
        name = rng.choice([*names, "train", "train", "train", "sample", "sample", "eval"])
        cls = load_object(COMMANDS[name].settings)
        fitting = FITTING.get(name, "runs/flow")
        base = rng.choice(TEMPLATES[name]).format(run=fitting if rng.random() < 0.5 else rng.choice(RUN)).split()
        try:
            blocks = {
                x[2:]: y for x, _, y in (word.partition("=") for word in base) if x[2:] in ("objective", "backbone")
            }
            flags = invent_flags(cls, rng, rng.randint(0, 2), {k: {"name": v} for k, v in blocks.items()})
        except ConfigError:
            flags = []
        flags = [flag for flag in flags if not re.match("--(out|config)", flag)]
        argv = [name, *base, *flags]
        before = {path.name for path in Path("runs").iterdir()}
        began = time.monotonic()
        code, errors = run(argv, TIME_LIMIT)
        line = shlex.join(argv)
        own = [text for text in errors.splitlines() if text.startswith("genkit: ")]
        if code is None:
            tally.fail("hang", line, errors)
        elif code not in (0, 1, 2, 130) or (code in (1, 2) and len(own) != 1) or "Traceback" in errors:
            tally.fail("traceback" if "Traceback" in errors else f"exit code {code}", line, errors)
        elif name == "train" and code == 2 and {path.name for path in Path("runs").iterdir()} - before:
            tally.fail("litter", line, errors)
        else:
            tally.counts[f"exit code {code}"] += 1
        if Path("file.txt").read_text() != "precious":
            tally.fail("file replaced", line, errors)
            Path("file.txt").write_text("precious")
        if os.environ.get("FUZZ_VERBOSE"):
            print(f"{i} {code} {time.monotonic() - began:.1f} s {line} | {own[-1] if own else ''}"[:300], flush=True)
    return tally


def main(argv: list[str] | None = None) -> int:
    """Run both campaigns. Returns the exit code."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--configurations", type=int, default=10_000)
    parser.add_argument("--commands", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts and failures to this file")
    options = parser.parse_args(argv)
    file = options.json and options.json.absolute()
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {"command": shlex.join(["python", "tools/fuzz.py", *(argv or sys.argv[1:])])}
    with tempfile.TemporaryDirectory() as folder:
        configurations = fuzz_configurations(options.configurations, options.seed, Path(folder))
        results["configurations"] = {"counts": dict(configurations.counts), "failures": configurations.failures}
        if options.commands:
            prepare(Path(folder))
            commands = fuzz_commands(options.commands, options.seed)
            results["commands"] = {"counts": dict(commands.counts), "failures": commands.failures}
        os.chdir(ROOT)
    failures = sum(len(part["failures"]) for part in results.values() if isinstance(part, dict))
    print(json.dumps({k: v["counts"] for k, v in results.items() if isinstance(v, dict)}, indent=1))
    if file:
        file.write_text(json.dumps(results, indent=1) + "\n")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
