"""LiveTracker: tracks one live stream from its camera into the store. Does not import Ray.

    if (step := stream.next_input()) is not None:
        stream.accept(segmenter.step(step.state, step.image, step.prompt))

Frames of a camera cannot be repeated. A restarted stream restores its objects from the newest usable snapshot
and continues with the next frame. Frame numbers and object ids are reserved before they are used, so that
none is used twice after a crash. Frame numbers lost in a restart are counted as dropped with the reason
"restart", and a `restart` event is recorded.

Rows are committed after a number of seconds or rows, whichever comes first. Files have no gaps between them:
each covers all frames that were received, tracked or not.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.base.closeable import Closing
from pipeline.base.errors import SourceError
from pipeline.base.records import Event, Frame
from pipeline.live.arrivals import IDS_AHEAD, Arrivals
from pipeline.live.camera.ledger import TOO_OLD, Ledger
from pipeline.live.committing import FRAMES_AHEAD, MOST_WAITING, LiveCommitter
from pipeline.live.feed import LiveFeed, OpenFeed, live_facts
from pipeline.live.pacing import LookPace, Pace
from pipeline.live.pending_rows import Unwritten
from pipeline.live.recent import LiveView
from pipeline.live.record import LiveRecord
from pipeline.live.recovery import restart_events, restore, run_of
from pipeline.live.requests import LiveRequests, Rejected
from pipeline.live.spec import LiveSpec
from pipeline.live.zones import LiveZones
from pipeline.memory.stream_memory import memory_listing
from pipeline.prompts.box_segmenters import BoxSegmenter, load_box_segmenter
from pipeline.prompts.remembered_object import RememberedObject
from pipeline.tracking.committer import Committer
from pipeline.tracking.files.stream_tracker import StepInput
from pipeline.tracking.look_ahead import SideEncoder, looks_ahead
from pipeline.tracking.objects import Masks, TrackedObjects
from pipeline.tracking.settings import TrackSettings
from pipeline.tracking.snapshots.object_states import read_object
from pipeline.tracks.edit_log import EDITED
from pipeline.tracks.sinks import Sinks
from pipeline.tracks.store import StreamStore
from xmem_core import Prompt, StepResult, VideoSegmenter

__all__ = ["LiveFeed", "LiveTracker", "OpenFeed", "Rejected"]

logger = logging.getLogger(__name__)

_AT_ONCE = 16  # maximum number of frames dropped per call


@dataclass(frozen=True)
class _Pending:
    """The frame whose result is awaited; it was `lag` seconds old when its turn came."""

    frame: Frame
    step: StepInput
    lag: float
    begun_at: float


@dataclass(frozen=True)
class _Arrived:
    """A frame to track that arrived `at` this time; `held`: it was read ahead of its turn."""

    frame: Frame
    at: float
    held: bool


class LiveTracker(Closing):
    """Tracks one live stream. Use it as a context manager.

    One thread steps it; `request` and the properties that the status reads are thread-safe.

    Args:
        spec: camera, prompts and settings of the stream.
        store: receives its rows.
        segmenter: creates and restores states; the caller runs the steps.
        settings: settings for the record; memory, model and size match the segmenter.
        open_feed: creates the source, which counts frames in the given ledger.
        view: receives the results of each tracked frame.
        sinks: receive the rows before the store does.
        distrusted: reasons, by request number, why a request must not be applied: it failed before.
        told: called in the background after events of zones were committed, with the file's first frame.

    Attributes:
        record: the stream record, with the committed state.
        zones: its zones and lines.
        requests: pending and applied requests, and whether the stream is paused.
        state: the segmenter's state of the stream.
        restored_from: frame of the snapshot that it resumed from; None if there was none.

    Raises:
        SettingsConflictError: the folder holds a stream of this id that is not live.
        StoreError: the folder cannot be read or written. UsageError: the spec is invalid.
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
        told: Callable[[int], None] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec = spec
        self.view = view or LiveView()
        self.settings = settings
        self._now, self._told = now, told
        boxes = load_box_segmenter(spec.settings.box_segmenter)
        self._failure: BaseException | None = None
        self._pending: _Pending | None = None
        self._held: _Arrived | None = None  # read ahead of its turn
        self._pace, self._looks = Pace(spec.settings), LookPace()
        self._spoilt = False  # a frame failed midway: the state may be wrong
        self._closed = False
        self._encoder: SideEncoder | None = None
        self.record = LiveRecord(store, live_facts(spec, settings, spec.shown_url, None))
        # Two processes that follow the same camera write different rows: each range is checked.
        committer = Committer(store, sinks, lambda first: self.record.check_ours(), MOST_WAITING)
        try:
            self._open(committer, store, segmenter, boxes, open_feed, distrusted)
        except BaseException:
            committer.close()
            raise

    # --- opening ---------------------------------------------------------------------------------

    def _open(
        self,
        committer: Committer,
        store: StreamStore,
        segmenter: VideoSegmenter,
        boxes: BoxSegmenter,
        open_feed: OpenFeed,
        distrusted: Mapping[int, str] | None,
    ) -> None:
        record, books = self.record, self.record.books
        restored = restore(store, books, self.spec, segmenter, boxes)
        self.state, self.restored_from = restored.state, restored.next_frame
        self._lost = restored.lost
        first = max(books.frames, record.frames_reserved)
        self._unwritten = Unwritten(books, first)
        most = self.spec.settings.finder.max_objects
        self._objects = TrackedObjects(
            self.state,
            self._unwritten,
            most=most,
            finder=restored.finder,
            categories=restored.categories,
            frame_size=restored.previous_size,
        )
        self.requests = LiveRequests(
            self.spec,
            record,
            self._objects,
            applied=restored.applied,
            paused=restored.paused,
            distrusted=distrusted,
            copies=lambda source: self._copied(source, store),
        )
        self.zones = LiveZones(self.spec.zones_here, store, record.zones, self._unwritten)
        record.begin_zones(self.zones.keep(books.frames))
        told = _edits_told(store, self.restored_from, self.requests)
        self._arrivals = Arrivals(
            self._objects, self.requests, record, boxes, most, segmenter, store.object_copies, told
        )
        self._committing = LiveCommitter(
            self.spec.stream_id,
            self.spec.settings,
            committer,
            record,
            self._unwritten,
            self._objects,
            self.requests,
            self.zones,
            run=run_of(segmenter),
            previous=restored.previous,
            facts=lambda: live_facts(self.spec, self.settings, self.source.uri, self.source),
            received_fps=lambda: self.rates()["received_fps"],
            now=self._now(),
            told=self._told,
        )
        if restored.finder is not None:
            restored.finder.reserve([record.ids_reserved - 1, *self.state.object_ids])
        self._begun = False
        self._restart_lost = first - books.frames
        ledger = Ledger.resumed(books.ledger, first) if record.resumed else Ledger()
        if self._restart_lost:
            self._unwritten.add(Event(books.frames, "dropped", "restart", self._restart_lost))
        ids = max(record.ids_reserved, *(i + 1 for i in (0, *self.state.object_ids)))
        if self.spec.parsed_prompts is not None:
            self.requests.begin_with(self.spec.parsed_prompts)
        record.reserve(frames=first + FRAMES_AHEAD, ids=max(ids, record.ids_reserved) + IDS_AHEAD)
        self.source = open_feed(self.spec, ledger)
        self.source.resume(first, *restored.previous)
        if looks_ahead(segmenter, threads := self.settings.threads):
            self._encoder = SideEncoder(segmenter, self.state, threads)

    # --- asking ----------------------------------------------------------------------------------

    def request(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Submit a request, to be applied before the next frame in the order of numbers. Durable on return.

        Args:
            content: one of {"prompts": `LivePrompts` or what they are made of}, {"remove": [ids]},
                {"rename": {"id": id, "category": text}}, {"memory": edit} with an edit as for
                `pipeline.edit_memory` of times that `LiveView.memory` lists, and {"pause": true or false}.
                Prompts without an id get one that was never used.

        Returns:
            {"seq": the request's number, "ids": the ids of its objects}.

        Raises:
            UsageError: the request is wrong, or exceeds the limit of objects. StoreError: it could not be
                stored.
        """
        size = (self.source.height, self.source.width) if self.source.height else None
        return self.requests.ask(content, size)

    def _copied(self, source: RememberedObject, store: StreamStore) -> tuple[str, str | None]:
        """Store a copy of an object; its key and category. UsageError if this stream cannot read it."""
        copy, category = read_object(source, store, self.state.model_fingerprint, self.state.room_for_copies)
        return store.object_copies.add(copy.to_bytes()), category

    # --- stepping --------------------------------------------------------------------------------

    def next_input(self) -> StepInput | None:
        """The next frame to track, the same until it is accepted; None if no frame is available.

        Does not wait for frames. After an error the stream must be closed.
        """
        if self._failure is not None:
            raise self._failure
        if self._pending is not None:
            return self._pending.step
        self._pace.looks(self._now())
        try:
            self._committing.check()
            arrived = self._arrived()
            if arrived is None:
                if self.source.closed and self._held is None:
                    raise SourceError(f"{self.source.uri}: the source ended")
            else:
                frame, begun_at = arrived.frame, self._now()
                self._receive(frame)
                self._unwritten.begin_frame()
                try:
                    if self._encoder is not None and not arrived.held:
                        self._encoder.begin(frame.image)
                    masks = self._prepared(frame)
                    image = frame.image if self._encoder is None else self._encoder.take(frame.image)
                except BaseException:
                    self._spoil(frame)
                    raise
                step = StepInput(self.state, image, Prompt(masks) if masks else None)
                self._pending = _Pending(frame, step, begun_at - arrived.at, begun_at)
                self._read_ahead()
                return step
        except BaseException as error:
            self._failure = error
            raise
        self.tick()
        return None

    def _arrived(self) -> _Arrived | None:
        """The next frame to track: the one read ahead, else from the source."""
        held = self._held
        if held is None:
            return self._next_wanted()
        if self._committing.backlogged or self._committing.numbers_run_out(self.source.ledger):
            return None
        self._held = None
        if self.requests.paused:
            reason = "paused"
        elif self._pace.is_late(self._now() - held.at):  # other streams had their turns meanwhile
            reason = TOO_OLD
        else:
            return held
        self._receive(held.frame)
        self._drop(held.frame, reason)
        return self._next_wanted()

    def _next_wanted(self, ahead: float | None = None) -> _Arrived | None:
        """Read the next frame that is to be tracked; None if there is none. Those before it are dropped.

        Args:
            ahead: seconds until the frame's turn, if it is read ahead of it.
        """
        wait = ahead or 0.0
        for _ in range(_AT_ONCE):
            if self._committing.backlogged or self._committing.numbers_run_out(self.source.ledger):
                break  # frames wait in the source, or are dropped and counted there
            frame = self.source.read(0)
            if frame is None:
                break
            lag, now = float(self.source.status().lag_seconds or 0.0), self._now()
            reason = "paused" if self.requests.paused else self._pace.unwanted(lag + wait, now + wait)
            if reason is None:
                return _Arrived(frame, now - lag, ahead is not None)
            self._receive(frame)
            self._drop(frame, reason)
        return None

    def _read_ahead(self) -> None:
        """If the next frame is there already, encode it while the pending one is tracked.

        It is received only when its turn comes: until then files end before it.
        """
        wait = self._pace.frame_seconds
        if self._encoder is None or not self.state.object_ids or wait is None:
            return
        try:
            self._held = self._next_wanted(wait)
        except SourceError as error:  # the next read fails as well, after the pending frame
            logger.debug("stream %s: nothing read ahead: %s", self.spec.stream_id, error)
        if self._held is not None:
            self._encoder.begin(self._held.frame.image)

    def _prepared(self, frame: Frame) -> Masks:
        """The prompts of a frame, with those of the detector if its turn has come."""
        began, late = self._now(), self.source.ledger.counts().late
        masks = self._arrivals.prepare(frame, may_detect=self._looks.may_look(began, late))
        if self._arrivals.detected:
            self._looks.looked(began, self._now(), late)
        return masks

    def accept(self, result: StepResult) -> None:
        """Process the segmenter's result for the frame returned last by `next_input`."""
        if self._failure is not None:
            raise self._failure
        if self._pending is None:
            raise RuntimeError("accept() without a frame from next_input()")
        frame, lag, begun_at = self._pending.frame, self._pending.lag, self._pending.begun_at
        try:
            records = self._objects.seen(frame, result)
            self._committing.previous = (frame.pts_seconds, frame.wall_time)
            self._pending, self._arrivals.applying = None, ()
            self.source.ledger.tracked()
            self._unwritten.add_tracked(records)
            zone_events = self.zones.tracked(frame, records)
            self.view.publish(frame, records, zone_events, self._unwritten.take_recent())
            took = self._now() - begun_at
            self.view.seen_at(self.state.time, frame.image)
            if self._arrivals.memory_edited or self.view.memory_due(self._now()):
                self._arrivals.memory_edited = False
                listing = memory_listing(self.state, self._objects.living(), frame.frame_index)
                self.view.remember(listing, self._now())
            if self._pace.tracked(lag, took):
                self._tell_of_slowness(took)
            self.tick()
        except BaseException as error:
            self._failure = error
            raise

    def _tell_of_slowness(self, took: float) -> None:
        logger.warning(
            "stream %s: a frame with %d objects took %.2f s, more than max_lag_seconds=%s allows: use "
            "a smaller size, fewer max_objects or a larger max_lag_seconds",
            self.spec.stream_id,
            len(self.state.object_ids),
            took,
            self.spec.settings.max_lag_seconds,
        )

    def tick(self) -> None:
        """Commit what is due.

        Called by `next_input` and `accept`; call it directly while no frames arrive.
        """
        if self._failure is not None:
            raise self._failure
        now = self._now()
        self._pace.sample(now, self.source.ledger)
        if self._begun and self._pending is None:
            self._committing.tick(now)

    def failed(self, error: BaseException) -> None:
        """Note that the segmenter failed on the frame returned last by `next_input`."""
        self._failure = self._failure or error

    def close(self, state: str = "running") -> None:
        """Commit everything tracked, then close the source and stop the threads.

        Args:
            state: state for the record: "running" if the stream may be resumed, else "finished".

        Raises:
            StoreError: rows could not be written; they are lost.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if self._pending is not None:
                frame, self._pending = self._pending.frame, None
                self._spoil(frame)
            if self._held is not None:
                held, self._held = self._held.frame, None
                self._receive(held)
                self._drop(held, "closed")
            self.source.close()
            for event in self.source.trailing_losses:
                self._unwritten.add(event)
            received = self.source.ledger.counts().received
            self._unwritten.covered = max(self._unwritten.covered, received)
            self._committing.check()
            # A run without frames has nothing to report: the next run reports both.
            begun = self._begun or self._unwritten.covered > self._unwritten.first + self._restart_lost
            if begun:
                self._restarted(None)
                self._committing.rotate(self._now())
            if self._begun and not self._spoilt and self.state.poisoned is None:
                self._committing.take_snapshot(self._now())
            self._committing.drain()
            finder = self._objects.finder
            next_id = self.record.ids_reserved if finder is None else finder.next_id
            self.record.rest(state, frames=self._unwritten.covered, ids=next_id)
        finally:
            if self._encoder is not None:
                self._encoder.close()
            self.record.close()
            self._committing.close()

    # --- one frame -------------------------------------------------------------------------------

    def _receive(self, frame: Frame) -> None:
        """Process an arrived frame: no frame before it is in flight any more."""
        if frame.frame_index >= self.record.frames_reserved:
            self.record.reserve(frames=frame.frame_index + self._committing.ahead())
        self._restarted(frame)
        for loss in frame.losses:
            self._unwritten.add(loss)
        self._unwritten.covered = frame.frame_index + 1

    def _restarted(self, frame: Frame | None) -> None:
        """Record the restart events, once, at the first frame or at the end."""
        if self._begun:
            return
        self._begun = True
        if not self.record.resumed:
            return
        for event in restart_events(
            frame,
            self._unwritten.first,
            previous=self._committing.previous[1],
            frames_lost=self._restart_lost,
            snapshot=self.restored_from,
            objects_lost=self._lost,
        ):
            self._unwritten.add(event)

    def _spoil(self, frame: Frame) -> None:
        """Note that a frame failed midway."""
        self._spoilt = True
        self._unwritten.take_back()
        self._drop(frame, "failed")

    def _drop(self, frame: Frame, reason: str) -> None:
        self.source.ledger.dropped(reason)
        self._unwritten.happened(frame, "dropped", reason=reason)

    # --- status ----------------------------------------------------------------------------------

    @property
    def next_frame(self) -> int:
        """The number after the newest frame that came out of the source."""
        return self._unwritten.covered

    @property
    def applying(self) -> tuple[int, ...]:
        """Numbers of the requests applied to the frame whose result is awaited."""
        return self._arrivals.applying

    @property
    def began(self) -> bool:
        """Whether a frame has arrived since the stream was opened."""
        return self._begun

    def rates(self) -> dict[str, float]:
        """Recent rates of received and tracked frames per second."""
        return self._pace.rates()

    def lag_seconds(self) -> dict[str, float | None]:
        """Recent age of frames once tracked, in seconds: median and 99th percentile."""
        return self._pace.lag_seconds()


def _edits_told(store: StreamStore, snapshot: int | None, requests: LiveRequests) -> set[int]:
    """Numbers of pending edits of the memory whose events were committed after the snapshot was taken."""
    if snapshot is None or not any("memory" in request.content for request in requests.waiting()):
        return set()
    events = [event for footer in store.footers(snapshot) for event in footer.events.to_pylist()]
    details = [json.loads(event["detail"] or "{}") for event in events if event["kind"] == EDITED]
    return {detail["request"] for detail in details if "request" in detail}
