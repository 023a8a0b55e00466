"""Fixtures and markers that many tests share."""

import collections
import contextlib
import ctypes
import gc
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Processes of tests keep compiled modules where an environment forbids it: to compile them again takes a
# fifth of the time in which `xmem serve` starts.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# One thread per worker of pytest-xdist; tests and their processes that need more set it.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Ray runs its workers at a niceness of 15: beside the other workers of pytest-xdist they would hardly run.
os.environ.setdefault("RAY_worker_niceness", "0")

# All Rays of a process share one token: Ray keeps the first that it read, also for a Ray started later.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# Without fastbins, as in processes that only track: see `pipeline.base.malloc`.
with contextlib.suppress(OSError, AttributeError, TypeError):
    ctypes.CDLL(None).mallopt(1, 0)

from support import costs
from support.needs import needs, selected_by
from support.servers import s3_server  # noqa: F401

# Before any test imports torch: see `xmem_core.openmp`.
import xmem_core as _core  # noqa: F401

sys.dont_write_bytecode = False  # this process too, see above

# Of pytest-xdist's workers themselves (see `pytest_xdist_setupnodes`), not of the processes that tests start.
_TUNABLES = "glibc.malloc.tcache_count=200:glibc.malloc.tcache_max=4096"
if "PYTEST_XDIST_WORKER" in os.environ and os.environ.get("GLIBC_TUNABLES") == _TUNABLES:
    del os.environ["GLIBC_TUNABLES"]

# Test machines may be busy, so no test has a deadline.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


_with_ray: set[Path] = set()
"""Files with tests that use `local_ray`."""


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Leave modules and tests out of all garbage collections: there are half a million objects of them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
        # By default every 700 new objects are looked through: a twentieth of the time of all tests.
        gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark tests by their needs.

    Each worker of pytest-xdist collects all tests: where nothing selects by needs, they do not look for them.

    On pytest-xdist's workers, files with tests that use `local_ray` come first, since one worker runs all of
    them; then the files that cost most, so that the workers end together.
    """
    seconds = costs.listed()
    of_files: dict[Path, float] = collections.defaultdict(float)
    for name, cost in seconds.items():
        of_files[costs.TESTS / name.partition("::")[0]] += cost
    on_worker = "PYTEST_XDIST_WORKER" in os.environ
    with_needs = not on_worker or selected_by(config.option.markexpr, config.option.keyword)
    for item in items:
        if not isinstance(item, pytest.Function):
            continue
        if with_needs:
            fixtures = (f.func for group in item._fixtureinfo.name2fixturedefs.values() for f in group)
            for marker in sorted({m for function in (item.function, *fixtures) for m in needs(function)}):
                item.add_marker(marker)
        if "local_ray" in item.fixturenames:
            item.add_marker("ray")
            _with_ray.add(item.path)
        if costs.name_of(item) in seconds:
            item.add_marker("slow")
    if on_worker:
        items.sort(key=lambda item: (item.path not in _with_ray, -of_files[item.path], item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Start the workers with larger caches of small freed blocks: a twentieth of the time of a step."""
    os.environ.setdefault("GLIBC_TUNABLES", _TUNABLES)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, have one worker run all files with `local_ray`."""
    if config.getoption("dist") != "loadfile":
        return None
    from support.one_ray import OneRay

    return OneRay(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--measure-costs", action="store_true", help="update tests/costs.txt: support/costs.py")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--measure-costs"):
        config.pluginmanager.register(costs.Measuring())
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and config.args_source is config.ArgsSource.TESTPATHS:
        # Each begins elsewhere, so that in a fresh clone it finds most test files compiled by the others.
        # `pytest_collection_modifyitems` makes their orders equal.
        paths = [str(path) for path in sorted(costs.TESTS.rglob("test_*.py"))]
        first = len(paths) * int(worker) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
        config.args = paths[first:] + paths[:first]


@pytest.fixture(autouse=True)
def _process_restored() -> Iterator[None]:
    """Undo what the command line sets in the test's process: log handlers, their level, torch's threads."""
    root, torch = logging.root, sys.modules.get("torch")
    handlers, level, threads = root.handlers[:], root.level, torch.get_num_threads() if torch else 0
    if "pipeline.tracking.files.track" in sys.modules:
        from support import opened

        opened.share()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    if torch and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.path not in _with_ray:
        _stop_ray()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # extensions complain of what is left over
    _stop_ray()
    if forked := sys.modules.get("support.forked"):
        forked.stop()


def _stop_ray() -> None:
    """Stop the Ray of `local_ray`: other tests start one themselves, or expect that none runs."""
    if shared := sys.modules.get("support.shared_ray"):
        shared.stop()


# torch and ray are imported by the fixtures: most tests do not need them.


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray with three CPUs in this process, without dashboard; see `support.shared_ray`."""
    from support import shared_ray

    shared_ray.start()
    yield
    shared_ray.clear()


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


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `xmem` with the given arguments in this process: exit code, standard output and error."""
    from jobs.cli.app import main

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return run
