"""Settings of evaluations and sweeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge
from tyro.conf import Positional

from genkit.config import table
from genkit.core.device import DeviceName
from genkit.training.sampling import LoadOptions, Sampling

Count = Annotated[int, Ge(1)]


@dataclass(frozen=True)
class Evaluate(Sampling, LoadOptions):
    """Measure samples against a reference: of a run, of a folder, zip or npz, or of a data set such as cifar10:test."""

    what: Positional[tuple[str, ...]] = ()
    """RUN, or A B: what is measured, and the reference; with --compare two cards or runs."""
    rebuild: Literal["train", "test"] | None = None
    """Measure not drawn samples but what the run's code (a VAE's, a first stage's, a codec's) keeps of this split."""
    metrics: str | None = None
    """Names with commas between: fid, kid, prdc, is, fid_inf, accuracy, w2, sliced_w2, mmd; None: what suits."""
    n: Annotated[int, Ge(2)] | None = None
    """How many samples; None: all that there are, of a run 10000 pictures or 2000 vectors."""
    reference: str | None = None
    """train or test of a run's own data, any source, or an .npz of mu and sigma; None: train."""
    reference_n: Annotated[int, Ge(2)] | None = None
    """How many samples of the reference; None: all, of vectors no more than are measured (but 2000)."""
    features: Any = table("genkit.evaluation:FEATURES", "auto", kind="genkit.evaluation.metrics.features:Features")
    """What distances are taken in; auto: classifier for small grey pictures, inception for others, raw for vectors."""
    mode: Literal["clean", "legacy_tensorflow", "legacy_pytorch"] | None = None
    """Short for --features.mode: how pictures are resized for Inception."""
    weights: str | None = None
    """Short for --features.weights: the file of the network."""
    settings: Any = table("genkit.evaluation:SETTINGS", "usual")
    """Of the metrics."""
    data: Any = table("genkit.evaluation:OPTIONS", "named")
    """Where the data sets that A, B and --reference name lie."""
    compare: bool = False
    """Set two cards side by side, which may differ in nothing but the weights."""
    save_stats: str | None = None
    """Write mu and sigma of the samples to this .npz, as a later reference."""
    out: str | None = None
    """The card; None: into the run's eval folder, of data only printed."""
    json: bool = False
    """Print JSON alone."""


@dataclass(frozen=True)
class Sweep:
    """Find the averages, guidance, samplers and steps that draw well and fast: screen with few, confirm with many."""

    run: Positional[str]
    """The run's folder, such as runs/latest."""
    metric: str | None = None
    """What decides, such as fid, kid, recall or w2; None: fid of pictures, w2 of vectors."""
    ema: tuple[str, ...] = ()
    """Averaged weights, by decay, and "none"; without: the slowest."""
    guidance: tuple[float, ...] = (1.0,)
    """Scales; 1: none."""
    interval: tuple[str, ...] = ("all",)
    """Where guidance acts: all, or LOW-HIGH in sigma / (alpha + sigma), such as 0.2-0.8."""
    sampler: tuple[str, ...] = ()
    """Names in genkit.diffusion.samplers.SAMPLERS; without: the objective's usual one."""
    steps: tuple[Count, ...] = (5, 10, 20)
    """Steps of the samplers."""
    grid: str = "uniform"
    """Where the steps lie: a name in genkit.diffusion.samplers.GRIDS."""
    n: Annotated[int, Ge(2)] = 500
    """Samples that every combination is screened with."""
    confirm: Annotated[int, Ge(2)] = 5000
    """Samples that the best are measured with again."""
    spare: Annotated[int, Ge(0)] = 2
    """Combinations beside the Pareto list that are confirmed too: the next best."""
    reference: str = "train"
    """train or test of the run's own data, any source, or an .npz of mu and sigma."""
    features: Any = table("genkit.evaluation:FEATURES", "auto", kind="genkit.evaluation.metrics.features:Features")
    """What distances are taken in."""
    mode: Literal["clean", "legacy_tensorflow", "legacy_pytorch"] | None = None
    """Short for --features.mode."""
    weights: str | None = None
    """Short for --features.weights."""
    settings: Any = table("genkit.evaluation:SETTINGS", "usual")
    """Of the metrics."""
    data: Any = table("genkit.evaluation:OPTIONS", "named")
    """Where a data set that --reference names lies."""
    seed: Annotated[int, Ge(0)] = 0
    """Sample i has seed + i."""
    step: Annotated[int, Ge(0)] | None = None
    """Which checkpoint; None: the newest."""
    batch: Count = 64
    """Samples at a time."""
    device: DeviceName = "auto"
    """auto: cuda where there is one."""
    json: bool = False
    """Print JSON alone."""
