"""The files of `genkit sample`: where they go, what they may replace, and how they are written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

from genkit import __version__, config
from genkit.core import Label, pictures
from genkit.core.arrays import save_npz
from genkit.core.files import is_own, refuse_foreign, sync, temporary_path, write_text
from genkit.training.ranks import Ranks
from genkit.training.run import Run, Samples

if TYPE_CHECKING:
    from genkit.cli.commands.sample import Sample

SUFFIX = {"grid": ".png", "npz": ".npz", "png": ""}
SETTINGS_FILE = "samples.json"  # in a folder of samples
MARKED = (".png", ".gif", ".jpg", ".jpeg", ".npz")  # files that say themselves who wrote them
FOLDER_FILES = re.compile(r"\d{6,}\.png|labels\.txt|captions\.jsonl|trajectory\.gif|samples\.json")
NAMED = {  # settings that a default name states, or that do not change the samples
    "run", "ema", "step", "device", "sampler", "steps", "guidance", "clip", "seed", "batch", "n", "label", "prompt",
    "lora", "lora_scale", "format", "out", "trajectory",
}  # fmt: skip


# --------------------------------------------------------------------------------------------------- the name
def destination(command: Sample, run: Run) -> Path:
    """``--out``, or a name in the run's samples directory that says how the samples were drawn.

    Raises ``ValueError`` if ``--out`` has the suffix of another format.
    """
    suffix = SUFFIX[command.format]
    if command.out is None:
        return run.directory / "samples" / (default_name(command, run) + suffix)
    out = Path(command.out)
    if not suffix or not out.suffix:
        return out.with_name(out.name + suffix)
    if command.format == "npz" and out.suffix != ".npz":
        raise ValueError(f"out: given {out}; --format npz writes a file NAME.npz")
    if command.format == "grid" and out.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"out: given {out}; allowed: the suffix of an image; try .png")
    return out


def default_name(command: Sample, run: Run) -> str:
    """A file name from all settings that change the samples: the usual ones in words, the others as a hash."""
    chosen = command.resolved(run)
    parts = [f"sample-step{run.step}"]
    if command.ema is not None:
        parts.append(f"ema{slug(command.ema)}")
    guided = "" if command.guidance == 1 else f"-guidance{command.guidance:g}"
    parts.append(f"{chosen['sampler']}{chosen['steps']}{guided}" if chosen["sampler"] else "one-pass")
    if chosen.get("clip"):
        parts.append("clip")
    if "start" in chosen:
        parts.append(f"start{chosen['start']:g}")
    if command.label is not None:
        parts.append(f"label{slug(str(command.label))}")
    if command.lora:
        parts.append(slug(Path(command.lora).resolve().name))
    if command.lora_scale is not None:
        parts.append(f"lora{command.lora_scale:g}")
    if command.prompt:
        parts.append(slug(*command.prompt))
    parts += [f"seed{command.seed}", f"n{command.n}"]
    unnamed = unnamed_settings(command)
    return "-".join([*parts, digest(unnamed)] if unnamed else parts)


def unnamed_settings(command: Sample) -> dict[str, Any]:
    """The settings that change the samples, differ from their defaults and are not stated by the name in words."""
    settings = config.dump(command)
    unnamed = {}
    for f in fields(type(command)):
        if f.name not in NAMED:
            default = f.default_factory() if callable(f.default_factory) else f.default
            if getattr(command, f.name) != default:
                unnamed[f.name] = settings[f.name]
    for name in ("guidance", "lora_scale"):  # stated with six digits
        value = getattr(command, name)
        if value is not None and float(f"{value:g}") != value:
            unnamed[name] = value
    if command.lora:  # stated without its folder
        unnamed["lora"] = str(Path(command.lora).resolve())
    return unnamed


def digest(value: object) -> str:
    """Eight characters that stand for JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def slug(*texts: str) -> str:
    """Texts as part of a file name: plain and short; with a hash if that changed them."""
    joined = "-".join(re.sub("[^a-z0-9.]+", "-", text.lower()) for text in texts)
    return joined if texts == (joined[:40],) else f"{joined[:40]}-{digest(texts)}"


# --------------------------------------------------------------------------------------------------- what is replaced
def settings_path(out: Path, format: str) -> Path:
    """The file of the settings: NAME.png.json beside NAME.png, samples.json in a folder."""
    return out / SETTINGS_FILE if format == "png" else out.with_name(out.name + ".json")


def read_settings(path: Path) -> dict[str, Any] | None:
    """The settings that an earlier `genkit sample` wrote; None if there are none."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stored if isinstance(stored, dict) and "genkit" in stored and "sampler" in stored else None


def require_free(command: Sample, run: Run, out: Path) -> None:
    """``ValueError`` if writing to ``out`` would replace a foreign file, or mix two sets of samples."""
    path = settings_path(out, command.format)
    stored = read_settings(path)
    if command.format == "png":
        require_free_folder(command, run, out, stored)
        return
    animation = animation_path(out, command.format)
    for file, is_ours in ((path, stored), (out, stored), (animation, stored and stored.get("trajectory"))):
        marked = file.suffix.lower() in MARKED and file.is_file()
        if file.exists() and not (is_own(file) if marked else is_ours) and (file != animation or command.trajectory):
            raise ValueError(f"out: {file} exists, and genkit sample did not write it; give another --out, or move it")


def require_free_folder(command: Sample, run: Run, out: Path, stored: Mapping[str, Any] | None) -> None:
    """``ValueError`` unless a folder is new, empty, or holds just these samples."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file; --format png writes a folder")
    names = sorted(p.name for p in out.iterdir()) if out.is_dir() else []
    if not names:
        return
    given = json.loads(json.dumps(base_settings(command, run)))
    others = {"out", "device", "batch", "genkit"}  # these do not change the samples
    same = stored is not None and all(stored.get(k) == v for k, v in given.items() if k not in others)
    if foreign := [name for name in names if not FOLDER_FILES.fullmatch(name)]:
        raise ValueError(f"out: {out} holds other files ({foreign[0]}); a folder of samples holds nothing else")
    if not same:
        raise ValueError(f"out: {out} holds other samples already; give another --out, or remove it")
    refuse_foreign(*(out / name for name in names if Path(name).suffix in MARKED))


