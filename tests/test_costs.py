"""The list of test functions that cost much, `tests/costs.txt`."""

from __future__ import annotations

import ast

from support.costs import LEAST, TESTS, listed


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
