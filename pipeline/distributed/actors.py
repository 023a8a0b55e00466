"""Ray actors: a `Worker` for batches and a `LiveHub` for live streams.

Ray restarts an actor whose process died. The new one has no open streams and answers "unknown" until a stream
is opened again from the store. Ray does not retry calls: a chunk without an answer may be tracked or not, and
only the store can tell.

The actors' classes only name the methods. `Worker` and `LiveHub`, and with them torch, are imported in the
actors' processes: drivers and the replicas of the API start without torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import ray

from pipeline.base.garbage import no_collection
from pipeline.base.malloc import keep_freed_memory
from pipeline.base.records import FrameChunk
from pipeline.distributed.messages import ChunkReport, StreamSpec, StreamStatus, WorkerSettings
from pipeline.distributed.parent import end_with_parent
from pipeline.live.hub.settings import HubSettings
from xmem_core.openmp import passive_environment

if TYPE_CHECKING:
    from pipeline.distributed.worker import Worker
    from pipeline.live.hub.hub import LiveHub

logger = logging.getLogger(__name__)

T = TypeVar("T")
FOR_EVER = -1
LIVE_CALLS = 32
WATCHERS = "watchers"
"""Concurrency group of calls that wait for a frame."""
_WATCHING = 128


def _of(attribute: str, name: str) -> Callable[..., Any]:
    """A method that calls the one of this name of the object in an attribute."""

    def call(self: object, *arguments: Any, **options: Any) -> Any:
        return getattr(getattr(self, attribute), name)(*arguments, **options)

    call.__name__ = name
    return call


class Tracker:
    """A `Worker` in an actor's process, which runs calls in order of arrival."""

    _worker: Worker
    conflicts, release, close, close_all = (
        _of("_worker", name) for name in ("conflicts", "release", "close", "close_all")
    )

    def __init__(self, settings: WorkerSettings, environment: Mapping[str, str] | None = None) -> None:
        os.environ.update(environment or {})
        end_with_parent()
        keep_freed_memory()
        with no_collection():
            from pipeline.distributed.worker import Worker

        self._worker = Worker(settings)

    def facts(self) -> dict[str, Any]:
        """The facts of `Worker.facts`, and the id of the Ray node."""
        return {**self._worker.facts(), "node_id": ray.get_runtime_context().get_node_id()}

    def open(self, spec: StreamSpec, state: bytes | None = None) -> StreamStatus:
        """Open a stream as a `Worker` does; ends the process if the device has become unusable."""
        return self._usable(self._worker.open(spec, state))

    def track(self, chunk: FrameChunk) -> ChunkReport:
        """Track a chunk as a `Worker` does; ends the process if the device has become unusable."""
        return self._usable(self._worker.track(chunk))

    def track_many(self, chunks: Sequence[FrameChunk]) -> list[ChunkReport]:
        """Track chunks as a `Worker` does; ends the process if the device has become unusable."""
        return self._usable(self._worker.track_many(chunks))

    def _usable(self, answer: T) -> T:
        """The answer; ends the process if the device is unusable, since every further stream would fail.

        Ray restarts the process with a working device, and the scheduler finds out which stream caused it.
        """
        if self._worker.broken:
            logger.error("the device is unusable, ending this process: %s", answer)
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
    """Create a TrackerActor and return its handle.

    Args:
        settings: settings of all its streams; `threads` CPUs are reserved.
        gpus: share of a GPU to reserve. Less than one lets several trackers share it.
        environment: variables that its process sets before anything else. They may hold credentials, so they
            go to its constructor: Ray's `env_vars` show on the dashboard.
        options: for `ray.actor.ActorClass.options`.
    """
    threads = settings.tracking.threads
    # Ray's default is one thread for the actor's libraries; torch is set per stream, OpenMP at its start.
    runtime = {"env_vars": {"OMP_NUM_THREADS": str(threads), **passive_environment()}}
    chosen = {"num_cpus": threads, "num_gpus": gpus, "runtime_env": runtime, **options}
    return TrackerActor.options(**chosen).remote(settings, dict(environment or {}))


class Live:
    """A `LiveHub` in an actor's process. Its methods do not block and run concurrently.

    Calls that wait for a frame run in the concurrency group `WATCHERS`, which has separate threads, so that
    they do not delay other calls. Ray restarts an actor whose process died, and the hub resumes all its
    streams.
    """

    _hub: LiveHub
    add, remove, list, status, request, view, metrics, capacity, close = (
        _of("_hub", name)
        for name in ("add", "remove", "list", "status", "request", "view", "metrics", "capacity", "close")
    )

    def __init__(self, settings: HubSettings) -> None:
        end_with_parent()
        keep_freed_memory()
        with no_collection():
            from pipeline.live.hub.hub import LiveHub

        self._hub = LiveHub(settings)

    def pid(self) -> int:
        """Process id of the actor."""
        return os.getpid()


# Ray's types do not include concurrency groups.
_remote: Any = ray.remote
LiveActor: Any = _remote(max_restarts=FOR_EVER, max_task_retries=0, concurrency_groups={WATCHERS: _WATCHING})(
    Live
)


def live_actor(settings: HubSettings, *, gpus: float = 0.0, calls: int = LIVE_CALLS, **options: Any) -> Any:
    """Return the handle of the hub's actor, which is started if it does not exist.

    The actor is detached: it outlives the process that started it. Stop it with `close`, then `ray.kill`.

    Args:
        settings: settings of the hub; those of an existing actor are not changed. If they do not set the
            number of threads, it is the number of free CPUs on a single machine, and one on a cluster.
        gpus: share of a GPU to reserve.
        calls: maximum number of concurrent calls, beside those that wait for frames.
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
    """Number of threads if the settings do not set it: the free CPUs of a single machine, one on a cluster.

    The machines of a cluster may differ in size, and may be shared.
    """
    nodes = ray.nodes()
    machines = [node for node in nodes if node["Alive"] and node["Resources"].get("CPU")]
    free = ray.available_resources().get("CPU", 1)
    return max(1, int(free)) if len(machines) == 1 else 1


def live_actor_name(hub: str) -> str:
    """Name of a hub's actor in Ray."""
    return f"xmem-live-{hub}"
