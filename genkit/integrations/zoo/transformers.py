"""DiT (Peebles & Xie 2023) and SiT (Ma et al. 2024) in the layout of their authors' state dicts.

Their features are in another order than ours, because their positions are: columns before rows, sine before cosine. The
order is changed once in all weights that read or write a token, so that the network is the same function. The last
layer's bias, which they have for each pixel of a patch, becomes a part of the shift before it.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from genkit.backbones import DiT
from genkit.backbones.diffusers import shift_time_embedding
from genkit.backbones.embed import grid_positions
from genkit.backbones.presets import DIT_SIZES
from genkit.core import Label, Objective, Spec
from genkit.integrations.zoo.foreign import ForeignModel, Hints, reflect_time, take, wave_rates
from genkit.objectives import DDPM, Flow

EPS = 1e-6  # of their layer norms


def read_dit(tensors: dict[str, Tensor], hints: Hints) -> ForeignModel:
    """A DiT: noise of DDPM's linear schedule, of which it is told the index."""
    model = read_transformer(tensors, hints, "dit", DDPM(), 1000.0)
    name = "trunk.cond.start.layer1.weight"
    weight = model.tensors[name]
    told = shift_time_embedding(weight, wave_rates(weight.shape[1] // 2).float(), True, 1.0)  # index + 1 = 1000 t
    return with_tensors(model, {name: told})


def read_sit(tensors: dict[str, Tensor], hints: Hints) -> ForeignModel:
    """A SiT: the velocity of linear paths from noise at time 0 to data at time 1."""
    model = read_transformer(tensors, hints, "sit", Flow(), 1.0)
    name = "trunk.cond.start.layer1.weight"
    weight = model.tensors[name]
    told = reflect_time(weight, wave_rates(weight.shape[1] // 2))
    return with_tensors(model, {name: told, "last.weight": -model.tensors["last.weight"]})


def with_tensors(model: ForeignModel, changed: dict[str, Tensor]) -> ForeignModel:
    """``model`` with other values of some tensors."""
    tensors = {**model.tensors, **changed}
    return ForeignModel(model.objective, model.backbone, model.spec, tensors, model.latent, model.notes)


def read_transformer(
    tensors: dict[str, Tensor], hints: Hints, kind: str, objective: Objective, time_scale: float
) -> ForeignModel:
    """The tensors of a DiT by genkit's names, told the time as the layout does."""
    get = partial(take, tensors, kind=kind)
    patches, positions = get("x_embedder.proj.weight"), get("pos_embed")[0]
    width, channels, patch = patches.shape[:3]
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    grid = math.isqrt(len(positions))
    quarter = torch.arange(width).view(4, -1)
    order = quarter.flip(0).flatten()  # cosine of rows, sine of rows, then those of columns
    if not torch.allclose(positions[:, order], grid_positions((grid, grid), width), atol=1e-4):
        raise ValueError(f"file: its positions are not the fixed ones of {kind}; genkit has no others there")
    table = get("y_embedder.embedding_table.weight")
    out = {
        "trunk.patches.weight": patches[order],
        "trunk.patches.bias": get("x_embedder.proj.bias")[order],
        "trunk.cond.embed.on_label.table.weight": table[:-1],
        "trunk.cond.embed.on_label.null": table[-1],
    }
    for i, name in ((0, "layer1"), (2, "layer2")):
        for part in ("weight", "bias"):
            out[f"trunk.cond.start.{name}.{part}"] = get(f"t_embedder.mlp.{i}.{part}")
    for i in range(depth):
        theirs, ours = f"blocks.{i}", f"trunk.blocks.{i}"
        out[f"{ours}.attention.kv.weight"] = get(f"{theirs}.attn.qkv.weight")[:, order]
        out[f"{ours}.attention.kv.bias"] = get(f"{theirs}.attn.qkv.bias")
        out[f"{ours}.layer1.weight"] = get(f"{theirs}.mlp.fc1.weight")[:, order]
        out[f"{ours}.layer1.bias"] = get(f"{theirs}.mlp.fc1.bias")
        for part in ("weight", "bias"):
            out[f"{ours}.attention.out.{part}"] = get(f"{theirs}.attn.proj.{part}")[order]
            out[f"{ours}.layer2.{part}"] = get(f"{theirs}.mlp.fc2.{part}")[order]
            out[f"{ours}.emb.{part}"] = reorder_chunks(get(f"{theirs}.adaLN_modulation.1.{part}"), order)
    for part in ("weight", "bias"):
        out[f"trunk.emb_last.{part}"] = reorder_chunks(get(f"final_layer.adaLN_modulation.1.{part}"), order)
    # rows of the last layer are (row, column, channel) of a patch; a second half of channels is a variance
    weight, bias = get("final_layer.linear.weight"), get("final_layer.linear.bias")
    weight = weight[:, order].view(patch, patch, -1, width)
    learned_variance = weight.shape[2] == 2 * channels
    weight, bias = weight[:, :, :channels], bias.view(patch, patch, -1)[:, :, :channels]
    out["last.weight"], out["last.bias"] = weight.permute(3, 2, 0, 1).contiguous(), torch.zeros(channels)
    out["trunk.emb_last.bias"] = torch.cat([
        out["trunk.emb_last.bias"][:width] + solve_shift(weight.flatten(0, 2), bias.flatten()),
        out["trunk.emb_last.bias"][width:],
    ])  # fmt: skip
    if tensors:
        raise ValueError(f"file: has {sorted(tensors)[0]}, which {kind} does not have; is it of another kind?")
    hidden = out["trunk.blocks.0.layer1.bias"].shape[0]
    backbone = DiT(
        width=width, depth=depth, patch=patch, head_size=head_size(hints, depth, width), ratio=hidden // width,
        waves=out["trunk.cond.start.layer1.weight"].shape[1] // 2, time_scale=time_scale, norm_eps=EPS,
    )  # fmt: skip
    spec = Spec((channels, grid * patch, grid * patch), {"label": Label(len(table) - 1)})
    notes = ("its learned variance is left out",) if learned_variance else ()
    return ForeignModel(objective, backbone, spec, out, latent=True, notes=notes)


def reorder_chunks(value: Tensor, order: Tensor) -> Tensor:
    """Rows of a layer whose output is several vectors of features, ``[k D, ...]``, each in another order."""
    return value.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)


def solve_shift(weight: Tensor, bias: Tensor) -> Tensor:
    """The smallest shift ``[D]`` of the features that a layer ``[N, D]`` maps to ``bias`` ``[N]``.

    ``ValueError`` if there is none, in layers of which some outputs depend on others.
    """
    shift = torch.linalg.pinv(weight.double()) @ bias.double()
    if not torch.allclose(weight.double() @ shift, bias.double(), atol=1e-6):
        raise ValueError("file: the bias of its last layer cannot be expressed here, as some pixels of a patch are "
                         "functions of others; is it trained?")  # fmt: skip
    return shift.float()


def head_size(hints: Hints, depth: int, width: int) -> int:
    """Channels of a head: as given, or those of the paper's network of this size."""
    if hints.head_size:
        return hints.head_size
    for layers, channels, heads in DIT_SIZES.values():
        if (layers, channels) == (depth, width):
            return width // heads
    raise ValueError(f"head_size: {depth} blocks of {width} are none of the paper's networks; give --head-size")
