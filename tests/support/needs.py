"""What a test needs, read from its code: other processes, Ray, an S3 server, an RTSP camera.

`conftest.py` marks each test accordingly, so that `-m "not ray and not process"` works without marking tests
by hand. A test needs what its function, its fixtures and the helpers under `tests/` that these call need.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

TESTS = Path(__file__).parents[1]

MARKERS = ("process", "ray", "s3", "rtsp")

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


def selected_by(*expressions: str) -> bool:
    """Whether expressions of pytest's options `-m` and `-k` may select tests by what they need."""
    # Part of a word counts, too: `-k` matches parts of names.
    return any(marker in expression for marker in MARKERS for expression in expressions)


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
    return _is_of_tests(thing.__module__)


@functools.cache
def _is_of_tests(module: str) -> bool:
    return TESTS in Path(getattr(sys.modules.get(module), "__file__", None) or "/").parents


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
    # Names only, as to read instructions takes many times as long: an attribute counts as the global of the
    # same name, and as an attribute of every module that the code refers to.
    modules = []
    for name in code.co_names:
        if name.split(".")[0] in _OF_MODULES:  # perhaps imported here
            yield name
        value = names.get(name)
        if isinstance(value, ModuleType):
            modules.append(value)
        if value is not None:
            yield value
    for module in modules:
        members = vars(module)  # not getattr: modules may import lazily
        yield from (members[name] for name in code.co_names if members.get(name) is not None)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _in_code(constant, names)
