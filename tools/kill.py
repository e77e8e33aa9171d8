"""Kill training at random moments, resume it, and compare the result with a run that was never killed.

    python tools/kill.py [--kills 200] [--stops 20] [--power-cuts 20] [--seed 0] [--json FILE]

Each chain trains one small workload. It is killed (SIGKILL) up to four times, at random moments or while a temporary
file exists, and resumed each time with `--resume auto`; then it runs to its end. Weights, averages, optimizer state and
the log without clocks must be bit-identical to the uninterrupted run. `--stops` sends SIGTERM instead, which must end
with exit code 130 and no traceback. `--power-cuts` also damages what a rename without a sync may leave behind: before
resuming, a file of the newest checkpoint, or the log, is cut or emptied. Exit code: 1 if a chain differs. Every run of
genkit is a fork of this process, so that imports are paid once.
"""

from __future__ import annotations

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
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sklearn.datasets  # noqa: F401  # of the digits: imported before the forks
import torch
from safetensors.torch import load_file

from genkit.cli.main import main as genkit_main
from genkit.cli.scripts import ScriptParser
from genkit.core import pictures
from genkit.training.checkpoint import find_checkpoint
from genkit.training.directory import find_run, list_checkpoints, read_log, step_of

STEPS = 60
SMALL = (
    f"--backbone=mlp --backbone.width 24 --batch 32 --steps {STEPS} --save-every 7 --log-every 5 --workers 0 "
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
            code = genkit_main(["train", *SMALL.split(), *arguments.split(), f"--out={out}"])
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


def strike(pid: int, out: Path, rng: random.Random, span: float, number: int) -> str | None:
    """Send a signal at a random moment of ``span`` seconds, or when a temporary file appears after it.

    Returns where the process was; None if it had ended. Raises ``AssertionError`` if SIGTERM did not end it as it
    should.
    """
    if wait(pid, rng.uniform(0, span)) is not None:
        return None
    if rng.random() < 0.3:
        end = time.monotonic() + span
        while time.monotonic() < end and not list(out.glob("*/checkpoints/.*.part")):
            if wait(pid, 0.001) is not None:
                return None
    os.kill(pid, number)
    code = wait(pid, 60)
    if number == signal.SIGTERM:
        log = out.with_suffix(".log").read_text()
        assert code in (0, 130), f"SIGTERM: exit code {code}\n{log}"
        assert "Traceback" not in log, log
        return "SIGTERM, " + ("after the last step" if code == 0 else "stopped with exit code 130")
    return place_of(out, pid)


def place_of(out: Path, pid: int) -> str:
    """Where a killed process was, judged by what it left: temporary files have its number in their names."""
    runs = [p for p in out.glob("*-*") if (p / ".lock-owner").is_file()] if out.is_dir() else []
    owned = [p for p in runs if f"process {pid} " in (p / ".lock-owner").read_text()]
    if not owned:
        return "while starting, before it wrote into the run"
    run, saved = owned[-1], list_checkpoints(owned[-1])
    if [*run.glob(f"checkpoints/.*-{pid}-*.part"), *run.glob(f"checkpoints/.*-{pid}-*.gone")]:
        return "while a checkpoint was written or removed"
    if list(run.glob(f".*-{pid}*")):
        return "while another file was written"
    if not saved:
        return "before the first checkpoint"
    return "after the last checkpoint" if step_of(saved[-1]) == STEPS else "between two checkpoints"


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
    run = find_run(out / "latest")
    tensors = {f"{p.name}/{k}": v for p in find_checkpoint(run).glob("*.safetensors") for k, v in load_file(p).items()}
    return tensors, [{k: v for k, v in r.items() if k not in CLOCKS} for r in read_log(run)]


class Campaign:
    """Chains of killed runs of all workloads, and what is counted of them."""

    def __init__(self, root: Path, seed: int, kills: int, stops: int, power_cuts: int):
        self.root, self.rng = root, random.Random(seed)
        self.left = {signal.SIGKILL: kills, signal.SIGTERM: stops}
        self.cuts_left = power_cuts
        self.counts, self.places, self.cuts, self.kills = Counter(), Counter(), Counter(), Counter()
        self.references, self.spans = {}, {}

    def run(self) -> None:
        """Uninterrupted runs, then chains until all kills, stops and cuts have been made."""
        for name, arguments in WORKLOADS.items():
            began = time.monotonic()
            assert wait(start(arguments, self.root / name), 120) == 0, name
            self.references[name], self.spans[name] = results(self.root / name), time.monotonic() - began
        while any(self.left.values()):
            name = [*WORKLOADS][self.counts["chains"] % len(WORKLOADS)]
            out = self.root / f"chain{self.counts['chains']}"
            log_is_damaged = self.interrupt(name, out)
            self.finish(name, out, log_is_damaged)
            shutil.rmtree(out, ignore_errors=True)

    def interrupt(self, name: str, out: Path) -> bool:
        """Start and interrupt a workload up to four times; whether its log was damaged."""
        damaged = False
        for _ in range(self.rng.randint(1, 4)):
            number = self.rng.choices([*self.left], [*self.left.values()])[0] if any(self.left.values()) else None
            if number is None:
                break
            place = strike(start(WORKLOADS[name], out), out, self.rng, self.spans[name], number)
            if place is None:
                continue
            self.left[number] -= 1
            self.places[place] += 1
            self.kills[name] += number == signal.SIGKILL
            if self.cuts_left and self.rng.random() < 0.5 and (cut := cut_power(out, self.rng)):
                self.cuts_left -= 1
                self.cuts[cut] += 1
                damaged |= cut == "log.jsonl"
        return damaged

    def finish(self, name: str, out: Path, log_is_damaged: bool) -> None:
        """Resume for the last time, and compare with the uninterrupted run."""
        saved = {p.name for p in out.glob("*-*") if list_checkpoints(p)}
        code = wait(start(WORKLOADS[name], out), 120)
        tensors, log = results(out) if code == 0 else ({}, [])
        expected, expected_log = self.references[name]
        same = tensors.keys() == expected.keys() and all(tensors[k].equal(expected[k]) for k in expected)
        same_log = log == expected_log or log_is_damaged
        lost = saved and (code != 0 or find_run(out / "latest").name not in saved)
        self.counts["chains"] += 1
        self.counts["weights_equal"] += same
        self.counts["logs_equal"] += same_log
        self.counts["lost_runs"] += bool(lost)
        if not same or not same_log or lost:
            print(f"chain {self.counts['chains']} ({name}): exit code {code}, weights {'equal' if same else 'DIFFER'}, "
                  f"log {'equal' if same_log else 'DIFFERS'}{', run LOST' if lost else ''}", flush=True)  # fmt: skip
            print("  " + "\n  ".join(out.with_suffix(".log").read_text().splitlines()[-8:]), flush=True)
        if self.counts["chains"] % 10 == 0:
            print(f"{self.counts['chains']} chains, {sum(self.kills.values())} kills", flush=True)

    def summary(self) -> dict[str, Any]:
        """All counts, ready for JSON."""
        keys = ("chains", "weights_equal", "logs_equal", "lost_runs")
        return {
            **{k: self.counts[k] for k in keys},
            "kills": sum(self.kills.values()),
            "places": dict(self.places.most_common()),
            "workloads": dict(self.kills.most_common()),
            "power_cuts": dict(self.cuts.most_common()),
        }


def main() -> int:
    """Run all chains. Returns the exit code: 1 if one differs from its uninterrupted run."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--power-cuts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pictures.plot_loss = lambda records, path: path  # most of the time of these tiny runs
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), args.seed, args.kills, args.stops, args.power_cuts)
        campaign.run()
    summary = {"seed": args.seed, "minutes": round((time.monotonic() - began) / 60, 1), **campaign.summary()}
    print(json.dumps(summary))
    if args.json:
        args.json.write_text(json.dumps({"command": "python " + " ".join(sys.argv), **summary}, indent=1) + "\n")
    counts = campaign.counts
    return int(min(counts["weights_equal"], counts["logs_equal"]) < counts["chains"] or counts["lost_runs"] > 0)


if __name__ == "__main__":
    sys.exit(main())
