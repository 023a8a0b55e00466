"""TrackerActor: a `Worker` inside a Ray actor, several streams to a device.

Ray restarts an actor whose process died; the new one knows of no stream, says so ("unknown"), and rebuilds
each from the store when it is opened again. Nothing is retried behind the scheduler's back: a chunk whose
answer never came may be tracked or not, and only the store can tell.
"""

from __future__ import annotations

from typing import Any

import ray

from pipeline.work import ChunkRef, ChunkReport, StreamSpec, StreamStatus, WorkerSettings
from pipeline.worker import Worker

FOR_EVER = -1


class Tracker:
    """What runs inside the actor: a `Worker`, whose calls are done in the order they came."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._worker = Worker(settings)

    def facts(self) -> dict[str, Any]:
        """See `Worker.facts`; with the node's id."""
        return {**self._worker.facts(), "node_id": ray.get_runtime_context().get_node_id()}

    def open(self, spec: StreamSpec, state: bytes | None = None) -> StreamStatus:
        """See `Worker.open`."""
        return self._worker.open(spec, state)

    def track(self, ref: ChunkRef) -> ChunkReport:
        """See `Worker.track`."""
        return self._worker.track(ref)

    def release(self, stream_id: str, to_store: bool = True) -> bytes | None:
        """See `Worker.release`."""
        return self._worker.release(stream_id, to_store)

    def close(self, stream_id: str) -> None:
        """See `Worker.close`."""
        self._worker.close(stream_id)

    def close_all(self) -> None:
        """See `Worker.close_all`."""
        self._worker.close_all()


TrackerActor: Any = ray.remote(max_restarts=FOR_EVER, max_task_retries=0)(Tracker)


def tracker_actor(settings: WorkerSettings, *, gpus: float = 0.0, **options: Any) -> Any:
    """A handle of a new TrackerActor.

    Args:
        settings: of all its streams; `threads` CPUs are reserved for it.
        gpus: share of a GPU to reserve. Less than one lets several trackers share it.
        options: for `ray.actor.ActorClass.options`.
    """
    # Ray would give the actor's libraries one thread; torch is told per stream, OpenMP reads it at its start.
    environment = {"env_vars": {"OMP_NUM_THREADS": str(settings.threads), "OMP_WAIT_POLICY": "PASSIVE"}}
    chosen = {"num_cpus": settings.threads, "num_gpus": gpus, "runtime_env": environment, **options}
    return TrackerActor.options(**chosen).remote(settings)
