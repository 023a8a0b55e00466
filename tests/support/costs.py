"""What tests cost: CPU seconds per test function, measured, in `tests/costs.txt`.

`conftest.py` marks the listed functions `slow` and starts the most expensive files first, so that the workers
of pytest-xdist end together. Fixtures are listed by the name of their file. To measure anew, in one process:

    python -m pytest --measure-costs

Processes of Ray, of jobs and of services are nobody's children that are waited for, and their seconds are not
seen so. Those of the functions that have them were measured with a cgroup's `cpuacct.usage`: such a
function's entry is raised by a new measurement, and never lowered or removed.
"""

from __future__ import annotations

import collections
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
LIST = TESTS / "costs.txt"
LEAST = 0.2
"""CPU seconds per case from which on a function is listed."""

LEAST_FIXTURES = 5.0
"""CPU seconds from which on a file's fixtures are listed."""

_WITH_OTHERS = ("ray", "process")
"""Markers of tests with processes that need not be children of pytest's."""


def listed() -> dict[str, float]:
    """CPU seconds of all cases of each function, by `path::function`, and of fixtures, by `path`.

    Paths are relative to `tests/`.
    """
    lines = (line.split() for line in LIST.read_text().splitlines())
    return {name: float(seconds) for seconds, name in lines}


def name_of(item: pytest.Item) -> str:
    """The name under which an item's function is listed."""
    return f"{file_of(item)}::{getattr(item, 'originalname', item.name)}"


def file_of(item: pytest.Item) -> str:
    """The name under which the fixtures of an item's file are listed."""
    return item.path.relative_to(TESTS).as_posix()


class Measuring:
    """A pytest plugin that replaces the list: adds, updates and removes the functions that ran."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = collections.defaultdict(list)
        self._fixtures: dict[str, float] = collections.defaultdict(float)
        self._with_others: set[str] = set()  # functions with processes that are not seen

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        before = _cpu_seconds()
        yield
        self._fixtures[file_of(item)] += _cpu_seconds() - before

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Measure this process and the children that it waited for; fixtures are shared and do not count."""
        before = _cpu_seconds()
        yield
        self._seconds[name_of(item)].append(_cpu_seconds() - before)
        if any(item.get_closest_marker(name) for name in _WITH_OTHERS):
            self._with_others.add(name_of(item))

    def pytest_sessionfinish(self) -> None:
        """Write the list."""
        found = listed()
        for name, seconds in self._seconds.items():
            before = found.pop(name, 0.0)
            if sum(seconds) >= LEAST * len(seconds):
                found[name] = sum(seconds)
            if name in self._with_others and before > found.get(name, 0.0):
                found[name] = before
        for name, cost in self._fixtures.items():
            found.pop(name, None)
            if cost >= LEAST_FIXTURES:
                found[name] = cost
        LIST.write_text("".join(f"{found[name]:.1f} {name}\n" for name in sorted(found)))


def _cpu_seconds() -> float:
    children = os.times()
    return time.process_time() + children.children_user + children.children_system
