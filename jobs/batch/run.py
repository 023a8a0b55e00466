"""Runs a batch: many videos on Ray, failures of single videos contained, and a report at the end."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from jobs.batch.listing import Skipped
from jobs.batch.manifest import local_absolute
from jobs.batch.ray_pool import RayPool, room_for
from jobs.batch.report import BatchReport
from jobs.cluster.connection import Resources, check, connected
from jobs.scheduling.actions import Progress, Running, SchedulerOptions, VideoResult
from jobs.scheduling.scheduler import Scheduler
from jobs.scheduling.video_job import VideoJob
from pipeline.base.errors import SettingsConflictError, StoreError, UsageError, XmemError
from pipeline.base.redaction import redacted
from pipeline.distributed.actors import tracker_actor
from pipeline.distributed.messages import WorkerSettings
from pipeline.storage.failures import Failure
from pipeline.storage.opening import open_files
from pipeline.tracking.plugins import check_plugins
from pipeline.tracking.settings import ModelSettings
from pipeline.tracking.stream_record import mark_failed
from pipeline.tracks.lease import lease
from pipeline.tracks.store import StreamStore

logger = logging.getLogger(__name__)

# Streams that a worker on a GPU tracks together at most; with so many the device is busy.
_TOGETHER = 8
# Share of a device's memory that weights and states may take together.
_USABLE = 0.85
_WRITERS = 16

OnProgress = Callable[[Progress, Sequence[Running]], None]


@dataclass(frozen=True)
class BatchOptions:
    """Where a batch runs, and with how many processes.

    Args:
        address: Ray cluster: `auto`, `host:6379`, `ray://host:10001`. None: a local Ray for this batch.
        actors: number of tracker processes; None: as many as fit.
        gpu_fraction: share of a GPU per process, if they run on GPUs.
        max_tries: tries without progress after which a video is quarantined.
        debug: show the output of Ray and its workers.
        take_over: ignore leases of another run on the same videos.
        env: environment variables of the workers, such as credentials; not shown in the repr.

    Raises:
        UsageError: a value is not allowed.
    """

    address: str | None = None
    actors: int | None = None
    gpu_fraction: float = 1.0
    max_tries: int = 4
    debug: bool = False
    take_over: bool = False
    env: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name in ("actors", "max_tries"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} {value} is not allowed: at least 1")
        fraction = self.gpu_fraction
        if not (0 < fraction <= 1 or (fraction > 1 and fraction == int(fraction))):
            raise UsageError(f"gpu_fraction {fraction} is not allowed: above 0, up to 1, or a whole number")


@dataclass(frozen=True, slots=True)
class Plan:
    """Number of tracker processes and their resources.

    Args:
        actors: number of processes.
        threads: CPUs, and threads of the network, per process.
        gpus: GPUs per process.
    """

    actors: int
    threads: int
    gpus: float = 0.0


def plan(videos: int, resources: Resources, model: ModelSettings, options: BatchOptions) -> Plan:
    """Choose the number of actors and threads for a number of videos.

    On CPUs: few videos get many threads each, many videos one each. On GPUs: one actor per GPU, or per
    fraction of one. Model settings and options take precedence.

    Raises:
        UsageError: GPUs are requested and there are none, or an actor needs more than any machine has.
    """
    device = model.device
    if device == "cpu":
        most = max(resources.node_cpus, default=1) or 1
        if model.threads is not None and model.threads > most:
            raise UsageError(f"threads {model.threads} is not allowed: the largest machine has {most} CPUs")
        threads = model.threads or min(most, max(1, resources.cpus // max(1, videos)))
        places = sum(cpus // threads for cpus in resources.node_cpus)
        return Plan(options.actors or max(1, min(videos, places)), threads)
    if device != "cuda":
        raise UsageError(f"device {device!r} is not allowed: use cpu or cuda (Ray chooses the GPU)")
    places = int(resources.gpus / options.gpu_fraction + 1e-6)
    # With an explicit number, an autoscaling cluster may add machines for actors that wait.
    if places < 1 and not (options.actors and options.address):
        raise UsageError(
            f"device cuda with {options.gpu_fraction:g} of a GPU for each actor is not possible: Ray sees "
            f"{resources.gpus:g} GPUs; use device cpu, or --actors on a cluster that adds machines on "
            "demand"
        )
    return Plan(options.actors or max(1, min(videos, places)), model.threads or 1, options.gpu_fraction)


def run_batch(
    jobs: Sequence[VideoJob],
    settings: WorkerSettings,
    options: BatchOptions | None = None,
    *,
    on_progress: OnProgress | None = None,
    on_stop: Callable[[], None] | None = None,
    stop: threading.Event | None = None,
    skipped: Skipped | None = None,
    request: Sequence[str] = (),
) -> BatchReport:
    """Track all videos. Failures of single videos are recorded in the report, not raised.

    Called again with the same jobs it tracks unfinished videos. In the main thread, SIGINT and SIGTERM stop
    the batch: no video is begun, current chunks are committed, and the rest is "pending". A second signal
    ends it at once; committed rows are kept.

    Args:
        jobs: videos, from `load_manifest`.
        settings: settings of all videos. If `threads` is not set, `plan` chooses it.
        options: where the batch runs.
        on_progress: called with the progress and the running videos, twice a second.
        on_stop: called when the batch begins to stop.
        stop: when set, stops the batch like a signal.
        skipped: files that `load_manifest` left out, for the report.
        request: command line without credentials, for the report.

    Returns:
        the report, which is also written to `OUT/batches/`.

    Raises:
        UsageError: settings or options are wrong, or a worker has another output folder than this process.
        SettingsConflictError: videos were tracked with other settings before.
        AnotherRunError: another run is tracking some of these videos into the same folder.
        XmemError: Ray is not available, the output folder cannot be written, or no worker can be started.
    """
    options = options or BatchOptions()
    settings = _for_workers(settings)
    if options.address is None:  # a cluster may have plugins that this machine lacks
        check_plugins(settings.tracking)
    started = datetime.now(UTC)
    report = BatchReport(
        jobs, {}, settings.out, started, started, skipped=skipped or Skipped(), request=request
    )
    files = open_files(settings.out, settings.out_storage_options)
    ids = (job.spec.stream_id for job in jobs)
    tracking = settings.tracking
    with (
        lease(files, report.batch_id, ids, take_over=options.take_over),
        report.probe(settings.out_storage_options) as probe,
        connected(options.address, gpus=tracking.model.device != "cpu", debug=options.debug) as resources,
    ):
        chosen = plan(len(jobs), resources, tracking.model, options)
        tracking = tracking.with_options({"threads": chosen.threads})
        settings = dataclasses.replace(settings, tracking=tracking, probe=probe)
        logger.info("%d videos on %s: %s", len(jobs), resources, chosen)
        schedule = SchedulerOptions(chunk_frames=tracking.commit.chunk_frames, max_tries=options.max_tries)
        if tracking.model.device != "cpu":
            schedule = dataclasses.replace(schedule, max_streams=_TOGETHER, depth=_TOGETHER, together=True)
        scheduler = _Stoppable(schedule, on_stop)
        for job in jobs:
            scheduler.add(job)
        most_workers = 0

        def news(standing: Progress) -> None:
            nonlocal most_workers
            check()
            most_workers = max(most_workers, standing.workers)
            if stop is not None and stop.is_set():
                pool.drain()
            if on_progress is not None:
                on_progress(standing, scheduler.running())

        def room(facts: Mapping[str, Any]) -> int:
            _check_output(scheduler, facts)
            return budget(facts, _share(resources, chosen))

        begun = _begun(jobs, settings)
        given = {job.spec.stream_id: job.spec.direction for job in jobs if job.spec.direction is not None}
        directions = {stream_id: given[stream_id] for stream_id in begun if stream_id in given}
        pool = RayPool(
            scheduler,
            lambda: tracker_actor(settings, gpus=chosen.gpus, environment=options.env),
            _wanted(len(jobs), chosen, options),
            budget=room,
            first=(
                (
                    lambda actor: actor.conflicts.remote(begun, directions),
                    lambda found: _refuse(settings, begun, found),
                )
                if begun
                else None
            ),
            on_progress=news,
            name_machines=options.address is not None,
            cpus=chosen.threads,
            gpus=chosen.gpus,
        )
        pool.run()
    results = {
        result.stream_id: _counted(result, settings, scheduler.fault) for result in scheduler.results()
    }
    report = dataclasses.replace(
        report,
        results=results,
        stopped=scheduler.fault,
        ended=datetime.now(UTC),
        interrupted=scheduler.fault is None and scheduler.stopping and scheduler.progress().pending > 0,
        frames=scheduler.progress().frames,
        workers=most_workers,
    )
    _mark_failed(report, settings)
    try:
        report.save(settings.out_storage_options)
    except StoreError as error:
        if report.stopped is None:
            raise
        logger.warning("the report could not be written to the output folder: %s", error)
    return report


class _Stoppable(Scheduler):
    """A scheduler with a callback for the beginning of a stop."""

    def __init__(self, options: SchedulerOptions, on_stop: Callable[[], None] | None) -> None:
        super().__init__(options)
        self.stopping = False
        self._on_stop = on_stop

    def drain(self) -> None:
        if not self.stopping:
            self.stopping = True
            if self._on_stop is not None and self.fault is None:
                self._on_stop()
        super().drain()


def _check_output(scheduler: Scheduler, facts: Mapping[str, Any]) -> None:
    """Stop the batch if a worker has another output folder: rows would be spread over machines' disks.

    Raises UsageError if nothing has been tracked yet.
    """
    fault = facts["output_fault"]
    if fault is None:
        return
    message = f"the worker on {facts['host']} (node {facts['node_id'][:12]}) {fault}"
    if scheduler.progress().chunks == 0:
        raise UsageError(message)
    scheduler.stop(Failure(UsageError.__name__, redacted(message), False, output=True))


def _begun(jobs: Sequence[VideoJob], settings: WorkerSettings) -> list[str]:
    """The jobs' streams that have records in the output folder and will be resumed."""
    files = open_files(settings.out, settings.out_storage_options)
    there = {name.rpartition("/")[2].removesuffix(".json") for name in files.names("streams")}
    return [job.spec.stream_id for job in jobs if job.spec.stream_id in there and not job.spec.restart]


