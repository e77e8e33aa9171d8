"""``genkit export --to diffusers``: a run of ``--backbone=diffusers`` as a pipeline, or a network and a scheduler."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from genkit.backbones.diffusers import Diffusers, DiffusersDenoiser, NetworkConfig, diffusers_class
from genkit.backbones.encoded_text import EncodedText
from genkit.backbones.lora import GuidanceLoRA
from genkit.config.numbers import Natural
from genkit.config.paths import PathText
from genkit.core import Objective
from genkit.data.codecs import LearnedCodec
from genkit.diffusion.paths import Linear, end_time
from genkit.integrations.diffusers_pipeline import has_further_parts, write_whole_pipeline
from genkit.integrations.diffusers_weights import BETAS, PREDICTIONS, remap_time_embedding
from genkit.integrations.export import ExportFormat
from genkit.objectives import DDPM, Flow
from genkit.training.run import Run
from genkit.training.sampling import clips_by_default


@dataclass(frozen=True)
class ToDiffusers(ExportFormat):
    """A folder that ``DiffusionPipeline.from_pretrained`` loads, of a run of --backbone=diffusers by ddpm or flow.

    A run that began from a pipeline (--init diffusers:P) is written as that pipeline with the run's network: its text
    encoders and all other parts are copied from P. Without one, diffusers has pipelines for unet2d without classes;
    everything else (classes, dit, unet2d-condition, latents) is written as network and scheduler, with the loop that
    draws samples in README.md.

    The same seed is the same noise z. diffusers starts from z, genkit from sigma(1) z: they differ by 2e-5 of it with
    linear betas, by 4e-4 with scaled-linear ones, and not at all with cosine betas, zero_snr or a flow.
    """

    label: Natural | None = None
    """for a network with classes: write only this class, as a network without; None: all of them"""
    base: PathText | None = None
    """pipeline that the run began from, if it is no longer where it was; "none": write network and scheduler alone"""

    def write(self, run: Run, folder: Path) -> list[str]:
        denoiser, family = single_network(run), run.config.backbone
        assert isinstance(family, Diffusers)
        if self.base != "none" and self.label is None and has_further_parts(run, denoiser):
            lines = write_whole_pipeline(run, denoiser, self.base, folder)
            (folder / "README.md").write_text(model_card(run, lines))
            return lines
        if self.base not in (None, "none"):
            raise ValueError(f"to.base: given {self.base}, but the run needs no parts of a pipeline; leave it out")
        make_schedule = SCHEDULES.get(type(run.objective))
        if make_schedule is None:
            name = type(run.objective).__name__
            raise refusal(f"diffusers has no scheduler that draws as {name} does; allowed: ddpm, flow")
        clip = clips_by_default(run.objective, run.codec)
        schedule = make_schedule(run.objective, family, clip)
        net, classes = copy.deepcopy(denoiser.model), denoiser.classes
        if self.label is not None:
            net, classes = single_class(denoiser, family.model, self.label), None
        if schedule.time_shift and family.clock == "index":
            net.load_state_dict(net.state_dict() | remap_time_embedding(net, schedule.time_shift))

        latent = isinstance(run.codec, LearnedCodec)
        part = "unet" if family.model.class_name.startswith("UNet") else "transformer"
        if family.model.has_own_pipeline and not latent:
            diffusers_class(schedule.pipeline)(unet=net, scheduler=schedule.scheduler).save_pretrained(folder)
        else:
            net.save_pretrained(folder / part)  # type: ignore[operator]  # of diffusers, not of nn.Module
            schedule.scheduler.save_pretrained(folder / "scheduler")

        is_pipeline = family.model.has_own_pipeline and not (classes or latent or family.learned_sigma)
        lines = schedule.pipeline_usage() if is_pipeline else schedule.loop_usage(part, classes)
        if latent:
            lines.append("It draws scaled latents; genkit decodes them (run.codec.decode).")
        start = end_time(run.denoiser.path)
        if start < 1 and not clip:
            lines.append(f"diffusers draws from t = 1 and genkit from t = {start:.4g}: their samples differ.")
        if isinstance(denoiser.sequences, EncodedText):
            lines.append(f"Its text is read by the encoders of {denoiser.sequences.encoder}.")
        elif denoiser.sequences is not None:
            lines.append("Its learned null and text encoder have no place in diffusers: they are left out.")
        (folder / "README.md").write_text(model_card(run, lines))
        return lines


def refusal(reason: str) -> ValueError:
    """The error for a run that diffusers cannot hold."""
    return ValueError(f"export: {reason}; to use it with genkit elsewhere: --to run")


def single_network(run: Run) -> DiffusersDenoiser:
    """The run's network. ``ValueError`` if it is not one of diffusers, or has an adapter that is not merged into it."""
    if isinstance(run.config.lora, GuidanceLoRA):
        raise refusal("diffusers has no adapter that takes the scale of guidance as an input; export the run that it "
                      "adapts")  # fmt: skip
    networks = [net for net in run.nets.values() if isinstance(net, DiffusersDenoiser)]
    if len(networks) != 1:
        name = type(run.config.backbone).__name__
        learned = " with --objective.learn-variance" if isinstance(run.config.backbone, Diffusers) else ""
        raise refusal(f"diffusers has no network such as {name}{learned}; train with --backbone=diffusers")
    return networks[0]


