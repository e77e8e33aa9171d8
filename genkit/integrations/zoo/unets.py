"""The U-Net of torchcfm (Tong et al. 2024), which is that of Dhariwal & Nichol 2021 in the layout of its state dict."""

from __future__ import annotations

import re
from functools import partial

import torch
from torch import Tensor

from genkit.backbones import UNet
from genkit.backbones.blocks import num_groups
from genkit.core import Condition, Label, Spec
from genkit.integrations.zoo.foreign import ForeignModel, Hints, reflect_time, take, wave_rates
from genkit.objectives import Flow

GROUPS = 32  # of all its norms
HEAD_SIZE, SIZE = 64, 32  # of the published networks, on CIFAR-10
RESIDUAL = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "emb", "out_layers.3": "conv2"}


def read_torchcfm(tensors: dict[str, Tensor], hints: Hints) -> ForeignModel:
    """A U-Net of torchcfm: the velocity of linear paths from noise at time 0 to data at time 1."""
    get = partial(take, tensors, kind="torchcfm")
    first = get("input_blocks.0.0.weight")
    width = tensors["time_embed.0.weight"].shape[1] if "time_embed.0.weight" in tensors else first.shape[0]
    size, head = hints.size or SIZE, hints.head_size or HEAD_SIZE
    levels = list_levels(tensors)
    blocks = max(len(level) for level in levels)
    mults = [tensors[f"input_blocks.{level[0]}.0.out_layers.0.weight"].shape[0] / width for level in levels]
    attention = tuple(
        size // 2**i for i, level in enumerate(levels) if f"input_blocks.{level[0]}.1.qkv.weight" in tensors
    )
    scale_shift = tensors["middle_block.0.emb_layers.1.bias"].shape[0] == 2 * int(mults[-1] * width)
    require_groups(tensors)
    out = {"down.first.weight": first, "down.first.bias": get("input_blocks.0.0.bias")}
    for i, name in ((0, "layer1"), (2, "layer2")):
        for part in ("weight", "bias"):
            out[f"cond.start.{name}.{part}"] = get(f"time_embed.{i}.{part}")
    waves = out["cond.start.layer1.weight"].shape[1] // 2
    out["cond.start.layer1.weight"] = reflect_time(out["cond.start.layer1.weight"], wave_rates(waves))
    conditions: dict[str, Condition] = {}
    notes: tuple[str, ...] = ()
    if "label_emb.weight" in tensors:
        table = get("label_emb.weight")
        conditions["label"] = Label(len(table))
        out["cond.embed.on_label.table.weight"], out["cond.embed.on_label.null"] = table, table.mean(0)
        notes = ("it knows no null class; here it is the mean of all",)
    count = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("input_blocks."))
    for i in range(1, count):
        copy_stage(tensors, f"input_blocks.{i}", f"down.steps.{i - 1}", head, scale_shift, out)
    copy_stage(tensors, "middle_block", "middle.stages.0", head, scale_shift, out)
    copy_block(tensors, "middle_block.2", "middle.stages.1.block", scale_shift, out)
    ups = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("output_blocks."))
    for i in range(ups):
        copy_stage(tensors, f"output_blocks.{i}", f"up.stages.{i}", head, scale_shift, out)
    for part in ("weight", "bias"):
        out[f"up.norm.{part}"] = get(f"out.0.{part}")
        out[f"up.last.{part}"] = -get(f"out.2.{part}")  # towards noise, not data
    if tensors:
        raise ValueError(f"file: has {sorted(tensors)[0]}, which torchcfm does not have; is it of another kind?")
    backbone = UNet(
        width=width, mults=tuple(map(int, mults)), num_blocks=blocks, attention=attention, head_size=head,
        scale_shift=scale_shift, waves=waves, time_scale=1.0,
    )  # fmt: skip
    spec = Spec((first.shape[1], size, size), conditions)
    return ForeignModel(Flow(), backbone, spec, out, latent=False, notes=notes)