def _refuse(settings: WorkerSettings, begun: Sequence[str], found: list[tuple[str, str]] | None) -> None:
    """Raise SettingsConflictError if begun streams have other settings, before each is refused alone."""
    if not found:
        return
    stream_id, differing = found[0]
    raise SettingsConflictError(
        f"{len(found)} of {len(begun)} streams in {settings.out} were tracked with other settings, such as "
        f"{stream_id}: {differing}; use the same, another --out, or start over (--restart)"
    )


def _counted(result: VideoResult, settings: WorkerSettings, fault: Failure | None) -> VideoResult:
    """A result with frames and rows counted in the store, if the worker's counts are unreliable.

    That is the case if the worker was lost or its last chunk could not be written.
    """
    if result.state == "finished" or not result.tries or (result.counted and fault is None):
        return result
    try:
        store = StreamStore(settings.out, result.stream_id, settings.out_storage_options)
        committed, footers = store.committed(), store.footers(0)
    except XmemError as error:
        logger.warning("stream %s: its rows cannot be counted: %s", result.stream_id, error)
        return result
    return result._replace(frames=committed.next_frame, rows=sum(f.rows for f in footers), counted=True)


def _mark_failed(report: BatchReport, settings: WorkerSettings) -> None:
    """Mark the stream records of failed videos as failed."""

    def mark(result: VideoResult) -> None:
        if result.cause is not None:
            store = StreamStore(settings.out, result.stream_id, settings.out_storage_options)
            mark_failed(store, result.cause)

    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(mark, [result for _, result in report.bad()]))


