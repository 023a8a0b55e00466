"""The parts of a network compiled by `torch.compile`, a function of its own for each shape of input.

On a GPU the functions run as CUDA graphs: an operation then costs no launch by the host, which takes most of
the time of small networks. On a CPU, Inductor writes C++, for which the machine needs a compiler.

What is compiled depends on a call's own shapes alone, never on which calls came before: a process that takes
over a stream compiles the same functions again, and gets the same bits.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

MOST_SHAPES = 32
"""Number of shapes for which a part is kept compiled. The one not used for the longest time makes room."""
MOST_OBJECTS = 8
"""Calls with more objects in an image run without being compiled: each number of objects is a shape."""
# Of a network, those that it has are compiled. All take and return tensors of fixed shapes.
_PARTS = ("encode_key", "encode_value", "read_objects", "decode")
# Position of the argument that has a dimension for objects, (B, O, ...).
_OWN = {"encode_value": 3, "read_objects": 1, "decode": 1}
_ADVICE = (
    "on a CPU torch.compile needs a C++ compiler (g++ or clang++), on a GPU Triton and a C compiler: install "
    "them, or turn compilation off (--no-compile)"
)


def compile_parts(network: nn.Module, device: torch.device) -> bool:
    """Compile the encoders and the decoder of a network that is prepared for inference, in place.

    A part is compiled for a shape when it first gets input of it, which takes up to a minute. Its results are
    copies, since CUDA graphs write each result into the same memory. Where compiling fails, that shape runs
    without, and a warning is logged, once.

    Returns:
        whether anything is compiled; False, with a warning, where torch.compile does not work at all.
    """
    options = compile_options(device)
    try:
        _compiled(_probe, options)(torch.zeros(8, device=device))
    except Exception as error:
        logger.warning("torch.compile does not work here, nothing is compiled: %s; %s", _said(error), _ADVICE)
        return False
    warn_once = _Once()
    for name in _PARTS:
        if hasattr(network, name):
            setattr(network, name, CompiledPart(name, getattr(network, name), options, warn_once))
    return True


def compile_options(device: torch.device) -> dict[str, Any]:
    """The arguments of `torch.compile` for a device: CUDA graphs on a GPU."""
    return {"mode": "reduce-overhead"} if device.type == "cuda" else {}


def _probe(x: Tensor) -> Tensor:
    return torch.relu(x + 1)


class _Once:
    """Logs each kind of warning once; repetitions are for debugging."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, message: str, *values: object) -> None:
        logger.log(logging.DEBUG if message in self._said else logging.WARNING, message, *values)
        self._said.add(message)


class CompiledPart:
    """A method of a network, compiled for each shape of its input. Called like the method.

    Args:
        name: the method's name.
        function: the method.
        options: further arguments of `torch.compile`.
        warn: logs what fails.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], options: dict[str, Any], warn: Callable[..., None]
    ) -> None:
        self._name, self._function, self._options, self._warn = name, function, options, warn
        # By shape; None: it could not be compiled.
        self._known: OrderedDict[Hashable, Callable[..., Any] | None] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, *given: Any, **flags: Any) -> Any:
        # Streams' numbers of objects come in any combination.
        ragged = flags.pop("counts", None)
        if ragged is not None:
            return self._function(*given, **flags, counts=ragged)
        if self._name in _OWN and given[_OWN[self._name]].shape[1] > MOST_OBJECTS:
            return self._function(*given, **flags)
        shape = (_shape(given), *sorted(flags.items()))
        compiled = self._for(shape, flags)
        if compiled is not None:
            try:
                return _copied(compiled(*given))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                with self._lock:
                    self._known[shape] = None
                self._warn(
                    "%s runs without being compiled, at least for one shape of input: %s; %s",
                    self._name, _said(error), _ADVICE,
                )  # fmt: skip
        return self._function(*given, **flags)

    def _for(self, shape: Hashable, flags: dict[str, Any]) -> Callable[..., Any] | None:
        with self._lock:
            if shape not in self._known:
                if len(self._known) >= MOST_SHAPES:
                    self._known.popitem(last=False)
                    self._warn(
                        "%s has been compiled for %d shapes; the oldest makes room, and is compiled again "
                        "when it is next needed. Track videos of many sizes with a fixed --size, or turn "
                        "compilation off (--no-compile)",
                        self._name, MOST_SHAPES,
                    )  # fmt: skip
                self._known[shape] = _compiled(self._function, self._options, flags)
            self._known.move_to_end(shape)
            return self._known[shape]


def _compiled(
    function: Callable[..., Any], options: dict[str, Any], flags: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The function, compiled for the shape of its first arguments.

    It has a code object of its own: torch counts the versions of a code object, and refuses the ninth.
    """
    # Not above: it takes seconds, and few networks are compiled.
    from torch._dynamo.eval_frame import remove_from_cache

    flags = flags or {}

    def call(*given: Any) -> Any:
        return function(*given, **flags)

    code = call.__code__.replace()
    own = FunctionType(code, call.__globals__, call.__name__, None, call.__closure__)
    made: Callable[..., Any] = torch.compile(own, fullgraph=True, dynamic=False, **options)
    # Torch would keep what it compiled, with its memory.
    weakref.finalize(made, remove_from_cache, code).atexit = False
    return made


def _shape(x: Any) -> Hashable:
    """What a function is compiled for: of tensors all but their values. Strides decide which kernels run."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype
    return tuple(map(_shape, x)) if isinstance(x, tuple) else x


def _copied(x: Any) -> Any:
    """The same with copies of all tensors."""
    if isinstance(x, Tensor):
        return x.clone()
    if isinstance(x, tuple):
        return tuple(map(_copied, x))
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{field.name: _copied(getattr(x, field.name)) for field in fields(x)})
    return x


def _said(error: Exception) -> str:
    """An error in one line; torch's are pages long, and the second line may say what the first announces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"
