"""What a test needs, read from its code: other processes, Ray, an S3 server, an RTSP camera.

`conftest.py` marks each test accordingly, so that `-m "not ray and not process"` works without marking tests
by hand. A test needs what its function, its fixtures and the helpers under `tests/` that these call need.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

TESTS = Path(__file__).parents[1]

_OF_MODULES = {
    "subprocess": "process",
    "multiprocessing": "process",
    "ray": "ray",
}
# Helpers and functions of the project whose code does not show their needs.
_OF_NAMES = {
    "seaweedfs": "s3",
    "Camera": "rtsp",
    "ray_head": "ray",
    "Service": "ray",
    "connected": "ray",
}


@functools.cache
def needs(function: Any) -> frozenset[str]:
    """Return the markers of a test function or fixture, of `process`, `ray`, `s3` and `rtsp`."""
    found: set[str] = set()
    seen: set[int] = set()
    ahead = [inspect.unwrap(function)]
    while ahead:
        current = ahead.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        markers, used = _direct(current)
        found |= markers
        ahead += used
    return frozenset(found)


@functools.cache
def _direct(thing: Any) -> tuple[frozenset[str], tuple[Any, ...]]:
    """Return the direct needs of a function or class, and the test functions and classes it uses."""
    markers: set[str] = set()
    used: list[Any] = []
    for value in _mentioned(thing):
        if isinstance(value, ModuleType | str):
            name = value if isinstance(value, str) else value.__name__
            markers |= {marker for module, marker in _OF_MODULES.items() if name.split(".")[0] == module}
            continue
        if (getattr(value, "__module__", None) or "").split(".")[0] == "ray":
            markers.add("ray")
        if marker := _OF_NAMES.get(getattr(value, "__name__", "")):
            markers.add(marker)
        unwrapped = inspect.unwrap(value) if callable(value) else value
        if isinstance(unwrapped, FunctionType | type) and _is_ours(unwrapped):
            used.append(unwrapped)
    return frozenset(markers), tuple(used)


def _is_ours(thing: FunctionType | type) -> bool:
    module = inspect.getmodule(thing)
    return TESTS in Path(getattr(module, "__file__", None) or "/").parents


def _mentioned(thing: Any) -> Iterator[Any]:
    """Yield what the code of a function, or of all methods of a class, refers to; imports as module names."""
    if isinstance(thing, type):
        yield from thing.__mro__[1:]
        for member in vars(thing).values():
            for part in (member, *(getattr(member, n, None) for n in ("fget", "fset", "__func__"))):
                if isinstance(part, FunctionType):
                    yield from _mentioned(inspect.unwrap(part))
    elif isinstance(thing, FunctionType):
        for cell in thing.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not filled yet
                continue
        yield from _in_code(thing.__code__, thing.__globals__)


def _in_code(code: CodeType, names: dict[str, Any]) -> Iterator[Any]:
    last: Any = None
    for instruction in dis.get_instructions(code):
        at, last = last, None
        if instruction.opname == "IMPORT_NAME":
            yield instruction.argval
        elif instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            last = names.get(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(at, ModuleType):
            last = vars(at).get(instruction.argval)  # not getattr: modules may import lazily
        if last is not None:
            yield last
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _in_code(constant, names)
