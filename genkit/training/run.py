"""The run directory: a configuration, checkpoints, a log and pictures. No pickle anywhere.

    runs/0007-digits-flow-unet/
      config.yaml    env.json    log.jsonl    loss.png    samples/step-0050000.png    latest -> checkpoints/step-0050000
      codec/first-stage.safetensors  (of a model of latents only: a copy, made once)
      base.json  (of a LoRA only: which weights it changes, with their sha256; the checkpoints hold the change alone)
      checkpoints/step-0050000/  nets.safetensors  ema-0.999.safetensors  optim.safetensors  state.json (written last)

A checkpoint is written under a temporary name, then renamed; ``latest`` likewise. So whatever kills a run, what its
directory shows is complete. :func:`load` needs ``config.yaml``, one checkpoint and, where there is one, ``codec``; of a
LoRA the base too.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as File
from typing import Any, Protocol, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genkit import config
from genkit.backbones import lora
from genkit.core import (
    Batch,
    Codec,
    Cond,
    Denoiser,
    Generator,
    Guidance,
    Label,
    Objective,
    Spec,
    spec_from_dict,
    spec_to_dict,
)
from genkit.core.files import write_text
from genkit.core.tensors import fill, sha256, tensors
from genkit.data import codecs, text
from genkit.diffusion.guidance import (
    LINEAR,
    Rule,
    autoguidance,
    by_classifier,
    clamp,
    classifier_free,
    compose,
    within,
)
from genkit.diffusion.samplers import GRIDS, Seeds, bind
from genkit.objectives import Classifier
from genkit.training import first_stage as latents
from genkit.training.loop import State, phase_parameters


# ---------------------------------------------------------------------------------------------- directories
def create(out: str | File, name: str) -> File:
    """A new directory ``out/NNNN-name``, numbered after the largest there is; ``out/latest`` points at it."""
    out = File(out)
    out.mkdir(parents=True, exist_ok=True)
    while True:
        numbers = [int(m[1]) for p in out.iterdir() if (m := re.match(r"(\d{4,})-", p.name))]
        run = out / f"{max(numbers, default=-1) + 1:04d}-{name}"
        try:
            run.mkdir()
        except FileExistsError:  # another process was faster
            continue
        point(out / "latest", run.name)
        return run


def point(link: File, target: str) -> None:
    """Make ``link`` a symbolic link to ``target``, atomically. A directory of that name is left as it is."""
    if link.is_dir() and not link.is_symlink():
        raise ValueError(f"{link}: is a directory, and this name is kept for a link; move it away")
    new = link.with_name(f".{link.name}-{os.getpid()}")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    os.replace(new, link)


def find(path: str | File) -> File:
    """The run directory that ``path`` names. ``ValueError`` says what is there instead."""
    run = File(path)
    if (run / "config.yaml").is_file():
        return run.resolve()
    if not run.exists():
        near = run.parent if run.parent.is_dir() else File("runs")
        runs = sorted(p.name for p in near.glob("*") if (p / "config.yaml").is_file()) if near.is_dir() else []
        known = f"{near} holds {', '.join(runs[-5:])}" if runs else "train one first: genkit train --objective=flow"
        raise ValueError(f"run: given {path}, which does not exist; {known}")
    raise ValueError(f"run: given {path}, which holds no config.yaml; a run is a directory that genkit train wrote")


def checkpoint_of(run: File, step: int | None = None) -> File:
    """The newest complete checkpoint, or the one of ``step``."""
    every = sorted(p for p in (run / "checkpoints").glob("step-*") if (p / "state.json").is_file())
    if not every:
        raise ValueError(f"run: given {run}, which has no complete checkpoint yet")
    if step is None:
        newest = run / "latest"
        return newest.resolve() if (newest / "state.json").is_file() else every[-1]
    for p in every:
        if int(p.name.removeprefix("step-")) == step:
            return p
    raise ValueError(f"step: given {step}; saved: {', '.join(p.name.removeprefix('step-').lstrip('0') for p in every)}")


# ---------------------------------------------------------------------------------------------- checkpoints
def optimizer_tensors(objective: Objective, state: State) -> dict[str, Tensor]:
    """``{"denoise/net.conv.weight/exp_avg": ...}``."""
    return {
        f"{phase.name}/{name}/{key}": value.cpu().contiguous().clone()
        for phase in objective.phases
        for name, p in phase_parameters(phase, state.nets)
        for key, value in state.optimizers[phase.name].state.get(p, {}).items()
    }


def save(
    run: File,
    state: State,
    objective: Objective,
    spec: Spec,
    codec: Codec,
    *,
    seed: int,
    keep: int,
    more: Mapping[str, Mapping[str, Tensor]] | None = None,
    best: int | None = None,
) -> File:
    """Write ``checkpoints/step-N``, point ``latest`` at it, and leave the newest ``keep`` checkpoints.

    ``more`` are further files, by name, of what only the caller needs. Where step ``best`` is said to be the best one,
    ``latest`` points at that, and it is kept as well.
    """
    final = run / "checkpoints" / f"step-{state.step:07d}"
    part = final.with_name(f".{final.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    files = {"nets.safetensors": tensors(state.nets), "optim.safetensors": optimizer_tensors(objective, state)}
    files |= {f"ema-{decay}.safetensors": tensors(nets) for decay, nets in state.emas.items()}
    files |= {name: dict(content) for name, content in (more or {}).items()}
    for name, content in files.items():
        save_file(content, part / name)
    record = {
        "step": state.step,
        "skipped": state.skipped,
        "seed": seed,
        "spec": spec_to_dict(spec),
        "codec": codecs.to_dict(codec),
        "sha256": {name: sha256(part / name) for name in files},
    }
    (part / "state.json").write_text(json.dumps(record, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    chosen = final if best is None else final.with_name(f"step-{best:07d}")
    point(run / "latest", f"checkpoints/{chosen.name}")
    for old in sorted((run / "checkpoints").glob("step-*"))[:-keep]:
        if old != chosen:
            shutil.rmtree(old)
    return final


def read(checkpoint: File, name: str) -> dict[str, Tensor]:
    """The tensors of one file, after its checksum was compared."""
    path = checkpoint / name
    recorded = json.loads((checkpoint / "state.json").read_text())["sha256"]
    if name not in recorded:
        raise ValueError(f"{checkpoint}: has no {name}; it holds {', '.join(recorded)}")
    if not path.is_file() or sha256(path) != recorded[name]:
        raise ValueError(f"{path}: is damaged (another sha256 than recorded); take an earlier checkpoint: --step N")
    return load_file(path)


def restore(checkpoint: File, state: State, objective: Objective) -> None:
    """Put a checkpoint back into ``state``: networks, averages, optimisers, step."""
    record = json.loads((checkpoint / "state.json").read_text())
    fill(state.nets, read(checkpoint, "nets.safetensors"), checkpoint)
    for decay, nets in state.emas.items():
        fill(nets, read(checkpoint, f"ema-{decay}.safetensors"), checkpoint)
    stored = read(checkpoint, "optim.safetensors")
    for phase in objective.phases:
        for name, p in phase_parameters(phase, state.nets):
            prefix = f"{phase.name}/{name}/"
            slots = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
            # the fused kernels want the step count beside the parameter
            state.optimizers[phase.name].state[p] = {k: v.to(p.device) for k, v in slots.items()}
    state.step, state.skipped = record["step"], record["skipped"]


# ------------------------------------------------------------------------------------------------- log lines
def append_log(run: File, record: Mapping[str, Any]) -> None:
    with open(run / "log.jsonl", "a") as f:
        f.write(json.dumps(record) + "\n")


def read_log(run: File) -> list[dict[str, Any]]:
    """The log's complete lines; a last one that was cut off by a kill is left out."""
    path = run / "log.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def rewind_log(run: File, step: int) -> None:
    """Forget the lines after ``step``: what a killed run did past its last checkpoint is done again."""
    kept = [r for r in read_log(run) if r["step"] <= step]
    write_text(run / "log.jsonl", "".join(json.dumps(r) + "\n" for r in kept))


