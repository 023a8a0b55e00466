"""The list of test functions that cost much, `tests/costs.txt`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from support import costs
from support.costs import LEAST, TESTS, Measuring, listed


def test_each_listed_function_exists() -> None:
    seconds = listed()
    assert len(seconds) > 100
    assert all(cost >= LEAST for cost in seconds.values())
    there = {
        f"{path.relative_to(TESTS).as_posix()}::{part.name}"
        for path in TESTS.rglob("test_*.py")
        for part in ast.parse(path.read_text()).body
        if isinstance(part, ast.FunctionDef)
    }
    assert sorted(seconds.keys() - there) == [], "renamed or removed: correct tests/costs.txt"


@pytest.mark.parametrize(("marker", "left"), [("ray", [9.0]), ("process", [9.0]), ("s3", [])])
def test_seconds_of_processes_that_are_not_seen_stay(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    marker: str,
    left: list[float],
) -> None:
    request.applymarker(marker)
    name = costs.name_of(request.node)
    monkeypatch.setattr(costs, "LIST", tmp_path / "costs.txt")
    costs.LIST.write_text(f"9.0 {name}\n")
    measuring = Measuring()
    list(measuring.pytest_runtest_call(request.node))  # a quick run, as far as this process sees
    measuring.pytest_sessionfinish()
    assert list(listed().values()) == left
