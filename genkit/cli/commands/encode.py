"""`genkit encode RUN`: the latents of a data set, cached; and what training on latents begins with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from tyro.conf import Positional

from genkit import config
from genkit.config import parse, table
from genkit.config.blocks import find_name
from genkit.core import Data, Draw, spec_to_dict
from genkit.core.device import pick_device
from genkit.core.tensors import sha256
from genkit.data import DATA as SOURCES
from genkit.data import InLatents
from genkit.data.latents import INDEX, is_shard, read_index, read_shard, write_index, write_shard
from genkit.objectives.autoencoders.autoencoder import Posterior
from genkit.training import first_stage as latents
from genkit.training.directory import find_run
from genkit.training.first_stage import Stage, statistics
from genkit.training.run import load_run, open_first_stage

console = Console(highlight=False, soft_wrap=True)
Count = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class Same:
    """The data that the run was trained on."""


DATA: dict[str, type] = {"same": Same, **SOURCES}


@dataclass(frozen=True)
class Encode:
    """Cache the latents of a data set."""

    run: Positional[str]
    """A run with a code (of vae, ae, vq or autoencoder), such as runs/latest; or diffusers:DIR."""
    data: Any = table("genkit.cli.commands.encode:DATA", "same", fallback="genkit.data:find_source")
    """What is encoded: a NAME, or a path to a folder of images."""
    split: Literal["train", "test"] = "train"
    """Which samples; both may lie in one folder."""
    out: str | None = None
    """The folder; None: latents in the run's folder."""
    shard: Count = 4096
    """Samples of a file. Files that are there already are kept: a run that was stopped goes on."""
    batch: Count = 256
    """Samples at a time."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""


def main(argv: list[str]) -> int:
    asked = parse(Encode, argv, prog="genkit encode", description="Cache the latents of a data set.")
    foreign = asked.run.partition(":")[0] in latents.OPEN
    if foreign and (isinstance(asked.data, Same) or not asked.out):
        raise ValueError(f"encode: {asked.run} is no run, and has no data or folder of its own; give --data and --out")
    source = load_run(asked.run, device="cpu").config.data if isinstance(asked.data, Same) else asked.data
    out = Path(asked.out) if asked.out else find_run(asked.run) / "latents"
    n, made = encode(source, out, asked, pick_device(asked.device))
    console.print(f"{n} samples of {asked.split}, {made} files written  {out}", markup=False)
    console.print(f"next  genkit train --objective=flow --backbone=dit --data=latents --data.root {out}", markup=False)
    return 0


def encode(source: Any, out: Path, asked: Encode, device: torch.device) -> tuple[int, int]:
    """Make the shards that are missing; how many samples there are, and how many files were made now."""
    data, kinds = source.load(asked.split), {"table": "genkit.data:DATA"}
    if isinstance(data, InLatents):
        raise ValueError(f"data: {out} would be latents of latents; name the samples themselves")
    stage = open_first_stage(asked.run, data.spec.shape, device)
    about: dict[str, Any] = {"stage": {**stage.about(), "sha256": stage.sha256}, "data": {
        "name": find_name(kinds, type(source)), **config.dump(source)}, "splits": {}}  # fmt: skip
    if (out / INDEX).is_file():
        found = read_index(out)
        for what, given in json.loads(json.dumps(about)).items():
            if what != "splits" and {**found[what], "run": None} != {**given, "run": None}:
                raise ValueError(f"{out}: holds latents of another {what}; name another folder with --out")
        about = found
    else:
        stage.write(out / "codec")
        write_index(out, about)
    views = 1 + int(source.random_flip)
    starts, made, shards = range(0, len(data), asked.shard), 0, {}
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("encoding", total=len(data))
        for k, first in enumerate(starts):
            last = min(first + asked.shard, len(data))
            path = out / f"{asked.split}-{k:05d}-of-{len(starts):05d}.safetensors"
            mark = {"rows": f"{first}-{last}", "views": str(views), "sha256": stage.sha256}
            if not is_shard(path, mark):
                write_shard(path, moments(stage, data, range(first, last), views, asked.batch, device), mark)
                made += 1
            shards[path.name] = sha256(path)
            bar.update(task, completed=last)
    spec = replace(data.spec, shape=tuple(stage.latent))
    measured = statistics(posterior(read_shard(out / name)) for name in shards)
    about["splits"][asked.split] = {
        "n": len(data), "views": views, "spec": spec_to_dict(spec), "shards": shards, "statistics": measured.to_dict(),
    }  # fmt: skip
    write_index(out, about)
    return len(data), made


def posterior(shard: Mapping[str, Tensor]) -> Posterior:
    mean = shard["mean"].flatten(0, 1)
    log_var = shard["log_var"].flatten(0, 1) if "log_var" in shard else torch.full_like(mean, -torch.inf)
    return Posterior(mean, log_var)


class Fixed(Draw):
    """Random numbers of an augmentation that mirrors every picture, or none, and draws all else."""

    def __init__(self, rows: range, number: float):
        super().__init__((0,), rows.start, rows.stop)
        self.number = number

    def uniform(self, *shape: int) -> Tensor:
        return super().uniform(*shape) if shape else torch.full((self.stop - self.start,), self.number)


def moments(
    stage: Stage, data: Data, rows: range, views: int, batch: int, device: torch.device
) -> dict[str, Tensor]:  # fmt: skip
    """The content of one shard."""
    found: list[dict[str, Tensor]] = []
    for first in range(rows.start, rows.stop, batch):
        here = range(first, min(first + batch, rows.stop))
        seen = [data.batch(torch.tensor(here), Fixed(here, number)) for number in (1.0, 0.0)[:views]]
        with torch.no_grad():
            each = [stage.posterior(replace(b.to(device), draw=Draw((0,), here.start, here.stop, device)))
                    for b in seen]  # fmt: skip
        part = {"mean": torch.stack([q.mean for q in each], 1), "log_var": torch.stack([q.log_var for q in each], 1)}
        found.append({k: v.float().cpu() for k, v in part.items()} | {f"cond.{k}": v for k, v in seen[0].cond.items()})
    out = {k: torch.cat([part[k] for part in found]) for k in found[0]}
    if bool((out["log_var"] == -torch.inf).all()):
        del out["log_var"]
    for name, value in out.items():
        if value.is_floating_point() and bool(torch.isnan(value).any()):
            raise ValueError(f"codec: {stage.name} gives a {name} that is not a number; the run has diverged")
    return out
