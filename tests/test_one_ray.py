"""Files with tests that use `local_ray` are given to one worker of pytest-xdist."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.one_ray import SHARED, OneRay, uses_local_ray

TESTS = Path(__file__).parent


def test_the_files_whose_tests_use_it_are_found(request: pytest.FixtureRequest) -> None:
    """Without collecting them, as the scheduler has to."""
    found = {path for path in TESTS.rglob("test_*.py") if uses_local_ray(path)}
    using = {item.path for item in request.session.items if "local_ray" in getattr(item, "fixturenames", ())}
    assert using <= found
    assert TESTS / "jobs/batch/test_batch.py" in found  # asks by `usefixtures`
    assert TESTS / "pipeline/distributed/test_serve.py" in found  # a fixture asks
    assert TESTS / "jobs/cluster/test_local_ray.py" not in found  # tests a module of this name
    assert Path(__file__) not in found


def test_they_are_one_unit_and_any_other_file_is_one_by_itself(pytestconfig: pytest.Config) -> None:
    scheduler = OneRay.__new__(OneRay)
    scheduler.config = pytestconfig
    units = [
        scheduler._split_scope(f"tests/{name}")
        for name in ("jobs/batch/test_batch.py::test_a[x::y]", "pipeline/distributed/test_serve.py::test_b",
                     "test_costs.py::test_c", "test_costs.py::test_d", "test_docs.py::test_e")
    ]  # fmt: skip
    assert units == [SHARED, SHARED, "tests/test_costs.py", "tests/test_costs.py", "tests/test_docs.py"]
