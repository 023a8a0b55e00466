"""Fixtures and markers that many tests share."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Beside other workers of pytest-xdist one thread each; tests and their processes that want more say so.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# All Rays of a process have one token: Ray keeps the first that it read, also for a Ray started later.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

from support.needs import needs
from support.servers import s3_server  # noqa: F401

# Before any test imports torch: see `xmem_core.openmp`.
import xmem_core as _core  # noqa: F401

# A busy machine is no fault of the code: no test is judged by the clock.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests by what they need; on pytest-xdist's workers, files whose tests take long come first."""
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


# torch is imported by the fixtures: most of the tests do without it.


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread: with small tensors several only wait for each other, and bits depend on their number."""
    from support.threads import torch_threads

    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file of a tiny model, see `tiny.tiny_weights`."""
    from support.tiny import tiny_weights

    return tiny_weights(tmp_path_factory.mktemp("model"))
