"""Scheduling overhead: many videos on a local Ray with a tracker that does no arithmetic (`make bench`).

Chunks/s over the whole run, workers' starts left aside, and how much the driver's resident memory grows. Real
chunks take seconds; this says how many workers one driver can keep busy. Beside it, the scheduler alone: the
same events without Ray.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import os
import pstats
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import ray  # noqa: E402
from support.measured import resident_bytes  # noqa: E402
from support.scheduler_world import Film, World  # noqa: E402

from jobs.batch.ray_pool import RayPool  # noqa: E402
from jobs.scheduling.actions import Progress, SchedulerOptions  # noqa: E402
from jobs.scheduling.scheduler import Scheduler  # noqa: E402
from jobs.scheduling.video_job import VideoJob  # noqa: E402
from pipeline.base.records import FrameChunk  # noqa: E402
from pipeline.distributed.messages import ChunkReport, StreamSpec, StreamStatus  # noqa: E402

CHUNK = 100


class Nothing:
    """Tracks videos of so many chunks at no cost. Released videos store their progress in a file."""

    def __init__(self, folder: str, chunks: int) -> None:
        self.folder = Path(folder)
        self.frames = chunks * CHUNK
        self.at: dict[str, int] = {}

    def facts(self) -> dict[str, Any]:
        """Process and node, as far as the pool needs them."""
        return {"pid": os.getpid(), "node_id": ray.get_runtime_context().get_node_id()}

    def open(self, spec: StreamSpec, state: bytes | None = None) -> StreamStatus:
        """Open at the released position, or at the start."""
        try:
            self.at[spec.stream_id] = int((self.folder / spec.stream_id).read_text())
        except FileNotFoundError:
            self.at[spec.stream_id] = 0
        return StreamStatus(spec.stream_id, self.at[spec.stream_id], state_bytes=1)

    def track(self, ref: FrameChunk) -> ChunkReport:
        """Track nothing, at once."""
        at = self.at[ref.stream_id]
        if at != ref.first:
            return ChunkReport(ref.stream_id, "refused", next_frame=at)
        self.at[ref.stream_id] = at = ref.last + 1
        outcome = "finished" if at >= self.frames else "tracked"
        return ChunkReport(ref.stream_id, outcome, at, CHUNK, at, 0, 0.001)  # type: ignore[arg-type]

    def release(self, stream_id: str, to_store: bool = True) -> None:
        """Store the position."""
        (self.folder / stream_id).write_text(str(self.at.pop(stream_id)))

    def close(self, stream_id: str) -> None:
        """Forget the stream."""
        self.at.pop(stream_id, None)


def with_ray(
    videos: int, chunks: int, actors: int, settings: SchedulerOptions, profile: bool
) -> dict[str, Any]:
    """Scheduler, pool and Ray together."""
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    ray.init(
        num_cpus=actors,
        include_dashboard=False,
        object_store_memory=200 * 2**20,
        log_to_driver=False,
        configure_logging=False,
    )
    started: list[tuple[float, int]] = []
    marks: list[tuple[int, int]] = []  # videos that have ended, resident bytes

    def seen(progress: Progress) -> None:
        if progress.workers == actors and not started:
            started.append((time.perf_counter(), progress.chunks))
        marks.append((progress.finished, resident_bytes()))

    with tempfile.TemporaryDirectory() as folder:
        actor = ray.remote(max_restarts=-1, max_task_retries=0)(Nothing)
        gc.collect()
        empty = resident_bytes()
        scheduler = Scheduler(settings)
        for i in range(videos):
            scheduler.add(VideoJob(StreamSpec(f"video-{i:07d}", f"s3://bucket/folder/video-{i:07d}.mp4")))
        full = resident_bytes()
        pool = RayPool(
            scheduler,
            lambda: actor.options(num_cpus=1).remote(folder, chunks),
            actors,
            on_progress=seen,
            progress_seconds=0.1,
        )
        profiler = cProfile.Profile()
        cpu = time.process_time()
        if profile:
            profiler.enable()
        pool.run()
        if profile:
            profiler.disable()
            pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(25)
        ended = time.perf_counter()
        cpu = time.process_time() - cpu
    gc.collect()
    after = resident_bytes()
    ray.shutdown()
    progress = scheduler.progress()
    if progress.finished != videos or progress.chunks != videos * chunks:
        raise RuntimeError(f"not all is done: {progress}")
    since, before = started[0]
    # Once workers run, Ray's own tables are there.
    early = next(rss for done, rss in marks if done >= videos // 10)
    return {
        "chunks_per_s": round((progress.chunks - before) / (ended - since)),
        "driver_cpu_us_per_chunk": round(cpu / progress.chunks * 1e6),
        "driver_mb": {
            "empty": round(empty / 1e6, 1),
            "with_all_videos": round(full / 1e6, 1),
            "tenth_done": round(early / 1e6, 1),
            "end": round(after / 1e6, 1),
            "peak": round(max(rss for _, rss in marks) / 1e6, 1),
        },
        "growth_bytes_per_video": round((after - early) / (videos - videos // 10)),
    }


def alone(videos: int, chunks: int, workers: int) -> dict[str, Any]:
    """The scheduler in a simulated world, which costs about as much itself."""
    options = SchedulerOptions(chunk_frames=CHUNK)
    gc.collect()
    empty = resident_bytes()
    world = World([], options, workers)
    for i in range(videos):
        film = Film(f"video-{i:07d}", chunks)
        world.films[film.name] = film
        world.scheduler.add(film.job())
    full = resident_bytes()
    calls = 0
    begun = time.process_time()
    while not world.scheduler.done:
        for action in world.scheduler.actions(0.0):
            world.machines[action.worker].calls.append(action)  # type: ignore[arg-type]
        for number, machine in world.machines.items():
            while machine.calls:
                calls += 1
                world.complete(number)
        world.tracked.clear()
        world.opened.clear()
        world.released.clear()
    spent = time.process_time() - begun
    return {
        "calls": calls,
        "cpu_us_per_call": round(spent / calls * 1e6, 1),
        "waiting_bytes_per_video": round((full - empty) / videos),
        "workers": workers,
    }


def main() -> None:
    """Print the results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=int, default=10_000)
    parser.add_argument("--chunks", type=int, default=10)
    parser.add_argument("--actors", type=int, default=4)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--alone", action="store_true", help="the scheduler only, without Ray")
    options = parser.parse_args()
    found: dict[str, Any] = {
        "videos": options.videos,
        "chunks_each": options.chunks,
        "cpus": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "scheduler_alone": alone(min(options.videos, 10_000), options.chunks, 16),
    }
    if not options.alone:
        settings = SchedulerOptions(chunk_frames=CHUNK, depth=options.depth, max_streams=options.streams)
        found["with_ray"] = {
            "actors": options.actors,
            "depth": options.depth,
            "streams": options.streams,
            **with_ray(options.videos, options.chunks, options.actors, settings, options.profile),
        }
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
