"""Published networks by name: the settings that a backbone's ``preset`` fills in where none are given.

Parameter counts are those of the papers within 0.5 % (``tests/backbones/test_presets.py`` has the table).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

Presets = Mapping[str, Mapping[str, Any]]

# Peebles & Xie 2023, table 1: depth, width and heads; SiT (Ma et al. 2024) has the same networks
DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
# Li & He 2025, table 9: depth, width, heads, bottleneck, and the block at which the class tokens join
JIT_SIZES = {"B": (12, 768, 12, 128, 4), "L": (24, 1024, 16, 128, 8), "H": (32, 1280, 16, 256, 10),
             "G": (40, 1664, 16, 256, 10)}  # fmt: skip


def dit_preset(size: str, patch: int) -> dict[str, Any]:
    """The settings of DiT-``size``/``patch``."""
    depth, width, heads = DIT_SIZES[size]
    return {"width": width, "depth": depth, "patch": patch, "head_size": width // heads, "ratio": 4, "waves": 128}


def jit_preset(size: str, patch: int) -> dict[str, Any]:
    """The settings of JiT-``size``/``patch``."""
    depth, width, heads, bottleneck, start = JIT_SIZES[size]
    modern = {"norm": "rms", "qk_norm": True, "mlp": "swiglu", "rope": True, "bottleneck": bottleneck,
              "class_tokens": 32, "class_tokens_start": start}  # fmt: skip
    return {"width": width, "depth": depth, "patch": patch, "head_size": width // heads, "ratio": 4, "waves": 128,
            **modern}  # fmt: skip


DIT_PRESETS: Presets = {
    **{f"{size}/{patch}": dit_preset(size, patch) for size in DIT_SIZES for patch in (2, 4, 8)},
    **{f"JiT-{size}/{patch}": jit_preset(size, patch) for size in JIT_SIZES for patch in (16, 32)},
}

NCSNPP = {"width": 128, "stem": 128, "mults": (2, 2, 2), "num_blocks": 4, "attention": (16,), "head_size": 256,
          "up_attention": "last", "scale_shift": False, "rescale": True, "dropout": 0.13}  # fmt: skip
ADM = {"attention": (32, 16, 8), "head_size": 64, "resample": "block"}

UNET_PRESETS: Presets = {
    # Ho et al. 2020, appendix B
    "ddpm-cifar10": {"width": 128, "mults": (1, 2, 2, 2), "num_blocks": 2, "attention": (16,), "head_size": 256,
                     "scale_shift": False, "dropout": 0.1, "waves": 64},
    # Song et al. 2021, appendix H, as tuned anew by Karras et al. 2022, table 7
    "ddpm++": {**NCSNPP, "resample": "block", "waves": 64},
    "ncsn++": {**NCSNPP, "resample": "fir", "residual_input": True, "waves": 128},
    # Dhariwal & Nichol 2021, appendix I
    "adm-64": {**ADM, "width": 192, "mults": (1, 2, 3, 4), "num_blocks": 3, "dropout": 0.1, "waves": 96},
    "adm-256": {**ADM, "width": 256, "mults": (1, 1, 2, 2, 4, 4), "num_blocks": 2, "dropout": 0.0, "waves": 128},
}  # fmt: skip

# Karras et al. 2024, table 2
EDM2_PRESETS: Presets = {
    name: {"width": width, "mults": (1, 2, 3, 4), "num_blocks": 3, "attention": (16, 8), "head_size": 64}
    for name, width in {"XS": 128, "S": 192, "M": 256, "L": 320, "XL": 384, "XXL": 448}.items()
}


def changed_fields(cfg: Any) -> dict[str, Any]:
    """The settings of ``cfg`` that differ from its preset's."""
    return {name: getattr(cfg, name) for name, value in cfg.presets[cfg.preset].items() if getattr(cfg, name) != value}


def require_filled(cfg: Any) -> None:
    """``ValueError`` if ``cfg`` names an unknown preset, or one whose settings were not filled in.

    ``genkit.config`` fills them in; the constructor of a dataclass cannot know which fields were given.
    """
    if cfg.preset is None:
        return
    family, presets = type(cfg).__name__, cfg.presets
    if cfg.preset not in presets:
        raise ValueError(f"{family}: preset is {cfg.preset!r}; allowed: {', '.join(presets)}")
    default = {f.name: f.default for f in fields(cfg) if f.default is not MISSING}
    if all(getattr(cfg, name) == default[name] for name in presets[cfg.preset]):
        raise ValueError(
            f"{family}: preset is {cfg.preset!r}, but all settings are the defaults; "
            f"try genkit.config.from_dict({family}, {{'preset': {cfg.preset!r}}})"
        )


def describe_preset(cfg: Any) -> Sequence[str]:
    """One line on the preset and the settings that replace its own; none without a preset."""
    if cfg.preset is None:
        return ()
    changes = ", ".join(f"{name} {value}" for name, value in changed_fields(cfg).items())
    return (f"preset   {cfg.preset}{f', but with {changes}' if changes else ''}",)
