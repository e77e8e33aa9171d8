"""Several objectives on the same network, data and budget, measured with the same ruler, on one page.

    genkit bench quality [--objectives ddpm,edm,flow,flow-ot] [--data digits] [--steps 2000] [--nfe 5,10,20,50]

Each row is trained by ``genkit train`` in a process of its own and measured at each number of network evaluations as
``genkit eval`` does; held-out data measured in the same way are the floor. What is there is not done again: a killed
training goes on from its last checkpoint, a card that fits is read. Everything lies in ``--out``: ``report.html``,
``report.md``, ``results.json``, the runs, and a grid of samples of each.
"""

from __future__ import annotations

import json
import math
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt
from rich.console import Console
from rich.progress import Progress

from genkit import __version__, config
from genkit.config import parse, table, to_yaml
from genkit.core import pictures
from genkit.core.device import pick_device
from genkit.evaluation import Drawn, Given, Ruler, cards, data_of, is_picture, ruler, weights_sha256
from genkit.evaluation.report import page as report
from genkit.evaluation.report.page import Card, Value
from genkit.training.checkpoint import find_checkpoint
from genkit.training.run import Run, load_run
from genkit.training.sampling import Sampling
from genkit.training.settings import TrainSettings

console = Console(highlight=False, soft_wrap=True)
Count = Annotated[int, Ge(1)]
GRID = 40  # samples of the pictures
TIMED = 64  # samples of the timing, in one batch
COLUMNS = ("fid", "accuracy", "precision", "recall", "w2", "sliced_w2", "mmd")  # of the table; the cards hold more


# ----------------------------------------------------------------------------------------------------------- rows
@dataclass(frozen=True)
class Row:
    """What ``genkit train`` is told besides the budget, and how samples are drawn.

    The solver asks the network once a step, so its steps are the number of evaluations. The same solver and grid serve
    all: for ddpm and edm on digits, at 5 and 10 evaluations, neither ddim, nor heun, nor the grids karras and logsnr
    did better by more than their intervals. A model of one pass has neither, and is measured at NFE 1.

    With a first ``stage`` (its flags), a ``share`` of the steps trains that, and the rest a model of its latents.
    """

    flags: tuple[str, ...]
    grid: str = "uniform"
    solver: str = "dpmpp_2m"
    stage: tuple[str, ...] = ()
    share: float = 0.4


ROWS: Mapping[str, Row] = {
    "ddpm": Row(("--objective=ddpm",)),
    "edm": Row(("--objective=edm",)),
    "flow": Row(("--objective=flow",)),
    "flow-ot": Row(("--objective=flow", "--objective.coupling=ot")),
    "vae": Row(("--objective=vae",)),
    "gan": Row(("--objective=gan",)),
    "latent": Row(("--objective=flow",), stage=("--objective=autoencoder",)),
}


