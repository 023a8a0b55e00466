"""Ray actors: a `Worker` for batches, several streams to a device, and a `LiveHub` for live streams.

Ray restarts an actor whose process died; the new one knows of no stream, says so ("unknown"), and rebuilds
each from the store when it is opened again. Nothing is retried behind the scheduler's back: a chunk whose
answer never came may be tracked or not, and only the store can tell.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import ray

from pipeline.allocation import keep_freed_memory
from pipeline.live_hub import HubSettings, LiveHub
from pipeline.live_spec import LiveSpec
from pipeline.parent import end_with_parent
from pipeline.work import ChunkRef, ChunkReport, StreamSpec, StreamStatus, WorkerSettings
from pipeline.worker import Worker
from xmem_core.openmp import passive_environment

logger = logging.getLogger(__name__)

T = TypeVar("T")
FOR_EVER = -1
LIVE_CALLS = 32
WATCHERS = 128
_WATCHERS = "watchers"


class Tracker:
    """What runs inside the actor: a `Worker`, whose calls are done in the order they came."""

    def __init__(self, settings: WorkerSettings, environment: Mapping[str, str] | None = None) -> None:
        os.environ.update(environment or {})
        end_with_parent()
        keep_freed_memory()
        self._worker = Worker(settings)

    def facts(self) -> dict[str, Any]:
        """See `Worker.facts`; with the node's id."""
        return {**self._worker.facts(), "node_id": ray.get_runtime_context().get_node_id()}

    def conflicts(self, stream_ids: Sequence[str]) -> list[tuple[str, str]]:
        """See `Worker.conflicts`."""
        return self._worker.conflicts(stream_ids)

    def open(self, spec: StreamSpec, state: bytes | None = None) -> StreamStatus:
        """See `Worker.open`."""
        return self._usable(self._worker.open(spec, state))

    def track(self, ref: ChunkRef) -> ChunkReport:
        """See `Worker.track`."""
        return self._usable(self._worker.track(ref))

    def release(self, stream_id: str, to_store: bool = True) -> bytes | None:
        """See `Worker.release`."""
        return self._worker.release(stream_id, to_store)

    def close(self, stream_id: str) -> None:
        """See `Worker.close`."""
        self._worker.close(stream_id)

    def close_all(self) -> None:
        """See `Worker.close_all`."""
        self._worker.close_all()

    def _usable(self, answer: T) -> T:
        """The answer, unless the device is beyond use: then every stream here would fail, one after another.

        Dead, the process is started again with a device that works, and which stream did it is found out.
        """
        if self._worker.broken:
            logger.error("the device is beyond use, this process ends: %s", answer)
            os._exit(1)
        return answer


TrackerActor: Any = ray.remote(max_restarts=FOR_EVER, max_task_retries=0)(Tracker)


