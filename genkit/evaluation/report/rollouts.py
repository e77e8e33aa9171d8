"""The rollouts of a policy on the page of its run: success and modes with intervals, paths and films."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from genkit.data.images import open_image
from genkit.evaluation.best import find_best
from genkit.evaluation.cards import hash_json, to_text
from genkit.evaluation.metrics import Direction, Estimate
from genkit.evaluation.report.curves import to_estimate
from genkit.evaluation.report.html import (
    Picture,
    embed_picture,
    embed_pictures,
    format_number,
    render,
    render_gallery,
    render_note,
    render_table,
    render_value,
)
from genkit.evaluation.run_records import RunRecord, read_json

NUMBERS: Mapping[str, Direction] = {  # measured numbers of a rollout, and which values are better
    "success": "higher", "coverage": "higher", "return": "higher", "best_reward": "higher",
    "mode_entropy_bits": "higher",
}  # fmt: skip
TITLES = {"mode_entropy_bits": "mode entropy in bits", "best_reward": "best reward"}
ACTING = ("step", "ema", "steps", "sampler", "guidance", "conditions", "best_of", "q_guidance", "act_steps")
UNIMPORTANT = ("film", "num_envs", "device", "fit_q")
MAX_FILMS = 4
FILM_FRAMES = 6
MAX_ROLLOUTS = 6  # whose pictures are shown, newest first


def read_rollouts(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The summaries of ``genkit rollout`` in a folder, oldest first; files that are none are left out."""
    paths = sorted(folder.glob("*.json"), key=lambda path: (path.stat().st_mtime, path.name))
    return [(path, tree) for path in paths if "episodes" in (tree := read_json(path))]


def rollout_parts(run: RunRecord) -> list[Markup]:
    """A table of the run's rollouts, with paths, actions and films of the newest; nothing if there are none."""
    rollouts = read_rollouts(run.path / "rollouts")
    if not rollouts:
        return []
    parts = [rollout_table([(run.name, path, summary) for path, summary in rollouts], many=False)]
    newest = [path for path, _ in rollouts[-MAX_ROLLOUTS:]][::-1]
    drawn = [(image, f"{kind} of {path.stem}") for path in newest for kind, image in pictures_of(path)]
    shown, errors = embed_pictures(drawn)
    if shown:
        parts.append(render_gallery(shown, "Episodes"))
    films = [film for path in newest for film in sorted(path.parent.glob(f"{path.stem}-episode*.gif"))]
    for film in films[:MAX_FILMS]:
        parts += film_parts(film, errors)
    if len(films) > MAX_FILMS:
        parts.append(render_note(f"{MAX_FILMS} of {len(films)} films."))
    if errors:
        parts.append(render_note("Left out: " + "; ".join(errors) + "."))
    return parts


def pictures_of(path: Path) -> list[tuple[str, Path]]:
    """The pictures that belong to a rollout's JSON file, by what they show."""
    kinds = {kind: path.with_name(f"{path.stem}-{kind}.png") for kind in ("paths", "plans", "actions")}
    return [(kind, image) for kind, image in kinds.items() if image.is_file()]


