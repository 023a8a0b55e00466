"""Trackers in real Ray actors: the same rows for any assignment and after killed processes."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from ray.exceptions import RayActorError
from support.tiny import CAPPED_MEMORY
from support.videos import make_video
from test_worker import FRAMES, PROMPTS, ROWS, rows

from pipeline.base.records import FrameChunk
from pipeline.distributed.actors import live_actor, tracker_actor
from pipeline.distributed.messages import StreamSpec, StreamStatus, WorkerSettings
from pipeline.live.hub.hub import HubSettings
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.files.track import track
from pipeline.tracking.settings import TrackSettings

pytestmark = pytest.mark.usefixtures("local_ray")

CHUNK = 3


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("video") / "clip.mp4", FRAMES, width=158, height=122, gop=8)


@pytest.fixture(scope="module")
def one_pass(tmp_path_factory: pytest.TempPathFactory, video: Path, model: str) -> pa.Table:
    out = tmp_path_factory.mktemp("one-pass")
    prompts = PromptSet.from_record(PROMPTS)
    track(
        video, out, prompts, stream_id="cam", model=model, memory=CAPPED_MEMORY, threads=1, chunk_frames=1000
    )
    return rows(out)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def actors(out: Path, model: str) -> list[Any]:
    options = WorkerSettings.of(
        str(out), model=model, memory=CAPPED_MEMORY, chunk_frames=CHUNK, snapshot_chunks=2
    )
    return [tracker_actor(options) for _ in range(2)]


def spec(video: Path, stream_id: str) -> StreamSpec:
    return StreamSpec(stream_id, str(video), prompts=PROMPTS)


def test_workers_of_the_shared_ray_are_forked(actors: list[Any]) -> None:
    """Else they would start as ever, and only slow the tests down; see `support.forked_ray`."""
    parent = ray.get(actors[0].__ray_call__.remote(lambda self: os.getppid()))
    assert b"support.forked" in Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")


@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_of_actors_gives_the_rows_of_one_pass(
    actors: list[Any], video: Path, out: Path, one_pass: pa.Table, seed: int
) -> None:
    rng, stream_id = random.Random(seed), f"moving-{seed}"
    at, position, outcome = 0, 0, ""
    assert ray.get(actors[at].open.remote(spec(video, stream_id))).next_frame == 0
    while outcome != "finished":
        report = ray.get(actors[at].track.remote(FrameChunk(stream_id, position, position + CHUNK - 1)))
        outcome, position = report.outcome, report.next_frame
        assert outcome in ("tracked", "finished")
        if outcome == "tracked" and rng.random() < 0.6:
            # By reference: the state goes from actor to actor and not through this process.
            state = actors[at].release.remote(stream_id, rng.random() < 0.5)
            ray.wait([state])
            at = rng.randrange(2)
            assert ray.get(actors[at].open.remote(spec(video, stream_id), state)).next_frame == position
    assert report.rows == ROWS
    assert rows(out, stream_id).equals(one_pass)


def test_a_killed_actor_comes_back_and_rebuilds_from_the_store(
    actors: list[Any], video: Path, out: Path, one_pass: pa.Table
) -> None:
    rng, actor, stream_id = random.Random(5), actors[0], "killed"
    kills, outcome = 0, ""
    status, pid = _persistently(actor, spec(video, stream_id))
    position, reached = status.next_frame, 0
    while outcome != "finished":
        call = actor.track.remote(FrameChunk(stream_id, position, position + CHUNK - 1))
        if kills < 4 and rng.random() < 0.5:
            kills += 1
            ray.wait([call], timeout=rng.uniform(0, 0.05))
            os.kill(pid, signal.SIGKILL)
        try:
            report = ray.get(call)
        except RayActorError:
            outcome = "lost"
        else:
            outcome, position = report.outcome, report.next_frame
        if outcome in ("lost", "unknown"):
            status, pid = _persistently(actor, spec(video, stream_id))
            assert status.failure is None
            position = status.next_frame
            assert position >= reached  # what has rows keeps them
            reached = position
            outcome = "finished" if status.finished else "tracked"
    assert kills >= 2
    assert rows(out, stream_id).equals(one_pass)


def _persistently(actor: Any, wanted: StreamSpec) -> tuple[StreamStatus, int]:
    """Whether it is open, and the process id. Calls fail until Ray has restarted the actor."""
    for _ in range(100):
        try:
            status, facts = ray.get([actor.open.remote(wanted), actor.facts.remote()])
            return status, facts["pid"]
        except RayActorError:
            continue
    raise AssertionError("the actor did not come back")


def test_an_actor_whose_device_is_beyond_use_dies_and_comes_back(
    actors: list[Any], video: Path, out: Path, one_pass: pa.Table
) -> None:
    def break_device(tracker: Any) -> None:
        """Like an illegal access on a GPU: this call fails, and all later ones would."""

        def step_many(inputs: Any) -> Any:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        tracker._worker._segmenter.step_many = step_many

    actor, stream_id = actors[1], "device"
    status, before = _persistently(actor, spec(video, stream_id))
    assert ray.get(actor.track.remote(FrameChunk(stream_id, 0, CHUNK - 1))).outcome == "tracked"
    ray.get(actor.__ray_call__.remote(break_device))
    with pytest.raises(RayActorError):
        ray.get(actor.track.remote(FrameChunk(stream_id, CHUNK, 2 * CHUNK - 1)))
    status, after = _persistently(actor, spec(video, stream_id))
    assert after != before
    assert status.next_frame == CHUNK
    report = ray.get(actor.track.remote(FrameChunk(stream_id, CHUNK, (FRAMES // CHUNK) * CHUNK + CHUNK - 1)))
    assert report.outcome == "finished"
    assert rows(out, stream_id).equals(one_pass)


def test_an_actor_has_the_threads_it_was_promised(out: Path, model: str) -> None:
    actor = tracker_actor(WorkerSettings.of(str(out), model=model, threads=1), num_cpus=0)
    assert ray.get(actor.__ray_call__.remote(lambda self: os.environ["OMP_NUM_THREADS"])) == "1"
    ray.kill(actor)


def test_a_hub_on_a_single_machine_takes_the_cpus_that_are_free(out: Path, model: str) -> None:
    """`xmem serve` and `serve run` use the same default number of threads."""
    free = str(max(1, int(ray.available_resources().get("CPU", 1))))
    tracking = TrackSettings.of(model=model)
    settings = HubSettings(str(out), hub="free", tracking=tracking, calibrate=False)
    live = live_actor(settings, num_cpus=0, lifetime=None)
    assert ray.get(live.__ray_call__.remote(lambda self: os.environ["OMP_NUM_THREADS"])) == free
    threads = live.__ray_call__.remote(lambda self: self._hub.settings.tracking.threads)
    assert str(ray.get(threads)) == free
    ray.kill(live)


def test_an_actors_threads_wait_as_the_driver_says(
    out: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set before its process starts, and thus before anything imports torch there."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    tracker = tracker_actor(WorkerSettings.of(str(out), model=model, threads=1), num_cpus=0)
    live = live_actor(
        HubSettings(str(out), hub="spin", tracking=TrackSettings.of(model=model, threads=1)),
        num_cpus=0,
        lifetime=None,
    )
    for actor in (tracker, live):
        started_with = ray.get(
            actor.__ray_call__.remote(lambda self: Path("/proc/self/environ").read_bytes())
        )
        assert b"GOMP_SPINCOUNT=77" in started_with.split(b"\0")
        ray.kill(actor)