def _wanted(videos: int, chosen: Plan, options: BatchOptions) -> int | Callable[[], int]:
    """Number of actors; on a cluster it follows the machines, unless a number was given."""
    if options.actors is not None or options.address is None:
        return chosen.actors
    return lambda: max(1, min(videos, room_for(chosen.threads, chosen.gpus)))


def budget(facts: Mapping[str, Any], share: float) -> int:
    """Return the device memory for the states of an actor's streams, in bytes, from its facts and its share
    of the device: most of what the weights leave free; libraries and decoders need the rest.
    """
    usable = int(facts["device_bytes"] * share * _USABLE)
    return max(0, usable - int(facts["weights_bytes"]))


def _share(resources: Resources, chosen: Plan) -> float:
    """An actor's share of its device: of a GPU, or of a machine's memory."""
    if chosen.gpus:
        return min(1.0, chosen.gpus)
    per_machine = -(-chosen.actors // max(1, len(resources.node_cpus)))
    return 1.0 / per_machine


def _for_workers(settings: WorkerSettings) -> WorkerSettings:
    """Settings with absolute paths, for processes with another working folder."""
    tracking = settings.tracking
    if os.path.isfile(tracking.model.name):
        tracking = tracking.with_options({"model": os.path.abspath(tracking.model.name)})
    return dataclasses.replace(settings, out=local_absolute(settings.out), tracking=tracking)
