"""Show what a change alters: run genkit on two trees and print every difference.

    python tools/same.py BASE            # this checkout against another commit: HEAD~1, a tag, a branch
    python tools/same.py --record FILE   # run this checkout alone and write its results

Both trees run the same small experiments (every family, latents, a policy, fine-tuning, guided sampling, an evaluation
card) and the same wrong command lines, on one thread each. Compared are the SHA-256 of every tensor in every safetensors
file (weights, averages, optimizer state), of the samples, the cards, the configurations, the logs without clocks, and the
exit code and last error line of each wrong command. A tree that has this script runs its own command lines, so an option
that is renamed on purpose does not stop the comparison. Exit code: 0 if nothing differs, 1 if something does.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = "--steps 6 --batch 16 --workers 0 --no-tensorboard --sample-every 6 --device cpu --log-every 2"
MLP, UNET = "--backbone=mlp --backbone.width 16", "--backbone.width 8 --backbone.mults 1 2"
DIT = "--backbone=dit --backbone.width 16 --backbone.depth 1 --backbone.head-size 8"

RUNS = [  # the directory that a `train` line makes is runs/NNNN-NAME, numbered in this order
    f"train {TINY} --name flow --objective=flow --data=digits {UNET}",
    f"train {TINY} --name ddpm --objective=ddpm --objective.learn-variance --data=digits {DIT} --micro-batch 4",
    f"train {TINY} --name edm --objective=edm --data=moons --backbone.width 16 --ema 0.9 0.99",
    f"train {TINY} --name vae --objective=vae --data=digits {MLP}",
    f"train {TINY} --name gan --objective=gan --data=digits {UNET}",
    f"train {TINY} --name stage --objective=autoencoder --data=digits --data.labels=false --objective.latent 4 4 4 {MLP}",
    f"train {TINY} --name latent --objective=flow --codec runs/0005-stage --data=digits --data.labels=false {DIT} --backbone.patch 1",
    f"train {TINY} --name policy --objective=flow --data=four-ways --data.n 20 --backbone.width 16",
    f"train {TINY} --name vq --objective=vq --data=digits {UNET}",
    f"train {TINY} --name anchored --objective=anchored --data=four-ways --data.anchors 4 --data.n 20 --backbone.width 16",
    "train --resume runs/0002-edm --steps 9",
    "finetune runs/0007-policy --num-envs 4 --num-steps 2 --eval-episodes 4 --iterations 4 --method.warmup 0 --name tuned",
    "finetune runs/0000-flow --reward genkit.rl.finetune.image_rewards:brightness --method=ddpo --exploration-noise=sde --steps 3 --samples 16 --method.batch 16 --iterations 3 --eval-samples 0 --name bright",
    "sample runs/0000-flow --n 8 --label 3 --guidance 2 --sampler dpmpp_2m --format npz --out guided.npz",
    "sample runs/0001-ddpm --n 4 --sampler ancestral --steps 5 --format npz --out ancestral.npz",
    "sample runs/0006-latent --n 4 --sampler heun --steps 5 --format npz --out latent.npz",
    "sample runs/0004-gan --n 4 --format npz --out gan.npz",
    "eval runs/0002-edm --n 40 --metrics w2,mmd --out card.json",
    "eval runs/0000-flow --n 64 --metrics fid,prdc --features raw --steps 4 --out card-digits.json",
    "likelihood runs/0002-edm --n 16 --steps 8 --json",
    "rollout runs/0007-policy --episodes 4 --out rollout",
    "report runs/0003-vae",
    "encode runs/0005-stage --out latents",
    "reflow runs/0002-edm --n 32 --steps 2",
    "sweep runs/0002-edm --steps 2 4 --n 40 --confirm-n 50",
]  # fmt: skip

REFUSED = [
    "trian",
    "train --objective=flwo",
    "train --objective.time-distribution.std 2 --objective=ddpm",
    "train --backbone=mlp --data=digits --backbone.depht 2",
    "train --steps -1",
    "train --batch x",
    "train --data=nowhere",
    "train --data=digits --data.size 0",
    "train --objective=edm --objective.prediction eps",
    "train --config missing.yaml",
    "train --resume runs/missing",
    "train --init runs/missing",
    "train --objective=distillation",
    "train --steps",
    "sample runs/missing",
    "sample runs/0000-flow --label 12",
    "sample runs/0000-flow --sampler heum",
    "sample runs/0004-gan --steps 5",
    "sample runs/0002-edm --guidance-passes apart",
    "sample runs/0002-edm --format png",
    "sample runs/0000-flow --step 5",
    "eval runs/0000-flow --metrics fidd",
    "eval runs/missing",
    "sweep runs/0004-gan --steps 5",
    "finetune runs/0000-flow",
    "rollout runs/0000-flow",
    "export runs/0000-flow --to nothing x",
    "bench nothing",
    "report runs/missing",
    "likelihood runs/0004-gan",
]

CLOCKS = re.compile(r"second|per_s|time|took|memory|ms_per|latency")
UNSTABLE = {"genkit", "git", "cwd", "date", "created", "host", "torch", "versions", "cpu", "threads"}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def without_clocks(value: object) -> object:
    """A JSON value without the entries that differ from run to run."""
    if isinstance(value, dict):
        return {k: without_clocks(v) for k, v in value.items() if not CLOCKS.search(k) and k not in UNSTABLE}
    return [without_clocks(v) for v in value] if isinstance(value, list) else value


def call(line: str) -> tuple[int, str, str]:
    """Exit code, last line on stderr and standard output of one `genkit` command, run in this process."""
    try:
        from genkit.cli.main import main
    except ImportError:  # a tree from before 2026-11-25
        from genkit.cli import main  # type: ignore[no-redef]

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(line.split())
        except SystemExit as e:
            code = int(e.code or 0)
        except Exception as e:  # a traceback that a user would see; the gate shows it rather than stopping
            code, err = 1, io.StringIO(f"{type(e).__name__}: {e}")
    lines = err.getvalue().strip().splitlines()
    return code, lines[-1] if lines else "", out.getvalue()


def record(folder: Path) -> dict[str, object]:
    """Everything that is compared, by a name: run all command lines in ``folder``."""
    import numpy as np
    from safetensors import safe_open

    os.chdir(folder)
    results: dict[str, object] = {}
    for line in RUNS:
        code, error, output = call(line)
        results[f"run: {line}"] = f"exit {code}" + (f" {error}" if code else "")
        if "--json" in line and not code:
            results[f"output: {line}"] = without_clocks(json.loads(output))
    for path in sorted(folder.rglob("*.safetensors")):
        if path.parent.parent.is_symlink() or path.parent.is_symlink():
            continue
        with safe_open(path, "pt") as f:
            for key in f.keys():  # noqa: SIM118  # not a mapping
                value = f.get_tensor(key).contiguous()
                content = f"{value.dtype}{tuple(value.shape)}".encode() + value.view(-1).numpy().tobytes()
                results[f"{path.relative_to(folder)}: {key}"] = digest(content)
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            for key in arrays:
                results[f"{path.name}: {key}"] = digest(arrays[key].tobytes())
    for path in sorted(
        [
            p
            for p in [*folder.glob("*.json"), *folder.glob("rollout/*.json"), *folder.glob("runs/*/*.json")]
            if p.name != "env.json"
        ]
    ):
        for key, value in dict(without_clocks(json.loads(path.read_text()))).items():  # type: ignore[call-overload]
            results[f"{path.relative_to(folder)}: {key}"] = value
    for path in sorted(folder.glob("runs/*/log.jsonl")):
        for i, row in enumerate(path.read_text().splitlines()):
            results[f"{path.relative_to(folder)}: {i}"] = without_clocks(json.loads(row))
    for path in sorted([*folder.glob("runs/*/config.yaml"), *folder.glob("runs/*/finetune.yaml")]):
        results[str(path.relative_to(folder))] = path.read_text().splitlines()
    for line in REFUSED:
        results[f"refused: {line}"] = call(line)[:2]
    return json.loads(json.dumps(results).replace(str(folder), "."))


def run(tree: Path, script: Path) -> subprocess.Popen[str]:
    """Start the experiments of ``tree``; the results go to standard output."""
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "COLUMNS": "200"}
    command = [sys.executable, str(script), "--record", "-"]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)


def show(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 300 else text[:300] + " ..."


def compare(base: str) -> int:
    """Run ``base`` and this checkout, print what differs, and return how many entries do."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["git", "worktree", "add", "-q", "--detach", folder, base], cwd=ROOT, check=True)
        try:
            theirs = Path(folder) / "tools" / "same.py"
            started = [run(Path(folder), theirs if theirs.is_file() else Path(__file__)), run(ROOT, Path(__file__))]
            before, after = (json.loads(process.communicate()[0]) for process in started)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)
    keys = [k for k in [*before, *(k for k in after if k not in before)] if before.get(k) != after.get(k)]
    for key in keys:
        print(f"{key}\n  - {show(before.get(key))}\n  + {show(after.get(key))}")
    failed = [key for key, value in after.items() if key.startswith("run: ") and value != "exit 0"]
    for key in failed:
        print(f"{key}: {after[key]}")
    print(f"{len(after)} entries compared with {base}; {len(keys)} differ, {len(failed)} runs failed")
    return len(keys) + len(failed)


def main() -> int:
    if len(sys.argv) == 3 and sys.argv[1] == "--record":
        with tempfile.TemporaryDirectory() as folder:
            results = json.dumps(record(Path(folder).resolve()), indent=1)
            os.chdir(ROOT)
        print(results) if sys.argv[2] == "-" else Path(sys.argv[2]).write_text(results + "\n")
        return 0
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    return int(compare(sys.argv[1]) > 0)


if __name__ == "__main__":
    sys.exit(main())
