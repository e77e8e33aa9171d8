"""How far samples in lower precision are from the same samples in fp32."""

from __future__ import annotations

from dataclasses import replace

from genkit.evaluation.sources import ModelSamples

SHIFT_SAMPLES = 16


def measure_shift(samples: ModelSamples, n: int = SHIFT_SAMPLES) -> dict[str, float]:
    """``{"n": n, "mean": ..., "max": ...}`` of |difference| between the first ``n`` samples and those in fp32.

    Numbers are of decoded samples: for images levels from 0 to 255. Both have the same seeds, conditions and settings.
    """
    exact = replace(samples, sampling=replace(samples.sampling, precision="fp32"))
    ours, theirs = (source.rows(0, n, n).x.double() for source in (samples, exact))
    difference = (ours - theirs).abs()
    return {"n": n, "mean": round(float(difference.mean()), 6), "max": round(float(difference.max()), 6)}
