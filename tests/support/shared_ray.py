"""One Ray for all test modules in a row that ask for it: the fixture `local_ray` of conftest.py."""

from __future__ import annotations

import contextlib
import gc
import os
import time
from pathlib import Path

import pytest
import ray
from support import forked
from support.forked_ray import ADDRESS, forking_workers

from jobs.cluster import connection
from jobs.cluster.local_ray import protected
from pipeline.api import slow_clients

CPUS = 3
_TESTS = Path(__file__).parents[1]
_FREE_SECONDS = 30.0
_running = contextlib.ExitStack()


def start() -> None:
    """Start it unless it runs. Its workers find the helpers of the tests and this checkout."""
    if ray.is_initialized():
        return
    stop()  # what is left of one that did not start, or that a test stopped
    # As `xmem batch` starts one: it is tried again on a busy machine, and Ray reads its token again, whatever
    # it has read for an earlier Ray.
    _running.enter_context(protected())
    _running.callback(ray.shutdown)
    with pytest.MonkeyPatch.context() as patch, forking_workers():
        patch.setenv(ADDRESS, forked.address())
        patch.setenv("PYTHONPATH", f"{_TESTS.parent}{os.pathsep}{_TESTS}")
        patch.setenv(slow_clients.VARIABLE, slow_clients.CALLBACK)  # read by proxies of Ray Serve only
        patch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # as `xmem serve` sets it
        connection._start(
            {
                "address": "local",
                "num_cpus": CPUS,
                "include_dashboard": False,
                "object_store_memory": 100 * 2**20,
                "log_to_driver": False,
                "configure_logging": False,
            }
        )


def clear() -> None:
    """Kill the actors that a module has left. If CPUs stay in use, stop Ray: the next module starts one."""
    if not ray.is_initialized():
        return
    for left in ray.util.list_named_actors(all_namespaces=True):
        with contextlib.suppress(ValueError):  # it has ended meanwhile
            ray.kill(ray.get_actor(left["name"], left["namespace"]))
    gc.collect()  # handles in cycles
    end = time.monotonic() + _FREE_SECONDS
    while ray.available_resources().get("CPU", 0) < CPUS:
        if time.monotonic() > end:
            stop()
            return
        time.sleep(0.05)


def stop() -> None:
    """Stop it if it runs; a Ray that a test has started by itself is left alone."""
    _running.close()
