"""The state of optimizers in a checkpoint, to the last bit: tensors as named tensors, all else as JSON beside them.

The slots of a parameter may be tensors, numbers, texts, None, or lists and mappings of these, and so may what an
optimizer keeps in a group, such as the number of steps. A tensor is stored as ``PHASE/PARAMETER/SLOT``, one inside a
list as ``PHASE/PARAMETER/SLOT.0``. The file has an entry ``json``, bytes of UTF-8, if there is anything but tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from genkit.core import Objective
from genkit.core.tensors import copy_to_cpu
from genkit.training.optimizers.groups import phase_parameters
from genkit.training.optimizers.modes import take_trained
from genkit.training.shared_files import Piece
from genkit.training.state import State

COMMON = {"params", "lr", "weight_decay", "betas"}  # of a group: what the run's settings say
TENSOR = "tensor:"  # begins the text that stands for a tensor
JSON = "json"
STEP = "step"  # the slot of torch's optimizers that counts
PAIRS = "pairs:"  # in the JSON, the only key of a mapping whose keys are whole numbers
STRIDES = "/strides"  # in the JSON, the layouts of tensors that are not in the usual order, by name


def optimizer_pieces(objective: Objective, state: State) -> dict[str, Piece]:
    """The optimizers' state by name, as this rank has it."""
    pieces: dict[str, Piece] = {}
    record: dict[str, Any] = {}
    for phase, name, p, slots in stepped_parameters(objective, state):
        tensors: dict[str, Tensor] = {}
        values = {key: flatten(value, f"{phase}/{name}/{key}", tensors) for key, value in slots.items()}
        pieces |= {key: state.piece(value, p) for key, value in tensors.items()}
        if strides := {key: value.stride() for key, value in tensors.items() if not value.is_contiguous()}:
            record.setdefault(STRIDES, {}).update(strides)
        if others := {key: value for key, value in values.items() if not isinstance(slots[key], Tensor)}:
            record.setdefault(phase, {}).setdefault("slots", {})[name] = others
    for phase, optimizer in state.optimizers.items():
        of_groups: dict[str, Tensor] = {}
        if any(groups := dump_groups(optimizer, phase, of_groups)):
            record.setdefault(phase, {})["groups"] = groups
        pieces |= {key: Piece(copy_to_cpu(value), tuple(value.shape)) for key, value in of_groups.items()}
    if record:
        content = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)
        pieces[JSON] = Piece(content, tuple(content.shape))
    return pieces


def restore_optimizers(stored: Mapping[str, Tensor], objective: Objective, state: State) -> None:
    """Load what :func:`optimizer_pieces` gave, as whole tensors, into the optimizers of ``state``."""
    record = json.loads(bytes(stored[JSON].tolist())) if JSON in stored else {}
    if state.sharding is None:  # products of matrices depend on their layout, in the last bit
        strides = record.get(STRIDES, {})
        stored = {k: with_strides(v, strides[k]) if k in strides else v for k, v in stored.items()}
    for phase in objective.phases:
        if phase.name not in state.optimizers:
            continue
        optimizer, others = state.optimizers[phase.name], record.get(phase.name, {})
        for group, values in zip(optimizer.param_groups, others.get("groups", ()), strict=False):
            group.update(unflatten(values, stored))
        if hasattr(optimizer, "train"):  # the checkpoint was written in the mode of evaluation
            optimizer.train()  # type: ignore[attr-defined]
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, p in phase_parameters(phase, state.nets):
            prefix, share = f"{phase.name}/{name}/", state.share_of(p)
            nested = others.get("slots", {}).get(name, {})
            slots: dict[str, Any] = unflatten(nested, stored)
            for key, value in stored.items():
                slot = key.removeprefix(prefix)
                if key.startswith(prefix) and slot.partition(".")[0] not in nested:
                    slots[slot] = state.own_rows(value, p)
            group = group_of[id(share)]
            optimizer.state[share] = {k: place(v, group, p, counts=k == STEP) for k, v in slots.items()}
            take_trained(optimizer, share)


def stepped_parameters(
    objective: Objective, state: State
) -> Iterator[tuple[str, str, nn.Parameter, Mapping[str, Any]]]:
    """``(phase, name, parameter, slots)`` of all parameters that have been stepped."""
    for phase in objective.phases:
        for name, p in phase_parameters(phase, state.nets):
            if slots := state.optimizers[phase.name].state.get(state.share_of(p)):
                yield phase.name, name, p, slots


def flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """What JSON can hold of ``value``: its tensors go to ``tensors``, under names that begin with ``name``.

    ``ValueError`` for an object of another kind.
    """
    if isinstance(value, Tensor):
        tensors[name] = value
        return TENSOR + name
    if isinstance(value, Mapping):
        values = {k: flatten(v, f"{name}.{k}", tensors) for k, v in value.items()}
        if all(isinstance(k, str) for k in values):
            return values
        if all(type(k) is int for k in values):
            return {PAIRS: [list(pair) for pair in values.items()]}
        raise ValueError(f"optimizer: its state {name} has keys other than texts, which a checkpoint cannot hold; "
                         "choose another one")  # fmt: skip
    if isinstance(value, list | tuple):
        return [flatten(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(
        f"optimizer: its state {name} is a {type(value).__name__}, which a checkpoint cannot hold; choose another one"
    )


def unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`flatten`; tuples come back as lists."""
    if isinstance(value, str) and value.startswith(TENSOR):
        return tensors[value.removeprefix(TENSOR)]
    if isinstance(value, dict):
        pairs = value[PAIRS] if value.keys() == {PAIRS} else value.items()
        return {k: unflatten(v, tensors) for k, v in pairs}
    return [unflatten(v, tensors) for v in value] if isinstance(value, list) else value


def dump_groups(optimizer: torch.optim.Optimizer, name: str, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """What each group holds that is not the optimizer's default, such as the number of steps."""
    return [
        {
            key: flatten(value, f"{name}/groups/{i}.{key}", tensors)
            for key, value in group.items()
            if key not in COMMON and differs(value, optimizer.defaults.get(key, Ellipsis))
        }
        for i, group in enumerate(optimizer.param_groups)
    ]


def differs(value: Any, default: Any) -> bool:
    """Whether a value of a group is not the optimizer's default."""
    if isinstance(value, Tensor) or isinstance(default, Tensor):
        return value is not default
    return type(value) is not type(default) or value != default


def with_strides(value: Tensor, strides: Sequence[int]) -> Tensor:
    """A copy of a tensor in the layout that ``strides`` describe."""
    return torch.empty_strided(value.shape, tuple(strides), dtype=value.dtype).copy_(value)


def place(slot: Any, group: Mapping[str, Any], p: nn.Parameter, counts: bool = False) -> Any:
    """A slot where the optimizer has it: on the parameter's device, but a single number, and a count of steps, on the
    CPU unless the kernels read it on the device. Slots of a parameter that is a single number are where that is."""
    if isinstance(slot, Tensor):
        on_device = slot.ndim > 0 or group.get("fused") or group.get("capturable") or (p.ndim == 0 and not counts)
        return slot.to(p.device, copy=True) if on_device else slot  # a file's memory is not aligned
    if isinstance(slot, dict):
        return {k: place(v, group, p) for k, v in slot.items()}
    return [place(v, group, p) for v in slot] if isinstance(slot, list) else slot
