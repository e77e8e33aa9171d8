"""How samples are drawn from a run: :class:`Sampling`, shared by ``run.sample``, evaluation, sweeps and commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, SupportsIndex, cast

import torch
from torch import Tensor

from genkit.config import table
from genkit.config.names import NameIn
from genkit.config.numbers import CheckpointStep, Count, Scale, Seed
from genkit.config.paths import PathText
from genkit.core import SCALE_INPUT, Codec, Cond, Generator, Guidance, Label, Noise, Objective, Spec
from genkit.core.device import DeviceName
from genkit.core.files import format_error
from genkit.core.grids import full_grid_size
from genkit.core.messages import warn_once
from genkit.data import codecs, text
from genkit.diffusion.checks import require
from genkit.diffusion.flow_map import HIGH_INPUT, LOW_INPUT
from genkit.diffusion.guidance import (
    LINEAR,
    autoguidance,
    by_classifier,
    clamp,
    classifier_free,
    compose,
    scale_input,
    within,
)
from genkit.diffusion.paths import end_time
from genkit.diffusion.samplers import GRIDS, Grid, find_sampler
from genkit.objectives import FlowMap
from genkit.objectives.matching.matching import Matching
from genkit.training.precision import Precision

if TYPE_CHECKING:
    from genkit.training.run import Run

SamplerName = Annotated[str, NameIn("genkit.diffusion.samplers:SAMPLERS")]
PIPELINE_GRID = "pipeline"  # the grid of the scheduler that a pretrained pipeline came with
GRID_NAMES = {**GRIDS, PIPELINE_GRID: None}
GridName = Annotated[str, NameIn("genkit.training.sampling:GRID_NAMES")]
Classes = int | str | Sequence[int | str] | Tensor
"""A class by number or name, or several in turn."""
ALIKE = 0.01  # of the largest number of a codec, by which those of another may differ
BOUNDED_CODECS = (codecs.Pixels, codecs.MinMax)  # whose samples lie in [-1, 1] in the model's units


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampler, guidance and seeds. A one-pass model (a VAE, a GAN) takes ``seed``, ``batch``,
    ``precision`` and ``compile`` only."""

    # -- sampler and guidance
    sampler: SamplerName | None = None
    """Sampler. None: the objective's default (heun), or the counterpart of the scheduler of a pretrained pipeline."""
    steps: Count | None = None
    """Number of sampler steps. None: 20, or 1 for a sampler that jumps by a flow map."""
    guidance: Scale = 1.0
    """Scale w of classifier-free guidance, uncond + w (cond - uncond), or away from --autoguide. 1: no guidance."""
    guidance_rule: Any = table("genkit.diffusion.guidance:RULES", "linear", kind="genkit.diffusion.guidance:Rule")
    """Guidance rule: linear, rescale (restores the standard deviation) or apg (projected and limited)."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only at noise levels LOW HIGH, in sigma / (alpha + sigma); elsewhere one pass is saved. None: always."""
    guidance_passes: Literal["together", "apart"] | None = None
    """Conditional and unconditional pass as one batch, or one after the other in half the memory. None: together."""
    autoguide: PathText | None = None
    """Guide away from a weaker model instead of the unconditional one: a run, or ema:DECAY or step:N of this run."""
    classifier: PathText | None = None
    """Guide by the gradient of this classifier, a run of --objective=classifier on the same path."""
    classifier_scale: float | None = None
    """Weight of the classifier's gradient. None: 1, which is Bayes' rule."""
    grid: GridName | None = None
    """Time grid of the steps; pipeline is that of the scheduler of a pretrained pipeline, which starts from the noise
    itself. None: uniform, or pipeline for a run that began from one."""
    clip: bool | None = None
    """Clip the predicted data to [-1, 1] at every step. None: if the model predicts the noise (eps, score) of data in
    [-1, 1], such as pixels, as Ho et al. 2020 do."""
    seed: Seed = 0
    """Sample i has seed + i, whatever the batch size."""
    batch: Count = 64
    """Samples per batch."""
    precision: Precision = "fp32"
    """Arithmetic of the networks' forward passes: fp32, tf32 (matrix products and convolutions of a CUDA device), bf16,
    or fp16 for cards without bf16. Samplers and guidance compute in fp32, and so do decoders of latents for fp16."""
    compile: bool = False
    """Compile the networks with torch.compile: a minute at the start, then faster steps."""

    def clips(self, run: Run) -> bool:
        """Whether the predicted data are clipped."""
        if self.clip is None and self.grid_for(run) == PIPELINE_GRID and run.pipeline:
            return run.pipeline.clips and clips_by_default(run.objective, run.codec)
        return clips_by_default(run.objective, run.codec) if self.clip is None else self.clip

    def grid_for(self, run: Run) -> str:
        """The name of the grid that this model is sampled on."""
        return self.grid or (PIPELINE_GRID if run.pipeline else "uniform")

    def times(self, run: Run, num_steps: int) -> Grid | Tensor:
        """The grid of this model's sampler. ``ValueError`` for that of a pipeline, if the run began from none."""
        name = self.grid_for(run)
        if name != PIPELINE_GRID:
            return GRIDS[name](num_steps)
        if run.pipeline is None:
            raise ValueError(f"grid: given {name}, but this run began from no pipeline; allowed: {', '.join(GRIDS)}")
        return run.pipeline.times(num_steps, run.spec.shape)

    def sampler_for(self, run: Run) -> str | None:
        """The sampler of this model, its pipeline's or objective's own if none is set; None for a model that draws in
        one pass."""
        if self.sampler or run.objective.sampler is None:
            return self.sampler
        return run.pipeline.sampler if run.pipeline else run.objective.sampler

    def num_steps(self, run: Run) -> int | None:
        """The number of steps of this model's sampler; None for a model that draws in one pass."""
        sampler = self.sampler_for(run)
        return None if sampler is None else self.steps or find_sampler(sampler).default_steps

    def resolved(self, run: Run) -> dict[str, Any]:
        """What the settings leave open, for cards and file names: sampler, its steps, ``clip``, and the time ``start``
        if it is not 1."""
        chosen = {"sampler": self.sampler_for(run), "steps": self.num_steps(run), "grid": self.grid_for(run)}
        if run.objective.sampler is None:
            return chosen
        clip = self.clips(run)
        start = 1.0 if clip or chosen["grid"] == PIPELINE_GRID else end_time(run.denoiser.path)
        return chosen | {"clip": clip, **({} if start == 1 else {"start": round(start, 4)})}

    def refuse_for_one_pass(self, model: str, takes_guidance: bool = False) -> None:
        """``ValueError`` for the first setting that has no effect on a ``model`` that draws in one pass."""
        for f in fields(self):
            if takes_guidance and f.name == "guidance":
                continue
            if f.name in (
                "seed",
                "batch",
                "precision",
                "compile",
                "guidance_rule",
                "guidance_passes",
                "autoguide",
                "classifier_scale",
            ):
                continue  # refused below without guidance
            if getattr(self, f.name) != f.default:
                raise ValueError(f"{f.name}: has no effect on {model}, which draws in one pass; leave it out")

    def refuse_for_scale_input(self) -> None:
        """``ValueError`` for the first setting of guidance that has no effect on a model which draws in one pass and
        takes the scale as an input."""
        refuse_scale_input_options(
            {**_guidance_options(self, self.autoguide), "classifier_scale": self.classifier_scale is not None}
        )


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Which weights of a run to load, and where to."""

    # -- weights and device
    ema: str | None = None
    """Averaged weights, by decay, or power-WIDTH of a run with --power-ema. None: the slowest average; "none": the raw
    weights."""
    step: CheckpointStep | None = None
    """Checkpoint, by its step or "best" (of train --keep-best). None: the newest."""
    device: DeviceName = "auto"
    """Device. auto: the machine's accelerator, or the CPU if it has none."""


