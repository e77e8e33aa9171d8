"""The settings that a run's checkpoints were saved with. config.yaml is compared: weights mean nothing under others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from genkit.training.directory import list_checkpoints, read_state

FREE = {"out", "name", "note", "tags", "resume", "step", "codec", "init"}  # places and labels, not meanings


def read_recorded_settings(run: Path) -> dict[str, Any]:
    """The settings that the newest readable checkpoint was saved with, as in config.yaml; ``{}`` if none has any."""
    for checkpoint in list_checkpoints(run)[::-1]:
        recorded = read_state(checkpoint).get("settings")
        if isinstance(recorded, dict):
            return recorded
    return {}


def changeable_fields(settings: type) -> set[str]:
    """The fields of a class of settings that may change when a run is resumed."""
    return {f.name for f in fields(settings) if f.metadata.get("changeable")}


def require_recorded_settings(run: Path, tree: Mapping[str, Any], settings: type) -> None:
    """``ValueError`` if ``tree``, read from config.yaml, lacks a setting that the run was trained with, or has another.

    Fields of the class ``settings`` that may change when a run is resumed may differ, and so may the root of the data.
    """
    for name, recorded in read_recorded_settings(run).items():
        where = run / "config.yaml"
        if name not in tree:
            raise ValueError(f"run: {where} is damaged: it lacks {name}, which was {recorded}; restore the file")
        given = tree[name]
        if isinstance(given, dict) and isinstance(recorded, dict):
            given, recorded = ({k: v for k, v in block.items() if k != "root"} for block in (given, recorded))
            # a setting that a newer version has added
            given = {k: v for k, v in given.items() if k in recorded}
        if isinstance(given, dict) and isinstance(recorded, str):  # a name that a newer version has made a block
            given = given.get("name")
        if name not in changeable_fields(settings) | FREE and json.loads(json.dumps(given)) != recorded:
            raise ValueError(
                f"run: {where} says {name}: {given}, but the weights were trained with {recorded}; restore the file"
            )
