"""Actions that a `Scheduler` asks for, and the outcome of each video: plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from pipeline.base.errors import UsageError
from pipeline.base.records import FrameChunk
from pipeline.distributed.messages import StreamSpec
from pipeline.storage.failures import Failure

VideoState = Literal["finished", "failed", "quarantined", "cancelled", "pending"]


@dataclass(frozen=True, slots=True)
class Open:
    """Call `open(spec)` of a worker; pass the result to `Scheduler.opened`."""

    call: int
    worker: int
    spec: StreamSpec


@dataclass(frozen=True, slots=True)
class Track:
    """Call `track(ref)` of a worker, or `track_many` of all that are asked for at once; pass the results to
    `Scheduler.reported`."""

    call: int
    worker: int
    ref: FrameChunk


@dataclass(frozen=True, slots=True)
class Release:
    """Call `release(stream_id)` of a worker, to the store; report completion to `Scheduler.released`."""

    call: int
    worker: int
    stream_id: str


@dataclass(frozen=True, slots=True)
class Close:
    """Call `close(stream_id)` of a worker; report completion to `Scheduler.released`."""

    call: int
    worker: int
    stream_id: str


@dataclass(frozen=True, slots=True)
class CloseWorker:
    """End a worker that has no streams; the scheduler has removed it already."""

    worker: int


Call: TypeAlias = Open | Track | Release | Close
Action: TypeAlias = Call | CloseWorker


@dataclass(frozen=True)
class SchedulerOptions:
    """Options of a `Scheduler`.

    Args:
        chunk_frames: frames per chunk; chunks end at its multiples.
        max_streams: maximum number of streams per worker.
        depth: maximum number of pending calls per worker, each for another stream.
        together: ask for chunks of all streams of a worker at once, when those before are done, so that it
            can track them together.
        quantum: chunks after which a stream makes room for waiting ones.
        max_tries: tries without progress after which a video is quarantined.
        backoff_seconds, max_backoff_seconds: wait before the second try, doubled before each further one.
        jitter: maximum random extension of waits, as a share of them.
        guess_bytes: assumed state size of streams not opened yet, until the mean of others is known.
        idle_seconds: time after which an idle worker is closed; None: never.
        seed: seed of the jitter.

    Raises:
        UsageError: a value is not allowed.
    """

    chunk_frames: int = 100
    max_streams: int = 2
    depth: int = 2
    together: bool = False
    quantum: int = 8
    max_tries: int = 4
    backoff_seconds: float = 1.0
    max_backoff_seconds: float = 60.0
    jitter: float = 0.25
    guess_bytes: int = 128 * 2**20
    idle_seconds: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("chunk_frames", "max_streams", "depth", "quantum", "max_tries"):
            value = getattr(self, name)
            if value < 1:
                raise UsageError(f"{name} {value!r} is not allowed: must be a whole number, at least 1")
        for name in ("backoff_seconds", "max_backoff_seconds", "jitter", "guess_bytes"):
            value = getattr(self, name)
            if not value >= 0:
                raise UsageError(f"{name} {value!r} is not allowed: must be a number, at least 0")


class VideoResult(NamedTuple):
    """Outcome of one video.

    Args:
        state: "finished"; "failed": retrying cannot help; "quarantined": `max_tries` tries made no progress;
            "cancelled"; "pending": not completed in this run, the next run continues it.
        frames: frames tracked so far. rows, losses: totals of the stream.
        tries: 1, plus one per failure.
        seconds: time spent on tracking.
        cause: the last failure, if it is not finished.
        ellipses: boxes in its prompts that GrabCut could not separate from the background.
        counted: whether frames, rows and losses were reported by a worker. False: its worker was lost, and
            the store may have other numbers.
    """

    stream_id: str
    state: VideoState
    frames: int
    rows: int
    losses: int
    tries: int
    seconds: float
    cause: Failure | None
    ellipses: int = 0
    counted: bool = True


class Running(NamedTuple):
    """A video on a worker: frames done, and their total if the source knows it."""

    stream_id: str
    frames: int
    frame_count: int | None


class Progress(NamedTuple):
    """Progress of a batch.

    Args:
        frames: frames of chunks reported in this run; repeated ones count again.
        chunks: chunks reported in this run.
        mean_frames: mean length of the videos whose length is known; 0 if none is.
        missing: requested workers that are not ready yet.
        shortage: short reason why workers are missing; empty if they are starting.
    """

    videos: int
    finished: int
    failed: int
    quarantined: int
    cancelled: int
    pending: int
    running: int
    waiting: int
    workers: int
    frames: int
    chunks: int
    rows: int
    mean_frames: float = 0.0
    missing: int = 0
    shortage: str = ""