def rollout_table(rollouts: Sequence[tuple[str, Path, Mapping[str, Any]]], many: bool) -> Markup:
    """One row a rollout (run, file, summary), the best of each number marked among those in the same episodes."""
    settings = [acting_settings(summary) for _, _, summary in rollouts]
    keys = dict.fromkeys(key for s in settings for key in s)
    columns = [key for key in keys if len({to_text(s.get(key)) for s in settings}) > 1 or key == "steps"]
    numbers = [n for n in NUMBERS if any(to_estimate(as_mapping(summary.get(n))) for _, _, summary in rollouts)]
    marks = mark_best([summary for _, _, summary in rollouts], numbers)
    rows = []
    for i, (name, path, summary) in enumerate(rollouts):
        values = [render_value(to_estimate(as_mapping(summary.get(n))), marks[n][i]) for n in numbers]
        speed = summary.get("ms_per_chunk")
        row = [to_text(settings[i].get(key, "–")) for key in columns]
        row += [to_text(summary["episodes"]), *values, format_number(speed if isinstance(speed, int | float) else None)]
        rows.append([*([name] if many else []), *row, render("small", text=path.stem)])
    heads = [TITLES.get(n, n) + " ↑" for n in numbers]
    caption = (
        "95 % intervals. Marks compare rollouts of the same episodes (environment, first seed, number); tied: the "
        "intervals overlap. Mode entropy is over successful episodes. ms/chunk: to draw one chunk of actions."
    )
    columns = ["sampler steps" if key == "steps" else key for key in columns]
    return render_table(
        caption,
        [*(["run"] if many else []), *columns, "episodes", *heads, "ms/chunk", "file"],
        rows,
        number_columns=["sampler steps", "episodes", *heads, "ms/chunk"],
    )


def as_mapping(value: Any) -> Any:
    """A number without an interval, as files of earlier versions have it, in the form of an estimate."""
    return {"value": value} if isinstance(value, int | float) else value


def acting_settings(summary: Mapping[str, Any]) -> dict[str, Any]:
    """How a policy acted: its settings, with the checkpoint and the sampler steps as they were used."""
    settings = summary.get("settings")
    settings = dict(settings) if isinstance(settings, Mapping) else {}
    used = {"weights": summary.get("weights"), "steps": summary.get("steps", settings.get("steps"))}
    return {k: v for k, v in settings.items() if k not in UNIMPORTANT} | used


def mark_best(summaries: Sequence[Mapping[str, Any]], numbers: Sequence[str]) -> dict[str, list[str]]:
    """The mark of each number of each rollout, among rollouts of the same episodes."""
    marks = {number: [""] * len(summaries) for number in numbers}
    groups: dict[str, list[int]] = {}
    for i, summary in enumerate(summaries):
        settings = {k: v for k, v in acting_settings(summary).items() if k not in (*ACTING, "weights")}
        groups.setdefault(hash_json(settings), []).append(i)
    for members in groups.values():
        for number in numbers:
            estimates: list[Estimate | None] = [to_estimate(as_mapping(summaries[i].get(number))) for i in members]
            best = find_best(NUMBERS[number], estimates)
            for place, i in enumerate(members):
                if best and estimates[place]:
                    marks[number][i] = best.mark(place)
    return marks


def film_parts(film: Path, errors: list[str]) -> list[Markup]:
    """Frames of a film side by side, and the film itself, which is shown when it is asked for."""
    try:
        strip, num = film_strip(film)
        whole = embed_picture(film, film.stem)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        errors.append(f"{film.name}: {e}")
        return []
    still = embed_picture(strip, f"{film.stem}: {min(FILM_FRAMES, num)} of {num} frames, from left to right")
    moving = render_gallery([Picture(whole.uri, whole.width, whole.height, film.stem)], "Film")
    return [
        render("wide", p=still, alt="Frames of an episode"),
        render("fold", name=f"Film {film.stem} ({num} frames)", inner=moving),
    ]


def film_strip(film: Path) -> tuple[Image.Image, int]:
    """Evenly spaced frames of a GIF beside each other, and its number of frames."""
    with open_image(film.read_bytes(), ["GIF"]) as opened:
        num = getattr(opened, "n_frames", 1)
        frames = []
        for i in dict.fromkeys(np.linspace(0, num - 1, min(FILM_FRAMES, num)).round().astype(int).tolist()):
            opened.seek(i)
            frames.append(opened.convert("RGB"))
    strip = Image.new("RGB", (sum(f.width for f in frames) + 4 * (len(frames) - 1), frames[0].height), "white")
    for i, frame in enumerate(frames):
        strip.paste(frame, (i * (frame.width + 4), 0))
    return strip, num
