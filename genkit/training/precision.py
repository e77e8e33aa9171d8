"""The arithmetic of networks outside training: fp32, TF32 or bf16."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from genkit.core import Cond, Generator, Noise

Precision = Literal["fp32", "tf32", "bf16"]


def require_precision(precision: Precision, device: torch.device) -> None:
    """``ValueError`` if the device has no such arithmetic."""
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision: given tf32, which only CUDA devices have; allowed on {device.type}: fp32, bf16")


@contextlib.contextmanager
def network_precision(nets: Mapping[str, nn.Module], precision: Precision, device: torch.device) -> Iterator[None]:
    """Run the forward passes of ``nets`` in a precision while the context lasts.

    With bf16 only the networks compute in it, by autocast, and what they return is float32: the arithmetic of samplers
    and guidance stays as it is. TF32 concerns all matrix products and convolutions on the device.
    """
    entered: list[Any] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        entered.append(torch.autocast(device.type, torch.bfloat16))
        entered[-1].__enter__()

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        entered.pop().__exit__(None, None, None)
        return output.float() if isinstance(output, Tensor) and output.dtype == torch.bfloat16 else output

    handles = []
    products: Any = torch.backends.cuda.matmul
    convolutions: Any = torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    try:
        if precision == "bf16":
            for net in nets.values():
                handles += [net.register_forward_pre_hook(enter), net.register_forward_hook(leave, always_call=True)]
        elif precision == "tf32":
            products.allow_tf32 = convolutions.allow_tf32 = True
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def tensor_precision(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run all that the context contains in a precision: bf16 by autocast, TF32 by the device's settings."""
    with network_precision({}, precision, device), torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
        yield


def with_precision(
    generate: Generator, nets: Mapping[str, nn.Module], precision: Precision, device: torch.device
) -> Generator:
    """``generate``, with the forward passes of ``nets`` in a precision. ``ValueError`` if the device lacks it."""
    require_precision(precision, device)
    if precision == "fp32":
        return generate

    def draw(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
        with network_precision(nets, precision, device):
            return generate(z, cond, noise)

    return draw