def default_steps(objective: Objective) -> int | None:
    """The number of steps of an objective's own sampler; None for a model that draws in one pass."""
    return None if objective.sampler is None else find_sampler(objective.sampler).default_steps


def clips_by_default(objective: Objective, codec: Codec) -> bool:
    """Whether predicted data are clipped to [-1, 1]: data in that range, by a model that predicts the noise.

    Its error in the data is sigma / alpha times that in the noise, at t = 1 a hundred times or more.
    """
    return (
        isinstance(objective, Matching)
        and objective.parametrization.predicts_noise
        and isinstance(codec, BOUNDED_CODECS)
    )


def build_guidance(run: Run, sampling: Sampling, weak: Run | None, classifier: Run | None) -> Guidance | None:
    """The guidance that ``sampling`` asks for, with the opened ``weak`` model and ``classifier``.

    Raises ``ValueError`` for settings that contradict each other, have no effect, or do not fit the run.
    """
    if sampling.grid not in (None, *GRID_NAMES):
        raise ValueError(f"grid: given {sampling.grid!r}; allowed: {', '.join(GRID_NAMES)}")
    guides: list[Guidance] = []
    if sampling.guidance != 1:
        guides.append(add_guidance(run, sampling, weak))
    elif idle := [name for name, used in _guidance_options(sampling, weak).items() if used]:
        raise ValueError(f"{idle[0]}: has no effect at guidance 1; give --guidance, say 2")
    if classifier is not None:
        scale = 1.0 if sampling.classifier_scale is None else sampling.classifier_scale
        guides.append(add_classifier(run, classifier, scale))
    elif sampling.classifier_scale is not None:
        raise ValueError(
            f"classifier_scale: given {sampling.classifier_scale}, but no classifier; give --classifier RUN"
        )
    if sampling.guidance_interval is not None:
        if not guides:
            raise ValueError("interval: has no effect without guidance; give --guidance, say 2, or a classifier")
        guided = within(*sampling.guidance_interval, compose(*guides))
        if not (takes_interval(run.objective) and weak is None and classifier is None):  # else it is an input
            guides = [guided]
    if sampling.clips(run):
        if isinstance(run.codec, codecs.LearnedCodec):
            raise ValueError("clip: keeps predicted data in [-1, 1], and this model predicts latents; leave it out")
        if not isinstance(run.codec, BOUNDED_CODECS):
            kind = type(run.codec).__name__
            raise ValueError(f"clip: keeps predicted data in [-1, 1], and those of {kind} go beyond; leave it out")
        guides.append(clamp())
    return compose(*guides) if guides else None