def tracker_actor(
    settings: WorkerSettings,
    *,
    gpus: float = 0.0,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> Any:
    """A handle of a new TrackerActor.

    Args:
        settings: of all its streams; `threads` CPUs are reserved for it.
        gpus: share of a GPU to reserve. Less than one lets several trackers share it.
        environment: variables that its process sets before anything else. They may hold credentials, so they
            go to its constructor: Ray's `env_vars` show on the dashboard.
        options: for `ray.actor.ActorClass.options`.
    """
    threads = settings.tracking.threads
    # Ray would give the actor's libraries one thread; torch is told per stream, OpenMP reads it at its start.
    runtime = {"env_vars": {"OMP_NUM_THREADS": str(threads), **passive_environment()}}
    chosen = {"num_cpus": threads, "num_gpus": gpus, "runtime_env": runtime, **options}
    return TrackerActor.options(**chosen).remote(settings, dict(environment or {}))


class Live:
    """What runs inside a live actor: a `LiveHub`, whose methods answer at once and several at a time.

    An actor whose process died is started again by Ray, and its hub goes on with all its streams by itself.
    """

    def __init__(self, settings: HubSettings) -> None:
        end_with_parent()
        keep_freed_memory()
        self._hub = LiveHub(settings)

    def add(self, spec: LiveSpec) -> dict[str, Any]:
        """See `LiveHub.add`."""
        return self._hub.add(spec)

    def remove(self, stream_id: str, wait: float = 0.0) -> dict[str, Any]:
        """See `LiveHub.remove`."""
        return self._hub.remove(stream_id, wait)

    def list(self) -> Any:
        """See `LiveHub.list`."""
        return self._hub.list()

    def status(self, stream_id: str) -> dict[str, Any]:
        """See `LiveHub.status`."""
        return self._hub.status(stream_id)

    def request(self, stream_id: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """See `LiveHub.request`."""
        return self._hub.request(stream_id, content)

    def tracks(self, stream_id: str, since: int | None = None, limit: int = 500) -> Any:
        """See `LiveHub.tracks`."""
        return self._hub.tracks(stream_id, since, limit)

    @ray.method(concurrency_group=_WATCHERS)
    def wait_tracks(self, stream_id: str, after_seq: int = -1, timeout: float = 10.0) -> Any:
        """See `LiveHub.wait_tracks`. Calls that wait hold threads of their own, up to `WATCHERS` of them."""
        return self._hub.wait_tracks(stream_id, after_seq, timeout)

    def jpeg(self, stream_id: str, overlay: bool = True, max_side: int = 960, quality: int = 80) -> bytes:
        """See `LiveHub.jpeg`."""
        return self._hub.jpeg(stream_id, overlay, max_side, quality)

    def metrics(self) -> dict[str, dict[str, Any]]:
        """See `LiveHub.metrics`."""
        return self._hub.metrics()

    def pid(self) -> int:
        """Of the actor's process."""
        return os.getpid()

    def capacity(self) -> dict[str, Any]:
        """See `LiveHub.capacity`."""
        return self._hub.capacity()

    def close(self) -> None:
        """See `LiveHub.close`."""
        self._hub.close()


# Ray's types don't know of concurrency groups.
_remote: Any = ray.remote
LiveActor: Any = _remote(max_restarts=FOR_EVER, max_task_retries=0, concurrency_groups={_WATCHERS: WATCHERS})(
    Live
)


def live_actor(settings: HubSettings, *, gpus: float = 0.0, calls: int = LIVE_CALLS, **options: Any) -> Any:
    """A handle of the actor that holds the hub of this name, started if there is none.

    It belongs to nobody: it lives on when whoever started it dies. End it with its `close`, then `ray.kill`.

    Args:
        settings: of the hub; those of an actor that is there already are not changed. Where they name no
            number of threads, they are all CPUs that are free on a single machine, and one on a cluster.
        gpus: share of a GPU to reserve.
        calls: that may be answered at the same time, beside those that wait for news.
        options: for `ray.actor.ActorClass.options`; `lifetime=None` ends it with its owner.
    """
    threads = settings.tracking.model.threads or _threads_here()
    settings = replace(settings, tracking=settings.tracking.with_options({"threads": threads}))
    environment = {"env_vars": {"OMP_NUM_THREADS": str(threads), **passive_environment()}}
    chosen = {
        "name": live_actor_name(settings.hub),
        "get_if_exists": True,
        "lifetime": "detached",
        "max_concurrency": calls,
        "num_cpus": threads,
        "num_gpus": gpus,
        "runtime_env": environment,
        **options,
    }
    return LiveActor.options(**chosen).remote(settings)


def _threads_here() -> int:
    """Threads for a hub whose settings name none: what is free on a single machine, one on a cluster.

    The machines of a cluster may differ in size, and are there for others too.
    """
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    machines = [node for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
    free = ray.available_resources().get("CPU", 1)  # type: ignore[no-untyped-call]
    return max(1, int(free)) if len(machines) == 1 else 1


def live_actor_name(hub: str) -> str:
    """The name under which Ray knows a hub's actor."""
    return f"xmem-live-{hub}"
