"""Condensed Ray errors, and retries of a Ray that does not start."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import ray

from jobs.cluster import connection as cluster
from jobs.cluster.connection import connected
from jobs.cluster.ray_errors import brief
from pipeline.base.errors import XmemError

SETUP = """runtime_env setup failed: Failed to set up runtime environment.
Traceback (most recent call last):
  File "/ray/agent.py", line 386, in _create
    await manager.create()
ValueError: inner

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/ray/packaging.py", line 700, in download
    raise RuntimeError("x")
RuntimeError: https://127.0.0.1:1/no.zip cannot be fetched
"""


def test_a_traceback_is_told_by_what_it_ends_with() -> None:
    assert brief(SETUP) == (
        "runtime_env setup failed: Failed to set up runtime environment. "
        "RuntimeError: https://127.0.0.1:1/no.zip cannot be fetched"
    )
    assert brief("one\n  line\n") == "one line"
    assert brief("") == ""
    long = brief("word " * 1000)
    assert len(long) == 300
    assert long.endswith(" ...")


class Starts:
    """A fake `ray.init` that fails a number of times, as Ray does on a busy machine."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0

    def __call__(self, **options: Any) -> None:
        self.calls += 1
        if self.calls <= self.failures:
            raise Exception("The current node timed out during startup.")


@pytest.mark.parametrize(("failures", "calls"), [(0, 1), (2, 3)])
def test_a_ray_that_does_not_start_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failures: int, calls: int
) -> None:
    starts = Starts(failures)
    monkeypatch.setattr(ray, "init", starts)
    monkeypatch.setattr(cluster, "resources", lambda: cluster.Resources((2,)))
    monkeypatch.setattr(cluster, "_START_WAITS", (0.0, 0.0))
    monkeypatch.setattr("jobs.cluster.local_ray.check_address", lambda: None)  # nothing was started
    with caplog.at_level(logging.WARNING), connected() as resources:
        assert resources.cpus == 2
    assert starts.calls == calls
    assert caplog.text.count("Ray did not start (The current node timed out during startup.)") == failures


def test_a_ray_that_never_starts_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(10)
    monkeypatch.setattr(ray, "init", starts)
    monkeypatch.setattr(cluster, "_START_WAITS", (0.0, 0.0))
    with (
        pytest.raises(
            XmemError, match=r"Ray cannot be started on .*timed out during startup.*try again later"
        ),
        connected(),
    ):
        pass
    assert starts.calls == 3
