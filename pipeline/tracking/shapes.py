"""Shape inference for operations on PyTorch's meta device (tensors without data), without its compiler.

PyTorch runs many of these operations by Python code that imports its compiler (torch._dynamo): over a second
of CPU time in each process that starts to track. The few that the networks use are therefore done here; all
others are left to the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

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
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    dtype = torch.bool if comparing else dtype
    # In the layout of the first argument that has one.
    first = next((tensor for tensor in tensors if sum(side > 1 for side in tensor.shape) > 1), tensors[0])
    if first.shape == shape and not first.is_contiguous():
        return torch.empty_like(first, dtype=dtype)
    return first.new_empty(shape, dtype=dtype)


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


def _addmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1])


def _batch_norm(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised; mean and deviation of each channel."""
    return torch.empty_like(x), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


def _layer_norm(x: Tensor, normalized: list[int], *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised; mean and deviation over the last dimensions."""
    shape = _reduced(x, range(x.dim() - len(normalized), x.dim()), True)
    return torch.empty_like(x), x.new_empty(shape), x.new_empty(shape)


def _upsample(x: Tensor, size: list[int], align_corners: bool, *scales: float | None) -> Tensor:
    layout = torch.contiguous_format
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        layout = torch.channels_last
    return torch.empty(*x.shape[:2], *size, dtype=x.dtype, device=x.device, memory_format=layout)


_RULES: dict[str, Callable[..., Any]] = {
    "cat": _cat,
    "stack": _stack,
    "mean": _mean,
    "all": _truth,
    "any": _truth,
    "arange": _arange,
    "addmm": _addmm,
    "native_batch_norm": _batch_norm,
    "native_layer_norm": _layer_norm,
    "upsample_bilinear2d": _upsample,
}
