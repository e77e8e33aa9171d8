"""Definitions that all of genkit shares: protocols, conditions, batches. Read this package first.

Conventions, for the whole package:

- Time ``t`` is a ``[B]`` tensor in [0, 1]; **t = 0 is data, t = 1 is noise** (the source). Other conventions are
  converted where they enter the package.
- ``x0`` is data, ``x1`` the source (noise), ``x = alpha(t) x0 + sigma(t) x1`` a point on the path between them,
  ``tau = sigma / (alpha + sigma)`` its chart time, ``z`` a standard normal, ``cond`` the conditions.
- Images are floats in [-1, 1] inside the package, uint8 (or floats in [0, 1]) outside.
- Shapes: ``B`` samples in a batch, ``S`` the shape of one sample, ``L`` tokens, ``K`` sampler steps.
"""

from genkit.core.batch import Batch, Draw, expand, mean_flat, pool_weight, seed_of
from genkit.core.conditions import (
    NO_COND,
    RESERVED,
    SCALE_INPUT,
    SIZES_INPUT,
    Cond,
    Condition,
    Frames,
    Image,
    Label,
    Scalar,
    Spec,
    Text,
    Tokens,
    Vector,
    keep_target,
    spec_from_dict,
    spec_to_dict,
)
from genkit.core.protocols import (
    ELBO,
    Backbone,
    Codec,
    Data,
    Denoiser,
    Direction,
    Generator,
    Guidance,
    HasELBO,
    Loss,
    Noise,
    Objective,
    Parametrization,
    Phase,
    Prediction,
    ProbabilityPath,
    Sampler,
)

__all__ = [
    "ELBO", "NO_COND", "RESERVED", "SCALE_INPUT", "SIZES_INPUT", "Backbone", "Batch",
    "Codec", "Cond", "Condition", "Data",
    "Denoiser", "Direction", "Draw", "Frames", "Generator", "Guidance", "HasELBO", "Image", "Label", "Loss", "Noise",
    "Objective", "Parametrization", "Phase", "Prediction", "ProbabilityPath", "Sampler", "Scalar", "Spec", "Text",
    "Tokens", "Vector", "expand", "keep_target", "mean_flat", "pool_weight", "seed_of", "spec_from_dict",
    "spec_to_dict",
]  # fmt: skip
