"""Machines that come and go while a pool runs: raylets of a made-up cluster, on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from standin import CHUNK, Actor, committed, notes

from jobs.actions import Progress, SchedulerOptions
from jobs.cluster import unreported
from jobs.manifest import VideoJob
from jobs.ray_pool import RayPool, room_for
from jobs.scheduler import Scheduler
from pipeline.work import StreamSpec


@pytest.fixture
def cluster() -> Iterator[Any]:
    root = Path(__file__).parents[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{root}{os.pathsep}{root / 'tests'}")
        # The head runs no actors, so that it outlives them.
        made = Cluster(
            initialize_head=True,
            connect=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 * 2**20},
        )
        yield made
        ray.shutdown()
        made.shutdown()


def test_machines_go_and_come(
    tmp_path: Path, cluster: Any, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler = Scheduler(SchedulerOptions(chunk_frames=CHUNK, max_tries=1))
    names = [f"v{i}" for i in range(4)]
    for name in names:
        scheduler.add(VideoJob(StreamSpec(name, "standin://?chunks=40&ms=20")))
    first = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    machines: list[str] = []

    def budget(facts: Any) -> None:
        machines.append(facts["node_id"])

    def went_on(progress: Progress) -> None:
        if progress.chunks > 5 and len(machines) == 1 and first in cluster.worker_nodes:
            cluster.remove_node(first, allow_graceful=False)
            cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)

    pool = RayPool(
        scheduler,
        lambda: Actor.options(num_cpus=1).remote(str(tmp_path)),
        lambda: max(1, room_for(1)),
        budget=budget,
        on_progress=went_on,
        progress_seconds=0.0,
    )
    with unreported(), caplog.at_level(logging.WARNING):
        pool.run()
    assert {r.state for r in scheduler.results()} == {"finished"}, list(scheduler.results())
    assert {r.tries for r in scheduler.results()} == {1}
    assert notes(tmp_path, "twice") == []
    assert all(committed(tmp_path, n) == 40 for n in names)
    assert len(set(machines)) == 2
    said = [r.getMessage() for r in caplog.records if "worker 1" in r.getMessage()]
    assert any("process died" in text or "went away" in text for text in said)
    assert all("\n" not in text for text in said)
    assert all(len(text) < 200 for text in said)
    assert "raylet" not in capsys.readouterr().out
