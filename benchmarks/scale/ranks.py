"""Encoding and sampling on one and on two ranks: the same files and samples, and the CPU time of the slower rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import genkit
from benchmarks.scale.files import noise_picture

NETWORK = {"name": "unet", "width": 64, "mults": [1, 2]}


def measure_ranks(pictures: int = 512, samples: int = 256) -> list[dict[str, Any]]:
    """A row for each of encoding and sampling."""
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), pictures)
        found = {num: run_on_ranks(num, run, Path(folder) / f"on-{num}", samples) for num in (1, 2)}
    rows = []
    for what in ("encode", "sample"):
        one, two = ([rank[what] for rank in found[num]] for num in (1, 2))
        seconds = [max(r["seconds"] for r in ranks) for ranks in (one, two)]
        same = one[0]["digest"] == two[0]["digest"]
        rows.append({"what": what, "one_rank_s": seconds[0], "two_ranks_s": seconds[1],
                     "ratio": seconds[0] / seconds[1], "identical": same})  # fmt: skip
    return rows


def make_run(folder: Path, pictures: int) -> Path:
    """A VAE of pictures of 64x64, hardly trained: encoding and sampling cost as much as later."""
    (folder / "pictures").mkdir()
    for i in range(pictures):
        noise_picture(i, (64, 64)).save(folder / "pictures" / f"{i}.png")
    trained = genkit.train(
        objective={"name": "vae", "latent": [4, 32, 32]}, backbone=NETWORK, steps=1, batch=8, device="cpu",
        data={"name": "folder", "root": str(folder / "pictures"), "size": 64, "held_out": 0}, out=str(folder / "runs"),
        sample_every=0, tensorboard=False,
    )  # fmt: skip
    return trained.directory


def run_on_ranks(num: int, run: Path, out: Path, samples: int) -> list[dict[str, Any]]:
    """What each of ``num`` ranks measured."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}"]
    command += ["-m", "benchmarks.scale.one_rank", str(run), str(out), str(samples)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(num)]
