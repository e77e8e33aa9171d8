"""`genkit eval`: samples of a run, or of a folder, measured against a reference; the card that says all about it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from genkit import config
from genkit.config import narrow, parse
from genkit.core.device import pick_device
from genkit.evaluation import (
    Drawn,
    Given,
    Named,
    Ranks,
    Rebuilt,
    cards,
    data_of,
    find_data,
    is_picture,
    is_stats,
    named,
    ruler,
    weights_sha256,
)
from genkit.evaluation.settings import Evaluate
from genkit.evaluation.sources import SPLITS, Samples
from genkit.training.distributed import join_ranks, missing_ranks, start_ranks
from genkit.training.run import Run, load_run
from genkit.training.sampling import LoadOptions, Sampling

console = Console(highlight=False, soft_wrap=True, stderr=True)
HOW = [f.name for f in fields(Sampling) if f.name not in ("seed", "batch")]
EVERYWHERE = ("batch", "device")  # settings of sampling that measuring stored samples has a use for too
OF_RUN = (Drawn, Rebuilt)
PICTURES, VECTORS = 10_000, 2_000  # samples of a run, if nothing is said


def main(argv: list[str]) -> int:
    if (num := missing_ranks()) > 1:
        start_ranks(num, "eval", argv)
    asked = parse(Evaluate, argv, prog="genkit eval", description=Evaluate.__doc__)
    if asked.compare:
        return compare(asked)
    return together(asked.device, lambda accelerator, ranks: evaluate(asked, accelerator, ranks))


def together(device: str, work: Callable[[Accelerator, Ranks], int]) -> int:
    """``work`` on every rank; the exit code. What they all refuse, the main one says."""
    accelerator = join_ranks(pick_device(device))
    ranks = Ranks.of(accelerator)
    try:
        return work(accelerator, ranks)
    except (ValueError, OSError):
        if ranks.main:
            raise
        return 2


def evaluate(asked: Evaluate, accelerator: Accelerator, ranks: Ranks) -> int:
    if not 1 <= len(asked.what) <= 2 or (len(asked.what) == 2 and asked.reference):
        raise ValueError(f"eval: given {' '.join(asked.what) or 'nothing'}; needs RUN, or A B, or A --reference B")
    if asked.save_stats and not asked.save_stats.endswith(".npz"):
        raise ValueError(f"save_stats: given {asked.save_stats}; needs a name that ends in .npz")
    metrics = named(asked.metrics) if asked.metrics is not None else None
    with accelerator.main_process_first():
        samples = opened(asked, accelerator.device)
        against = reference_of(asked.reference or "".join(asked.what[1:]), samples, asked.data)
    if metrics is None and against is None and asked.save_stats:
        metrics = {}
    n = asked.n or samples.limit or (PICTURES if is_picture(samples.spec) else VECTORS)
    if samples.limit is not None and n > samples.limit:
        raise ValueError(f"n: given {n}, but {samples.name} holds {samples.limit} samples; take --n {samples.limit}")
    with bar("reference", ranks) as progress:
        held = ruler(
            samples,
            against,
            metrics,
            asked.features,
            mode=asked.mode,
            weights=asked.weights,
            settings=asked.settings,
            reference_n=asked.reference_n or (None if is_picture(samples.spec) else max(n, VECTORS)),
            batch=asked.batch,
            device=accelerator.device,
            ranks=ranks,
            progress=progress,
        )
    with bar("samples", ranks, n) as progress:
        found = held.look(samples, n, progress)
    card = ranks.once(lambda: held.card(samples, n, found))
    if not ranks.main:
        return 0
    if asked.save_stats:
        Path(asked.save_stats).expanduser().parent.mkdir(parents=True, exist_ok=True)
        found.measured.moments.save(Path(asked.save_stats).expanduser())
    out = destination(asked, samples, card)
    if out:
        cards.write(card, out)
    if asked.json:
        print(json.dumps(card, allow_nan=False))
        return 0
    show(card)
    for path in (asked.save_stats, out):
        if path:
            print(path)
    return 0


# ------------------------------------------------------------------------------------------------ what is measured
def is_run(name: str) -> bool:
    return (Path(name).expanduser() / "config.yaml").is_file()


def opened(asked: Evaluate, device: torch.device) -> Samples:
    """A run to draw from, or samples that exist."""
    name = asked.what[0]
    if is_run(name):
        run = load_run(Path(name).expanduser(), ema=asked.ema, step=asked.step, device=device.type)
        if run.config.threads:
            torch.set_num_threads(run.config.threads)
        if not asked.rebuild:
            return draw(run, asked)
        unchanged(asked, (*EVERYWHERE, "ema", "step"), "reconstructions")
        return Rebuilt(run, data_of(run, asked.rebuild, asked.data), weights_sha256(run))
    unchanged(asked, EVERYWHERE, f"samples that exist; {name} is not a run")
    if asked.rebuild:
        raise ValueError(f"rebuild: needs a run with a code; {name} is not a run")
    try:
        return find_data(name, asked.data)
    except ValueError as e:
        raise ValueError(f"{e}, or a run that genkit train wrote" if "is unknown" in str(e) else str(e)) from e


USUAL = config.dump(Evaluate())


def unchanged(asked: Evaluate, but: Sequence[str], what: str) -> None:
    """``ValueError`` for a setting of sampling that has no effect on ``what``."""
    for f in [*fields(Sampling), *fields(LoadOptions)]:
        if f.name not in but and config.dump(asked)[f.name] != USUAL[f.name]:
            raise ValueError(f"{f.name}: has no effect on {what}")


def draw(run: Run, asked: Sampling, sha256: str | None = None) -> Drawn:
    """Samples of a run, as asked; ``sha256`` of its weights where these are not in a file."""
    tree = config.dump(asked)
    sampling = narrow(asked, Sampling)
    how = {"sampling": sampling, **run.open_references(sampling)}
    return Drawn(run, how, asked.seed, sha256 or weights_sha256(run), {k: tree[k] for k in HOW})


def reference_of(name: str, samples: Samples, options: Named) -> Given | Path | None:
    """What is measured against: for a run its own training split, if nothing is said."""
    if isinstance(samples, OF_RUN) and (not name or name in SPLITS):
        return data_of(samples.run, name or "train", options)
    if not name:
        return None
    if name in SPLITS:
        raise ValueError(f"reference: given {name}, a split of a run's data, but {samples.name} is not a run")
    if is_stats(Path(name).expanduser()):
        return Path(name).expanduser()
    return find_data(name, options)


def destination(asked: Evaluate, samples: Samples, card: cards.Card) -> Path | None:
    if asked.out:
        return Path(asked.out).expanduser()
    if not isinstance(samples, OF_RUN):
        return None
    return samples.run.directory / "eval" / cards.name_of(card["settings"])


# --------------------------------------------------------------------------------------------------- what is shown
@contextlib.contextmanager
def bar(what: str, ranks: Ranks, total: int | None = None) -> Iterator[Any]:
    """A progress bar of the main rank, on standard error, where that is a terminal."""
    with Progress(console=console, disable=not (ranks.main and sys.stderr.isatty()), transient=True) as shown:
        task = shown.add_task(what, total=total)
        yield lambda done: shown.update(task, completed=done)


def show(card: cards.Card) -> None:
    s = card["settings"]
    width = max(map(len, card["metrics"]), default=0)
    for name, value in card["metrics"].items():
        print(f"{name:<{width}}  {cards.text(cards.estimate(value))}")
    drawn = f"{s['sampler']} {s['steps']} steps, NFE {s['nfe']:g}, guidance {s['guidance']:g}, ema {s['ema']}; " if (
        s.get("sampler")) else ""  # fmt: skip
    drawn += f"reconstructions of {name_of(s['rebuilt'])}; " if "rebuilt" in s else ""
    against = s["reference"]
    about = f" against {against.get('n')} of {name_of(against)}" if against else ""
    print(f"{drawn}{s['n']} samples{about}; features {words(s['features'])}; {s['seconds']} s")
    for note in s["notes"]:
        print(f"note: {note}")


def name_of(reference: Mapping[str, Any]) -> str:
    return reference.get("stats") or f"{reference['data']}:{reference['split']}"


def words(features: Mapping[str, Any]) -> str:
    return " ".join(str(features[k]) for k in ("name", "mode") if k in features)


@dataclass(frozen=True)
class Shown:
    """One line of a comparison, for JSON."""

    metric: str
    a: Mapping[str, float | None]
    b: Mapping[str, float | None]
    overlap: bool | None


def compare(asked: Evaluate) -> int:
    """Two cards side by side."""
    if len(asked.what) != 2:
        raise ValueError(f"compare: given {len(asked.what)} cards or runs; needs two: genkit eval --compare A B")
    paths = [cards.newest(name) for name in asked.what]
    a, b = (cards.read(p) for p in paths)
    lines = cards.compare(a, b)
    if asked.json:
        rows = [vars(Shown(x.metric, x.a._asdict(), x.b._asdict(), x.overlap)) for x in lines]
        print(json.dumps({"a": str(paths[0]), "b": str(paths[1]), "metrics": rows}))
        return 0
    table = Table("metric", "A", "B", "B - A", "intervals")
    says = {True: "overlap", False: "apart", None: "not known"}
    for line in lines:
        table.add_row(line.metric, cards.text(line.a), cards.text(line.b), f"{line.b.value - line.a.value:+.4g}",
                      says[line.overlap])  # fmt: skip
    for letter, path in zip("AB", paths, strict=True):
        print(f"{letter}  {path}")
    Console(highlight=False).print(table)
    for note in cards.remarks(a, b):
        print(f"note: {note}")
    return 0
