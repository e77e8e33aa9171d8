"""The U-Nets of EDM (Karras et al. 2022) in the layout of its state dicts: DDPM++, NCSN++ and ADM.

Where its names say ``32x32_block0``, the side of a level is known from them. Labels enter DDPM++ and NCSN++ before the
layers of the time embedding, whose inputs are sines first there and cosines first here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from genkit.backbones import UNet
from genkit.backbones.blocks import BOX, FIR
from genkit.core import Condition, Label, Spec
from genkit.integrations.zoo.foreign import ForeignModel, Hints, take
from genkit.integrations.zoo.unets import fold_scale_shift
from genkit.objectives import EDM

KIND = "edm"
HEAD_SIZE = 64  # of ADM; the others have one head
PARTS = ("weight", "bias")


@dataclass(frozen=True)
class Levels:
    """What the names and shapes of a file say of its network."""

    sizes: tuple[int, ...]
    channels: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    """sizes with attention on the way down"""
    adm: bool
    """whether it is ADM"""


def read_edm(tensors: dict[str, Tensor], hints: Hints) -> ForeignModel:
    """A U-Net of EDM, preconditioned as in table 1 with ``sigma_data = 0.5``."""
    tensors = {name.removeprefix("model."): value for name, value in tensors.items()}
    get = partial(take, tensors, kind=KIND)
    levels = find_levels(tensors)
    if hints.size not in (None, levels.sizes[0]):
        raise ValueError(f"size: given {hints.size}, but the file is of {levels.sizes[0]}; leave it out")
    if hints.head_size and not levels.adm:
        raise ValueError(f"head_size: given {hints.head_size}, but DDPM++ and NCSN++ have one head; leave it out")
    settings: dict[str, Any] = {"resample": "fir" if pop_taps(tensors) == FIR else "block"}
    out: dict[str, Tensor] = {}
    for i, layer in enumerate(("layer1", "layer2")):
        for part in PARTS:
            out[f"cond.start.{layer}.{part}"] = get(f"map_layer{i}.{part}")
    width, waves = out["cond.start.layer1.bias"].shape[0] // 4, out["cond.start.layer1.weight"].shape[1] // 2
    conditions, notes = read_conditions(tensors, levels.adm, out)
    if not levels.adm:
        out["cond.start.layer1.weight"] = out["cond.start.layer1.weight"].roll(waves, 1)
        closed = 10_000 ** -torch.linspace(0, 1, waves, dtype=torch.float64)  # down to 1e-4 itself
        settings |= {"wave_rates": tuple(closed.tolist()), "early_conditions": True, "norm_eps": 1e-6, "rescale": True,
                     "scale_shift": False, "up_attention": "last"}  # fmt: skip
    if "map_noise.freqs" in tensors:
        settings["wave_rates"] = tuple((2 * torch.pi * get("map_noise.freqs")).tolist())
    if residual := any("aux_residual" in name for name in tensors):
        settings |= {"residual_input": True, "residual_border": True}
    stem = copy_down(tensors, levels, residual, out)
    copy_up(tensors, levels, out)
    if tensors:
        raise ValueError(f"file: has {sorted(tensors)[0]}, which {KIND} does not have; is it of another kind?")
    if any(c % width for c in levels.channels):
        raise ValueError(f"file: its levels have {levels.channels} channels, which are no multiples of {width}")
    backbone = UNet(
        width=width, stem=stem, mults=tuple(c // width for c in levels.channels), num_blocks=levels.blocks,
        attention=levels.attention, head_size=(hints.head_size or HEAD_SIZE) if levels.adm else max(levels.channels),
        waves=waves, time_scale=1.0, **settings,
    )  # fmt: skip
    size, channels = levels.sizes[0], out["down.first.weight"].shape[1]
    spec = Spec((channels, size, size), conditions)
    return ForeignModel(EDM(sigma_data=0.5), backbone, spec, out, latent=False, notes=notes)


def find_levels(tensors: dict[str, Tensor]) -> Levels:
    """The levels of a network. ``ValueError`` if the file has none, or a network that is none of the three."""
    blocks = [m for name in tensors if (m := re.fullmatch(r"enc\.(\d+)x\1_block(\d+)\.conv0\.weight", name))]
    sizes = sorted({int(m[1]) for m in blocks}, reverse=True)
    if not sizes:
        first = ", ".join(sorted(tensors)[:3])
        raise ValueError(f"file: has no enc.32x32_block0.conv0.weight, or of another size, which {KIND} has; it holds "
                         f"{first} ...; is it of another kind?")  # fmt: skip
    if unserved := next((name for name in tensors if re.search("aux_(down|skip|up)", name)), None):
        raise ValueError(f"file: has {unserved}, of an encoder or decoder with skips; allowed are DDPM++, NCSN++ and "
                         "ADM as EDM trained them")  # fmt: skip
    if sizes != [sizes[0] >> i for i in range(len(sizes))] or sizes[-1] < 4:
        raise ValueError(f"file: has levels of {', '.join(map(str, sizes))}; each must be half of the one before, and "
                         "the last 4 or more")  # fmt: skip
    return Levels(
        tuple(sizes),
        tuple(len(tensors[f"enc.{n}x{n}_block0.conv0.weight"]) for n in sizes),
        1 + max(int(m[2]) for m in blocks),
        tuple(n for n in sizes if f"enc.{n}x{n}_block0.qkv.weight" in tensors),
        "out_conv.weight" in tensors,
    )


def pop_taps(tensors: dict[str, Tensor]) -> tuple[int, ...]:
    """The taps of the filter of all changes of size, whose copies are removed from ``tensors``."""
    names = [name for name in tensors if name.endswith(".resample_filter")]
    kernels = [tensors.pop(name) for name in names]
    if not kernels:  # buffers, which some save without
        return FIR if any("aux_residual" in name for name in tensors) else BOX
    for taps in (BOX, FIR):
        line = torch.tensor(taps) / sum(taps)
        kernel = torch.outer(line, line)[None, None]
        if all(k.shape == kernel.shape and torch.allclose(k, kernel, atol=1e-3) for k in kernels):  # of float16, too
            return taps
    raise ValueError(f"file: {names[0]} and others are not all {BOX} or all {FIR}, which are the filters here")


def read_conditions(
    tensors: dict[str, Tensor], adm: bool, out: dict[str, Tensor]
) -> tuple[dict[str, Condition], tuple[str, ...]]:
    """Labels, and what is left out. Its null class is the label of zeros."""
    conditions: dict[str, Condition] = {}
    notes: list[str] = []
    if tensors.pop("map_augment.weight", None) is not None:
        notes.append("its inputs of augmentation are left out, as they are 0 in samples")
    if "map_label.weight" in tensors:
        table = tensors.pop("map_label.weight").T
        count, null = len(table), torch.zeros(table.shape[1])
        if not adm:
            null = take(tensors, "map_label.bias", KIND)
            table, null = (v.roll(v.shape[-1] // 2, -1) for v in (count**0.5 * table + null, null))
        out["cond.embed.on_label.table.weight"], out["cond.embed.on_label.null"] = table.contiguous(), null
        conditions["label"] = Label(count)
        notes.append("its null class is a label of zeros, which EDM did not train; guidance needs one that is trained")
    return conditions, tuple(notes)


def copy_down(tensors: dict[str, Tensor], levels: Levels, residual: bool, out: dict[str, Tensor]) -> int:
    """The way down; returns the channels of the first convolution."""
    step = 0
    for level, n in enumerate(levels.sizes):
        if level:
            copy_block(tensors, f"enc.{n}x{n}_down", f"down.steps.{step}.down", levels.adm, out)
            step += 1
        if level and residual:
            copy_parts(tensors, f"enc.{n}x{n}_aux_residual", f"down.inputs.{level - 1}.conv", out)
        for i in range(levels.blocks):
            theirs, ours = f"enc.{n}x{n}_block{i}", f"down.steps.{step}"
            copy_stage(tensors, theirs, ours, levels.adm, n in levels.attention, out)
            step += 1
    n = levels.sizes[0]
    copy_parts(tensors, f"enc.{n}x{n}_conv", "down.first", out)
    return len(out["down.first.bias"])


def copy_up(tensors: dict[str, Tensor], levels: Levels, out: dict[str, Tensor]) -> None:
    """The middle, the way up and the last layer."""
    bottom, top = levels.sizes[-1], levels.sizes[0]
    for i, attends in enumerate((True, False)):
        copy_stage(tensors, f"dec.{bottom}x{bottom}_in{i}", f"middle.stages.{i}", levels.adm, attends, out)
    stage = 0
    for n in reversed(levels.sizes):
        if n != bottom:  # it is a part of the last stage of the level below
            copy_block(tensors, f"dec.{n}x{n}_up", f"up.stages.{stage - 1}.up", levels.adm, out)
        for i in range(levels.blocks + 1):
            attends = n in levels.attention and (levels.adm or i == levels.blocks)
            copy_stage(tensors, f"dec.{n}x{n}_block{i}", f"up.stages.{stage}", levels.adm, attends, out)
            stage += 1
    copy_parts(tensors, "out_norm" if levels.adm else f"dec.{top}x{top}_aux_norm", "up.norm", out)
    copy_parts(tensors, "out_conv" if levels.adm else f"dec.{top}x{top}_aux_conv", "up.last", out)


def copy_stage(
    tensors: dict[str, Tensor], theirs: str, ours: str, adm: bool, attends: bool, out: dict[str, Tensor]
) -> None:
    """A residual block, and attention."""
    copy_block(tensors, theirs, f"{ours}.block", adm, out)
    if not attends:
        return
    copy_parts(tensors, f"{theirs}.norm2", f"{ours}.attention.norm", out)
    for part in PARTS:
        attention = f"{ours}.attention.self_attention"
        # theirs: for each channel its query, key and value; ours: the queries of all, then keys, then values
        rows = take(tensors, f"{theirs}.qkv.{part}", KIND).unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
        out[f"{attention}.kv.{part}"] = rows.flatten(1) if part == "weight" else rows
        projection = take(tensors, f"{theirs}.proj.{part}", KIND)
        out[f"{attention}.out.{part}"] = projection.flatten(1) if part == "weight" else projection


def copy_block(tensors: dict[str, Tensor], theirs: str, ours: str, adm: bool, out: dict[str, Tensor]) -> None:
    """A residual block. In ADM the embedding scales and shifts, and the second norm becomes part of it."""
    for name, new in {"norm0": "norm1", "conv0": "conv1", "affine": "emb", "norm1": "norm2", "conv1": "conv2"}.items():
        copy_parts(tensors, f"{theirs}.{name}", f"{ours}.{new}", out)
    if f"{theirs}.skip.weight" in tensors:
        copy_parts(tensors, f"{theirs}.skip", f"{ours}.skip", out)
    if adm:
        fold_scale_shift(out, ours, *(out.pop(f"{ours}.norm2.{part}") for part in PARTS))


def copy_parts(tensors: dict[str, Tensor], theirs: str, ours: str, out: dict[str, Tensor]) -> None:
    """Weight and bias of a layer."""
    for part in PARTS:
        out[f"{ours}.{part}"] = take(tensors, f"{theirs}.{part}", KIND)
