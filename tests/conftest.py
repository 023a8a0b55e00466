"""Fixtures and markers that many tests share."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# One thread per worker of pytest-xdist; tests and their processes that need more set it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# All Rays of a process share one token: Ray keeps the first that it read, also for a Ray started later.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

from support.needs import needs
from support.servers import s3_server  # noqa: F401

# Before any test imports torch: see `xmem_core.openmp`.
import xmem_core as _core  # noqa: F401

# Test machines may be busy, so no test has a deadline.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their needs; on pytest-xdist's workers, run the files with long tests first."""
    long: set[Path] = set()
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        fixtures = (f.func for group in item._fixtureinfo.name2fixturedefs.values() for f in group)
        for marker in sorted({m for function in (item.function, *fixtures) for m in needs(function)}):
            item.add_marker(marker)
        if any(item.get_closest_marker(name) for name in ("slow", "chaos", "ray")):
            long.add(item.path)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.path not in long)


# torch is imported by the fixtures: most tests do not need it.


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: with small tensors more threads only wait, and last bits depend on their number."""
    from support.threads import torch_threads

    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a tiny model's weights, see `tiny.tiny_weights`."""
    from support.tiny import tiny_weights

    return tiny_weights(tmp_path_factory.mktemp("model"))
