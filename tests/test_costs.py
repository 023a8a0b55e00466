"""The list of test functions that cost much, `tests/costs.txt`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from support import costs
from support.costs import LEAST, TESTS, Measuring, listed


def test_all_that_is_listed_exists() -> None:
    seconds = listed()
    assert len(seconds) > 100
    assert all(cost >= LEAST for cost in seconds.values())
    there = {
        f"{path.relative_to(TESTS).as_posix()}::{part.name}"
        for path in TESTS.rglob("test_*.py")
        for part in ast.parse(path.read_text()).body
        if isinstance(part, ast.FunctionDef)
    }
    there |= {name.partition("::")[0] for name in there}
    assert sorted(seconds.keys() - there) == [], "renamed or removed: correct tests/costs.txt"


def test_fixtures_are_listed_by_their_file(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "LIST", tmp_path / "costs.txt")
    costs.LIST.write_text("9.0 another/test_file.py\n7.0 test_costs.py\n")
    clock = iter([0.0, 2.0, 2.0, 6.0, 6.0, 6.1])
    monkeypatch.setattr(costs, "_cpu_seconds", lambda: next(clock))
    measuring = Measuring()
    for _ in range(2):
        list(measuring.pytest_runtest_setup(request.node))
    list(measuring.pytest_runtest_call(request.node))
    measuring.pytest_sessionfinish()
    assert listed() == {"another/test_file.py": 9.0, "test_costs.py": 6.0}


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
