"""A run that began from a pipeline of diffusers, written as one.

Network and first stage are the run's. Every other part is copied as files from the pipeline that the run began from, so
that text encoders, which may be large, are neither loaded nor changed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from genkit.backbones.diffusers import DiffusersDenoiser
from genkit.backbones.encoded_text import EncodedText
from genkit.data.codecs import LearnedCodec
from genkit.integrations.diffusers_folder import locate, read_json
from genkit.integrations.diffusers_stage import DiffusersStage
from genkit.integrations.diffusers_text import files_sha256
from genkit.integrations.diffusers_weights import SavedModel, objective_of, open_model
from genkit.training.first_stage import LatentCodec
from genkit.training.run import Run

INDEX = "model_index.json"
PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack", "*.h5")  # beside safetensors, the same weights once more
CODE = ("*.py", "__pycache__")
CLASS_COUNTS = ("num_embeds_ada_norm", "num_class_embeds")  # settings of networks with classes


def has_further_parts(run: Run, denoiser: DiffusersDenoiser) -> bool:
    """Whether a run began from a pipeline that has more parts than a network and a scheduler."""
    return run.pipeline is not None and (
        isinstance(denoiser.sequences, EncodedText) or isinstance(run.codec, LearnedCodec)
    )


def write_whole_pipeline(run: Run, denoiser: DiffusersDenoiser, location: str | None, folder: Path) -> list[str]:
    """Fill ``folder`` with a pipeline like the one that ``run`` began from, and return how to use it.

    ``location`` is the folder of that pipeline where it has moved, or OWNER/NAME of the hub. ``ValueError`` if it is
    gone, or differs from the one that the run was trained with.
    """
    assert run.pipeline is not None
    base = open_base(run, denoiser, location or run.pipeline.name)
    index = read_json(base.root / INDEX, "to.base")
    stage = run.codec.stage if isinstance(run.codec, LatentCodec) else None
    network = base.folder.name
    own = {network, "vae"} if stage else {network}
    copied = [k for k, v in index.items() if isinstance(v, list) and k not in own and (base.root / k).is_dir()]
    for part in copied:
        has_safetensors = any((base.root / part).glob("*.safetensors"))
        shutil.copytree(
            base.root / part, folder / part, ignore=shutil.ignore_patterns(*CODE, *(PICKLES if has_safetensors else ()))
        )
    shutil.copyfile(base.root / INDEX, folder / INDEX)
    denoiser.model.save_pretrained(folder / network)  # type: ignore[operator]  # of diffusers, not of nn.Module
    if isinstance(stage, DiffusersStage):
        stage.nets["net"].save_pretrained(folder / "vae")  # type: ignore[operator]
    prompt = '"a red square", ' if isinstance(denoiser.sequences, EncodedText) else ""
    words = '--prompt "a red square" ' if prompt else ""
    return [
        f"{network} and vae are the run's; {', '.join(copied)} are copied from {base.root}",
        "pipe = diffusers.DiffusionPipeline.from_pretrained('{out}')",
        f"pipe({prompt}num_inference_steps=30, guidance_scale=5, generator=torch.Generator().manual_seed(0)).images[0]",
        f"draws the image of: genkit sample RUN --n 1 {words}--steps 30 --guidance 5",
    ]


def open_base(run: Run, denoiser: DiffusersDenoiser, location: str) -> SavedModel:
    """The pipeline at ``location``. ``ValueError`` unless it is that of the run, whose network fits in it."""
    assert run.pipeline is not None
    base = open_model(str(locate(location, "to.base")))
    if not (base.root / INDEX).is_file():
        raise ValueError(f"to.base: {base.root} holds no {INDEX}; needs the pipeline that the run began from")
    expected = f"give the pipeline that the run began from ({run.pipeline.name}), or --to.base none"
    ours, theirs = type(denoiser.model).__name__, base.network.class_name
    if ours != theirs:
        raise ValueError(f"to.base: the network in {base.root} is a {theirs}, the run's a {ours}; {expected}")
    own: Any = denoiser.model.config
    counts = [(own.get(k), base.settings.get(k)) for k in CLASS_COUNTS]
    if odd := [(a, b) for a, b in counts if b is not None and a != b]:
        raise ValueError(
            f"to.base: the run has {odd[0][0]} classes, its pipeline draws from {odd[0][1]}; write network and "
            "scheduler alone: --to.base none"
        )
    sequences = denoiser.sequences
    if isinstance(sequences, EncodedText) and files_sha256(base.root) != sequences.sha256:
        raise ValueError(f"to.base: the text encoders in {base.root} are not those of the training; {expected}")
    if dict(base.scheduler or {}) != dict(run.pipeline.scheduler):
        raise ValueError(f"to.base: the scheduler in {base.root} is not that of the run; {expected}")
    require_same_meaning(run, base)
    return base


def require_same_meaning(run: Run, base: SavedModel) -> None:
    """``ValueError`` if the run's network predicts something else, or its latents are scaled in another way."""
    prediction = getattr(run.objective, "prediction", None)
    theirs = (objective_of(base) or {}).get("prediction", "velocity")
    if prediction != theirs:
        raise ValueError(
            f"to.base: the run predicts {prediction}, its pipeline expects {theirs}; write network and scheduler "
            "alone: --to.base none"
        )
    if not isinstance(run.codec, LearnedCodec):
        return
    theirs = (
        isinstance(run.codec, LatentCodec) and isinstance(run.codec.stage, DiffusersStage) and not run.codec.measured
    )
    if not theirs or not (base.root / "vae").is_dir():
        raise ValueError(
            "to.base: the run has another first stage than its pipeline, or scales its latents in another way; write "
            "network and scheduler alone: --to.base none"
        )
