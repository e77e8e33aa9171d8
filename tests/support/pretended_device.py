"""A CUDA device that is only pretended: real numbers, computed on the CPU, with the name and the rules of ``cuda:0``.

    with PretendedDevice() as device:
        net.to(CUDA)(torch.randn(4, 2, device=CUDA))
    device.waits  # {(what, where): times} that the host would have waited for the device

Mixing devices raises :class:`DeviceMismatch`, as CUDA does. A wait is anything after which the host knows a number
that the device computed, or a copy from memory that is not pinned.

What it cannot find: errors of CUDA kernels (dtypes, alignment), and waits inside a kernel that is not in ``WAITS``.
"""

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import wraps
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
META = torch.device("meta")  # forward-mode derivatives compute shapes there
aten = torch.ops.aten
WAITS = {  # kernels whose shape of output, or check of it, depends on values: CUDA synchronises in them
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten.bincount, aten.histc,
    aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave, aten._linalg_eigh,
    aten._linalg_svd, aten.linalg_eig, aten.linalg_lstsq, aten._linalg_check_errors,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
current: "PretendedDevice | None" = None


class DeviceMismatch(RuntimeError):
    """Tensors of two devices in one operation."""


class Pretended(Tensor):
    """A tensor on the pretended device. Its kernels see ``inner``, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **layout, layout=inner.layout, device="cpu")
        made.inner = inner.detach()
        return made

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"Pretended({tuple(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = Pretended(self.inner.clone())
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if getattr(self, "_is_param", False) else copy
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        flat = tree_flatten((args, kwargs))[0]
        if any(isinstance(t, Tensor) and t.is_meta for t in flat):  # it asks for a shape only
            return func(*tree_map_only(Pretended, lambda t: t.inner.to(META), args), **kwargs)
        if current is not None:
            current.judge(func.overloadpacket, args, flat)
        inner_args, inner_kwargs = tree_map_only(Pretended, lambda t: t.inner, (args, kwargs))
        if kwargs.get("device") == META:
            return func(*inner_args, **inner_kwargs)
        if "device" in kwargs:
            inner_kwargs["device"] = CPU
        out = func(*inner_args, **inner_kwargs)
        out = tree_map_only(Tensor, lambda t: t if isinstance(t, Pretended) else Pretended(t), out)
        return return_and_correct_aliasing(func, args, kwargs, out)


class ToDevice(torch.autograd.Function):
    """A copy to the pretended device, through which gradients come back."""

    @staticmethod
    def forward(ctx, x):
        return Pretended(x.detach().clone())

    @staticmethod
    def backward(ctx, grad):
        return grad.inner if isinstance(grad, Pretended) else grad


class ToHost(torch.autograd.Function):
    """A copy from the pretended device."""

    @staticmethod
    def forward(ctx, x):
        return x.inner.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        return Pretended(grad)


class PretendedGenerator(torch.Generator):
    """A generator that knows which device it belongs to."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        self.belongs_to = CUDA if torch.device(device).type == "cuda" else CPU

    device = property(lambda self: self.belongs_to)


class PretendedDevice(TorchFunctionMode):
    """The context in which ``cuda`` is pretended. Outside it, tensors that were made in it may not be used."""

    def __init__(self):
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.kernels = 0

    # ------------------------------------------------------------------------------------------------ the rules
    def wait(self, what: str) -> None:
        self.waits[what, calling_line()] += 1

    def judge(self, packet, args, flat) -> None:
        """The rules for one kernel with these arguments, at least one of which is on the device."""
        self.kernels += 1
        others = [t for t in flat if isinstance(t, Tensor) and not isinstance(t, Pretended)]
        if packet in WAITS:
            self.wait(str(packet))
        if packet in INDEXING:
            return self.judge_index(packet, args)
        if packet is aten.copy_:
            return self.wait("copy_ between devices") if others else None
        if any(t.dim() and not is_missing_tangent(t) for t in others) and torch._C._current_autograd_node() is None:
            shapes = [f"{t.device.type} {list(t.shape)}" for t in flat if isinstance(t, Tensor)]
            raise DeviceMismatch(f"{packet}: {', '.join(shapes)} at {calling_line()}")
        return None

    def judge_index(self, packet, args) -> None:
        indices = [i for i in args[1] if isinstance(i, Tensor)]
        if not isinstance(args[0], Pretended):
            raise DeviceMismatch(f"{packet}: a table on the CPU with indices on the device at {calling_line()}")
        fills = packet is not aten.index and args[2].numel() == 1  # a number under a mask is a masked_fill
        if any(i.dtype in (torch.bool, torch.uint8) for i in indices) and not fills:
            self.wait("index by a mask")
        if not all(isinstance(i, Pretended) for i in indices):
            self.wait("index from the host")

    # ------------------------------------------------------------------------------------- what callers can ask
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return self.move(func, *args, **kwargs)
        if func is Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.is_pinned_here = True
            return pinned
        if isinstance(args[0] if args else None, Pretended):
            if func in (Tensor.numpy, Tensor.__array__):
                raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")
            if func is Tensor.tolist:
                self.wait("tolist")
                return args[0].inner.tolist()
            if func is Tensor.new_tensor:
                self.wait("new_tensor")
                return Pretended(torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}))
        if func is Tensor.backward:
            return self.backward(args[0], **kwargs)
        return self.make(func, args, kwargs)

    def backward(self, x, gradient=None, retain_graph=None, create_graph=False, inputs=None):
        """Backward with these rules in force: activations may be computed again."""
        gradient = torch.ones_like(x) if gradient is None else gradient
        TorchFunctionMode.__enter__(self)
        try:
            torch.autograd.graph._engine_run_backward(
                (x,), (gradient,), bool(retain_graph or create_graph), create_graph, inputs or (),
                allow_unreachable=True, accumulate_grad=True)  # fmt: skip
        finally:
            TorchFunctionMode.__exit__(self, None, None, None)

    def make(self, func, args, kwargs):
        """Call a function that may make numbers on the device it is given."""
        generator, wanted = kwargs.get("generator"), kwargs.get("device")
        if isinstance(generator, PretendedGenerator):
            tensors = [a for a in args if isinstance(a, Tensor)]
            target = torch.device(wanted) if wanted is not None else tensors[0].device if tensors else CPU
            if target.type != generator.device.type:
                raise DeviceMismatch(f"{func.__name__}: generator on {generator.device}, numbers on {target}")
        if wanted is None or torch.device(wanted).type != "cuda":
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0] if args else kwargs["data"], Pretended):
            self.wait(f"{func.__name__} of numbers on the host")
        out = func(*args, **{**kwargs, "device": CPU})
        self.kernels += 1
        return out if isinstance(out, Pretended) else Pretended(out)

    def move(self, func, x, *args, **kwargs):
        """``to``, ``cuda`` and ``cpu``."""
        target, dtype, quiet = {Tensor.cuda: CUDA, Tensor.cpu: CPU}.get(func), None, kwargs.pop("non_blocking", False)
        layout = {k: kwargs.pop(k) for k in ("memory_format", "copy") if k in kwargs}
        for a in () if target else (*args, *kwargs.values()):
            if isinstance(a, Tensor):
                target, dtype = a.device, a.dtype
            elif isinstance(a, torch.dtype):
                dtype = a
            elif isinstance(a, bool):
                quiet = quiet or a
            elif a is not None:
                target = torch.device(a)
        if (target or x.device).type != x.device.type:
            pinned = quiet and target.type == "cuda" and getattr(x, "is_pinned_here", False)
            if not pinned:
                self.wait(f"copy to {target.type}")
            if target.type == "cuda":
                x = ToDevice.apply(x) if x.requires_grad else Pretended(x.detach().clone())
            else:
                x = ToHost.apply(x) if x.requires_grad else x.inner.detach().clone()
        options = {**layout, **({"dtype": dtype} if dtype is not None and dtype != x.dtype else {})}
        return Tensor.to(x, **options) if options else x

    # -------------------------------------------------------------------------------------------- what is patched
    def __enter__(self):
        global current
        current, self.patches = self, ExitStack()
        autocast, optimizer, clip = torch.autocast, torch.optim.Optimizer, torch.nn.utils.clip_grad

        class CPUAutocast(autocast):
            def __init__(self, device_type, *args, **kwargs):
                super().__init__("cpu", *args, **kwargs)

        grouped = by_pretended_device(clip._group_tensors_by_device_and_dtype)
        own = staticmethod(by_pretended_device(optimizer._group_tensors_by_device_and_dtype))
        for target, name, value in (
            (torch, "Generator", PretendedGenerator),
            (torch, "autocast", CPUAutocast),
            (optimizer, "_group_tensors_by_device_and_dtype", own),
            (clip, "_group_tensors_by_device_and_dtype", grouped),
            (Tensor, "as_subclass", as_subclass),
            (torch.cuda, "get_rng_state", lambda device=CUDA: torch.get_rng_state()),
            (torch.cuda, "set_rng_state", lambda state, device=CUDA: torch.set_rng_state(state)),
        ):
            self.patches.enter_context(mock.patch.object(target, name, value))
        self.patches.enter_context(overwritten_parameters())
        return super().__enter__()

    def __exit__(self, *error):
        global current
        current = None
        self.patches.close()
        return super().__exit__(*error)