def refuse_scale_input_options(options: Mapping[str, bool]) -> None:
    """``ValueError`` for the first option of guidance that is used, by name: a model that takes the scale as an input
    has none of them."""
    if idle := [name for name, used in options.items() if used]:
        raise ValueError(f"{idle[0]}: has no effect on a model that takes the guidance scale as an input")


def _guidance_options(sampling: Sampling, weak: Run | str | None) -> dict[str, bool]:
    return {
        "rule": sampling.guidance_rule != LINEAR,
        "passes": sampling.guidance_passes is not None,
        "autoguide": weak is not None,
    }


def add_guidance(run: Run, sampling: Sampling, weak: Run | None) -> Guidance:
    """Classifier-free guidance (Ho & Salimans 2022), or autoguidance (Karras et al. 2024) with a weaker model."""
    scale, rule, passes = sampling.guidance, sampling.guidance_rule, sampling.guidance_passes
    learned = run.objective.guidance_range or run.config.backbone.guidance_range
    if weak is None and learned:
        refuse_scale_input_options(_guidance_options(sampling, weak))
        interval = sampling.guidance_interval if takes_interval(run.objective) else None
        return scale_input(scale, *learned, **dict(zip((LOW_INPUT, HIGH_INPUT), interval or (), strict=False)))
    if weak is None:
        if not run.spec.cond:
            raise ValueError(f"guidance: given {scale}, but this model has no conditions to guide by; use 1")
        if not run.objective.knows_null:
            raise ValueError(
                f"guidance: given {scale}, but this model was never trained without its conditions: there is nothing "
                "to guide away from; use 1, --autoguide, or train with --objective.cond-dropout 0.1"
            )
        return classifier_free(scale, rule, passes or "together")
    if passes is not None:
        raise ValueError(f"passes: given {passes}, but autoguidance runs two networks, one after the other")
    if same_weights(weak, run):
        raise ValueError(f"autoguide: given {weak.weights}, the model itself; take an earlier step or a faster ema")
    require_same_samples("autoguide", run, weak)
    return autoguidance(weak.denoiser, scale, rule)