def single_class(denoiser: DiffusersDenoiser, model: NetworkConfig, label: int) -> nn.Module:
    """The network of one class, without a table of classes: the class's row is added to the time embedding's bias."""
    if denoiser.classes is None or not model.has_own_pipeline:
        problem = "has no classes" if denoiser.classes is None else f"is a {model.class_name}, which needs classes"
        raise ValueError(f"to.label: given {label}; this network {problem}; leave it out")
    num = denoiser.classes[1]
    if label >= num:
        raise ValueError(f"to.label: given {label}; allowed 0..{num - 1}")
    config: Any = denoiser.model.config
    settings = {k: v for k, v in dict(config).items() if not k.startswith("_")}
    net = diffusers_class(model.class_name)(**{**settings, "num_class_embeds": None})
    weights = denoiser.model.state_dict()
    row = weights.pop("class_embedding.weight")[label]
    bias = "time_embedding.linear_2.bias"
    net.load_state_dict({**weights, bias: weights[bias] + row})
    return net.eval()


@dataclass(frozen=True)
class Schedule:
    """A scheduler of diffusers that draws as an objective does, and how to use it."""

    scheduler: Any
    pipeline: Literal["DDIMPipeline", "DDPMPipeline"]
    """the pipeline that runs it with a unet2d"""
    time_shift: float
    """offset of diffusers' times from genkit's"""
    options: str
    """options of genkit sample that draw the same image"""
    steps: int
    set_timesteps: str
    """Python code that sets the steps of the loop"""
    step_options: str = ""
    """Python code of further arguments of the scheduler's steps"""

    def pipeline_usage(self) -> list[str]:
        """How to draw with the pipeline."""
        return [
            "pipe = diffusers.DiffusionPipeline.from_pretrained('{out}')",
            f"pipe(num_inference_steps={self.steps}, generator=[torch.Generator().manual_seed(0)]{self.step_options})"
            ".images[0]",
            f"draws the image of: genkit sample RUN --n 1 {self.options}",
        ]

    def loop_usage(self, part: str, classes: tuple[str, int] | None) -> list[str]:
        """How to draw with the network in the subfolder ``part`` and the scheduler."""
        kind = type(self.scheduler).__name__
        label = f", class_labels=labels  # {classes[1]} is the null class" if classes else ""
        return [
            f"No pipeline of diffusers draws with it; it consists of {part} and scheduler, and this loop draws:",
            f"scheduler = diffusers.{kind}.from_pretrained('{{out}}/scheduler'); {self.set_timesteps}",
            f"for t in scheduler.timesteps: x = scheduler.step(net(x, t, ...).sample, t, x{self.step_options})"
            f".prev_sample{label}",
        ]


def ddpm_schedule(objective: Objective, family: Diffusers, clip: bool) -> Schedule:
    """DDIM for a DDPM. ``ValueError`` if diffusers does not have its prediction, or the network's times differ."""
    assert isinstance(objective, DDPM)
    predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
    betas = {ours: theirs for theirs, ours in BETAS.items()}
    if objective.prediction not in predictions:
        raise refusal(f"diffusers knows no prediction {objective.prediction}; allowed: {', '.join(predictions)}")
    if objective.timesteps != family.timesteps:
        counts = f"the network counts {family.timesteps} times, the objective {objective.timesteps}"
        raise refusal(f"{counts}; train with --backbone.timesteps {objective.timesteps}")
    scheduler = diffusers_class("DDIMScheduler")(
        num_train_timesteps=objective.timesteps,
        beta_start=objective.beta_min,
        beta_end=objective.beta_max,
        beta_schedule=betas[objective.betas],
        prediction_type=predictions[objective.prediction],
        rescale_betas_zero_snr=objective.zero_snr,
        timestep_spacing="trailing",
        clip_sample=clip,
    )
    steps = min(50, objective.timesteps)
    options = f"--sampler ddim --grid trailing --steps {steps}"
    step_options = ", use_clipped_model_output=True" if clip else ""
    return Schedule(scheduler, "DDIMPipeline", 0.0, options, steps, f"scheduler.set_timesteps({steps})", step_options)


def flow_schedule(objective: Objective, family: Diffusers, clip: bool) -> Schedule:
    """Euler for rectified flow. ``ValueError`` for flows that diffusers does not have."""
    assert isinstance(objective, Flow)
    fits = {
        "path": isinstance(objective.path, Linear),
        "prediction": objective.prediction == "velocity",
        "source": objective.source.is_normal,
    }
    if odd := [name for name, fit in fits.items() if not fit]:
        allowed = {"path": "linear", "prediction": "velocity", "source": "normal"}[odd[0]]
        raise refusal(f"diffusers' flow matching has another {odd[0]} than this run; allowed: {allowed}")
    scheduler = diffusers_class("FlowMatchEulerDiscreteScheduler")(num_train_timesteps=family.timesteps)
    code = "scheduler.set_timesteps(sigmas=[1 - i / 20 for i in range(20)])  # --sampler ddim --steps 20"
    return Schedule(scheduler, "DDPMPipeline", 1.0, "--sampler ddim --grid linspace --steps 28", 28, code)


SCHEDULES: Mapping[type, Callable[[Objective, Diffusers, bool], Schedule]] = {DDPM: ddpm_schedule, Flow: flow_schedule}


def model_card(run: Run, lines: list[str]) -> str:
    """The text of README.md."""
    code = "\n".join(f"    {line}" for line in lines).replace("{out}", "DIR")
    weights = f"{run.directory.name}/{run.weights}"
    return f"# {run.directory.name}\n\nExported by genkit from {weights}.\n\n{code}\n"
