"""Shape inference for operations on PyTorch's meta device (tensors without data), without its compiler.

PyTorch runs many of these operations by Python code that imports its compiler (torch._dynamo) or what that
imports (sympy): over a second of CPU time in each process that starts to track. The few that the networks use
are therefore done here; all others are left to the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ELEMENTWISE = frozenset(
    (
        *("add", "sub", "rsub", "mul", "div", "pow", "sqrt", "rsqrt", "reciprocal", "sin", "cos"),
        *("relu", "hardtanh", "clamp", "sigmoid", "tanh", "logit", "_safe_softmax"),
        *("bitwise_and", "bitwise_not", "ge"),
    )
)
_COMPARING = frozenset({"ge"})
_FILLING = frozenset({"fill_", "zero_", "normal_", "uniform_", "masked_fill_", "copy_"})


class Shapes(TorchDispatchMode):
    """Within it, operations on tensors of the meta device do not import PyTorch's compiler."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the compiler would be imported to be told to skip `__torch_dispatch__`

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = outcome(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if out is None else out


def outcome(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """What an operation returns, by the shapes of its arguments; None if that is left to the meta device.

    Args:
        func: an overload of `torch.ops.aten`.
        args, kwargs: its arguments, as `__torch_dispatch__` gets them. In-place operations return the first.
    """
    name: str = func.overloadpacket.__name__
    if "out" in kwargs:
        return None
    if name in _FILLING or (name.endswith("_") and name[:-1] in _ELEMENTWISE):
        return args[0]
    if name in _ELEMENTWISE:
        return _elementwise([arg for arg in args if isinstance(arg, Tensor)], comparing=name in _COMPARING)
    rule = _RULES.get(name)
    return rule(*args, **kwargs) if rule else None


def _elementwise(tensors: list[Tensor], *, comparing: bool) -> Tensor | None:
    dtype = tensors[0].dtype
    if any(tensor.dtype != dtype for tensor in tensors):
        return None
    if not dtype.is_floating_point and dtype != torch.bool:
        return None  # quotients and roots of integers are floating-point numbers
    shape = np.broadcast_shapes(*(tuple(tensor.shape) for tensor in tensors))  # torch's imports sympy
    dtype = torch.bool if comparing else dtype
    # In the layout of the first argument that has one.
    first = next((tensor for tensor in tensors if sum(side > 1 for side in tensor.shape) > 1), tensors[0])
    if first.shape == shape and not first.is_contiguous():
        return _alike(first, dtype)
    return first.new_empty(shape, dtype=dtype)


def _like(x: Tensor, *, dtype: torch.dtype | None = None, **others: Any) -> Tensor | None:
    """`empty_like`, `zeros_like` and `ones_like` without other arguments than a dtype."""
    others.pop("pin_memory", None)
    if any(value is not None for value in others.values()):
        return None
    return _alike(x, dtype)


def _alike(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor in the same layout; `torch.empty_like` imports sympy."""
    dtype = dtype or x.dtype
    longer = [(t, s) for t, s in zip(x.stride(), x.shape, strict=True) if s != 1]
    step = 1
    for stride, side in sorted(longer):
        if stride < step:  # overlaps
            return torch.empty_like(x, dtype=dtype)
        if stride > step:  # gaps
            in_order = longer == sorted(longer, reverse=True)
            return x.new_empty(x.shape, dtype=dtype) if in_order else torch.empty_like(x, dtype=dtype)
        step *= side
    return torch.empty_strided(tuple(x.shape), x.stride(), dtype=dtype, device=x.device)


def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    if any(tensor.dtype != first.dtype or tensor.dim() != first.dim() for tensor in tensors):
        return None
    shape = list(first.shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return first.new_empty(shape)


def _stack(tensors: list[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    if any(tensor.dtype != first.dtype for tensor in tensors):
        return None
    shape = list(first.shape)
    shape.insert(dim % (first.dim() + 1), len(tensors))
    return first.new_empty(shape)


def _mean(
    x: Tensor, dims: list[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    return x.new_empty(_reduced(x, dims or range(x.dim()), keepdim), dtype=dtype)


def _total(
    x: Tensor, dims: list[int] | int | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor | None:
    """`sum` and `prod`."""
    if dtype is None and not x.dtype.is_floating_point:
        return None  # of another type
    return _mean(x, [dims] if isinstance(dims, int) else dims, keepdim, dtype=dtype)


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor | None:
    return x.new_empty(x.shape) if x.is_contiguous() and not half_to_float else None


def _truth(x: Tensor, dim: int | None = None, keepdim: bool = False) -> Tensor:
    """`all` and `any`."""
    return x.new_empty(_reduced(x, range(x.dim()) if dim is None else (dim,), keepdim), dtype=torch.bool)


def _reduced(x: Tensor, dims: Iterable[int], keepdim: bool) -> list[int]:
    chosen = {dim % x.dim() for dim in dims}
    return [1 if dim in chosen else side for dim, side in enumerate(x.shape) if keepdim or dim not in chosen]


def _arange(*bounds: int, dtype: torch.dtype | None = None, **others: Any) -> Tensor | None:
    if not all(isinstance(bound, int) for bound in bounds):
        return None
    return torch.empty(len(range(*bounds)), dtype=dtype or torch.int64, device="meta")


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    *others: Any,
) -> Tensor | None:
    if transposed or x.dim() != 4 or not len(stride) == len(padding) == len(dilation) == 2:
        return None
    sides = [
        (side + 2 * p - d * (kernel - 1) - 1) // s + 1
        for side, kernel, s, p, d in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    return x.new_empty((x.shape[0], weight.shape[0], *sides)) if min(sides) > 0 else None


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


def _batch_norm(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised; mean and deviation of each channel."""
    return _alike(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


def _layer_norm(x: Tensor, normalized: list[int], *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised; mean and deviation over the last dimensions."""
    shape = _reduced(x, range(x.dim() - len(normalized), x.dim()), True)
    return _alike(x), x.new_empty(shape), x.new_empty(shape)


def _upsample(x: Tensor, size: list[int], align_corners: bool, *scales: float | None) -> Tensor:
    return _resized(x, size)


def _avg_pool(x: Tensor, kernel: list[int], stride: Sequence[int] = (), *others: Any) -> Tensor | None:
    """Of windows that neither overlap nor reach beyond the image."""
    if others or x.dim() != 4 or len(kernel) != 2 or list(stride or kernel) != list(kernel):
        return None
    sides = [side // width for side, width in zip(x.shape[2:], kernel, strict=True)]
    return _resized(x, sides) if min(sides) > 0 else None


def _max_pool(
    x: Tensor, kernel: list[int], stride: Sequence[int] = (), padding: Sequence[int] = (), *others: Any
) -> tuple[Tensor, Tensor] | None:
    """The maxima and their places."""
    if others or x.dim() != 4 or not len(kernel) == len(stride) == len(padding) == 2:
        return None
    parts = zip(x.shape[2:], kernel, stride, padding, strict=True)
    sides = [(side + 2 * p - width) // s + 1 for side, width, s, p in parts]
    return (_resized(x, sides), _resized(x, sides, torch.int64)) if min(sides) > 0 else None


def _resized(x: Tensor, size: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    layout = torch.contiguous_format
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    return torch.empty(*x.shape[:2], *size, dtype=dtype or x.dtype, device=x.device, memory_format=layout)


_RULES: dict[str, Callable[..., Any]] = {
    "empty_like": _like,
    "zeros_like": _like,
    "ones_like": _like,
    "cat": _cat,
    "stack": _stack,
    "mean": _mean,
    "amax": _mean,
    "amin": _mean,
    "sum": _total,
    "prod": _total,
    "_softmax": _softmax,
    "all": _truth,
    "any": _truth,
    "arange": _arange,
    "addmm": _addmm,
    "avg_pool2d": _avg_pool,
    "max_pool2d_with_indices": _max_pool,
    "convolution": _convolution,
    "native_batch_norm": _batch_norm,
    "native_layer_norm": _layer_norm,
    "upsample_bilinear2d": _upsample,
}
