"""A trained model: :class:`Run`, and loading one from a run directory (:mod:`genkit.training.directory`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from genkit import config
from genkit.backbones import lora
from genkit.backbones.embed import scalar_keys
from genkit.config.numbers import CheckpointStep
from genkit.config.trust import TRUSTED
from genkit.core import Batch, Cond, Denoiser, Generator, Guidance, Objective, Spec, spec_from_dict
from genkit.core.device import pick_device
from genkit.core.progress import Progress, reporting
from genkit.core.tensors import load_tensors, to_tensors
from genkit.data import codecs
from genkit.diffusion.guidance import compose
from genkit.diffusion.samplers import Seeds, bind
from genkit.objectives import Classifier
from genkit.training.adapters import MergedAdapter, merge_adapter
from genkit.training.averages import reconstructed_width, weights_file
from genkit.training.base_weights import BASE_FILE, read_base
from genkit.training.checkpoint import find_intact_checkpoint, read_tensors
from genkit.training.directory import find_run, read_state, step_of
from genkit.training.first_stage import FirstStage, codec_from_dict, foreign_stage, require_fit, run_stage
from genkit.training.init_sources import find_source
from genkit.training.pipelines import Pipeline, read_pipeline, set_text_nulls
from genkit.training.post_hoc_ema import reconstruct
from genkit.training.power_ema import PREFIX
from genkit.training.precision import Precision, use_codec_precision, with_networks
from genkit.training.ranks import SINGLE, Ranks
from genkit.training.samples import Samples, count_calls, draw_batches
from genkit.training.sampling import (
    PIPELINE_GRID,
    Classes,
    Sampling,
    as_count,
    as_tensors,
    build_guidance,
    generate_at_scale,
    picture_names,
    require_conditions,
    sample_conditions,
)
from genkit.training.settings import TrainSettings, stored_settings


@dataclass(frozen=True)
class Run:
    """A trained model: its configuration, networks (in evaluation mode), and the layout of its samples."""

    directory: Path
    config: TrainSettings
    nets: dict[str, nn.Module]
    spec: Spec
    codec: codecs.Codec
    step: int
    weights: str
    """the file that the networks came from, relative to the directory"""
    device: torch.device
    adapter: MergedAdapter | None = field(default=None, kw_only=True)
    """a further LoRA that was merged into the weights"""
    adapter_scale: float = field(default=1.0, kw_only=True)
    """scale of the adapter of a LoRA run itself"""

    def file_used_with(self, name: str) -> Path | None:
        """The file ``name`` (of ``USED_WITH``), by which the weights are used: that of the adapter, if one was merged
        into them and has it, else the run's own; None if there is none."""
        places = [self.adapter.place, self.directory] if self.adapter else [self.directory]
        return next((place / name for place in places if (place / name).is_file()), None)

    def describe_adapter(self) -> str:
        """What changes the weights that were loaded: a further LoRA, another scale of the run's own; "" for nothing."""
        own = "" if self.adapter_scale == 1 else f"its own LoRA at {self.adapter_scale:g}"
        return self.adapter.describe() if self.adapter else own

    @property
    def objective(self) -> Objective:
        """The objective that the networks were trained by."""
        return self.config.objective

    @property
    def pipeline(self) -> Pipeline | None:
        """The scheduler of the pretrained pipeline that the run began from, if it began from one."""
        return read_pipeline(self.directory)

    @property
    def data_spec(self) -> Spec:
        """Layout of a decoded sample; its shape differs from ``spec``, the model's, for a model of latents."""
        return replace(self.spec, shape=codecs.decoded_shape(self.codec, self.spec.shape))

    @property
    def classifier(self) -> Classifier:
        """The objective of a classifier's run. ``ValueError`` for any other run."""
        if not isinstance(self.objective, Classifier):
            kind = type(self.objective).__name__
            raise ValueError(f"classifier: given a run of {kind}; train one on its data: "
                             f"genkit train --objective=classifier --config {self.directory}/config.yaml")  # fmt: skip
        return self.objective

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser that samplers are bound to. ``ValueError`` for an objective without one."""
        captured: list[Denoiser] = []

        def capture(denoise: Denoiser) -> Generator:
            captured.append(denoise)
            return lambda z, cond, noise=None: z

        self.objective.generator(self.nets, capture)
        if not captured:
            raise ValueError(f"{type(self.objective).__name__}: draws in one pass, without a denoiser")
        return captured[0]

    def open_references(
        self, sampling: Sampling, weak: Run | None = None, classifier: Run | None = None
    ) -> dict[str, Run]:
        """The models that ``sampling`` names, opened: ``weak`` (autoguidance) and ``classifier``; or those given."""
        named = {"weak": (weak, sampling.autoguide), "classifier": (classifier, sampling.classifier)}
        return {role: run or open_reference(self, str(name)) for role, (run, name) in named.items() if run or name}

    def generator(
        self,
        sampling: Sampling | None = None,
        *,
        weak: Run | None = None,
        classifier: Run | None = None,
        inner: Guidance | None = None,
        outer: Guidance | None = None,
        callback: Callable[..., None] | None = None,
        differentiable: bool = False,
        **options: Any,
    ) -> Generator:
        """``(z, cond, noise) -> x`` in the model's own units; ``run.codec.decode`` decodes them to samples.

        ``options`` go to the sampler (``eta`` of ddim), and so does ``callback(step, x, prediction)``. ``weak`` and
        ``classifier`` are opened models that replace those named in ``sampling``. ``inner`` is a guidance that wraps
        the network itself (it may count evaluations), ``outer`` one applied after all others. Gradients pass through a
        one-pass model, and through a sampler's steps if it is to be ``differentiable``. Raises ``ValueError`` for
        settings that do not fit the model; a one-pass model (a VAE, a GAN) refuses all but the defaults.
        """
        sampling = sampling or Sampling()
        if self.objective.sampler is None and self.objective.is_generative:
            learned = self.objective.guidance_range
            sampling.refuse_for_one_pass(type(self.objective).__name__, takes_guidance=learned is not None)
            given = {"weak": weak, "classifier": classifier, "callback": callback, "outer": outer, **options}
            if unused := [name for name, value in given.items() if value is not None]:
                kind = type(self.objective).__name__
                raise ValueError(f"{unused[0]}: has no effect on {kind}, which draws in one pass; leave it out")
            if learned and sampling.guidance != 1:
                sampling.refuse_for_scale_input()
                generate = generate_at_scale(self.objective.generator(self.nets), sampling.guidance, *learned)
                return with_networks(generate, self.nets, sampling.precision, self.device, sampling.compile)
        opened = self.open_references(sampling, weak, classifier)
        weak, classifier = opened.get("weak"), opened.get("classifier")
        guides = [inner, build_guidance(self, sampling, weak, classifier), outer]
        guidance = compose(*(g for g in guides if g is not None))
        sampler, steps, bound = sampling.sampler_for(self), sampling.num_steps(self), None
        if sampler and steps:
            grid, from_noise = sampling.times(self, steps), sampling.grid_for(self) == PIPELINE_GRID
            bound = bind(sampler, grid, guidance, callback=callback, from_noise=from_noise,
                         differentiable=differentiable, **options)  # fmt: skip
        others = {f"{role}.{k}": v for role, m in (("weak", weak), ("by", classifier)) if m for k, v in m.nets.items()}
        generate = self.objective.generator(self.nets, bound)
        return with_networks(generate, {**self.nets, **others}, sampling.precision, self.device, sampling.compile)

    def decode(self, x: Tensor, precision: Precision = "fp32") -> Tensor:
        """Decode samples in the model's units ``[B, *S]``; latents by their first stage, in a precision (in fp32 for
        fp16, whose range common decoders exceed)."""
        with use_codec_precision(precision, self.device):
            return self.codec.decode(x)

    def sample(
        self,
        n: int = 16,
        sampling: Sampling | None = None,
        *,
        label: Classes | None = None,
        prompt: str | Sequence[str] | None = None,
        cond: Cond | None = None,
        weak: Run | None = None,
        classifier: Run | None = None,
        outer: Guidance | None = None,
        options: Mapping[str, Any] | None = None,
        trajectory: bool = False,
        ranks: Ranks = SINGLE,
        consume: Callable[[int, Tensor], None] | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Samples:
        """Draw ``n`` samples. Sample i has seed ``seed + i``, whatever the batch size.

        Settings are given as a :class:`Sampling`, or by name: ``run.sample(16, sampler="heun", steps=20, guidance=2)``.
        Conditions are a class ``label`` (a number or a name, or several in turn: a list, a tensor), a ``prompt`` (or
        several in turn; "" is null), or ``cond``, tensors ``[n, ...]`` by name; without any of these the model's
        classes, or the captions that it kept, in turn. ``cond`` has all conditions: one that it lacks is null.
        ``options`` go to the sampler. ``ranks`` share the batches; the main one gets all samples, the others none.
        ``consume(first, x)`` receives each batch in place of the result, on the rank that drew it. Raises
        ``ValueError`` for what does not fit the model.
        """
        sampling = config.override(sampling or Sampling(), **settings)
        n = as_count(n)
        if cond is not None and (label is not None or prompt not in (None, (), [])):
            name, given = ("label", label) if label is not None else ("prompt", prompt)
            raise ValueError(f"{name}: given {given!r:.60} beside cond, which has all conditions; leave one out")
        opened = self.open_references(sampling, weak, classifier)
        weak, classifier = opened.get("weak"), opened.get("classifier")
        if trajectory and n > sampling.batch:
            raise ValueError(f"trajectory: given --n {n} in batches of {sampling.batch}; take --batch {n}")
        spec = self.spec if classifier is None else with_classes(self.spec, classifier)
        conditions = as_tensors(cond) if cond is not None else sample_conditions(spec, n, label, prompt)
        spec.check(conditions, n)
        require_conditions(self, conditions)
        frames: list[list[Tensor]] = []

        def record(step: int, x: Tensor, prediction: Any) -> None:
            frames[-1].append(self.decode(x.float(), sampling.precision).cpu())

        generate = self.generator(sampling, weak=weak, classifier=classifier, outer=outer,
                                  callback=record if trajectory else None, **(options or {}))  # fmt: skip
        shape, calls = self.objective.noise_shape(self.spec), []

        def draw(rows: range) -> Tensor:
            noise = Seeds(range(sampling.seed + rows.start, sampling.seed + rows.stop), self.device)
            batch_cond = {k: v[rows.start : rows.stop].to(self.device) for k, v in conditions.items()}
            frames.append([])
            z = generate(noise(shape), batch_cond, noise)
            self.require_finite(z, rows.start)
            calls.append(count.calls)
            return self.decode(z, sampling.precision).cpu()

        with reporting(progress) as report, torch.no_grad(), count_calls(self.nets) as count:
            x = draw_batches(draw, n, sampling.batch, ranks, consume, report)
        (evaluations, *_), rows = zip(*ranks.gather((calls[0] if calls else 0, count.rows)), strict=True)
        steps = [torch.cat(parts) for parts in zip(*frames, strict=True)]
        return Samples(x, conditions, evaluations, sum(rows) / n, picture_names(spec, prompt), steps)

    def reconstruct(self, batch: Batch) -> Tensor:
        """``batch.x`` ``[B, *S]`` encoded and decoded again; for a model of latents, by its first stage.

        Raises ``ValueError`` if the model has no code.
        """
        batch = self.codec.encode(batch.to(self.device))
        with torch.no_grad():
            decoded = self.objective.reconstruct(self.nets, batch)
            if decoded is None and not isinstance(self.codec, codecs.LearnedCodec):
                kind = type(self.objective).__name__
                raise ValueError(f"reconstruct: given a run of {kind} on the samples themselves, which has no code")
            return self.codec.decode(batch.x if decoded is None else decoded)

    def require_finite(self, x: Tensor, first: int = 0) -> None:
        """``ValueError`` that names a sample that is not finite, before the codec turns it into a valid pixel."""
        bad = ~torch.isfinite(x.float()).flatten(1).all(1)
        if bool(bad.any()):
            index = first + int(bad.nonzero()[0])
            raise ValueError(f"{self.weights}: sample {index} is not finite; the run has diverged")


def with_classes(spec: Spec, classifier: Run) -> Spec:
    """The model's conditions and the classifier's classes. ``ValueError`` if both have classes that differ."""
    objective = classifier.classifier
    name, kind = objective.label, objective.kind(classifier.spec)
    if spec.cond.get(name, kind) != kind:
        raise ValueError(f"classifier: knows {name} as {kind}; the model has {spec.cond[name]}")
    return replace(spec, cond={**spec.cond, name: kind})


# ------------------------------------------------------------------------------------------------------ loading
def load_run(
    path: str | Path,
    *,
    ema: str | float | None = None,
    step: CheckpointStep | None = None,
    device: str = "auto",
    adapter: str | Path | None = None,
    adapter_scale: float | None = None,
    trust: bool = False,
) -> Run:
    """The model of a run directory, at its latest checkpoint or the one of ``step``, a number or "best" (of
    ``keep_best``).

    ``ema`` is a decay that the run kept ("0.999"), "power-0.1" for a power-function average, which is reconstructed if
    the run did not keep that width, or "none" for the raw weights; None is the largest decay. A LoRA run
    is merged into its base's weights, and so is a further LoRA run, the ``adapter``; ``adapter_scale`` scales the
    adapter, or the run's own one if no other is given. Reads safetensors, JSON and YAML only;
    a run that names classes of other packages is refused unless you ``trust`` it, for their code runs. Raises
    ``ValueError`` if something is missing or damaged.
    """
    run, target = find_run(path), pick_device(device)
    cfg = stored_settings(run, trust)
    if trust:
        TRUSTED.add(str(run))
    name = None if ema is None else str(ema)
    width = reconstructed_width(cfg, name)
    file = weights_file(cfg, name if width is None else f"{PREFIX}{cfg.power_ema[0]}")
    checkpoint = find_intact_checkpoint(run, step, file)
    weights = checkpoint / file if width is None else reconstruct(run, checkpoint, cfg, width)
    tensors = read_tensors(checkpoint, file) if width is None else load_file(weights)
    record = read_state(checkpoint)
    spec = spec_from_dict(record["spec"])
    nets = cfg.objective.networks(cfg.backbone, spec)
    if adapter_scale is not None and adapter is None and not cfg.lora.active:
        raise ValueError(f"lora_scale: given {adapter_scale}, but {run.name} is no LoRA run; name one with --lora RUN")
    strength = 1.0 if adapter_scale is None else adapter_scale
    own = strength if adapter is None else 1.0
    if isinstance(cfg.lora, lora.GuidanceLoRA) and not (run / BASE_FILE).is_file():  # exported, with its base
        lora.thaw(lora.adapt(nets, cfg.lora, own))
        load_tensors(nets, tensors, weights)
    elif cfg.lora.active:
        load_lora_base(nets, run)
        lora.merge(nets, cfg.lora, tensors, weights, own)
    else:
        load_tensors(nets, tensors, weights)
    further = None if adapter is None else merge_adapter(nets, adapter, strength)
    for net in nets.values():
        net.to(target).eval().requires_grad_(False)
    codec = codec_from_dict(record["codec"], run / "codec", target)
    return Run(run, cfg, nets, spec, codec, record["step"], str(weights.relative_to(run)), target,
               adapter=further, adapter_scale=own)  # fmt: skip


load = load_run  # its name in the public API, genkit.load


def sample(
    run: str | Path | Run,
    n: int = 16,
    sampling: Sampling | None = None,
    *,
    ema: str | float | None = None,
    step: CheckpointStep | None = None,
    device: str = "auto",
    **options: Any,
) -> Samples:
    """Draw ``n`` samples from a run, or from the directory of one; ``options`` are those of :meth:`Run.sample`."""
    opened = run if isinstance(run, Run) else load_run(run, ema=ema, step=step, device=device)
    return opened.sample(n, sampling, **options)


def open_reference(run: Run, name: str) -> Run:
    """A second model for sampling from ``run``: a run directory, or ``ema:DECAY``, ``step:N``, ``step:best`` of it; the
    latter with the adapter that was merged into it."""
    device, further = run.device.type, run.adapter
    scale = further.scale if further else run.adapter_scale if run.config.lora.active else None
    same: dict[str, Any] = {"device": device, "adapter": further.place if further else None, "adapter_scale": scale}
    if match := re.fullmatch(r"ema:(.+)", name):
        return load_run(run.directory, ema=match[1], step=run.step, **same)
    if match := re.fullmatch(r"step:(\d+|best)", name):
        step: Any = match[1] if match[1] == "best" else int(match[1])
        return load_run(run.directory, ema=average_name(run.weights), step=step, **same)
    return load_run(name, device=device)


def average_name(weights: str) -> str:
    """The decay in a weights file's name, or "none"."""
    return Path(weights).stem.removeprefix("ema-").replace("nets", "none")


