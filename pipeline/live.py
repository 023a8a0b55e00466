"""LiveTracker: one live stream's way from its camera through the segmenter into the store. No Ray in here.

    if (step := stream.next_input()) is not None:
        stream.accept(segmenter.step(step.state, step.image, step.prompt))

Nothing is ever repeated: what a camera showed is gone. A stream that starts again takes the newest usable
snapshot for its objects and goes on with the next frame there is. Frame numbers and object ids are reserved
before anybody sees them, so that none is used twice, whoever dies when; the numbers between are counted as
dropped for the reason "restart", in a `restart` event's company.

Rows are committed after some seconds or rows, whichever comes first. Files follow one another without a gap:
each covers all frames that were received, tracked or not.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.background import BackgroundWriter
from pipeline.boxes import BoxSegmenter, load_box_segmenter
from pipeline.closing import Closing
from pipeline.errors import PromptError, SourceError
from pipeline.finder import ObjectFinder
from pipeline.ledger import Ledger
from pipeline.live_feed import LiveFeed, OpenFeed
from pipeline.live_objects import LiveObjects, Masks
from pipeline.live_pace import Pace
from pipeline.live_record import Books, LiveRecord, Request
from pipeline.live_requests import LiveRequests, Rejected
from pipeline.live_restore import restore, run_of
from pipeline.live_snapshot import LiveSnapshot
from pipeline.live_spec import LiveSpec
from pipeline.live_unwritten import Unwritten
from pipeline.live_view import LiveView
from pipeline.prompts import PromptSet
from pipeline.records import Event, Frame, events_table, tracks_table
from pipeline.settings import TrackSettings
from pipeline.sinks import Sinks
from pipeline.snapshot import Snapshot
from pipeline.store import StreamStore
from pipeline.stream import StepInput
from xmem_core import Prompt, StepResult, VideoSegmenter

__all__ = ["LiveFeed", "LiveTracker", "OpenFeed", "Rejected"]

logger = logging.getLogger(__name__)

_FRAMES_AHEAD = 64  # that are reserved at least
_MARGIN = 8  # frames that may come while one looks
_IDS_AHEAD = 16
_EMPTY_SECONDS = 60.0  # between files that would have no rows
_HASTY_SNAPSHOT_SECONDS = 1.0
_MOST_WAITING = 8  # rotations' worth of rows that may wait for a slow store
_AT_ONCE = 16  # frames that are thrown away in one go


@dataclass(frozen=True)
class _Pending:
    """The frame that waits to be accepted, `lag` seconds old when it was read."""

    frame: Frame
    step: StepInput
    lag: float
    read_at: float


class LiveTracker(Closing):
    """One live stream. Use it as a context manager.

    One thread steps it; `request` and what the status is made of may be used from any.

    Args:
        spec: what is asked for.
        store: where its rows go.
        segmenter: makes and restores states; steps are done by whoever drives this stream.
        settings: for the record; memory, model and size of the segmenter.
        open_feed: makes the source, counting in the ledger that it gets.
        view: what is told of each tracked frame.
        sinks: where rows go besides the store.
        distrusted: why, by the number of a request, it is not to be done: what it asked for failed before.

    Attributes:
        record: how far it is committed.
        requests: how far they are done, and whether it is paused.
        state: what the segmenter remembers of it.
        restored_from: the frame that the snapshot it went on from is of; None if there was none.
        applying: the numbers of the requests that are done on the frame that waits to be accepted.

    Raises:
        SettingsConflictError: the folder holds a stream of this id that is not live.
        StoreError: the folder cannot be read or written. UsageError: the spec is wrong.
    """

    def __init__(
        self,
        spec: LiveSpec,
        store: StreamStore,
        segmenter: VideoSegmenter,
        settings: TrackSettings,
        open_feed: OpenFeed,
        *,
        view: LiveView | None = None,
        sinks: Sinks | None = None,
        distrusted: Mapping[int, str] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec = spec
        self.applying: tuple[int, ...] = ()
        self.view = view or LiveView()
        self.settings = settings
        self._store, self._segmenter, self._sinks, self._now = store, segmenter, sinks, now
        boxes = load_box_segmenter(spec.settings.box_segmenter)
        self._writer = BackgroundWriter(_MOST_WAITING)
        self._jobs_given = self._jobs_done = 0  # each counted by one thread
        self._failure: BaseException | None = None
        self._pending: _Pending | None = None
        self._pace = Pace(spec.settings)
        self._spoilt = False  # a frame failed half-way: the state may be wrong
        self._closed = False
        self.record = LiveRecord(store, self._facts(spec.shown_url, None))
        try:
            self._open(open_feed, boxes, distrusted)
        except BaseException:
            self._writer.close()
            raise

    # --- opening ---------------------------------------------------------------------------------

    def _open(self, open_feed: OpenFeed, boxes: BoxSegmenter, distrusted: Mapping[int, str] | None) -> None:
        record, books = self.record, self.record.books
        restored = restore(self._store, books, self.spec, self._segmenter, boxes)
        self.state, self.restored_from = restored.state, restored.next_frame
        self._previous, self._previous_size = restored.previous, restored.previous_size
        self._lost = restored.lost
        first = max(books.frames, record.frames_reserved)
        self._unwritten = Unwritten(books, first)
        self._objects = LiveObjects(
            self.state,
            boxes,
            self.spec.settings.finder.max_objects,
            self._unwritten,
            finder=restored.finder,
            categories=restored.categories,
        )
        self.requests = LiveRequests(
            self.spec,
            record,
            self._objects,
            applied=restored.applied,
            paused=restored.paused,
            distrusted=distrusted,
        )
        self._snapshot_applied = self.requests.applied
        if restored.finder is not None:
            restored.finder.reserve([record.ids_reserved - 1, *self.state.object_ids])
        self._begun = False
        self._rotated_at = self._snapshot_at = self._now()
        self._snapshot_tracked = books.ledger.tracked
        self._restart_lost = first - books.frames
        ledger = Ledger.resumed(books.ledger, first) if record.resumed else Ledger()
        if self._restart_lost:
            self._unwritten.add(Event(books.frames, "dropped", "restart", self._restart_lost))
        ids = max(record.ids_reserved, *(i + 1 for i in (0, *self.state.object_ids)))
        if self.spec.prompts is not None:
            self.requests.begin_with(self.spec.prompts)
        record.reserve(frames=first + _FRAMES_AHEAD, ids=max(ids, record.ids_reserved) + _IDS_AHEAD)
        self.source = open_feed(self.spec, ledger)
        self.source.resume(first, *self._previous)

    def _facts(self, uri: str, source: LiveFeed | None) -> dict[str, Any]:
        return {
            "source": uri,
            "width": 0 if source is None else source.width,
            "height": 0 if source is None else source.height,
            "rate": None if source is None else source.rate,
            "codec": "" if source is None else source.codec,
            "container": "" if source is None else source.container,
            "model": self.settings.model.name,
            "settings": self.settings.to_dict(),
            "prompts": PromptSet().to_record(),
            "resolved_prompts": {},
            "live_settings": self.spec.settings.to_dict(),
        }

    # --- asking ----------------------------------------------------------------------------------

    def request(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Have something done before the next frame; durable when it returns, in the order of the numbers.

        Args:
            content: one of {"prompts": a prompts file's content, without frames}, {"remove": [ids]} and
                {"pause": true or false}. Prompts without an id get one that no object ever had.

        Returns:
            {"seq": its number, "ids": of the objects it is about}.

        Raises:
            UsageError: it is wrong, or there would be too many objects. StoreError: it could not be kept.
        """
        size = (self.source.height, self.source.width) if self.source.height else None
        return self.requests.ask(content, size)

    # --- stepping --------------------------------------------------------------------------------

    def next_input(self) -> StepInput | None:
        """The next frame to track, the same until it is accepted; None if there is none just now.

        Never waits for frames. Raises what went wrong; the stream must be closed then.
        """
        if self._failure is not None:
            raise self._failure
        if self._pending is not None:
            return self._pending.step
        self._pace.looks(self._now())
        try:
            self._writer.check()
            for _ in range(_AT_ONCE):
                if self._backlogged() or self._numbers_run_out():
                    break  # frames wait, or are dropped where they wait, and counted there
                frame = self.source.read(0)
                if frame is None:
                    if self.source.closed:
                        raise SourceError(f"{self.source.uri}: the source ended")
                    break
                lag, read_at = float(self.source.status().lag_seconds or 0.0), self._now()
                self._receive(frame)
                reason = "paused" if self.requests.paused else self._pace.unwanted(lag, read_at)
                if reason is not None:
                    self._drop(frame, reason)
                    continue
                self._unwritten.begin_frame()
                try:
                    step = self._arrive(frame)
                except BaseException:
                    self._spoil(frame)
                    raise
                self._pending = _Pending(frame, step, lag, read_at)
                return step
        except BaseException as error:
            self._failure = error
            raise
        self.tick()
        return None

    def accept(self, result: StepResult) -> None:
        """Take the segmenter's result for the frame that `next_input` gave last."""
        if self._failure is not None:
            raise self._failure
        if self._pending is None:
            raise RuntimeError("accept() without a frame from next_input()")
        frame, lag, read_at = self._pending.frame, self._pending.lag, self._pending.read_at
        try:
            records = self._objects.seen(frame, result)
            self._previous, self._previous_size = (frame.pts_seconds, frame.wall_time), frame.size
            self._pending, self.applying = None, ()
            self.source.ledger.tracked()
            self._unwritten.add_tracked(records)
            self.view.publish(frame, records)
            took = self._now() - read_at
            if self._pace.tracked(lag, took):
                self._tell_of_slowness(took)
            self.tick()
        except BaseException as error:
            self._failure = error
            raise

    def _tell_of_slowness(self, took: float) -> None:
        logger.warning(
            "stream %s: a frame with %d objects took %.2f s, more than max_lag_seconds=%s allows: give "
            "a smaller size, fewer max_objects or a larger max_lag_seconds",
            self.spec.stream_id,
            len(self.state.object_ids),
            took,
            self.spec.settings.max_lag_seconds,
        )

    def tick(self) -> None:
        """Commit what is due. Called by `next_input` and `accept`; by itself while no frames come."""
        if self._failure is not None:
            raise self._failure
        now = self._now()
        self._pace.sample(now, self.source.ledger)
        if self._pending is not None or self._writing:
            return
        chosen = self.spec.settings
        since = now - self._rotated_at
        hasty = self._objects.changed and now - self._snapshot_at >= _HASTY_SNAPSHOT_SECONDS
        snapshot = hasty or (
            now - self._snapshot_at >= chosen.snapshot_seconds
            and self._unwritten.tracked > self._snapshot_tracked
        )
        due = (
            self._unwritten.waiting_rows >= chosen.rotate_rows
            or (since >= chosen.rotate_seconds and self._unwritten.worth_a_file)
            or since >= max(_EMPTY_SECONDS, chosen.rotate_seconds)
        )
        if self._begun and (due or snapshot):
            self._rotate(now)
            if snapshot:
                self._take_snapshot(now)

    def failed(self, error: BaseException) -> None:
        """The segmenter failed on the frame that `next_input` gave last."""
        self._failure = self._failure or error

    def close(self, state: str = "running") -> None:
        """Let go of source and threads, with everything committed that was tracked.

        Args:
            state: for the record: "running" if the stream is to go on later, "finished" if not.

        Raises:
            StoreError: it could not be written; the rest is lost.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._pending is not None:
                frame, self._pending = self._pending.frame, None
                self._spoil(frame)
            self.source.close()
            for event in self.source.trailing_losses:
                self._unwritten.add(event)
            received = self.source.ledger.counts().received
            self._unwritten.covered = max(self._unwritten.covered, received)
            self._writer.check()
            # Without a frame of its own a run has nothing to tell: the next one tells of both.
            begun = self._begun or self._unwritten.covered > self._unwritten.first + self._restart_lost
            if begun:
                self._restarted(None)
                self._rotate(self._now())
            if self._begun and not self._spoilt and self.state.poisoned is None:
                self._take_snapshot(self._now())
            self._writer.drain()
            finder = self._objects.finder
            next_id = self.record.ids_reserved if finder is None else finder.next_id
            self.record.rest(state, frames=self._unwritten.covered, ids=next_id)
        finally:
            self.record.close()
            self._writer.close()

    # --- one frame -------------------------------------------------------------------------------

    def _receive(self, frame: Frame) -> None:
        """A frame is here: nothing before it is in flight any more."""
        if frame.frame_index >= self.record.frames_reserved:
            self.record.reserve(frames=frame.frame_index + self._ahead())
        self._restarted(frame)
        for loss in frame.losses:
            self._unwritten.add(loss)
        self._unwritten.covered = frame.frame_index + 1

    def _restarted(self, frame: Frame | None) -> None:
        """Once, with the first frame or the end: tell what came before, if anything did."""
        if self._begun:
            return
        self._begun = True
        if not self.record.resumed:
            return
        seconds = None
        if frame is not None and frame.wall_time is not None and self._previous[1] is not None:
            seconds = round((frame.wall_time - self._previous[1]).total_seconds(), 3)
        detail = {"seconds": seconds, "frames": self._restart_lost, "snapshot": self.restored_from}
        index = self._unwritten.first if frame is None else frame.frame_index
        pts, wall = (None, None) if frame is None else (frame.pts_seconds, frame.wall_time)
        self._unwritten.add(
            Event(index, "restart", "resumed", 1, pts_seconds=pts, wall_time=wall, detail=detail)
        )
        for object_id in self._lost:
            self._unwritten.add(
                Event(
                    index,
                    "object_removed",
                    "restart",
                    pts_seconds=pts,
                    wall_time=wall,
                    object_id=object_id,
                    detail={"why": "it is in no snapshot"},
                )
            )
        self._lost = ()

    def _spoil(self, frame: Frame) -> None:
        """It failed half-way."""
        self._spoilt = True
        self._unwritten.take_back()
        self._drop(frame, "failed")

    def _drop(self, frame: Frame, reason: str) -> None:
        self.source.ledger.dropped(reason)
        self._unwritten.happened(frame, "dropped", reason=reason)

    def _arrive(self, frame: Frame) -> StepInput:
        """A frame is to be tracked: what was asked for, and what is found on it, goes with it."""
        told = any(loss.kind == "resized" and loss.reason is None for loss in frame.losses)
        if self._previous_size is not None and frame.size != self._previous_size and not told:
            detail = {"from": list(self._previous_size), "to": list(frame.size)}
            self._unwritten.happened(frame, "resized", detail=detail)
        masks: Masks = {}
        self.applying = ()
        for request in self.requests.waiting():
            if not self.requests.refuses(request):
                self.applying += (request.number,)
                self._apply(frame, request, masks)
            self.requests.done(request)
            if masks:
                break  # prompts of two requests may cover each other; the next frame is soon here
        if self._objects.finder is not None:
            self._reserve_ids(self._objects.finder)
            self._objects.look(frame, masks)
        return StepInput(self.state, frame.image, Prompt(masks) if masks else None)

    def _apply(self, frame: Frame, request: Request, masks: Masks) -> None:
        for object_id in request.content.get("remove", ()):
            if object_id in self.state.object_ids:
                self._objects.remove(frame, object_id, "requested")
            else:
                self.requests.reject(request, f"no object {object_id} is tracked that could be removed")
        if "prompts" in request.content:
            try:
                masks.update(self._objects.prompt(frame, request.content["prompts"]))
            except PromptError as error:
                self.requests.reject(request, str(error))

    def _reserve_ids(self, finder: ObjectFinder) -> None:
        """For all objects that may be found on the next look."""
        most = self.spec.settings.finder.max_objects
        # Ids that requests were promised lie below what is reserved, so they must be known here as well.
        while True:
            # Requests that come from here on get ids above this.
            free = self.record.ids_reserved
            finder.reserve(self.requests.promised_ids())
            if finder.next_id + most <= free:
                break
            self.record.reserve(ids=finder.next_id + most + _IDS_AHEAD)

    # --- committing ------------------------------------------------------------------------------

    def _backlogged(self) -> bool:
        return self._writing and self._unwritten.waiting_rows > _MOST_WAITING * self.spec.settings.rotate_rows

    def _numbers_run_out(self) -> bool:
        """Whether the next frame might have a number that is not reserved; then that is being done."""
        received = self.source.ledger.counts().received
        if received + _MARGIN <= self.record.frames_reserved:
            return False
        if not self._writing:
            frames = received + self._ahead()
            self._submit(lambda: self.record.reserve(frames=frames))
        return True

    def _ahead(self) -> int:
        """Frames to reserve beyond the newest: those of three rotations."""
        rate = self.rates()["received_fps"]
        return _FRAMES_AHEAD + math.ceil(3 * self.spec.settings.rotate_seconds * rate)

    def _submit(self, job: Callable[[], None]) -> None:
        def do() -> None:
            try:
                job()
            finally:
                self._jobs_done += 1

        self._jobs_given += 1
        self._writer.submit(do)

    @property
    def _writing(self) -> bool:
        return self._jobs_done < self._jobs_given

    def _rotate(self, now: float) -> None:
        """Hand all frames received so far to the writing thread."""
        self._rotated_at = now
        content = self._unwritten.cut()
        if content is None:
            return
        first, last, counts = content.first, content.last, content.counts
        if not counts.settled:
            logger.error("stream %s: the ledger does not add up: %r", self.spec.stream_id, counts)
        books = Books(last + 1, counts, content.rows, self._objects.living(), *self._previous)
        reserved, facts = last + 1 + self._ahead(), self._facts(self.source.uri, self.source)

        def write() -> None:
            tracks, events = tracks_table(content.records), events_table(content.events)
            if self._sinks and not self._store.holds(first):
                self._sinks.commit(self.spec.stream_id, first, last, tracks, events)
            if first == 0:
                self.record.check_ours()
            self._store.commit(first, last, tracks, events)
            self.record.committed(books, frames=reserved, facts=facts)

        self._submit(write)

    def _take_snapshot(self, now: float) -> None:
        """Of the state after all frames that were handed to the writer; written after them."""
        self._snapshot_at, self._snapshot_tracked = now, self._unwritten.tracked
        objects = self._objects
        objects.changed = False
        snapshot = LiveSnapshot(
            Snapshot(
                next_frame=self._unwritten.first,
                tracker=self.state.to_bytes(),
                run=run_of(self._segmenter),
                previous_pts_seconds=self._previous[0],
                previous_size=self._previous_size,
                categories=tuple(objects.categories.items()),
                rows=self._unwritten.rows,
                losses=self._unwritten.corrupt,
                finder=None if objects.finder is None else objects.finder.to_bytes(),
            ),
            self._previous[1],
            self.requests.applied,
            self.requests.paused,
        )
        # The store keeps two: what is in both need not be asked again.
        done, self._snapshot_applied = self._snapshot_applied, self.requests.applied

        def write() -> None:
            self._store.save_snapshot(snapshot.stream.next_frame, snapshot.to_bytes())
            self.record.forget(done)

        self._submit(write)

    # --- how it is -------------------------------------------------------------------------------

    @property
    def next_frame(self) -> int:
        """The number after the newest frame that came out of the source."""
        return self._unwritten.covered

    @property
    def began(self) -> bool:
        """Whether a frame has come since it was opened."""
        return self._begun

    def rates(self) -> dict[str, float]:
        """Frames per second lately, received and tracked."""
        return self._pace.rates()

    def lag_seconds(self) -> dict[str, float | None]:
        """How old frames were once they were tracked, lately: the median, and 99 of 100."""
        return self._pace.lag_seconds()