def base_settings(command: Sample, run: Run) -> dict[str, Any]:
    """What is known of the settings before the drawing."""
    settings = config.dump(command) | {"weights": run.weights, "genkit": __version__} | command.resolved(run)
    kind = run.spec.cond.get("label")
    if command.label is not None and isinstance(kind, Label):
        settings["label"] = kind.number(command.label)
    return settings


# --------------------------------------------------------------------------------------------------- writing
def write_samples(
    command: Sample, run: Run, samples: Samples, captions: Sequence[str], out: Path, folder: SampleFolder | None
) -> list[Path]:
    """Write the samples and their settings; the paths to name. All of a ``folder`` appears at once."""
    settings = base_settings(command, run)
    settings |= {"nfe": samples.evaluations, "rows_per_sample": samples.network_rows}
    text = json.dumps(settings, indent=1) + "\n"
    if folder is not None:
        folder.finish(samples, captions, text, command.trajectory)
        return [out, out / "trajectory.gif"] if command.trajectory else [out]
    out.parent.mkdir(parents=True, exist_ok=True)
    if command.format == "npz":
        write_npz(samples, out)
    else:
        pictures.save_image(samples.grid(), out)
    paths = [out]
    if command.trajectory:
        paths.append(samples.animation(animation_path(out, command.format)))
    write_text(settings_path(out, command.format), text)
    return paths


def animation_path(out: Path, format: str) -> Path:
    """Where the trajectory goes."""
    return out / "trajectory.gif" if format == "png" else out.with_suffix(".gif")


class SampleFolder:
    """A folder of one file a sample, `000000.png` and so on, which ranks fill together as they draw.

    The files have a temporary name until :meth:`finish`; a folder that is there already receives the finished files,
    its settings last. As a context it removes what is unfinished.
    """

    def __init__(self, out: Path, ranks: Ranks) -> None:
        self.out, self.ranks = out, ranks
        self.part: Path = ranks.once(self.create_part)

    def create_part(self) -> Path:
        """Create the temporary folder, on the main rank."""
        out = self.out.absolute()
        part = temporary_path((out if out.exists() else out.parent) / "samples", "part")
        part.mkdir(parents=True)
        return part

    def __enter__(self) -> SampleFolder:
        return self

    def __exit__(self, *error: object) -> None:
        if self.ranks.is_main:
            shutil.rmtree(self.part, ignore_errors=True)

    def write(self, first: int, x: Tensor) -> None:
        """Write samples uint8 ``[B, C, H, W]``, of which the first has the number ``first``."""
        if x.ndim != 4:
            raise ValueError(f"format: given png for samples of shape {tuple(x.shape[1:])}; allowed: grid, npz")
        for i, image in enumerate(x.permute(0, 2, 3, 1).numpy(), first):
            file = self.part / f"{i:06d}.png"
            pictures.to_pil(image).save(file, **pictures.mark_options("PNG"))
            sync(file)

    def finish(self, samples: Samples, captions: Sequence[str], settings: str, trajectory: bool) -> None:
        """Add `labels.txt`, captions and the settings, and give all files their names."""
        part, out, n = self.part, self.out, len(list(self.part.glob("*.png")))
        if "label" in samples.cond:
            lines = (f"{i:06d}.png {int(c)}\n" for i, c in enumerate(samples.cond["label"]))
            (part / "labels.txt").write_text("".join(lines))
        if captions:
            (part / "captions.jsonl").write_text("".join(caption_lines(captions, n)))
        if trajectory:
            samples.animation(part / "trajectory.gif")
        (part / SETTINGS_FILE).write_text(settings)
        for file in part.iterdir():
            if file.suffix != ".png":
                sync(file)
        if not out.exists():
            os.replace(part, out)
            return
        for file in part.iterdir():
            kept = out / file.name
            if kept.suffix in (".txt", ".jsonl") and kept.exists() and kept.read_bytes() != file.read_bytes():
                raise ValueError(f"out: {kept} exists, and has been changed; give another --out, or move it")
        for file in sorted(part.iterdir(), key=lambda file: file.name == SETTINGS_FILE):
            os.replace(file, out / file.name)


def caption_lines(captions: Sequence[str], n: int) -> list[str]:
    """The prompts of the images, as `--data.captions files` reads them."""
    return [json.dumps({"file_name": f"{i:06d}.png", "text": captions[i % len(captions)]}) + "\n" for i in range(n)]


def write_npz(samples: Samples, out: Path) -> None:
    """The layout of guided-diffusion: `arr_0` uint8 NHWC (floats as they are), `arr_1` labels."""
    x = samples.x
    array = x.permute(0, 2, 3, 1).numpy() if x.ndim == 4 else x.numpy()
    arrays = [array, samples.cond["label"].numpy()] if "label" in samples.cond else [array]
    save_npz(out, {f"arr_{i}": array for i, array in enumerate(arrays)})
