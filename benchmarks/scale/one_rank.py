"""One of the ranks of :mod:`benchmarks.scale.ranks`: python -m benchmarks.scale.one_rank RUN OUT SAMPLES."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path

import torch

import genkit
from genkit.training.distributed import join_ranks
from genkit.training.ranks import Ranks


def measure_rank(run: Path, out: Path, samples: int) -> None:
    """On each rank: encode and sample, and write CPU seconds and digests."""
    torch.set_num_threads(1)
    ranks = Ranks.of(join_ranks(torch.device("cpu")))
    opened = genkit.load(run, device="cpu")
    begun = time.process_time()
    genkit.encode(str(run), out=out / "latents", shard=32, batch=16, device="cpu", workers=1)
    encoded = time.process_time()
    drawn = opened.sample(samples, batch=8, ranks=ranks)
    seconds = {"encode": encoded - begun, "sample": time.process_time() - encoded}
    files = b"".join(path.read_bytes() for path in sorted((out / "latents").glob("*.safetensors")))
    contents = {"encode": files, "sample": drawn.x.numpy().tobytes()}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    result = {name: {"seconds": seconds[name], "digest": digests[name]} for name in seconds}
    (out / f"{ranks.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    measure_rank(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
