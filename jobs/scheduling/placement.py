"""Placement of videos on workers: free slots and device memory per worker.

A worker's memory holds the states of its streams, which add up, and the workspace of one step, since its
streams take turns. A stream's need is known once it has been opened anywhere; before that it is guessed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from enum import Enum, auto

from jobs.scheduling.actions import SchedulerOptions
from jobs.scheduling.fair_queue import FairQueue
from jobs.scheduling.video_job import VideoJob
from pipeline.storage.failures import Failure

# Priorities beyond these limits have no further effect; sums of their inverses would lose precision.
_LIGHTEST, _HEAVIEST = 1e-6, 1e6


class Where(Enum):
    """Where a video is between two calls."""

    WAITING = auto()  # in a queue, delayed, or with a worker reserved for it
    TO_OPEN = auto()
    OPENING = auto()
    IDLE = auto()
    TRACKING = auto()
    RELEASING = auto()
    TO_CLOSE = auto()
    CLOSING = auto()


class Video:
    """A video that has not ended."""

    __slots__ = (
        "avoid",
        "best",
        "cancelled",
        "cause",
        "ellipses",
        "failing",
        "failures",
        "frame_count",
        "further",
        "had",
        "harmless",
        "losses",
        "offset",
        "orphaned",
        "position",
        "put_off",
        "queue",
        "retry",
        "rows",
        "seconds",
        "sent",
        "spec",
        "state_bytes",
        "suspect",
        "ticket",
        "tries",
        "turn",
        "weight",
        "where",
        "worker",
        "workspace_bytes",
    )

    def __init__(self, job: VideoJob) -> None:
        self.spec = job.spec
        self.weight = min(max(job.priority, _LIGHTEST), _HEAVIEST)
        self.where = Where.WAITING
        self.queue: FairQueue[Video] | None = None
        self.ticket = 0
        self.put_off = 0  # number of its entry among the delayed videos
        self.worker: Worker | None = None  # the worker that holds it or is reserved for it
        self.sent = False  # whether the worker may have it open
        self.avoid = 0  # the worker on which it failed last
        self.turn = 0.0  # virtual time among the streams of its worker
        self.had = 0  # chunks since it was placed on its worker
        self.further = False  # whether it has made new progress since then
        self.position = 0
        self.best: int | None = None  # the furthest frame reached so far
        self.frame_count: int | None = None
        self.offset = 0
        self.rows = self.losses = self.ellipses = 0
        self.seconds = 0.0
        self.state_bytes: int | None = None
        self.workspace_bytes = 0
        self.tries = 0
        self.retry = True  # whether the next opening is another try
        self.failures = 0  # failures since it last made new progress
        self.harmless = 0  # consecutive refusals
        self.failing: Failure | None = None  # failure to handle once the worker has released it
        self.cause: Failure | None = None
        self.suspect = False
        self.orphaned = False  # whether a worker that held it was lost and may have lived on for a moment
        self.cancelled = False


class Worker:
    """One worker process and what it holds.

    Args:
        number: unique number, never used before.
        budget_bytes: device memory for streams; None: no limit.
    """

    __slots__ = (
        "budget_bytes",
        "calls",
        "clock",
        "exclusive",
        "idle_since",
        "number",
        "reserved",
        "streams",
        "to_do",
    )

    def __init__(self, number: int, budget_bytes: int | None) -> None:
        self.number = number
        self.budget_bytes = budget_bytes
        self.streams: dict[str, Video] = {}
        self.calls: dict[int, Video] = {}
        self.to_do: deque[Video] = deque()  # videos to open or close
        self.clock = 0.0
        self.exclusive: Video | None = None  # a suspect that is alone here
        self.reserved: Video | None = None  # the video that gets the next free place here
        self.idle_since: float | None = None

    def next_video(self) -> Video | None:
        """The next video: first those to open or close, then the one with the least virtual time."""
        if self.to_do:
            return self.to_do.popleft()
        idle = [v for v in self.streams.values() if v.where is Where.IDLE]
        return min(idle, key=lambda v: v.turn, default=None)

    def do(self, video: Video, where: Where) -> None:
        """Mark a video of this worker as `TO_OPEN` or `TO_CLOSE`."""
        video.where = where
        self.to_do.append(video)

    def took_turn(self, video: Video) -> None:
        """Count a chunk of a video."""
        self.clock = max(self.clock, video.turn)
        video.turn += 1.0 / video.weight
        video.had += 1

    def holds_alone(self, state_bytes: int, workspace_bytes: int) -> bool:
        """Whether a stream fits if it is alone on the worker."""
        return self.budget_bytes is None or state_bytes + workspace_bytes <= self.budget_bytes


class Workers:
    """All workers, their free places, and the estimated needs of streams."""

    def __init__(self, options: SchedulerOptions) -> None:
        self._options = options
        self._all: dict[int, Worker] = {}
        self._open: dict[int, Worker] = {}  # workers with a free place for any video
        self.reserved: dict[int, Worker] = {}
        self._largest: int | None = 0  # largest budget seen; None: no limit
        self._known = 0
        self._known_bytes = 0

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._all.values())

    @property
    def any_place(self) -> bool:
        """Whether any worker has a free place for any video."""
        return bool(self._open)

    @property
    def wards(self) -> int:
        """Number of workers that hold a suspect or are being emptied for one."""
        return sum(w.exclusive is not None or (w.reserved is not None and w.reserved.suspect) for w in self)

    def add(self, number: int, budget_bytes: int | None) -> Worker:
        """Add a worker. ValueError: the number is in use."""
        if number in self._all:
            raise ValueError(f"worker {number} exists already: each process needs its own number")
        worker = self._all[number] = Worker(number, budget_bytes)
        if budget_bytes is None:
            self._largest = None
        elif self._largest is not None:
            self._largest = max(self._largest, budget_bytes)
        self._sort(worker)
        return worker

    def remove(self, number: int) -> Worker | None:
        """Remove a worker; None if there is none with this number."""
        worker = self._all.pop(number, None)
        if worker is not None:
            self._open.pop(number, None)
            self.reserved.pop(number, None)
        return worker

    # --- assignment ----------------------------------------------------------------------------

    def admit(self, worker: Worker, video: Video) -> None:
        """Assign a waiting video to a worker."""
        video.worker, video.turn = worker, worker.clock
        video.sent, video.further, video.had = False, False, 0
        worker.streams[video.spec.stream_id] = video
        if video.suspect:
            worker.exclusive = video
        worker.do(video, Where.TO_OPEN)
        self._sort(worker)

    def release(self, video: Video) -> None:
        """Return a video to waiting, from the worker that holds it or is reserved for it."""
        worker, video.worker, video.where, video.sent = video.worker, None, Where.WAITING, False
        if worker is None:
            return
        if worker.reserved is video:
            worker.reserved = None
            self.reserved.pop(worker.number, None)
        else:
            del worker.streams[video.spec.stream_id]
            if video in worker.to_do:
                worker.to_do.remove(video)
            if worker.exclusive is video:
                worker.exclusive = None
        self._sort(worker)

    def reserve(self, worker: Worker, video: Video) -> None:
        """Reserve the next free place of a worker for a waiting video."""
        worker.reserved, video.worker = video, worker
        self.reserved[worker.number] = worker
        self._sort(worker)

    def clear(self, video: Video) -> None:
        """Clear a suspect: other videos may join it."""
        video.suspect = False
        worker = video.worker
        if worker is not None and worker.exclusive is video:
            worker.exclusive = None
            self._sort(worker)

    def _sort(self, worker: Worker) -> None:
        places = self._options.max_streams - len(worker.streams)
        if worker.number in self._all and places > 0 and worker.exclusive is None and worker.reserved is None:
            self._open[worker.number] = worker
        else:
            self._open.pop(worker.number, None)

    # --- memory ---------------------------------------------------------------------------------

    def learn(self, video: Video, state_bytes: int, workspace_bytes: int) -> None:
        """Record the memory needs of an opened stream."""
        if video.state_bytes is None:
            self._known += 1
            self._known_bytes += state_bytes
        video.state_bytes, video.workspace_bytes = state_bytes, workspace_bytes

    def confirm(self, worker: Worker, video: Video) -> bool:
        """Whether a stream opened on a worker fits beside the others whose needs are known."""
        known = [v for v in worker.streams.values() if v.state_bytes is not None]
        return worker.holds_alone(
            sum(v.state_bytes or 0 for v in known), max((v.workspace_bytes for v in known), default=0)
        )

    def has_room(self, worker: Worker, video: Video) -> bool:
        """Whether a waiting video can be placed on a worker now, ignoring reservations."""
        if video.suspect:
            return not worker.streams and self.could_hold(worker, video)
        if worker.exclusive is not None or len(worker.streams) >= self._options.max_streams:
            return False
        return self._free(worker, video) >= 0

    def could_hold(self, worker: Worker, video: Video) -> bool:
        """Whether a video fits on an empty worker."""
        return video.state_bytes is None or worker.holds_alone(video.state_bytes, video.workspace_bytes)

    def roomiest(self, video: Video) -> Worker | None:
        """The worker to place a video on: preferably not where it failed, then the emptiest."""
        fitting = (w for w in self._open.values() if self.has_room(w, video))
        return min(fitting, key=lambda w: (w.number == video.avoid, *self._load(w, video)), default=None)

    def to_reserve(self, video: Video) -> Worker | None:
        """The unreserved worker that is likely to have room for a video first."""
        fitting = (
            w for w in self if w.exclusive is None and w.reserved is None and self.could_hold(w, video)
        )
        return min(fitting, key=lambda w: self._load(w, video), default=None)

    def any_could_hold(self, video: Video) -> bool:
        """Whether a video fits any of the current workers if it were empty."""
        return any(self.could_hold(w, video) for w in self)

    def too_big(self, video: Video) -> Failure:
        """The failure of a video that fits no worker; permanent if it never fitted one."""
        need = (video.state_bytes or 0) + video.workspace_bytes
        largest = max((w.budget_bytes or 0 for w in self), default=0)
        permanent = self._largest is not None and need > self._largest
        message = (
            f"its state needs {need} bytes of device memory; the largest worker has {largest} for streams: "
            "use a larger device, a smaller size or fewer objects"
        )
        return Failure("TooBig", message, permanent)

    def _load(self, worker: Worker, video: Video) -> tuple[int, float]:
        return len(worker.streams), -self._free(worker, video)

    def _free(self, worker: Worker, video: Video) -> float:
        """Free memory after adding a video, in bytes; negative if it does not fit."""
        if worker.budget_bytes is None:
            return 0.0
        there = [*worker.streams.values(), video]
        if len(there) == 1 and video.state_bytes is None:
            # A guess must not prevent placement: a stream has to be opened to learn its needs.
            return 0.0
        workspace = max(v.workspace_bytes for v in there)
        return worker.budget_bytes - workspace - sum(map(self._need, there))

    def _need(self, video: Video) -> float:
        if video.state_bytes is not None:
            return video.state_bytes
        return self._known_bytes / self._known if self._known else self._options.guess_bytes