def is_missing_tangent(x: Tensor) -> bool:
    """Forward mode makes zeros, on the device that C++ sees, for a tensor without a tangent."""
    return forward_ad._current_level >= 0 and not bool(x.any())


plain_as_subclass = Tensor.as_subclass


def as_subclass(x: Tensor, kind: type) -> Tensor:
    """``x.as_subclass(kind)``, which stays on the device."""
    if not isinstance(x, Pretended):
        return plain_as_subclass(x, kind)
    both = type(f"Pretended{kind.__name__}", (kind, Pretended), {"__torch_function__": Pretended.__torch_function__})
    return Pretended.__new__(both, x.inner)


def by_pretended_device(group):
    """A function that groups tensors by device, with the pretended one named as it names itself."""

    @wraps(group)
    def grouped(*args, **kwargs):
        found = group(*args, **kwargs)
        on_device = {key: any(isinstance(t, Pretended) for ts in value[0] for t in ts) for key, value in found.items()}
        return {(CUDA, key[1]) if on_device[key] else key: value for key, value in found.items()}

    return grouped


@contextmanager
def overwritten_parameters():
    """``Module.to`` replaces parameters, whose storage cannot be swapped."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def calling_line() -> str:
    """``file.py:line`` of genkit's innermost frame."""
    frame = sys._getframe(1)
    while frame:
        path = frame.f_code.co_filename
        if "/genkit/" in path and "/site-packages/" not in path:
            return f"{path.rpartition('/genkit/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "no line of genkit"