# ------------------------------------------------------------------------------- starting from other weights, LoRA
def init_from(
    nets: Mapping[str, nn.Module],
    init: str | Path,
    note: Callable[[str], None] = lambda text: None,
    ema: str | None = None,
    step: CheckpointStep | None = None,
    objective: Objective | None = None,
) -> dict[str, str]:
    """Load another run's weights (its slowest average), or those of KIND:WHERE, into ``nets``; returns their origin.

    ``note`` receives remarks on what is initialised anew. Inputs that the other network does not have (a second time)
    begin without an effect. ``ValueError`` names the first tensor that does not fit, or says why ``objective`` refuses.
    """
    copies = objective.starts_from if objective is not None else {}
    first = {k: net for k, net in nets.items() if k not in copies}
    origin = load_weights(first, init, note, ema, step, objective)
    for name, start in copies.items():
        if name in nets and start is not None:
            nets[name].load_state_dict(nets[start].state_dict())
    return origin


def load_weights(
    nets: Mapping[str, nn.Module],
    init: str | Path,
    note: Callable[[str], None],
    ema: str | None,
    step: CheckpointStep | None,
    objective: Objective | None,
) -> dict[str, str]:
    """The part of :func:`init_from` that reads a run or KIND:WHERE."""
    source, where = find_source(str(init))
    if source:
        return source.init_from(nets, where, note)
    other = load_run(init, ema=ema, step=step, device="cpu")
    if objective is not None:
        objective.refuse_init(other.objective)
    # a network without parameters in the other run (a new memory, say) may stay as it is
    both = {k for k in nets if k in other.nets or any(True for _ in nets[k].parameters())}
    stored = to_tensors({k: v for k, v in other.nets.items() if k in both})
    wanted = to_tensors({k: v for k, v in nets.items() if k in both})
    new = {f"{k}.{name}" for k in both for name in scalar_keys(nets[k])} - stored.keys()
    for key in sorted((wanted.keys() | stored.keys()) - new):
        theirs, ours = (list(v[key].shape) if key in v else None for v in (stored, wanted))
        if theirs != ours:
            raise ValueError(
                f"init: {other.directory.name} does not fit, first at {key}: {theirs or 'absent'} there, "
                f"{ours or 'absent'} here; needs the same --backbone and samples of the same shape and conditions"
            )
    load_tensors({k: nets[k] for k in both}, {**{k: wanted[k] for k in new}, **stored}, other.directory)
    return {"run": str(other.directory), "weights": other.weights}


def load_lora_base(nets: Mapping[str, nn.Module], run: Path) -> dict[str, str]:
    """Load the weights that a LoRA run adapts into ``nets``; returns their origin."""
    origin = read_base(run)
    source, where = find_source(origin["run"])
    if source:
        origin = source.init_from(nets, where)
        set_text_nulls(nets)
        return origin
    step = step_of(Path(origin["weights"]).parent)
    return init_from(nets, origin["run"], ema=average_name(origin["weights"]), step=step)


# ------------------------------------------------------------------------------------------------- first stages
def open_first_stage(name: str, shape: tuple[int, ...], device: torch.device) -> FirstStage:
    """The first stage behind ``--codec`` for samples of this shape: a run with a code, or KIND:WHERE.

    Raises ``ValueError`` if it has no code, or one for other samples.
    """
    foreign, where = foreign_stage(name)
    if foreign:
        return foreign.open(where, shape, device)
    run = load_run(name, device=device.type)
    cfg = run.config
    stage = run_stage(run.directory.name, cfg.objective, cfg.backbone, run.nets, run.spec, run.codec).to(device)
    require_fit(stage, shape)
    return stage
