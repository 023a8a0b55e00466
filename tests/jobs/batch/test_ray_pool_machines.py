"""Machines that join and leave while a pool runs: raylets of a simulated cluster on this machine."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from support.standin import CHUNK, Actor, committed, notes
from support.tiny import tiny_weights
from support.videos import make_video

from jobs.batch.ray_pool import RayPool, room_for
from jobs.batch.run import BatchOptions, run_batch
from jobs.cluster import local_ray
from jobs.cluster.connection import unreported
from jobs.scheduling.actions import Progress, SchedulerOptions
from jobs.scheduling.scheduler import Scheduler
from jobs.scheduling.video_job import VideoJob
from pipeline.base.errors import UsageError
from pipeline.distributed.messages import StreamSpec, WorkerSettings

_CLONE_NEWNS, _CLONE_FS = 0x00020000, 0x00000200


@pytest.fixture
def cluster() -> Iterator[Any]:
    root = Path(__file__).parents[3]
    with local_ray.protected():
        pass  # Ray reads RAY_AUTH_MODE again: commands of earlier tests set it after Ray had read it
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{root}{os.pathsep}{root / 'tests'}")
        # Its nodes, like a local Ray, without processes that nothing here asks.
        with local_ray.lean_start(logs=False):
            # The head runs no actors, so that it outlives them.
            made = Cluster(
                initialize_head=True,
                connect=True,
                head_node_args={
                    "num_cpus": 0,
                    "include_dashboard": False,
                    "object_store_memory": 100 * 2**20,
                },
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
    assert any("process died" in text or "was lost" in text for text in said)
    assert all("\n" not in text for text in said)
    assert all(len(text) < 200 for text in said)
    assert "raylet" not in capsys.readouterr().out


@pytest.fixture
def another_disk(cluster: Any, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Add a machine with one CPU and its own empty disk at `tmp_path / "out"`; returns its node id."""
    made: list[str] = []
    ready, over = threading.Event(), threading.Event()

    def live() -> None:
        try:
            # Of this thread alone, and of the processes that it starts; they end with it.
            if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS | _CLONE_FS):
                return
            private = ["mount", "--make-rprivate", "/"]
            disk = ["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "out")]
            if any(subprocess.run(command, capture_output=True).returncode for command in (private, disk)):
                return
            made.append(cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20).node_id)
        finally:
            ready.set()
        over.wait()

    thread = threading.Thread(target=live)

    def add() -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("signal.signal", lambda *given: None)  # Ray's are for the main thread only
            thread.start()
            ready.wait()
        if not made:
            pytest.skip("mount namespaces are for root only")
        return made[0]

    yield add
    over.set()
    if thread.is_alive():
        thread.join()


@pytest.mark.parametrize("tracked_before", [False, True])
def test_a_machine_with_another_disk_at_the_output_folder_is_refused(
    tmp_path: Path, cluster: Any, another_disk: Callable[[], str], tracked_before: bool
) -> None:
    """The second machine's processes run in their own mount namespace, with an empty disk at OUT."""
    out = tmp_path / "out"
    out.mkdir()
    video = make_video(tmp_path / "a.mp4", 200, width=64, height=48)
    prompts = {"version": 1, "objects": [{"id": 1, "polygons": [[5, 5, 40, 5, 40, 40, 5, 40]]}]}
    jobs = [VideoJob(StreamSpec(f"s{i}", str(video), prompts=prompts)) for i in range(2)]
    settings = WorkerSettings.of(str(out), model=tiny_weights(tmp_path), chunk_frames=4, threads=1)
    options = BatchOptions(actors=2)
    elsewhere: list[str] = []

    def add_other(standing: Progress | None = None, running: Any = None) -> None:
        if not elsewhere and (standing is None or standing.chunks):
            elsewhere.append(another_disk())

    if tracked_before:
        cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        report = run_batch(jobs, settings, options, on_progress=add_other)
        assert report.stopped is not None
        message = report.stopped.message
        assert report.exit_code == 1
        assert report.totals()["pending"] == 2
        assert {v["rows"] for v in json.loads(Path(report.location).read_text())["videos"]} != {0}
    else:
        add_other()
        with pytest.raises(UsageError) as caught:
            run_batch(jobs, settings, options)
        message = str(caught.value)
        assert not (out / "tracks").exists()
    assert f"(node {elsewhere[0][:12]}) has another folder at {out}: give --out a folder that all" in message
    assert list((out / "batches").glob(".*")) == []