# ------------------------------------------------------------------------------------------------ using a run
@dataclass(frozen=True)
class Run:
    """A trained model: its configuration, networks (in evaluation mode), and what its samples look like."""

    directory: File
    config: config.Train
    nets: dict[str, nn.Module]
    spec: Spec
    codec: Codec
    step: int
    weights: str
    """the file that the networks came from"""
    device: torch.device

    @property
    def objective(self) -> Objective:
        return self.config.objective

    @property
    def world(self) -> Spec:
        """What a decoded sample looks like; another shape than ``spec``, the model's, where that models latents."""
        return replace(self.spec, shape=codecs.world_shape(self.codec, self.spec.shape))

    def generator(
        self,
        sampler: str | None = None,
        steps: int = 20,
        guidance: float = 1.0,
        *,
        rule: Rule = LINEAR,
        interval: tuple[float, float] | None = None,
        passes: str | None = None,
        weak: Run | None = None,
        classifier: Run | None = None,
        classifier_scale: float | None = None,
        grid: str = "uniform",
        clip: bool = False,
        guide: Guidance | None = None,
        watch: Guidance | None = None,
        callback: Callable[..., None] | None = None,
        **options: Any,
    ) -> Generator:
        """``(z, cond, noise) -> x`` in the model's own numbers; ``run.codec.decode`` makes them samples.

        ``sampler`` None is the objective's usual one; ``options`` go to it (``eta`` of ddim). ``guidance`` goes from
        the null condition, or from the ``weak`` model, by ``rule`` (:mod:`genkit.diffusion.guidance`); a
        ``classifier`` guides by
        its gradient; both only in the ``interval`` of chart times. ``clip`` keeps predicted data in [-1, 1]. ``guide``
        is any further guidance, after all others; ``watch`` stands nearest to the network, and may count its
        evaluations. A one-pass model (a VAE, a GAN) refuses all these.
        """
        if self.objective.sampler is None and self.objective.draws:
            given = {"sampler": sampler, "steps": steps != 20, "guidance": guidance != 1, "classifier": classifier,
                     "grid": grid != "uniform", "clip": clip, "callback": callback, "interval": interval,
                     "guide": guide}  # fmt: skip
            if odd := [name for name, value in given.items() if value]:
                kind = type(self.objective).__name__
                raise ValueError(f"{odd[0]}: has no effect on {kind}, which draws in one pass; leave it out")
        if grid not in GRIDS:
            raise ValueError(f"grid: given {grid!r}; allowed: {', '.join(GRIDS)}")
        guides: list[Guidance] = []
        if guidance != 1:
            guides.append(self.extrapolate(guidance, rule, passes, weak))
        elif idle := [k for k, v in {"rule": rule != LINEAR, "passes": passes, "autoguide": weak}.items() if v]:
            raise ValueError(f"{idle[0]}: has no effect at guidance 1; give --guidance, say 2")
        if classifier is not None:
            guides.append(self.steer(classifier, 1.0 if classifier_scale is None else classifier_scale))
        elif classifier_scale is not None:
            raise ValueError(f"classifier_scale: given {classifier_scale}, but no classifier; give --classifier RUN")
        if interval is not None:
            if not guides:
                raise ValueError("interval: has no effect without guidance; give --guidance, say 2, or a classifier")
            guides = [within(*interval, compose(*guides))]
        if clip:
            if isinstance(self.codec, codecs.Learned):
                raise ValueError("clip: keeps predicted data in [-1, 1], and this model predicts latents; leave it out")
            guides.append(clamp())
        if guide is not None:
            guides.append(guide)
        if watch is not None:
            guides.insert(0, watch)
        sampler = sampler or self.objective.sampler
        bound = bind(sampler, GRIDS[grid](steps), compose(*guides), callback=callback, **options) if sampler else None
        return self.objective.generator(self.nets, bound)

    def extrapolate(self, scale: float, rule: Rule, passes: str | None, weak: Run | None) -> Guidance:
        """Classifier-free guidance, or autoguidance where there is a weaker model."""
        if weak is None:
            if not self.spec.cond:
                raise ValueError(f"guidance: given {scale}, but this model has no conditions to guide by; use 1")
            return classifier_free(scale, rule, passes or "together")
        if passes is not None:
            raise ValueError(f"passes: given {passes}, but autoguidance runs two networks, one after the other")
        if (weak.directory, weak.weights) == (self.directory, self.weights):
            raise ValueError(f"autoguide: given {weak.weights}, the model itself; take an earlier step or a faster ema")
        self.require_alike("autoguide", weak)
        return autoguidance(weak.denoiser, scale, rule)

    def steer(self, classifier: Run, scale: float) -> Guidance:
        """Guidance by a classifier's run."""
        if scale == 0:
            raise ValueError("classifier_scale: given 0, at which the classifier has no effect; leave it out")
        self.require_alike("classifier", classifier)
        return by_classifier(classifier_of(classifier).classify(classifier.nets), scale)

    def require_alike(self, name: str, other: Run) -> None:
        """``ValueError`` where a second run means other samples than this one."""
        mine, its = ((run.spec.shape, codecs.to_dict(run.codec)) for run in (self, other))
        if mine != its:
            raise ValueError(f"{name}: was trained on samples {its[0]} by {its[1]['name']}, this model on {mine[0]} by "
                             f"{mine[1]['name']}, or by other settings; both need the same data")  # fmt: skip

    @property
    def denoiser(self) -> Denoiser:
        """What a sampler is bound to. ``ValueError`` for an objective without one."""
        found: list[Denoiser] = []
        unsampled: Any = lambda denoise: found.append(denoise) or denoise  # noqa: E731
        self.objective.generator(self.nets, unsampled)
        if not found:
            raise ValueError(f"{type(self.objective).__name__}: draws in one pass, without a denoiser")
        return found[0]

    def sample(
        self,
        n: int = 16,
        *,
        label: int | None = None,
        prompt: str | Sequence[str] | None = None,
        seed: int = 0,
        cond: Cond | None = None,
        classifier: Run | None = None,
        batch: int = 64,
        progress: Callable[[int], None] = lambda done: None,
        **how: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """``n`` decoded samples ``[n, *S]`` (uint8 for images) and their conditions. Sample i has seed ``seed + i``.

        ``prompt``, or several in turn, is for a model of words; an empty one means null, as does what is not given of
        several conditions. Without any of these a model draws its classes, or the captions that it kept, in turn.
        ``how`` goes to :meth:`generator`.
        """
        spec = self.spec if classifier is None else with_classes(self.spec, classifier)
        conditions = dict(cond) if cond is not None else labels(spec, n, label, prompt)
        spec.check(conditions, n)
        generate, drawn = self.generator(classifier=classifier, **how), []
        shape = self.objective.noise_shape(self.spec)
        for first in range(0, n, batch):
            rows = slice(first, min(first + batch, n))
            noise = Seeds(range(seed + rows.start, seed + rows.stop), self.device)
            here = {k: v[rows].to(self.device) for k, v in conditions.items()}
            with torch.no_grad():
                x = generate(noise(shape), here, noise)
                self.require_finite(x, rows.start)
                drawn.append(self.codec.decode(x).cpu())
            progress(rows.stop)
        return torch.cat(drawn), conditions

    def rebuild(self, batch: Batch) -> Tensor:
        """The world's samples ``batch.x`` after the way through the code and back, decoded; of a model of latents,
        through those of its first stage. ``ValueError`` where there is no code."""
        batch = self.codec.encode(batch.to(self.device))
        with torch.no_grad():
            back = self.objective.reconstruct(self.nets, batch)
            if back is None and not isinstance(self.codec, codecs.Learned):
                kind = type(self.objective).__name__
                raise ValueError(f"rebuild: given a run of {kind} on the samples themselves, which has no code")
            return self.codec.decode(batch.x if back is None else back)

    def require_finite(self, x: Tensor, first: int = 0) -> None:
        """``ValueError`` that names a sample which is not finite, before the codec hides it in a pixel."""
        bad = ~torch.isfinite(x.float()).flatten(1).all(1)
        if bool(bad.any()):
            odd = first + int(bad.nonzero()[0])
            raise ValueError(f"{self.weights}: sample {odd} is not finite; the run has diverged")


def classifier_of(run: Run) -> Classifier:
    if not isinstance(run.objective, Classifier):
        kind = type(run.objective).__name__
        raise ValueError(f"classifier: given a run of {kind}; train one: genkit train --objective=classifier")
    return run.objective


def with_classes(spec: Spec, classifier: Run) -> Spec:
    """The model's conditions and the classifier's classes, which have to be the same where both have them."""
    objective = classifier_of(classifier)
    name, kind = objective.label, objective.kind(classifier.spec)
    if spec.cond.get(name, kind) != kind:
        raise ValueError(f"classifier: knows {name} as {kind}; the model has {spec.cond[name]}")
    return replace(spec, cond={**spec.cond, name: kind})


def labels(
    spec: Spec, n: int, label: int | None = None, prompt: str | Sequence[str] | None = None
) -> dict[str, Tensor]:
    """What is asked of each of ``n`` samples: the class ``label``, the ``prompt`` or several of them in turn, or both.

    If nothing is given, all classes, or the captions that the model kept, in turn. ``{}`` for a model without
    conditions. What is left out of several conditions is null.
    """
    classes = {k: kind for k, kind in spec.cond.items() if isinstance(kind, Label)}
    words, prompts = text.worded(spec), [prompt] if isinstance(prompt, str) else list(prompt or ())
    if label is not None and not classes:
        raise ValueError(f"label: given {label}, but this model has no classes; leave --label out")
    if missing := ", ".join(k for k in spec.cond if k not in {**classes, **words}):
        raise ValueError(f"this model needs more than a class: {missing}; give run.sample(cond={{...}}) in Python")
    for name, kind in classes.items():
        if label is not None and not 0 <= label < kind.num:
            raise ValueError(f"{name}: given {label}; allowed 0..{kind.num - 1}")
    turn, asked = torch.arange(n), label is not None or bool(prompts)
    if classes and words and not asked:
        raise ValueError(f"this model needs more than a class: {', '.join(words)}; give --prompt, --label or both")
    said = prompts or ([] if asked else list(text.examples(spec)))
    found = {k: v[turn % len(said)] for k, v in text.conditions(spec, said).items()} if said else {}
    if label is not None:
        return {**found, **{k: torch.full((n,), label) for k in classes}}
    return found if prompts else {**found, **{k: turn % kind.num for k, kind in classes.items()}}


def pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: given cuda, and torch sees no CUDA device here; allowed: cpu, auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def load(
    path: str | File,
    *,
    ema: str | None = None,
    step: int | None = None,
    device: str = "auto",
    adapter: str | File | None = None,
    adapter_scale: float | None = None,
) -> Run:
    """The model of a run directory, at its newest checkpoint or the one of ``step``.

    ``ema`` is a decay that the run kept ("0.999"), "none" for the raw weights; None is the largest decay. The change of
    a LoRA run is merged into its base's weights, and so is that of a further LoRA run, the ``adapter``;
    ``adapter_scale`` says how much of it, or of the run's own where there is no other.
    ``ValueError`` where something is missing or damaged. Reads safetensors, JSON and YAML only.
    """
    run, where = find(path), pick_device(device)
    cfg = config.from_dict(config.Train, config.load_yaml(run / "config.yaml"))
    checkpoint = checkpoint_of(run, step)
    record = json.loads((checkpoint / "state.json").read_text())
    file = file_of(cfg, ema)
    spec = spec_from_dict(record["spec"])
    nets = cfg.objective.networks(cfg.backbone, spec)
    if adapter_scale is not None and adapter is None and not cfg.lora.active:
        raise ValueError(f"lora_scale: given {adapter_scale}, but {run.name} is no LoRA run; name one with --lora RUN")
    strength = 1.0 if adapter_scale is None else adapter_scale
    if cfg.lora.active:
        rebase(nets, run)
        own = strength if adapter is None else 1.0
        lora.merge(nets, cfg.lora, read(checkpoint, file), checkpoint / file, own)
    else:
        fill(nets, read(checkpoint, file), checkpoint / file)
    if adapter is not None:
        merge(nets, adapter, strength)
    for net in nets.values():
        net.to(where).eval().requires_grad_(False)
    codec = latents.from_dict(record["codec"], run / "codec", where)
    return Run(run, cfg, nets, spec, codec, record["step"], str((checkpoint / file).relative_to(run)), where)


def file_of(cfg: config.Train, ema: str | None) -> str:
    """The file of a checkpoint that holds this average; ``load`` says which there are."""
    kept = sorted(cfg.ema)
    if ema is None:
        ema = str(kept[-1]) if kept else "none"
    if ema != "none" and ema not in map(str, kept):
        raise ValueError(f"ema: given {ema}; this run has: {', '.join([*map(str, kept), 'none'])}")
    return "nets.safetensors" if ema == "none" else f"ema-{ema}.safetensors"


def merge(nets: Mapping[str, nn.Module], adapter: str | File, strength: float = 1.0) -> None:
    """Add what a LoRA run learned, its slowest average, to the weights of ``nets``, in place."""
    other = find(adapter)
    cfg = config.from_dict(config.Train, config.load_yaml(other / "config.yaml"))
    if not cfg.lora.active:
        raise ValueError(f"lora: given {adapter}, which is no LoRA run; train one: --init RUN --lora.rank 8")
    checkpoint, file = checkpoint_of(other), file_of(cfg, None)
    lora.merge(nets, cfg.lora, read(checkpoint, file), checkpoint / file, strength)


class Origin(Protocol):
    """Where a training may begin, besides a run's folder: what a module does for ``--init KIND:WHERE``."""

    def begin(self, nets: Mapping[str, nn.Module], where: str, say: Callable[[str], None] = ...) -> dict[str, str]: ...
    def suggested(self, where: str) -> dict[str, Any]: ...
    def name_of(self, where: str) -> str: ...
    def remark(self, where: str, objective: Objective) -> str | None: ...


ORIGINS = {"diffusers": "genkit.integrations.weights"}  # modules that are :class:`Origin`, a room above this one


def origin_of(init: str) -> tuple[Origin | None, str]:
    """Who knows ``init``, and what they know it as; None for a run's folder."""
    kind, colon, where = init.partition(":")
    if colon and kind in ORIGINS:
        return cast(Origin, importlib.import_module(ORIGINS[kind])), where
    return None, init


def suggested(init: str) -> dict[str, Any]:
    """The blocks of config.yaml that a training with ``--init`` has where a person gives none."""
    origin, where = origin_of(init)
    if origin:
        return origin.suggested(where)
    stored = config.load_yaml(find(init) / "config.yaml")
    return {k: stored[k] for k in ("objective", "backbone") if k in stored}


def name_of_init(init: str) -> str:
    """``--init`` as config.yaml keeps it: the same from everywhere."""
    origin, where = origin_of(init)
    return init.removesuffix(where) + origin.name_of(where) if origin else str(find(init))


def remarks(init: str, objective: Objective) -> list[str]:
    """What a person should hear before weights go on with another objective than they come from."""
    origin, where = origin_of(init)
    found = origin.remark(where, objective) if origin else None
    return [found] if found else []


BASE = "base.json"


def write_base(run: File, begun: Mapping[str, str]) -> None:
    """Keep which weights a LoRA changes."""
    write_text(run / BASE, json.dumps({**begun, "sha256": sha256(weights_of(begun))}, indent=1) + "\n")


def weights_of(begun: Mapping[str, str]) -> File:
    """The file that :func:`begin` spoke of. (That of a network of diffusers has its whole path.)"""
    return File(begun["run"]) / begun["weights"]


def base_of(run: File) -> dict[str, str]:
    """What ``base.json`` says, of a base that is still there, or that lies beside the run as it did.

    ``ValueError`` where its weights are gone or others.
    """
    if not (run / BASE).is_file():
        raise ValueError(f"{run}: has no {BASE}, which says what this LoRA changes")
    begun = json.loads((run / BASE).read_text())
    moved = {**begun, "run": str(run.parent / File(begun["run"]).name)}
    there = [b for b in (begun, moved) if weights_of(b).is_file()]
    if not there:
        raise ValueError(f"lora: {run.name} changes {weights_of(begun)}, which is not there any more; put it back, or "
                         "its run beside this one")  # fmt: skip
    for b in there:
        if sha256(weights_of(b)) == begun["sha256"]:
            return b
    raise ValueError(f"lora: {weights_of(there[0])} is not what {run.name} changes any more (another sha256)")


def rebase(nets: Mapping[str, nn.Module], run: File) -> dict[str, str]:
    """Give ``nets`` the weights that a LoRA run changes."""
    begun = base_of(run)
    origin, where = origin_of(begun["run"])
    if origin:
        return origin.begin(nets, where)
    file = File(begun["weights"])
    average, step = file.stem.removeprefix("ema-").replace("nets", "none"), int(file.parent.name.removeprefix("step-"))
    return begin(nets, begun["run"], ema=average, step=step)


def begin(
    nets: Mapping[str, nn.Module],
    init: str | File,
    say: Callable[[str], None] = lambda text: None,
    ema: str | None = None,
    step: int | None = None,
) -> dict[str, str]:
    """Give ``nets`` the weights of another run, its slowest average, or of KIND:WHERE; where those came from.

    ``ValueError`` names the first tensor that does not fit; ``say`` hears what begins anew.
    """
    origin, where = origin_of(str(init))
    if origin:
        return origin.begin(nets, where, say)
    other = load(init, ema=ema, step=step, device="cpu")
    both = {k for k in nets if k in other.nets or any(True for _ in nets[k].parameters())}  # a new memory may be empty
    stored, wanted = (tensors({k: v for k, v in each.items() if k in both}) for each in (other.nets, nets))
    for key in sorted(wanted.keys() | stored.keys()):
        there, here = (list(v[key].shape) if key in v else None for v in (stored, wanted))
        if there != here:
            raise ValueError(
                f"init: {other.directory.name} does not fit, first at {key}: {there or 'absent'} there, "
                f"{here or 'absent'} here; needs the same --backbone and samples of the same shape and conditions"
            )
    fill({k: nets[k] for k in both}, stored, other.directory)
    return {"run": str(other.directory), "weights": other.weights}


def beside(run: Run, name: str) -> Run:
    """A second model for a run's sampling: a run's directory, or ``ema:DECAY`` or ``step:N`` of the run itself."""
    device, average = run.device.type, File(run.weights).stem.removeprefix("ema-").replace("nets", "none")
    if found := re.fullmatch(r"ema:(.+)", name):
        return load(run.directory, ema=found[1], step=run.step, device=device)
    if found := re.fullmatch(r"step:(\d+)", name):
        return load(run.directory, ema=average, step=int(found[1]), device=device)
    return load(name, device=device)


def first_stage(name: str, shape: tuple[int, ...], device: torch.device) -> latents.Stage:
    """The weights behind ``--codec``, for samples of this shape: a run with a code, or KIND:WHERE of a kind that
    :mod:`genkit.training.first_stage` can open. ``ValueError`` where it is none, or not for such samples."""
    kind, colon, where = name.partition(":")
    if colon and kind in latents.OPEN:
        return latents.OPEN[kind](where, shape, device)
    run = load(name, device=device.type)
    stage = latents.of_run(
        run.directory.name, run.config.objective, run.config.backbone, run.nets, run.spec, run.codec
    ).to(device)
    latents.require_fit(stage, shape)
    return stage


def name_of_stage(name: str) -> str:
    """``--codec`` as config.yaml keeps it: the same from everywhere."""
    kind, colon, where = name.partition(":")
    return f"{kind}:{File(where).resolve()}" if colon and kind in latents.OPEN else str(find(name))
