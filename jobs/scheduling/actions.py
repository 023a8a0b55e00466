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
    """Call `open(spec)` of a worker; the answer goes to `Scheduler.opened`."""

    call: int
    worker: int
    spec: StreamSpec


@dataclass(frozen=True, slots=True)
class Track:
    """Call `track(ref)` of a worker; the answer goes to `Scheduler.reported`."""

    call: int
    worker: int
    ref: FrameChunk


@dataclass(frozen=True, slots=True)
class Release:
    """Call `release(stream_id)` of a worker, to the store; that it is done goes to `Scheduler.released`."""

    call: int
    worker: int
    stream_id: str


@dataclass(frozen=True, slots=True)
class Close:
    """Call `close(stream_id)` of a worker; that it is done goes to `Scheduler.released`."""

    call: int
    worker: int
    stream_id: str


@dataclass(frozen=True, slots=True)
class CloseWorker:
    """End a worker that holds no stream and will get none; it is forgotten already."""

    worker: int


Call: TypeAlias = Open | Track | Release | Close
Action: TypeAlias = Call | CloseWorker


@dataclass(frozen=True)
class SchedulerOptions:
    """How a `Scheduler` decides.

    Args:
        chunk_frames: frames of a chunk; chunks end at its multiples.
        max_streams: streams that one worker holds at most.
        depth: calls under way at one worker at most, each of another stream.
        quantum: chunks after which a stream makes room for others that wait.
        max_tries: tries without progress after which a video is quarantined.
        backoff_seconds, max_backoff_seconds: wait before the second try, doubled before each further one.
        jitter: waits are longer by up to this part of them, at random.
        guess_bytes: state of a stream that was never opened, until others have shown a mean.
        idle_seconds: a worker for which nothing is left is closed after so long; None: never.
        seed: of the jitter.

    Raises:
        UsageError: a value that makes no sense.
    """

    chunk_frames: int = 100
    max_streams: int = 2
    depth: int = 2
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
                raise UsageError(f"{name} {value!r} is not allowed: give a whole number from 1")
        for name in ("backoff_seconds", "max_backoff_seconds", "jitter", "guess_bytes"):
            value = getattr(self, name)
            if not value >= 0:
                raise UsageError(f"{name} {value!r} is not allowed: give a number from 0")


class VideoResult(NamedTuple):
    """What became of one video.

    Args:
        state: "finished"; "failed": trying again cannot help; "quarantined": `max_tries` tries brought it
            no further; "cancelled"; "pending": not done in this run, the next one goes on.
        frames: how far it is. rows, losses: of the whole stream.
        tries: 1, and one more for each failure.
        seconds: tracking took.
        cause: the last failure, if it is not finished.
        ellipses: boxes of its prompts that could not be told from their surroundings.
        counted: frames, rows and losses are what the worker that held it said; False: one was lost with it,
            so that the store may hold others.
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
    """A video that a worker holds: how far it is, and of how many frames where the source says so."""

    stream_id: str
    frames: int
    frame_count: int | None


class Progress(NamedTuple):
    """Where a batch stands.

    Args:
        frames: tracked in this run, as their chunks were reported; repeated ones count again.
        chunks: reported in this run.
        mean_frames: length of a video, over those whose length is known; 0: of none.
        missing: workers that were asked for and are not there yet.
        shortage: why they are not, in a few words; empty: they are starting.
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