@dataclass(frozen=True)
class Quality:
    """Train several objectives on the same network, data and budget, and measure them with the same ruler."""

    objectives: str = "ddpm,edm,flow,flow-ot"
    """Rows, with commas between: ddpm, edm, flow, flow-ot, vae, gan, latent, or any other objective's NAME."""
    backbone: Any = table(
        "genkit.backbones:BACKBONES", "unet", kind="genkit.core:Backbone", follows="data.default_backbone"
    )
    """The network of all rows; without a NAME, the one that suits the data."""
    data: Any = table("genkit.data:DATA", "digits", kind="genkit.data:DataSource", fallback="genkit.data:find_source")
    """What all learn from."""
    steps: Count = 2000
    """Optimiser steps of each."""
    batch: Count = 64
    """Samples per step."""
    lr: Annotated[float, Gt(0)] = 1e-3
    """Peak learning rate."""
    nfe: str = "5,10,20,50"
    """Network evaluations a sample, with commas between."""
    n: Annotated[int, Ge(2)] = 1000
    """Samples that are measured."""
    seeds: Count = 1
    """Trainings of each row; with several the numbers are their mean, the intervals from the least to the largest."""
    features: Any = table("genkit.evaluation:FEATURES", "auto", kind="genkit.evaluation.metrics.features:Features")
    """What distances are taken in; auto: classifier for small grey pictures, inception for others, raw for vectors."""
    out: str = "runs/quality"
    """Where everything goes, and is looked for."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    threads: Count | None = None
    """CPU threads; None: one for small batches, else all."""

    @property
    def names(self) -> list[str]:
        found = list(dict.fromkeys(filter(None, map(str.strip, self.objectives.split(",")))))
        if not found:
            raise ValueError(f"objectives: given none; allowed: {', '.join(ROWS)}, or any objective's NAME")
        return found

    @property
    def budgets(self) -> list[int]:
        words = [w.strip() for w in self.nfe.split(",")]
        if not all(w.isdecimal() and int(w) for w in words):
            raise ValueError(f"nfe: given {self.nfe!r}; allowed: whole numbers from 1 on, such as 5,10,20,50")
        return sorted(set(map(int, words)))

    def training(self, name: str, seed: int) -> TrainSettings:
        """The configuration of one row's training, of two its last. ``ValueError`` where there is no such objective, or
        no sampling."""
        row = row_of(name)
        cfg = parse(TrainSettings, row.flags, prog="genkit bench quality")
        if not cfg.objective.is_generative:
            raise ValueError(f"objectives: given {name}, which draws no samples")
        return self.spent(cfg, name, seed, self.steps - self.first_steps(row))

    def first_steps(self, row: Row) -> int:
        """Of a row's first stage, if it has one."""
        if row.stage and self.steps < 2:
            raise ValueError(f"steps: given {self.steps}; a first stage and a model of its latents need 2 or more")
        return min(self.steps - 1, max(1, round(row.share * self.steps))) if row.stage else 0

    def first_training(self, name: str, seed: int) -> TrainSettings | None:
        """The configuration of a row's first stage, if it has one."""
        row = row_of(name)
        if not row.stage:
            return None
        spec = self.data.load("train").spec
        latent = ["--objective.latent", *map(str, latent_of(spec.shape))]
        cfg = parse(TrainSettings, [*row.stage, *latent], prog="genkit bench quality")
        return self.spent(cfg, f"{name}-stage", seed, self.first_steps(row))

    def spent(self, cfg: TrainSettings, name: str, seed: int, steps: int) -> TrainSettings:
        """What all rows share."""
        every = max(1, steps // 4)
        return replace(
            cfg,
            backbone=self.backbone,
            data=self.data,
            steps=steps,
            batch=self.batch,
            lr=self.lr,
            warmup=min(cfg.warmup, steps // 10),
            seed=seed,
            device=self.device,
            threads=self.threads,
            out=str(Path(self.out) / "runs"),
            name=f"{name.replace(':', '-')}-seed{seed}",
            save_every=every,
            sample_every=every,
            log_every=max(1, min(cfg.log_every, steps // 20)),
            tensorboard=False,
        )


def row_of(name: str) -> Row:
    return ROWS.get(name) or Row((f"--objective={name}",))


def latent_of(shape: Sequence[int]) -> tuple[int, ...]:
    """A latent for pictures: each side halved, down to at most 8, and up to 4 channels, at most half of the numbers."""
    if len(shape) != 3:
        raise ValueError(f"objectives: given latent, whose first stage is for pictures; samples are {list(shape)}")
    sides = [-(-n // 2) for n in shape[1:]]
    while max(sides) > 8:
        sides = [-(-n // 2) for n in sides]
    return (max(1, min(4, math.prod(shape) // (2 * math.prod(sides)))), *sides)


# ------------------------------------------------------------------------------------------------------- training
SETTLED = ("precision", "threads", "device", "resume", "out", "workers")  # what a training resolves, or may change


def same(a: TrainSettings, b: TrainSettings) -> bool:
    """Whether two trainings come to the same networks."""
    rest = {k: getattr(b, k) for k in SETTLED}
    return replace(a, **rest) == b


def training_of(cfg: TrainSettings) -> tuple[Path | None, int]:
    """The newest run of just this configuration that can be gone on with, and its step."""
    for run in sorted(Path(cfg.out).glob(f"*-{cfg.name}"), reverse=True):
        try:
            if same(config.from_dict(TrainSettings, config.load_yaml(run / "config.yaml")), cfg):
                return run, step_of(run)
        except ValueError:  # another version's, half-written, or killed before its first checkpoint
            continue
    return None, 0


def step_of(run: Path) -> int:
    return int(find_checkpoint(run).name.removeprefix("step-"))


@dataclass(frozen=True)
class Cost:
    """CPU and wall seconds of the processes that trained ``steps`` steps, start-up and pictures included."""

    cpu: float
    wall: float
    steps: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.cpu + other.cpu, self.wall + other.wall, self.steps + other.steps)

    def of(self, steps: int) -> Cost:
        """Of so many steps: parts whose process was killed with us are taken to have cost as much a step."""
        scale = steps / max(1, self.steps)
        return Cost(self.cpu * scale, self.wall * scale, steps)


def cost_of(run: Path) -> Cost:
    try:
        sessions = [Cost(**s) for s in json.loads((run / "cost.json").read_text())]
    except (OSError, ValueError, TypeError):
        sessions = []
    return Cost(*(sum(getattr(s, k) for s in sessions) for k in ("cpu", "wall", "steps")))


@contextmanager
def stopping() -> Iterator[None]:
    """SIGTERM ends us by way of ``finally``, like Ctrl-C, so that a training is told to save."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def launch(argv: Sequence[str]) -> int:
    """The exit code of ``genkit train`` in a process of its own; what ends us tells it to save first."""
    with stopping(), subprocess.Popen([sys.executable, "-m", "genkit", "train", *argv]) as child:
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise


def train(cfg: TrainSettings) -> Path:
    """A finished training of ``cfg``: found, gone on with, or made."""
    run, first = training_of(cfg)
    if run is not None and first >= cfg.steps:
        return run
    argv = ["--resume", str(run)]
    if run is None:
        argv = ["--config", str(report.write(to_yaml(cfg), Path(cfg.out).parent / "configs" / f"{cfg.name}.yaml"))]
    began, before = time.perf_counter(), children_seconds()
    try:
        code = launch(argv)
    finally:
        run, last = training_of(cfg)
        if run is not None and last > first:
            cpu, wall = children_seconds() - before, time.perf_counter() - began
            note_cost(run, Cost(round(cpu, 2), round(wall, 2), last - first))
    if code == 130:
        raise KeyboardInterrupt
    if run is None or last < cfg.steps:
        raise ValueError(f"{cfg.name}: training ended with code {code}; the line above says why")
    return run


@dataclass(frozen=True)
class Trained:
    """What came of a row's training, and of its first stage's, if it has one."""

    run: Path
    cost: Cost


def train_row(asked: Quality, name: str, seed: int) -> Trained:
    """A finished training of a row: of its first stage too, whose steps and cost count."""
    cfg, first = asked.training(name, seed), asked.first_training(name, seed)
    if first is None:
        run = train(cfg)
        return Trained(run, cost_of(run))
    stage = train(first)
    run = train(replace(cfg, codec=str(stage.resolve())))
    return Trained(run, cost_of(stage) + cost_of(run))


def children_seconds() -> float:
    """CPU seconds of the processes that we have waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def note_cost(run: Path, session: Cost) -> None:
    path = run / "cost.json"
    sessions = json.loads(path.read_text()) if path.is_file() else []
    report.write(json.dumps([*sessions, asdict(session)]) + "\n", path)


# ------------------------------------------------------------------------------------------------------ measuring
@dataclass(frozen=True)
class Result:
    """One row of one seed at one number of evaluations."""

    row: str
    seed: int
    nfe: int
    how: str
    card: Card
    ms: float
    """a sample: CPU time where there is no GPU"""
    cost: Cost
    run: Path
    picture: Path


TOLD = {k: v for k, v in config.dump(Sampling()).items() if k not in ("seed", "batch")}


@dataclass
class Bench:
    """The ruler, made for the first model and then held against all, and what it finds, kept on the disk."""

    asked: Quality
    device: torch.device
    held: Ruler | None = None

    def ruler(self, samples: Drawn) -> Ruler:
        if self.held is None:
            about = None if is_picture(samples.spec) else max(self.asked.n, VECTORS)
            against, features = data_of(samples.run), self.asked.features
            self.held = ruler(samples, against, features=features, reference_n=about, device=self.device)
        return self.held

    def measure_run(self, run: Run, row: Row, nfe: int, progress: Callable[[int], None]) -> dict[str, Any]:
        """The card of a run, its milliseconds a sample and the picture beside it; found, or made."""
        how: dict[str, Any] = {}
        if run.objective.sampler is not None:
            how = {"sampler": row.solver, "steps": nfe, "grid": row.grid}
        samples = Drawn(run, how, weights_sha256=weights_sha256(run), settings={**TOLD, **how})
        path = self.card(samples, self.asked.n, run.directory / "eval", progress)
        beside = run.directory / "quality" / path.stem
        timing, picture = beside.with_name(f"{path.stem}.json"), beside.with_name(f"{path.stem}.png")
        if not (timing.is_file() and picture.is_file()):
            pictures.save(pictures.picture(*run.sample(GRID, **how)), picture)
            report.write(json.dumps({"ms_per_sample": milliseconds(run, how)}) + "\n", timing)
        return {
            "card": report.card_of(path.stem, path.read_bytes()),
            "ms": json.loads(timing.read_text())["ms_per_sample"],
            "picture": picture,
        }

    def card(self, samples: Drawn | Given, n: int, folder: Path, progress: Callable[[int], None]) -> Path:
        """The card of ``n`` samples by our ruler; found by its settings, or made."""
        assert self.held is not None or isinstance(samples, Drawn)
        held = self.ruler(samples) if isinstance(samples, Drawn) else self.held
        assert held is not None
        path = folder / cards.name_of(held.plan(samples, n))
        if not path.is_file():
            cards.write(held.card(samples, n, held.look(samples, n, progress)), path)
        progress(n)
        return path

    def floor(self, run: Run) -> Card | None:
        """Held-out data, as many as there are up to n, in the same ruler; None where none are held out."""
        try:
            test = data_of(run, "test")
        except ValueError:
            return None
        self.ruler(Drawn(run))
        path = self.card(test, min(self.asked.n, test.limit), Path(self.asked.out) / "real", lambda done: None)
        return report.card_of("real", path.read_bytes())


VECTORS = 2000  # of the reference, at least, where samples are vectors: as `genkit eval`


def milliseconds(run: Run, how: Mapping[str, Any]) -> float:
    """To draw one sample in a batch of 64: the faster of two, CPU time of this process, or wall time on a GPU."""

    def once() -> float:
        now = time.process_time if run.device.type == "cpu" else time.perf_counter
        began = now()
        run.sample(TIMED, batch=TIMED, **how)  # its samples end on the CPU, so a GPU has finished
        return now() - began

    return 1e3 * min(once(), once()) / TIMED


# --------------------------------------------------------------------------------------------------------- writing
NAMES = {"cpu": "training, CPU s", "ms": "ms a sample"}


def over_seeds(values: Sequence[Value]) -> Value:
    """The value; of several, their mean, from the least to the largest."""
    if len(values) == 1:
        return values[0]
    numbers = [v.value for v in values]
    return Value(sum(numbers) / len(numbers), min(numbers), max(numbers))


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    name: str
    how: str
    nfe: int | None
    values: Mapping[str, Value]


def lines_of(results: Sequence[Result], steps: int) -> list[Line]:
    """The results with the seeds taken together."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for r in results:
        groups.setdefault((r.row, r.nfe), []).append(r)
    lines = []
    for (name, nfe), group in groups.items():
        values = {k: over_seeds([r.card.metrics[k] for r in group]) for k in group[0].card.metrics}
        values["cpu"] = over_seeds([Value(r.cost.of(steps).cpu) for r in group])
        values["ms"] = over_seeds([Value(r.ms) for r in group])
        lines.append(Line(name, group[0].how, nfe, values))
    return lines


def columns(lines: Sequence[Line]) -> list[str]:
    return [k for k in (*COLUMNS, *NAMES) if any(k in line.values for line in lines)]


def markdown(lines: Sequence[Line], told: Mapping[str, str], notes: Sequence[str]) -> str:
    """The table, what it was made with, and what has to be known to read it."""
    keys = columns(lines)
    head = ["objective", "sampler", "NFE", *(NAMES.get(k, report.titled(k)) for k in keys)]
    rows = [[line.name, line.how, str(line.nfe or "–"), *(plain(line.values.get(k)) for k in keys)] for line in lines]
    out = [f"# {TITLE}", "", f"    {told['command']}", ""]
    out += ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * 3 + ["---:"] * len(keys), *rows)]
    out += ["", *(f"- {note}" for note in notes), *(f"- {k}: {v}" for k, v in told.items() if k != "command")]
    return "\n".join(out) + "\n"


def plain(value: Value | None) -> str:
    return "–" if value is None else f"{report.number(value.value)} {report.interval(value)}".strip()


TITLE = "Objectives on one network, data and budget"


def html(results: Sequence[Result], lines: Sequence[Line], told: Mapping[str, str], notes: Sequence[str]) -> str:
    keys = columns(lines)
    titles = [NAMES.get(k, report.titled(k)) for k in keys]
    head = ["objective", "sampler", "NFE", *titles]
    rows = [[x.name, x.how, str(x.nfe or "–"), *(report.value_cell(x.values.get(k)) for k in keys)] for x in lines]
    floor = next((line.values for line in lines if line.nfe is None), {})
    series: dict[str, list[Line]] = {}
    for line in lines:
        if line.nfe is not None:
            series.setdefault(line.name, []).append(line)
    points = {k: [Card(k, x.values, {"nfe": x.nfe}) for x in found] for k, found in series.items()}
    nfe = report.nfe_plots([k for k in keys if k not in NAMES], points, floor)
    first = [r for r in results if r.seed == 0]
    grids, _ = report.embed_all((r.picture, f"{r.row}, NFE {r.nfe}") for r in first)
    logs = {r.row: report.read_log(r.run / "log.jsonl") for r in first}
    curves = [
        report.curve_plot(f"{row} {key}", {key: points}, log_scale=True)
        for row, log in logs.items()
        for key, points in log.curves.items()
        if key.endswith("/loss")
    ]
    caption = "Each number with its interval; ↓ lower is better, ↑ higher. The first line is held-out data."
    shared = [r.card.settings for r in results]
    common = {k: v for k, v in shared[0].items() if k not in {*report.differing(shared), "notes"}} if shared else {}
    return report.page(
        TITLE,
        told["command"],
        [
            ("", [report.table(caption, head, rows, right=["NFE", *titles], floor=[0] if floor else []),
                  report.render("lines", lines=notes)]),
            ("Quality against network evaluations", nfe),
            ("Samples", [report.frames(grids, "Grid of samples")] if grids else []),
            ("Training", [report.note("Each objective has its own loss: their heights do not compare."),
                          report.render("plots", plots=curves)] if curves else []),
            ("Settings", [report.listing(told),
                          report.render("fold", name="Settings of all cards", inner=report.listing(common))]),
        ],
    )  # fmt: skip


def notes_of(asked: Quality, results: Sequence[Result], real: Card | None, device: torch.device) -> list[str]:
    """What a reader of the table has to know, the cards' own notes included."""
    several = f"Means over {asked.seeds} trainings; in brackets the least and the largest."
    clock = "wall" if device.type == "cuda" else "CPU"
    notes = [several] if asked.seeds > 1 else []
    for name in filter(lambda name: row_of(name).stage, asked.names):
        shape = "x".join(map(str, latent_of(asked.data.load("train").spec.shape)))
        notes.append(f"{name}: {asked.first_steps(row_of(name))} of the steps train a first stage of {shape}, the rest "
                     "a flow of its latents.")  # fmt: skip
    if real is not None:
        notes.append(f"real: {text(real, 'n')} held-out samples, measured in the same way against the training data. "
                     "No distance of finite sets is 0, and it is larger the fewer they are.")  # fmt: skip
    return [
        *notes,
        *dict.fromkeys(note for r in results for note in r.card.notes),
        "Every model draws the same seeds and classes, from the slowest average of its weights, without guidance.",
        "training: CPU seconds of the whole process of genkit train, its start and its pictures included; "
        f"a sample: {clock} milliseconds in a batch of {TIMED}.",
    ]


def text(card: Card, key: str) -> str:
    return report.text_of(card.settings.get(key, "?"))


def write(
    asked: Quality, argv: Sequence[str], results: Sequence[Result], real: Card | None, device: torch.device
) -> None:
    """``report.md``, ``report.html`` and ``results.json``, of what there is so far."""
    lines = [Line("real", "held-out data", None, real.metrics)] if real is not None else []
    lines += lines_of(results, asked.steps)
    budget = {k: getattr(asked, k) for k in ("steps", "batch", "lr", "n", "seeds")}
    told = {
        "command": shlex.join(["genkit", "bench", "quality", *argv]),
        "data": report.text_of(config.dump(asked)["data"]),
        "backbone": report.text_of(config.dump(asked)["backbone"]),
        "budget": ", ".join(f"{k} {v}" for k, v in budget.items()),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": f"genkit {__version__}, torch {torch.__version__}",
    }
    notes, out = notes_of(asked, results, real, device), Path(asked.out)
    values = lambda line: {k: v._asdict() for k, v in line.values.items()}  # noqa: E731
    record = {**told, "notes": notes, "rows": [{**asdict(x), "values": values(x)} for x in lines]}
    report.write(json.dumps(record, indent=1) + "\n", out / "results.json")
    report.write(markdown(lines, told, notes), out / "report.md")
    report.write(html(results, lines, told, notes), out / "report.html")


# ------------------------------------------------------------------------------------------------------------ main
def main(argv: list[str]) -> int:
    asked = parse(Quality, argv, prog="genkit bench quality")
    budgets, device = asked.budgets, pick_device(asked.device)
    for name in asked.names:  # mistakes are found before any training
        asked.training(name, 0)
        asked.first_training(name, 0)
    jobs = [(name, seed) for seed in range(asked.seeds) for name in asked.names]
    bench, results, real = Bench(asked, device), [], None
    for i, (name, seed) in enumerate(jobs, 1):
        console.print(f"[{i}/{len(jobs)}] {name}, seed {seed}", markup=False)
        trained, row = train_row(asked, name, seed), row_of(name)
        run = load_run(trained.run, device=asked.device)
        torch.set_num_threads(run.config.threads or torch.get_num_threads())
        one_pass = run.objective.sampler is None
        with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
            for nfe in [1] if one_pass else budgets:
                task = bar.add_task(f"measuring, NFE {nfe}", total=asked.n)
                found = bench.measure_run(run, row, nfe, lambda done, task=task: bar.update(task, completed=done))
                how = "one pass" if one_pass else f"{row.solver}, {row.grid}"
                results.append(Result(name, seed, nfe, how, **found, cost=trained.cost, run=trained.run))
            real = real or bench.floor(run)
        write(asked, argv, results, real, device)
    shown = ("report.md", "report.html")
    console.print((Path(asked.out) / "report.md").read_text(), markup=False, soft_wrap=True)
    for name in shown:
        console.print(Path(asked.out) / name, markup=False)
    return 0
