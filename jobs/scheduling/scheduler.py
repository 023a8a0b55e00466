"""The batch scheduler: assigns videos to workers. No Ray, threads or clock: events in, actions out.

    scheduler.add(job); scheduler.worker_ready(1, budget_bytes)
    for action in scheduler.actions(now):             # Open, Track, Release, Close, CloseWorker
        ...                                           # results are passed in by call number:
    scheduler.opened(call, status); scheduler.reported(call, report); scheduler.released(call)

A stream stays on the worker that holds its state, with one chunk at a time. If others wait and it has used
its quantum, it is released and queued behind the begun streams; free places alternate between new and begun
videos. So neither long nor short videos starve the others.

When a worker dies, the responsible stream is unknown. Each of its streams becomes a suspect and runs alone
until it makes new progress. A crash counts as a failed try only for a stream that was alone.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator

from jobs.scheduling.actions import (
    Action,
    Close,
    CloseWorker,
    Open,
    Progress,
    Release,
    Running,
    SchedulerOptions,
    Track,
    VideoResult,
    VideoState,
)
from jobs.scheduling.outcomes import Ledger
from jobs.scheduling.placement import Video, Where, Worker, Workers
from jobs.scheduling.video_job import VideoJob
from jobs.scheduling.waiting import Waiting
from pipeline.base.errors import AnotherWriterError, UsageError
from pipeline.base.records import FrameChunk
from pipeline.distributed.messages import ChunkReport, StreamStatus
from pipeline.storage.failures import Failure

# "refused" and "unknown" are harmless, but a worker that returns nothing else must not keep a video for ever.
_HARMLESS = 3
# Number of lost workers whose streams can still be absolved.
_REMEMBERED = 256
# Time to wait for a sufficiently large worker, which may come back.
_NO_WORKER_SECONDS = 30.0


class Scheduler:
    """Assigns videos to workers; see the module docstring.

    `actions` returns the decisions; it must be called after each batch of events and at `wakeup`. Times are
    seconds of any monotonic clock.
    """

    def __init__(self, options: SchedulerOptions | None = None) -> None:
        self.options = options or SchedulerOptions()
        self._random = random.Random(self.options.seed)
        self._videos: dict[str, Video] = {}
        self._ledger = Ledger()
        self._waiting = Waiting()
        self._workers = Workers(self.options)
        self._calls: dict[int, Video] = {}
        # (video, counted as a try, became a suspect).
        self._blamed: dict[int, list[tuple[Video, bool, bool]]] = {}
        self._last_call = 0
        self._dirty: dict[int, Worker] = {}
        self._releasing = 0
        self._draining = False
        self.fault: Failure | None = None
        """The failure that stopped the whole batch; see `stop`."""

    # --- videos and progress --------------------------------------------------------------------

    def add(self, job: VideoJob) -> None:
        """Add a video; UsageError if its stream id exists already."""
        stream_id = job.spec.stream_id
        if stream_id in self._videos or stream_id in self._ledger:
            raise UsageError(f"stream id {stream_id!r} appears twice: each video needs its own")
        video = self._videos[stream_id] = Video(job)
        if self._draining:
            self._end(video, "pending")
        else:
            self._waiting.add(video)

    @property
    def done(self) -> bool:
        """Whether every video has ended or is left for another run."""
        return not self._videos

    @property
    def unfinished(self) -> int:
        """Number of videos that have not ended."""
        return len(self._videos)

    def results(self) -> Iterator[VideoResult]:
        """Results of the ended videos, in the order in which they ended."""
        return iter(self._ledger)

    def result(self, stream_id: str) -> VideoResult | None:
        """Result of a video; None if it has not ended."""
        return self._ledger.get(stream_id)

    def running(self) -> list[Running]:
        """Videos currently on workers."""
        held = (v for w in self._workers for v in w.streams.values())
        return [Running(v.spec.stream_id, v.position, v.frame_count) for v in held]

    def progress(self) -> Progress:
        """Progress of the batch."""
        running = sum(len(w.streams) for w in self._workers)
        counts = self._ledger.counts
        return Progress(
            videos=len(self._videos) + len(self._ledger),
            running=running,
            waiting=len(self._videos) - running,
            workers=len(self._workers),
            frames=self._ledger.frames,
            chunks=self._ledger.chunks,
            rows=self._ledger.rows,
            mean_frames=self._ledger.mean_frames,
            finished=counts["finished"],
            failed=counts["failed"],
            quarantined=counts["quarantined"],
            cancelled=counts["cancelled"],
            pending=counts["pending"],
        )

    # --- workers ---------------------------------------------------------------------------------

    def worker_ready(self, number: int, budget_bytes: int | None = None) -> None:
        """Add a worker without streams. A restarted worker needs a new number.

        Args:
            budget_bytes: device memory for its streams; None: no limit.
        """
        self._touch(self._workers.add(number, budget_bytes))

    def worker_lost(self, number: int, cause: Failure, now: float, *, blame: bool = True) -> None:
        """Remove a lost worker and its streams' states; its later results are ignored.

        Args:
            blame: whether one of its streams may be the cause. False: its machine was lost.
        """
        worker = self._workers.remove(number)
        if worker is None:
            return
        self._dirty.pop(number, None)
        for call, video in worker.calls.items():
            del self._calls[call]
            self._releasing -= video.where is Where.RELEASING
        there = list(worker.streams.values())
        sent = [v for v in there if v.sent]
        # If it had a single stream, that stream is the cause.
        alone = sent[0] if blame and len(sent) == 1 else None
        if alone is not None:
            alone.failing = alone.failing or cause
        if blame:
            self._blamed[number] = [(v, v is alone, not v.suspect) for v in sent]
            if len(self._blamed) > _REMEMBERED:
                del self._blamed[next(iter(self._blamed))]
        for video in sent:
            video.suspect = video.suspect or blame
            video.orphaned = True
        for video in there if worker.reserved is None else [*there, worker.reserved]:
            self._let_go(video, now)

    def absolve(self, number: int) -> None:
        """Absolve the streams of a lost worker, once it is known that they were not the cause."""
        for video, counted, suspected in self._blamed.pop(number, ()):
            if counted and video.failures:
                video.failures -= 1
            if suspected and video.suspect:
                self._workers.clear(video)
                if video.queue is not None:
                    self._waiting.remove(video)
                    self._waiting.put(video)
                elif video.worker is not None:
                    self._touch(video.worker)

    # --- results ---------------------------------------------------------------------------------

    def opened(self, call: int, status: StreamStatus, now: float) -> None:
        """Process the result of `Open`."""
        video, worker = self._answered(call)
        if video is None or worker is None:
            return
        if status.failure is not None:
            video.failing = status.failure
            self._let_go(video, now)
            return
        if video.spec.restart:
            # It was started over; the next opening continues it.
            video.spec = dataclasses.replace(video.spec, restart=False)
        video.position, video.offset = status.next_frame, status.offset
        self._ledger.count_length(video, status.frame_count)
        video.ellipses = max(video.ellipses, status.ellipses)
        self._ledger.count_rows(video, status.rows, status.losses)
        if video.best is None:
            video.best = status.next_frame
        elif status.next_frame > video.best:
            self._got_further(video)
        if status.finished:
            self._end(video, "finished")
            return
        self._workers.learn(video, status.state_bytes, status.workspace_bytes)
        if video.cancelled or self._draining:
            worker.do(video, Where.TO_CLOSE)
        elif not self._workers.confirm(worker, video):
            # Nothing was tracked, so nothing is lost: the video waits for more memory.
            too_big = self._workers.too_big(video)
            video.failing = too_big if too_big.permanent else None
            worker.do(video, Where.TO_CLOSE)
        else:
            video.where = Where.IDLE

    def reported(self, call: int, report: ChunkReport, now: float) -> None:
        """Process the result of `Track`."""
        video, worker = self._answered(call)
        if video is None or worker is None:
            return
        self._ledger.count(video, report)
        if report.outcome == "finished":
            video.position = max(report.next_frame, video.position)
            self._ledger.count_rows(video, report.rows, report.losses)
            self._end(video, "finished")
        elif report.outcome == "failed":
            video.failing = report.failure or Failure("Failure", "the worker gave no reason", False)
            video.position = report.next_frame
            self._ledger.count_rows(video, report.rows, report.losses)
            self._let_go(video, now)
        elif report.outcome == "tracked" and report.next_frame > video.position:
            video.position, video.where, video.harmless = report.next_frame, Where.IDLE, 0
            self._ledger.count_rows(video, report.rows, report.losses)
            if video.best is None or video.position > video.best:
                self._got_further(video)
                video.further = True
                self._workers.clear(video)
        else:
            self._did_nothing(worker, video, report)

    def _did_nothing(self, worker: Worker, video: Video, report: ChunkReport) -> None:
        video.harmless += 1
        if video.harmless > _HARMLESS:
            message = f"the worker makes no progress at frame {video.position}: {report.outcome}"
            video.failing, video.harmless = Failure("NoProgress", message, False), 0
            worker.do(video, Where.TO_CLOSE)
        elif report.outcome == "unknown":
            worker.do(video, Where.TO_OPEN)
        else:
            video.position, video.where = report.next_frame, Where.IDLE

    def released(self, call: int, now: float) -> None:
        """Note that `Release` or `Close` is done."""
        video, _ = self._answered(call)
        if video is not None:
            self._let_go(video, now)

    def call_failed(self, call: int, failure: Failure, now: float) -> None:
        """Handle a call that raised, which is unexpected; the worker is alive."""
        video, worker = self._answered(call)
        if video is None or worker is None:
            return
        video.failing = video.failing or failure
        if video.where is Where.CLOSING:
            self._let_go(video, now)
        else:
            # The stream may or may not be open there.
            worker.do(video, Where.TO_CLOSE)

    def _answered(self, call: int) -> tuple[Video, Worker] | tuple[None, None]:
        video = self._calls.pop(call, None)
        if video is None or video.worker is None:
            return None, None
        worker = video.worker
        del worker.calls[call]
        self._releasing -= video.where is Where.RELEASING
        self._touch(worker)
        return video, worker

    # --- the user --------------------------------------------------------------------------------

    def cancel(self, stream_id: str | None = None) -> bool:
        """Cancel a video, or all; current chunks are finished and kept.

        Returns:
            Whether there was a video to cancel.
        """
        if stream_id is None:
            return sum(self.cancel(i) for i in list(self._videos)) > 0
        video = self._videos.get(stream_id)
        if video is None:
            return False
        video.cancelled = True
        self._withdraw(video, "cancelled")
        return True

    def drain(self) -> None:
        """Begin no more chunks, finish current ones, and release all streams to the store."""
        self._draining = True
        for video in list(self._videos.values()):
            self._withdraw(video, "pending")

    def stop(self, fault: Failure) -> None:
        """Drain because of a failure that affects all videos; it counts against none of them."""
        self.fault = self.fault or fault
        self.drain()

    def _withdraw(self, video: Video, state: VideoState) -> None:
        if video.sent and video.worker is not None:
            self._touch(video.worker)
        else:
            self._end(video, state)

    # --- decisions -------------------------------------------------------------------------------

    def wakeup(self) -> float | None:
        """Time at which `actions` must be called even without events; None: after events only."""
        times = [t for t in (self._waiting.wakeup,) if t is not None]
        seconds = self.options.idle_seconds
        if seconds is not None and len(self._videos) < len(self._workers):
            times += [w.idle_since + seconds for w in self._workers if w.idle_since is not None]
        return min(times, default=None)

    def actions(self, now: float) -> list[Action]:
        """Actions to execute now. Each call must be answered once, unless its worker is lost."""
        self._waiting.wake(now)
        for worker in list(self._workers.reserved.values()):
            reserved = worker.reserved
            if reserved is not None and self._workers.has_room(worker, reserved):
                self._workers.release(reserved)
                self._admit(worker, reserved)
        self._place_suspects(now)
        self._place_waiting(now)
        actions: list[Action] = []
        for worker in self._dirty.values():
            self._dispatch(worker, actions)
        self._dirty.clear()
        self._close_idle(now, actions)
        return actions

    def _place_suspects(self, now: float) -> None:
        """Place suspects, each alone on a worker, on at most half of the workers."""
        suspects = self._waiting.suspects
        while self._workers.wards < max(1, len(self._workers) // 2):
            video = suspects.first()
            if video is None or not self._place(video, now):
                return

    def _place_waiting(self, now: float) -> None:
        """Give free places to waiting videos, alternating new and begun ones."""
        while self._workers.any_place:
            places = len(self._workers) * self.options.max_streams
            if not any(self._place(video, now) for video in self._waiting.next(places)):
                return

    def _place(self, video: Video, now: float) -> bool:
        """Place the first video of a queue on a worker that has room, or reserve a worker for it.

        Returns:
            Whether it left the queue; otherwise it has to wait.
        """
        workers = self._workers
        worker = workers.roomiest(video)
        if worker is not None:
            self._waiting.take(video)
            self._admit(worker, video)
            return True
        # The next free place is reserved for it, otherwise smaller videos would always come first.
        worker = workers.to_reserve(video)
        if worker is not None:
            self._waiting.take(video)
            workers.reserve(worker, video)
            self._touch(worker)
            return True
        if not len(workers) or workers.any_could_hold(video):
            return False
        self._waiting.take(video)
        video.failing = workers.too_big(video)
        self._failed(video, now, at_least=_NO_WORKER_SECONDS)
        return True

    def _admit(self, worker: Worker, video: Video) -> None:
        self._workers.admit(worker, video)
        self._touch(worker)

    def _dispatch(self, worker: Worker, actions: list[Action]) -> None:
        busy = any(video.where is Where.TRACKING for video in worker.calls.values())
        latest: float | None = None
        while len(worker.calls) < self.options.depth:
            video = worker.next_video()
            if video is None:
                return
            if self.options.together and video.where is Where.IDLE:
                # A chunk of a stream with a large share is shorter in virtual time. Others join it only if
                # they are not further ahead than that, so that shares stay the same.
                latest = video.turn + 1.0 / video.weight if latest is None else latest
                if busy or video.turn > latest:
                    return
            self._last_call += 1
            call, stream_id = self._last_call, video.spec.stream_id
            worker.calls[call] = self._calls[call] = video
            if video.where is Where.TO_OPEN:
                video.where, video.sent = Where.OPENING, True
                video.tries += video.retry
                video.retry = False
                actions.append(Open(call, worker.number, video.spec))
            elif video.where is Where.TO_CLOSE:
                video.where = Where.CLOSING
                actions.append(Close(call, worker.number, stream_id))
            elif self._makes_room(worker, video):
                video.where = Where.RELEASING
                self._releasing += 1
                actions.append(Release(call, worker.number, stream_id))
            else:
                video.where = Where.TRACKING
                worker.took_turn(video)
                first, size = video.position, self.options.chunk_frames
                actions.append(
                    Track(call, worker.number, FrameChunk(stream_id, first, first - first % size + size - 1))
                )

    def _makes_room(self, worker: Worker, video: Video) -> bool:
        if video.cancelled or self._draining:
            return True
        # Only after new progress: if its rows were lost each time, it would be released and resumed for ever.
        if video.suspect or not video.further or video.had < self.options.quantum:
            return False
        return worker.reserved is not None or len(self._waiting) > self._releasing

    def _close_idle(self, now: float, actions: list[Action]) -> None:
        seconds = self.options.idle_seconds
        if seconds is None or len(self._videos) >= len(self._workers):
            return
        for worker in list(self._workers):
            if worker.streams or worker.reserved is not None:
                worker.idle_since = None
            elif worker.idle_since is None:
                worker.idle_since = now
            elif now - worker.idle_since >= seconds and len(self._videos) < len(self._workers):
                self._workers.remove(worker.number)
                actions.append(CloseWorker(worker.number))

    # --- where a video goes ----------------------------------------------------------------------

    def _let_go(self, video: Video, now: float) -> None:
        """Decide what happens to a video after its worker has released it."""
        if video.worker is not None and video.failing is not None:
            video.avoid = video.worker.number
        self._workers.release(video)
        if video.cancelled:
            video.cause = video.failing or video.cause
            self._end(video, "cancelled")
        elif video.failing is not None:
            self._failed(video, now)
        elif self._draining:
            self._end(video, "pending")
        else:
            self._waiting.put(video)

    def _failed(self, video: Video, now: float, at_least: float = 0.0) -> None:
        failure, video.failing = video.failing, None
        assert failure is not None
        video.cause = failure
        if failure.output:
            self._end(video, "pending")
            self.stop(failure)
            return
        # The lost worker may have committed after the video was opened elsewhere.
        own = failure.kind == AnotherWriterError.__name__ and video.orphaned
        video.orphaned = video.orphaned and not own
        video.failures += 1
        if failure.permanent and not own:
            self._end(video, "failed")
        elif video.failures >= self.options.max_tries:
            self._end(video, "quarantined")
        elif self._draining:
            self._end(video, "pending")
        else:
            options, video.retry = self.options, True
            seconds = min(options.backoff_seconds * 2 ** (video.failures - 1), options.max_backoff_seconds)
            seconds = max(seconds, at_least) * (1 + options.jitter * self._random.random())
            self._waiting.put_off(video, now + seconds)

    def _end(self, video: Video, state: VideoState) -> None:
        self._waiting.remove(video)
        self._workers.release(video)
        del self._videos[video.spec.stream_id]
        self._ledger.end(video, state)

    def _got_further(self, video: Video) -> None:
        video.best, video.failures = video.position, 0

    def _touch(self, worker: Worker) -> None:
        self._dirty[worker.number] = worker