def list_levels(tensors: dict[str, Tensor]) -> list[list[int]]:
    """The numbers of the blocks with residual layers, level by level: a convolution that halves is between two."""
    numbers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("input_blocks.")} - {0})
    levels: list[list[int]] = [[]]
    for i in numbers:
        if f"input_blocks.{i}.0.op.weight" in tensors:
            levels.append([])
        elif f"input_blocks.{i}.0.in_layers.0.weight" in tensors:
            levels[-1].append(i)
    if not all(levels) or len({len(level) for level in levels}) != 1:
        raise ValueError("file: is no U-Net of torchcfm whose levels have equal numbers of blocks and are halved by a "
                         "convolution; is it of another kind?")  # fmt: skip
    return levels


def require_groups(tensors: dict[str, Tensor]) -> None:
    """``ValueError`` unless genkit's norms have as many groups as those of the file, at all their channels."""
    for name, value in tensors.items():
        if re.search(r"(in_layers\.0|out_layers\.0|norm|^out\.0)\.weight$", name) and num_groups(len(value)) != GROUPS:
            raise ValueError(f"file: {name} has {len(value)} channels in {GROUPS} groups; genkit has "
                             f"{num_groups(len(value))} there; needs 128 channels or more")  # fmt: skip


def copy_stage(
    tensors: dict[str, Tensor], theirs: str, ours: str, head: int, scale_shift: bool, out: dict[str, Tensor]
) -> None:
    """A block, attention, and a change of size, of which each but the first may be absent."""
    if f"{theirs}.0.op.weight" in tensors:
        for part in ("weight", "bias"):
            out[f"{ours}.conv.{part}"] = tensors.pop(f"{theirs}.0.op.{part}")
        return
    copy_block(tensors, f"{theirs}.0", f"{ours}.block", scale_shift, out)
    if f"{theirs}.1.qkv.weight" in tensors:
        for part in ("weight", "bias"):
            out[f"{ours}.attention.norm.{part}"] = tensors.pop(f"{theirs}.1.norm.{part}")
            attention = f"{ours}.attention.self_attention"
            # theirs: for each head its queries, keys and values; ours: the queries of all heads, then keys, then values
            rows = tensors.pop(f"{theirs}.1.qkv.{part}")
            rows = rows.unflatten(0, (-1, 3, min(head, len(rows) // 3))).transpose(0, 1).flatten(0, 2)
            out[f"{attention}.kv.{part}"] = rows.flatten(1) if part == "weight" else rows
            projection = tensors.pop(f"{theirs}.1.proj_out.{part}")
            out[f"{attention}.out.{part}"] = projection.flatten(1) if part == "weight" else projection
    for i in (1, 2):
        if f"{theirs}.{i}.conv.weight" in tensors:
            for part in ("weight", "bias"):
                out[f"{ours}.up.conv.{part}"] = tensors.pop(f"{theirs}.{i}.conv.{part}")


def copy_block(tensors: dict[str, Tensor], theirs: str, ours: str, scale_shift: bool, out: dict[str, Tensor]) -> None:
    """A residual block. Where the embedding scales and shifts, a norm's own weight and bias become part of it."""
    get = partial(take, tensors, kind="torchcfm")
    for name, new in RESIDUAL.items():
        for part in ("weight", "bias"):
            out[f"{ours}.{new}.{part}"] = get(f"{theirs}.{name}.{part}")
    gain, offset = get(f"{theirs}.out_layers.0.weight"), get(f"{theirs}.out_layers.0.bias")
    if scale_shift:
        fold_scale_shift(out, ours, gain, offset)
    else:
        out[f"{ours}.norm2.weight"], out[f"{ours}.norm2.bias"] = gain, offset
    if f"{theirs}.skip_connection.weight" in tensors:
        for part in ("weight", "bias"):
            out[f"{ours}.skip.{part}"] = tensors.pop(f"{theirs}.skip_connection.{part}")


def fold_scale_shift(out: dict[str, Tensor], block: str, gain: Tensor, offset: Tensor) -> None:
    """Let the layer ``block.emb``, whose output scales and shifts a norm, do what the norm's weight and bias did."""
    # (1 + s) (g n + o) + b = (1 + s') n + b' with 1 + s' = (1 + s) g and b' = (1 + s) o + b
    for part, one in (("weight", 0.0), ("bias", 1.0)):
        scale, shift = out[f"{block}.emb.{part}"].chunk(2, 0)
        g, o = (v.view(-1, *(1,) * (scale.ndim - 1)) for v in (gain, offset))
        out[f"{block}.emb.{part}"] = torch.cat([(scale + one) * g - one, (scale + one) * o + shift])
