"""Experiment trackers, through Accelerate: TensorBoard, Weights & Biases, MLflow, Trackio.

A tracker never ends a training: one that fails (no network, say) is left out from then on, with a warning.
"""

from __future__ import annotations

import json
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image

from genkit.core.files import write_text

logger = logging.getLogger("genkit")
IDS_FILE = "trackers.json"  # in the run directory: what the trackers call the run, so that a resumed run goes on there
MLFLOW_NAME = re.compile(r"[^\w\-. /:]")  # what a name of MLflow must not hold


class RunTracker:
    """One tracker of a run. A subclass says how it is opened and how it shows pictures."""

    package = ""
    """what has to be installed"""

    def __init__(self, run: Path, project: str, step: int, stored: str | None):
        """``stored`` is what :attr:`id` was when the run was tracked before, ``step`` where it goes on."""
        self.run, self.project, self.step = run.resolve(), project, step
        self.id = stored or self.new_id()
        self.resumed = stored is not None
        self.tracker: Any = self.make()
        self.tracker.start()

    def new_id(self) -> str:
        """What the tracker will call a new run: unique, unlike the names of run directories."""
        return f"{self.run.name}-{uuid.uuid4().hex[:8]}"

    def make(self) -> GeneralTracker:
        """Accelerate's tracker."""
        raise NotImplementedError

    def log_settings(self, settings: Mapping[str, Any]) -> None:
        """Store the hyperparameters, by dotted name."""
        self.tracker.store_init_configuration(dict(settings))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Store scalars."""
        self.tracker.log(dict(values), step=step)

    def log_picture(self, image: Image.Image, path: Path, step: int) -> None:
        """Store a picture of samples, which is also the file ``path``."""
        raise NotImplementedError


class TensorBoard(RunTracker):
    """Event files in the run's directory ``tensorboard``."""

    package = "tensorboard"

    def make(self) -> GeneralTracker:
        return TensorBoardTracker("tensorboard", self.run, purge_step=self.step + 1)

    def log_settings(self, settings: Mapping[str, Any]) -> None:
        if not self.step:  # as a table of text: add_hparams would add a run of its own each time
            rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
            self.tracker.log({"settings": f"| setting | value |\n| --- | --- |\n{rows}"}, step=0)

    def log_picture(self, image: Image.Image, path: Path, step: int) -> None:
        self.tracker.log_images({"samples": np.asarray(image.convert("RGB"))[None]}, step=step, dataformats="NHWC")


class WandB(RunTracker):
    """Weights & Biases; its files are in the run's directory ``wandb``. ``WANDB_MODE=offline`` works too."""

    package = "wandb"

    def make(self) -> GeneralTracker:
        options = {"id": self.id, "name": self.run.name, "dir": str(self.run), "resume": "allow"}
        return WandBTracker(self.project, **options)

    def log_picture(self, image: Image.Image, path: Path, step: int) -> None:
        self.tracker.log_images({"samples": [image]}, step=step)


class MLflow(RunTracker):
    """MLflow: the server of ``MLFLOW_TRACKING_URI``, else the database ``mlflow.db`` beside the run directories."""

    package = "mlflow"

    def new_id(self) -> str:
        return ""  # MLflow chooses it

    def make(self) -> GeneralTracker:
        import mlflow  # lazy: optional, and slow to import

        # by default MLflow tries for four minutes to reach a server that is away
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        artifacts = None
        if not (os.environ.get("MLFLOW_TRACKING_URI") or mlflow.is_tracking_uri_set()):
            mlflow.set_tracking_uri(f"sqlite:///{self.run.parent / 'mlflow.db'}")
            artifacts = (self.run.parent / "mlartifacts").as_uri()
        return MLflowTracker(self.project, artifacts, self.id or None, run_name=self.run.name)

    def log_settings(self, settings: Mapping[str, Any]) -> None:
        if not self.resumed:  # MLflow refuses other values of a parameter
            super().log_settings(settings)
        self.id = self.tracker.tracker.info.run_id

    def log(self, values: Mapping[str, float], step: int) -> None:
        super().log({MLFLOW_NAME.sub("_", name): value for name, value in values.items()}, step)

    def log_picture(self, image: Image.Image, path: Path, step: int) -> None:
        self.tracker.log_artifact(str(path), "samples")


class Trackio(RunTracker):
    """Trackio, which keeps its data in ``TRACKIO_DIR``, else in the cache of Hugging Face."""

    package = "trackio"

    def make(self) -> GeneralTracker:
        options = {"name": self.id, "resume": "allow", "embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        return TrackioTracker(self.project, **options)

    def log_picture(self, image: Image.Image, path: Path, step: int) -> None:
        import trackio  # lazy: optional

        self.tracker.log({"samples": trackio.Image(np.asarray(image.convert("RGB")))}, step=step)


TRACKERS: dict[str, type[RunTracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def require_trackers(names: Iterable[str]) -> None:
    """``ValueError`` for the first tracker whose package is not installed."""
    for name in names:
        if find_spec(TRACKERS[name].package) is None:
            raise ValueError(f"trackers: given {name}, which is not installed: pip install {TRACKERS[name].package}")


class Trackers:
    """The trackers of a run, in the main process. :meth:`close` ends them."""

    def __init__(self, names: Iterable[str], run: Path, project: str, step: int, settings: Mapping[str, Any]):
        """Open the trackers and store the ``settings``, by dotted name. ``step`` is where training goes on."""
        self.trackers: dict[str, RunTracker] = {}
        ids = read_ids(run)
        for name in names:
            kind, stored = TRACKERS[name], ids.get(name)
            opened = self.attempt(name, lambda kind=kind, stored=stored: kind(run, project, step, stored))
            if opened is not None:
                self.trackers[name] = opened
                self.attempt(name, lambda opened=opened: opened.log_settings(settings))
        chosen = {name: tracker.id for name, tracker in self.trackers.items() if name != "tensorboard"}
        if chosen:
            write_text(run / IDS_FILE, json.dumps({**ids, **chosen}) + "\n")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Store scalars."""
        for name, tracker in list(self.trackers.items()):
            self.attempt(name, lambda tracker=tracker: tracker.log(values, step))

    def log_picture(self, image: Image.Image, path: Path, step: int) -> None:
        """Store a picture of samples, which is also the file ``path``."""
        for name, tracker in list(self.trackers.items()):
            self.attempt(name, lambda tracker=tracker: tracker.log_picture(image, path, step))

    def close(self) -> None:
        """Finish what is being written."""
        for name, tracker in list(self.trackers.items()):
            self.attempt(name, tracker.tracker.finish)
        self.trackers = {}

    def attempt(self, name: str, function: Callable[[], Any]) -> Any:
        """The result of ``function``; if it fails, None, a warning, and the tracker is left out from now on."""
        try:
            return function()
        except Exception as e:  # whatever a tracker raises: training is worth more
            self.trackers.pop(name, None)
            problem = " ".join(f"{type(e).__name__}: {e}".split())[:300]
            logger.warning(f"warning  {name} does not work, training goes on without it: {problem}")
            return None


def read_ids(run: Path) -> dict[str, str]:
    """What the trackers call the run; {} if it has not been tracked."""
    try:
        ids = json.loads((run / IDS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return ids if isinstance(ids, dict) else {}
