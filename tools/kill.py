"""Kill training at random moments, resume it, and compare the result with a run that was never killed.

    python tools/kill.py [--kills 200] [--seed 0] [--power-cuts 20] [--json FILE]

Each chain trains one small workload. It is killed (SIGKILL) up to four times, at random moments or while a temporary
file exists, and resumed each time with `--resume auto`; then it runs to its end. Weights, averages, optimizer state and
the log without clocks must be bit-identical to the uninterrupted run. `--power-cuts` also damages what a rename without
a sync may leave behind: before resuming, a file of the newest checkpoint, or the log, is cut or emptied. Exit code: 1
if a chain differs. Every run of genkit is a fork of this process, so that imports are paid once.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file

from genkit.cli.main import main as genkit
from genkit.core import pictures
from genkit.training.checkpoint import find_checkpoint, list_checkpoints
from genkit.training.directory import read_log

SMALL = (
    "--backbone=mlp --backbone.width 24 --batch 32 --steps 60 --save-every 7 --log-every 5 --workers 0 "
    "--device cpu --sample-every 0 --no-tensorboard --resume auto"
)
WORKLOADS = {
    "flow": "--objective=flow --data=moons --data.n=512",
    "two averages, micro-batches, dropout": "--objective=flow --data=moons --data.n=512 --ema 0.9 0.99 "
    "--micro-batch 24 --backbone.dropout 0.1",
    "loss-aware times": "--objective=flow --data=moons --data.n=512 --objective.time-distribution=loss-aware",
    "gan": "--objective=gan --data=8gaussians",
    "vae": "--objective=vae --data=digits",
    "vq": "--objective=vq --data=digits",
}
CLOCKS = ("seconds", "samples_per_s")


def start(arguments: str, out: Path) -> int:
    """Fork a process that trains; its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        try:
            code = genkit(["train", *SMALL.split(), *arguments.split(), f"--out={out}"])
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            sys.stdout.flush()
            os._exit(code)
    return pid


def wait(pid: int, seconds: float) -> int | None:
    """The exit code, or None if the process still runs after ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


def kill_somewhere(pid: int, out: Path, rng: random.Random, span: float) -> bool:
    """Kill the process at a random moment of ``span`` seconds, or when a temporary file appears after it."""
    if wait(pid, rng.uniform(0, span)) is not None:
        return False
    if rng.random() < 0.5:
        end = time.monotonic() + span
        while time.monotonic() < end and not list(out.glob("*/checkpoints/.*.part")):
            if wait(pid, 0.001) is not None:
                return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def cut_power(out: Path, rng: random.Random) -> str | None:
    """Truncate one file of the newest checkpoint, or the log, as an unsynced rename would leave it."""
    runs = [p for p in out.glob("*-*") if not p.is_symlink() and list_checkpoints(p)]
    if not runs:
        return None
    newest = list_checkpoints(runs[-1])[-1]
    path = rng.choice([*newest.iterdir(), runs[-1] / "log.jsonl"])
    if path.is_file():
        content = path.read_bytes()
        path.write_bytes(content[: rng.choice([0, len(content) // 2])])
    return path.name


def results(out: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """All tensors of the last checkpoint, and the log without clocks."""
    run = (out / "latest").resolve()
    tensors = {f"{p.name}/{k}": v for p in find_checkpoint(run).glob("*.safetensors") for k, v in load_file(p).items()}
    return tensors, [{k: v for k, v in r.items() if k not in CLOCKS} for r in read_log(run)]


def main() -> int:
    """Run all chains. Returns the exit code: 1 if one differs from its uninterrupted run."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--power-cuts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pictures.plot_loss = lambda records, path: path  # most of the time of these tiny runs
    rng, counts, cuts = random.Random(args.seed), Counter(), Counter()
    with tempfile.TemporaryDirectory() as folder:
        root, references, spans = Path(folder), {}, {}
        for name, arguments in WORKLOADS.items():
            began = time.monotonic()
            assert wait(start(arguments, root / name), 120) == 0, name
            references[name], spans[name] = results(root / name), time.monotonic() - began
        while counts["kills"] < args.kills:
            name = rng.choice(list(WORKLOADS))
            out = root / f"chain{counts['chains']}"
            damaged = False
            for _ in range(rng.randint(1, 4)):
                counts["kills"] += kill_somewhere(start(WORKLOADS[name], out), out, rng, spans[name])
                if sum(cuts.values()) < args.power_cuts and rng.random() < 0.5 and (cut := cut_power(out, rng)):
                    cuts[cut] += 1
                    damaged |= cut == "log.jsonl"
            code = wait(start(WORKLOADS[name], out), 120)
            tensors, log = results(out) if code == 0 else ({}, [])
            expected, expected_log = references[name]
            same = tensors.keys() == expected.keys() and all(tensors[k].equal(expected[k]) for k in expected)
            counts["chains"] += 1
            counts["weights equal"] += same
            counts["logs equal"] += log == expected_log or damaged
            if not same or (log != expected_log and not damaged):
                print(f"chain {counts['chains']} ({name}): exit code {code}, weights {'equal' if same else 'DIFFER'}, "
                      f"log {'equal' if log == expected_log else 'DIFFERS'}", flush=True)  # fmt: skip
                print("  " + "\n  ".join(out.with_suffix(".log").read_text().splitlines()[-8:]), flush=True)
            shutil.rmtree(out, ignore_errors=True)
    summary = {"seed": args.seed, **counts, "power_cuts": dict(cuts)}
    print(json.dumps(summary))
    if args.json:
        args.json.write_text(json.dumps({"command": "python " + " ".join(sys.argv), **summary}, indent=1) + "\n")
    return int(counts["weights equal"] < counts["chains"] or counts["logs equal"] < counts["chains"])


if __name__ == "__main__":
    sys.exit(main())
