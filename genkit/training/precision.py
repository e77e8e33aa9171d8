"""The arithmetic of networks: fp32, TF32, bf16 or fp16, and compiled networks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from genkit.core import Cond, Generator, Noise, Spec
from genkit.core.device import has_fast_bf16, warn_of_emulated_bf16

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
AUTOCAST: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}  # the others need no autocast


def require_precision(precision: str, device: torch.device) -> None:
    """``ValueError`` if the device has no such arithmetic; a warning if it emulates it."""
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(f"precision: given tf32, which only CUDA devices have; allowed on {device.type}: fp32, bf16")
    if precision in AUTOCAST and not has_autocast(AUTOCAST[precision], device.type):
        raise ValueError(f"precision: given {precision}, which torch does not have on {device.type} here; take fp32")
    if precision == "bf16":
        warn_of_emulated_bf16("precision: bf16", device)


def pick_precision(name: str, device: torch.device, spec: Spec) -> str:
    """``auto`` is bf16 if the device is fast at it, but fp32 for vectors, whose small networks gain nothing.

    ``ValueError`` if the device lacks a precision that is named.
    """
    require_precision(name, device)
    if name != "auto":
        return name
    return "bf16" if len(spec.shape) > 1 and has_fast_bf16(device) else "fp32"


@lru_cache
def has_autocast(dtype: torch.dtype, device: str) -> bool:
    """Whether matrix products under autocast to ``dtype`` work on a device; some versions of torch only warn."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.autocast(device, dtype):
                return (torch.ones(1, 1, device=device) @ torch.ones(1, 1, device=device)).dtype == dtype
    except RuntimeError:
        return False


@contextlib.contextmanager
def use_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Compute in a precision while the context lasts: matrix products and convolutions, of whichever network.

    bf16 and fp16 are autocast, so results may have these types; TF32 concerns CUDA devices only. ``ValueError`` if the
    device lacks the precision.
    """
    require_precision(precision, device)
    if precision == "tf32":
        with allow_tf32():
            yield
    elif precision in AUTOCAST:
        with torch.autocast(device.type, AUTOCAST[precision]):
            yield
    else:
        yield


@contextlib.contextmanager
def use_codec_precision(precision: str, device: torch.device) -> Iterator[None]:
    """:func:`use_precision` for the first stages of latent models; fp32 for fp16, whose range common ones exceed."""
    with use_precision("fp32" if precision == "fp16" else precision, device):
        yield


@contextlib.contextmanager
def allow_tf32() -> Iterator[None]:
    """Let CUDA multiply matrices and convolve in TF32, which keeps 10 bits of 23."""
    products: Any = torch.backends.cuda.matmul
    convolutions: Any = torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = True
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


@contextlib.contextmanager
def network_precision(nets: Mapping[str, nn.Module], precision: Precision, device: torch.device) -> Iterator[None]:
    """Run the forward passes of ``nets`` in a precision while the context lasts.

    With bf16 and fp16 only the networks compute in it, by autocast, and what they return is float32: the arithmetic of
    samplers and guidance stays as it is. TF32 concerns all matrix products and convolutions on the device.
    """
    require_precision(precision, device)
    if precision not in AUTOCAST:
        with use_precision(precision, device):
            yield
        return
    entered: list[Any] = []

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        entered.append(torch.autocast(device.type, AUTOCAST[precision]))
        entered[-1].__enter__()

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        entered.pop().__exit__(None, None, None)
        return output.float() if isinstance(output, Tensor) and output.dtype == AUTOCAST[precision] else output

    handles = []
    try:
        for net in nets.values():
            handles += [net.register_forward_pre_hook(enter), net.register_forward_hook(leave, always_call=True)]
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def use_forwards(nets: Mapping[str, nn.Module], forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace the ``forward`` of networks while the context lasts; their hooks stay outside it."""
    try:
        for name, net in nets.items():
            net.forward = forwards[name]
        yield
    finally:
        for net in nets.values():
            net.__dict__.pop("forward", None)


def with_networks(
    generate: Generator,
    nets: Mapping[str, nn.Module],
    precision: Precision,
    device: torch.device,
    compiled: bool = False,
) -> Generator:
    """``generate``, with the forward passes of ``nets`` in a precision, and compiled on request.

    ``ValueError`` if the device lacks the precision.
    """
    require_precision(precision, device)
    if precision == "fp32" and not compiled:
        return generate
    forwards = {name: torch.compile(net.forward) if compiled else net.forward for name, net in nets.items()}

    def draw(z: Tensor, cond: Cond, noise: Noise | None = None) -> Tensor:
        with use_forwards(nets, forwards), network_precision(nets, precision, device):
            return generate(z, cond, noise)

    return draw