def generate_at_scale(generate: Generator, scale: float, low: float, high: float) -> Generator:
    """A one-pass generator that takes the scale of guidance as an input, at ``scale``. ``ValueError`` outside of what
    it has learned."""
    require("guidance", scale, f"{low:g} to {high:g}, the scales that this model was trained for", low <= scale <= high)

    def guided(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
        return generate(z, {**cond, SCALE_INPUT: z.new_full((len(z),), scale)}, noise)

    return guided


def takes_interval(objective: Objective) -> bool:
    """Whether the network takes the interval of guidance as an input, as one jump may cross its ends."""
    return isinstance(objective, FlowMap) and objective.guidance_range is not None


def same_weights(a: Run, b: Run) -> bool:
    """Whether two models are one: averages of different decay may still be equal early in training."""
    if a.nets.keys() != b.nets.keys():
        return False
    for name in a.nets:
        ours, theirs = a.nets[name].state_dict(), b.nets[name].state_dict()
        if ours.keys() != theirs.keys() or not all(ours[k].equal(theirs[k].to(ours[k].device)) for k in ours):
            return False
    return True


def require_conditions(run: Run, cond: Cond) -> None:
    """``ValueError`` if a condition is absent of a model that was never trained without it."""
    missing = [name for name in run.spec.cond if name not in cond]
    if missing and not run.objective.knows_null:
        raise ValueError(f"condition {missing[0]!r} is missing, and this model was never trained without it; give it")


def add_classifier(run: Run, classifier: Run, scale: float) -> Guidance:
    """Guidance by a classifier's gradient (Dhariwal & Nichol 2021)."""
    if scale == 0:
        raise ValueError("classifier_scale: given 0, at which the classifier has no effect; leave it out")
    require_same_samples("classifier", run, classifier)
    return by_classifier(classifier.classifier.classify(classifier.nets), scale)


def require_same_samples(option: str, run: Run, other: Run) -> None:
    """``ValueError`` if ``other`` models other samples than ``run``: another shape, or another codec."""
    require_same_units(option, (run.spec, run.codec), (other.spec, other.codec))


def require_same_units(option: str, ours: tuple[Spec, Codec], theirs: tuple[Spec, Codec]) -> None:
    """``ValueError`` if samples of two models have another shape, or are encoded otherwise."""
    (shape, codec), (other_shape, other_codec) = ((spec.shape, codecs.to_dict(code)) for spec, code in (ours, theirs))
    if shape != other_shape or not encodes_alike(codec, other_codec):
        raise ValueError(
            f"{option}: was trained on samples {other_shape} by {other_codec['name']}, this model on {shape} by "
            f"{codec['name']}, or by other settings; both need the same data"
        )


def as_count(n: object) -> int:
    """A number of samples. ``ValueError`` for what is none."""
    if isinstance(n, bool) or not isinstance(n, SupportsIndex) or int(n) < 1:
        raise ValueError(f"n: given {n!r:.60}; needs a whole number from 1")
    return int(n)


def encodes_alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two stored codecs give samples the same meaning: numbers that were measured of the data may differ by a
    hundredth, and latents may be drawn or their mean."""
    (texts, numbers), (other_texts, other_numbers) = (split_numbers(codec) for codec in (a, b))
    if texts != other_texts or len(numbers) != len(other_numbers):
        return False
    bound = ALIKE * max(map(abs, numbers), default=0.0)
    return all(abs(x - y) <= bound for x, y in zip(numbers, other_numbers, strict=True))


def split_numbers(codec: Mapping[str, Any]) -> tuple[dict[str, Any], list[float]]:
    """What a stored codec says in words, and its numbers in order."""
    texts: dict[str, Any] = {}
    numbers: list[float] = []
    for name, value in codec.items():
        if name in ("posterior", "measured"):
            continue
        if isinstance(value, list | tuple) and value and all(isinstance(v, float) for v in value):
            numbers += value
        else:
            texts[name] = value
    return texts, numbers


def class_numbers(kind: Label, given: Classes, n: int, option: str = "label") -> Tensor:
    """The classes ``[n]`` that a number or name, or several of them in turn (a list, a tensor), stand for.

    ``ValueError`` if one is unknown or no class at all.
    """
    if isinstance(given, Tensor) or hasattr(given, "tolist"):  # of NumPy
        given = cast(Any, given).tolist()
    several: list[Any] = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not several:
        raise ValueError(f"{option}: given an empty list; needs a class, or several")
    for value in several:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise ValueError(f"{option}: given {value!r:.60}; needs a number or a name, or a list of them")
    numbers = torch.tensor([kind.number(value, option) for value in several])
    if untrained := sorted({int(i) for i in numbers if int(i) in kind.empty}):
        listed = ", ".join(kind.names[i] if kind.names else str(i) for i in untrained)
        warn_once(f"{option}: {listed} had no sample in training; the model knows nothing of it")
    return numbers[torch.arange(n) % len(numbers)]


def sample_conditions(
    spec: Spec,
    n: int,
    label: Classes | None = None,
    prompt: str | Sequence[str] | None = None,
    known: text.TextTable | None = None,
) -> dict[str, Tensor]:
    """Conditions of ``n`` samples: the class ``label`` (number or name, or several in turn), the ``prompt`` (or several
    in turn), or both. The states of some texts may be ``known``.

    If neither is given, all classes that have samples, or the captions that the model kept, in turn; ``{}`` for a model
    without conditions. Any of several conditions that is left out is null.
    """
    classes = {k: kind for k, kind in spec.cond.items() if isinstance(kind, Label)}
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    if label is not None and not classes:
        raise ValueError(f"label: given {label}, but this model has no classes; leave --label out")
    require_promptable(spec)
    numbers = {} if label is None else {name: class_numbers(kind, label, n, name) for name, kind in classes.items()}
    unspecified = label is None and not prompts
    if unspecified:
        require_one_kind(spec)
    index = torch.arange(n)
    captions = prompts or (list(text.caption_examples(spec)) if unspecified else [])
    cond: dict[str, Tensor] = {}
    if captions:
        cond = {k: v[index % len(captions)] for k, v in text.encode_prompts(spec, captions, known).items()}
    if label is not None:
        return {**cond, **numbers}
    return cond if prompts else {**cond, **{k: class_numbers(kind, kind.trained, n, k) for k, kind in classes.items()}}


def require_promptable(spec: Spec) -> None:
    """``ValueError`` if a condition is neither a class nor text."""
    given = {k for k, kind in spec.cond.items() if isinstance(kind, Label)} | text.conditions_of_prompts(spec)
    if missing := ", ".join(k for k in spec.cond if k not in given):
        raise ValueError(f"this model needs more than a class: {missing}; give run.sample(cond={{...}}) in Python")


def require_one_kind(spec: Spec) -> None:
    """``ValueError`` if there are classes and texts, which could be combined in many ways."""
    texts = text.text_conditions(spec)
    if texts and any(isinstance(kind, Label) for kind in spec.cond.values()):
        raise ValueError(f"this model needs more than a class: {', '.join(texts)}; give --prompt, --label or both")


def picture_names(spec: Spec, prompt: str | Sequence[str] | None = None) -> tuple[str, ...]:
    """The headings of a grid: the names of the classes if there are classes, else the prompts that come in turn."""
    for kind in spec.cond.values():
        if isinstance(kind, Label):
            return kind.names
    return (prompt,) if isinstance(prompt, str) else tuple(prompt or text.caption_examples(spec))


def grid_size(spec: Spec, about: int) -> int:
    """The number of samples, near ``about``, whose picture has full rows; ``about`` itself if they are no images.

    Large images are fewer: half as many beyond 32x32, a quarter beyond 64x64.
    """
    if len(spec.shape) != 3:
        return about
    _, height, width = spec.shape
    about //= 1 if height * width <= 32**2 else 2 if height * width <= 64**2 else 4
    groups = [len(kind.trained) for kind in spec.cond.values() if isinstance(kind, Label)]
    return full_grid_size(groups[0] if groups else len(text.caption_examples(spec)) or 1, about, height / width)


def as_tensors(cond: Mapping[str, Any]) -> dict[str, Tensor]:
    """Conditions that may be given as lists or arrays. ``ValueError`` for what is no numbers."""
    try:
        return {name: torch.as_tensor(value) for name, value in cond.items()}
    except (TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"cond: needs tensors [n, ...] by name: {format_error(e)}; classes by name: label=") from e
