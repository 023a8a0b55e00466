"""StreamTracker: one stream's way from its source through the segmenter into the store. No Ray in here.

    while (step := stream.next_input()) is not None:
        stream.accept(segmenter.step(step.state, step.image, step.prompt))

The resume rule: rows are committed chunk by chunk, chunk k being frames k * chunk_frames and on. A stream
that starts again asks the store for the first frame without rows, takes the newest snapshot not after it, and
tracks from the snapshot's frame on. Frames that have rows already are repeated to rebuild the state and are
not written again. Since tracking is deterministic, the files are then those of an undisturbed run.

A stream that ended at `max_frames` goes on with a larger one, or with none; the rows are those of a single
pass, only the files are cut there too. With a smaller one there is nothing to do.

As long as nothing is committed there is no stream yet: a record without rows binds nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.background import BackgroundWriter
from pipeline.boxes import BoxSegmenter, load_box_segmenter
from pipeline.closing import Closing
from pipeline.detectors import Detector, load_detector
from pipeline.errors import PromptError, SettingsConflictError, SourceError
from pipeline.finder import NewObject, ObjectFinder
from pipeline.masks import tracked_records
from pipeline.prefetch import Prefetch
from pipeline.prompts import PromptSet, ResolvedPrompt, resolve
from pipeline.records import Event, Frame, MaskRecord, events_table, tracks_table
from pipeline.settings import TrackSettings
from pipeline.sinks import Sinks
from pipeline.snapshot import Snapshot
from pipeline.sources import VideoSource
from pipeline.store import CommittedRange, StreamStore
from pipeline.stream_record import (
    FINISHED,
    RUNNING,
    ResolvedPrompts,
    StreamIdentity,
    StreamRecord,
    StreamSummary,
    checked,
    prompts_of,
)
from xmem_core import Prompt, StepResult, TrackerState, VideoSegmenter

__all__ = ["FINISHED", "RUNNING", "StepInput", "StreamSummary", "StreamTracker"]

logger = logging.getLogger(__name__)

_NAMED_FRAMES = 5

_Restored = tuple[Snapshot, TrackerState, ObjectFinder | None]


@dataclass(frozen=True)
class StepInput:
    """What the segmenter gets for one frame."""

    state: TrackerState
    image: NDArray[np.uint8]
    prompt: Prompt | None


class StreamTracker(Closing):
    """One stream. Use it as a context manager.

    Once one of its methods has failed, `next_input` and `accept` raise the same error again: a frame would be
    missing. Close it and open another one, which goes on from what is committed.

    Args:
        source: the opened video; closed with the stream.
        store: where its rows go.
        segmenter: makes and restores states; steps are done by whoever drives this stream.
        settings: what decides the rows.
        prompts: what to track; None on a stream that has a record: what the record says. With a detector in
            the settings there need not be any.
        box_segmenter: turns boxes into masks; by default the one that the settings name.
        restart: remove first what the folder holds of this stream; not if there is nothing to track, or the
            first frame's prompts don't fit it.
        snapshot: what `export` gave, to go on from. If it is not of this stream, or of frames that have no
            rows, the store's own are used.
        sinks: where rows go besides the store; each chunk is given to them before it is committed.
        extra: what the user says about the stream beside that, as plain data for its record; None: what the
            record says.

    Raises:
        SettingsConflictError: the folder holds this stream with other settings, prompts or another video.
        PromptError: there is nothing to track.
        StoreError: the folder cannot be read or written, or holds a damaged record.
    """

    def __init__(
        self,
        source: VideoSource,
        store: StreamStore,
        segmenter: VideoSegmenter,
        settings: TrackSettings,
        prompts: PromptSet | None,
        box_segmenter: BoxSegmenter | None = None,
        *,
        restart: bool = False,
        snapshot: bytes | None = None,
        sinks: Sinks | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.source = source
        self.store = store
        self.settings = settings
        self.summary = StreamSummary(store.stream_id)
        self._segmenter = segmenter
        self._boxes = box_segmenter
        self._sinks = sinks
        self._extra = extra
        self._frames: Prefetch[Frame] | None = None
        self._writer = BackgroundWriter()
        self._records: list[MaskRecord] = []
        self._events: list[Event] = []
        self._rows = 0  # of all frames up to _next, committed or not
        self._resolved = ResolvedPrompts()
        self._tried: tuple[int, ResolvedPrompt] | None = None
        self._waiting: Frame | None = None
        self._pending: tuple[Frame, StepInput] | None = None
        self._failure: BaseException | None = None
        self._ended = False
        self._exhausted = False
        self._detector: Detector | None = None
        self._finder: ObjectFinder | None = None
        try:
            self._open(prompts, restart, snapshot)
        except BaseException:
            self.close()
            raise

    # --- opening ---------------------------------------------------------------------------------

    def _open(self, prompts: PromptSet | None, restart: bool, snapshot: bytes | None) -> None:
        if self.settings.detector.name is not None:
            self._detector = load_detector(self.settings.detector.name)
        if restart:
            self._try_first_frame(self._something(prompts))
            self.store.restart()
            # Not listed again: a writer that is being stopped may be about to take back its last chunk.
            committed = CommittedRange(0, 0)
        else:
            self.store.prepare()
            committed = self.store.committed()
        self._committed = committed.next_frame
        record = self.store.read_record()
        if record is not None:
            record = checked(record, self.store.root)
            prompts = prompts_of(record, self.store.root) if prompts is None else prompts
        elif committed.files:
            raise SettingsConflictError(
                f"{self.store.root} holds rows of stream {self.store.stream_id} but no record of its "
                "settings: restart it (--restart), or give another --stream-id or --out"
            )
        self._prompts = self._something(prompts)
        self._identity = StreamIdentity.of(self.source, self.settings, self._prompts)
        recorded = (record or {}).get("extra")
        extra = recorded if self._extra is None else self._extra
        self._record = StreamRecord(self.store, self.source, self._identity, self._resolved, extra)
        differing = [] if record is None else self._identity.differences(record)
        if differing and committed.files:
            raise SettingsConflictError(
                f"stream {self.store.stream_id} in {self.store.root} was tracked with other settings: "
                f"{'; '.join(differing)}; use the same, "
                "another --stream-id or --out, or start over (--restart)"
            )
        self.summary.frames = self._committed
        if record is None or differing:
            self._record.begin(self.summary)
        else:
            self._resolved.load(record.get("resolved_prompts"))
            if self._has_all(record):
                self.summary.state = FINISHED
                self._ended = True
                if extra != recorded:
                    self._record.update(FINISHED, self.summary)
                return
        self._digests = self._identity.digests(record)
        self._restore(snapshot)
        if record is not None and not differing and self._goes_on(record):
            self._record.update(RUNNING, self.summary)
        self._frames = Prefetch(self._limited(self._next, self._previous_pts))

    def _has_all(self, record: Mapping[str, Any]) -> bool:
        """Whether all frames that are asked for have rows; then the summary says how many."""
        limit, before = self.settings.commit.max_frames, record["settings"].get("max_frames")
        # The rows are the truth: a record that claims more than they hold is not believed.
        if record.get("state") == FINISHED and record.get("frames") == self._committed:
            at_its_end = before is None or self._committed < before
            if not at_its_end and (limit is None or limit > self._committed):
                return False
            self.summary.rows = int(record.get("rows", 0))
            self.summary.losses = int(record.get("losses", 0))
            return True
        if limit is None or limit >= self._committed:
            return False
        self.summary.rows = sum(footer.rows for footer in self.store.footers(0))
        self._warn(f"{self._committed} frames have rows, more than max_frames={limit}: nothing to do")
        return True

    def _goes_on(self, record: Mapping[str, Any]) -> bool:
        """Whether the record of a stream that is opened again says what is no longer so."""
        before = record["settings"].get("max_frames")
        return record.get("state") != RUNNING or before != self.settings.commit.max_frames

    def _something(self, prompts: PromptSet | None) -> PromptSet:
        """The prompts, if there is anything to track."""
        if self.settings.detector.name is not None:
            return prompts or PromptSet()
        if prompts is None or prompts.is_empty():
            raise PromptError("nothing to track: give masks, boxes, a prompts file or a detector")
        return prompts

    def _try_first_frame(self, prompts: PromptSet) -> None:
        """Whatever is wrong with the first frame's prompts is found before anything is removed."""
        frame = next(self.source.frames(), None)
        if frame is not None and prompts.at(frame.frame_index):
            self._tried = (frame.frame_index, self._resolve(frame, prompts))

    def _restore(self, given: bytes | None) -> None:
        """Take the state that was handed over, else the newest usable one, or start from the first frame."""
        found = None if given is None else self._handed_over(given)
        if (
            found is None
            and (stored := self.store.load_snapshot(self._committed, self._validated)) is not None
        ):
            found = stored[1]
        if found is None:
            self.state = self._segmenter.new_state()
            self._next = 0
            self._previous_pts: float | None = None
            self._previous_size: tuple[int, int] | None = None
            self._categories: dict[int, str | None] = {}
            self._finder = self._new_finder()
        else:
            snapshot, self.state, self._finder = found
            self._next = snapshot.next_frame
            self._previous_pts = snapshot.previous_pts_seconds
            self._previous_size = snapshot.previous_size
            self._categories = dict(snapshot.categories)
            self._rows = snapshot.rows
            self.summary.losses = snapshot.losses
        if self._committed:
            self.summary.resumed_at = self._committed
            logger.info(
                "stream %s: %d frames have rows, going on from frame %d",
                self.store.stream_id,
                self._committed,
                self._next,
            )
        self.summary.rows = self._rows
        if self._next < self._committed:
            self.summary.rows += sum(footer.rows for footer in self.store.footers(self._next))
        self._first = self._committed
        self._snapshot_at = self._next

    def _handed_over(self, blob: bytes) -> _Restored | None:
        try:
            return self._validated(blob)
        except ValueError as error:
            logger.warning(
                "stream %s: the state that was handed over is not usable, rebuilding it: %s",
                self.store.stream_id,
                error,
            )
            return None

    def _validated(self, blob: bytes) -> _Restored:
        snapshot = Snapshot.from_bytes(blob)
        if snapshot.run not in self._digests:
            raise ValueError("it was taken with other settings, prompts or another video")
        if snapshot.next_frame > self._committed:
            raise ValueError(
                f"it is of frame {snapshot.next_frame}, and frames up to {self._committed - 1} have rows"
            )
        finder = self._new_finder()
        if finder is not None:
            if snapshot.finder is None:
                raise ValueError("it holds no detector's memory")
            finder.from_bytes(snapshot.finder)
        return snapshot, TrackerState.from_bytes(snapshot.tracker, device=self._segmenter.device), finder

    def _new_finder(self) -> ObjectFinder | None:
        """One that remembers nothing; each with a detector of its own."""
        name = self.settings.detector.name
        if name is None:
            return None
        detector, self._detector = self._detector or load_detector(name), None
        if self._boxes is None:
            self._boxes = load_box_segmenter(self.settings.commit.box_segmenter)
        return ObjectFinder(detector, self.settings.detector.finder, self._boxes, self._prompts.object_ids)

    def _limited(self, start: int, previous_pts: float | None) -> Iterator[Frame]:
        limit = self.settings.commit.max_frames
        if limit is not None and start >= limit:
            return
        for frame in self.source.frames(start, previous_pts_seconds=previous_pts):
            yield frame
            # Asking for one frame more would decode it, and report losses that lie beyond the limit.
            if limit is not None and frame.frame_index + 1 >= limit:
                return
        self._exhausted = True

    @property
    def next_frame(self) -> int:
        """The frame that comes next: how far this run is."""
        return self.summary.frames if self._ended else self._next

    @property
    def position(self) -> int:
        """The first frame that this run has not tracked for good: frames that it only repeats don't count."""
        return self.summary.frames if self._ended else max(self._first, self._next)

    @property
    def rows(self) -> int:
        """Rows of the frames before `position`: committed, or on their way to the store."""
        return self.summary.rows if self._ended or self._next < self._committed else self._rows

    @property
    def ended(self) -> bool:
        """Whether all of it is tracked and committed."""
        return self._ended

    @property
    def ellipses(self) -> int:
        """Boxes so far that the box segmenter could not tell from their surroundings."""
        return self._resolved.ellipses

    @property
    def most_objects(self) -> int:
        """How many objects there may be at the same time, by prompts and detector."""
        found = 0 if self.settings.detector.name is None else self.settings.detector.finder.max_objects
        return self._prompts.most_objects + found

    # --- stepping --------------------------------------------------------------------------------

    def next_input(self) -> StepInput | None:
        """The next frame to track, the same until it is accepted; None at the end, when all is committed.

        Raises:
            SourceError, PromptError, StoreError: what is committed stays, and a later run goes on from it.
        """
        if self._failure is not None:
            raise self._failure
        if self._pending is not None:
            return self._pending[1]
        if not self.settle():
            return None
        frame, self._waiting = self._waiting, None
        assert frame is not None
        try:
            step = self._arrive(frame)
            self._pending = (frame, step)
        except BaseException as error:
            self._failure = error
            raise
        return step

    def settle(self) -> bool:
        """Look at the next frame without beginning it: a chunk that ends before it is handed to the writer.

        Only the frame after it shows that a chunk is whole. `next_input` does this too; calling it alone lets
        a stream rest between two chunks.

        Returns:
            whether there is another frame. If not, everything is committed.

        Raises:
            SourceError, StoreError: what is committed stays, and a later run goes on from it.
        """
        if self._failure is not None:
            raise self._failure
        if self._pending is not None or self._waiting is not None:
            return True
        if self._ended or self._frames is None:
            return False
        try:
            self._writer.check()
            frame = next(self._frames, None)
            if frame is None:
                self._finish()
                return False
            self._end_chunk(frame)
            self._waiting = frame
        except BaseException as error:
            self._failure = error
            raise
        return True

    def export(self) -> bytes:
        """The state between two chunks, for a StreamTracker elsewhere; returns once all rows are committed.

        Raises:
            RuntimeError: in the middle of a chunk, or after the end. StoreError: rows could not be written.
        """
        return self._between_chunks().to_bytes()

    def save(self) -> None:
        """Save a snapshot between two chunks; durable when it returns. Raises as `export` does."""
        snapshot = self._between_chunks()
        self._snapshot_at = self._next
        self.store.save_snapshot(snapshot.next_frame, snapshot.to_bytes())

    def _between_chunks(self) -> Snapshot:
        if self._failure is not None:
            raise self._failure
        if self._ended or self._pending is not None or self._next > self._first:
            raise RuntimeError(
                f"stream {self.store.stream_id} is not between two chunks at frame {self._next}: "
                "its state can be taken only there"
            )
        try:
            self._writer.drain()
        except BaseException as error:
            self._failure = error
            raise
        return self._snapshot()

    def accept(self, result: StepResult) -> None:
        """Take the segmenter's result for the frame that `next_input` gave last."""
        if self._failure is not None:
            raise self._failure
        if self._pending is None:
            raise RuntimeError("accept() without a frame from next_input()")
        frame, _ = self._pending
        try:
            self._take(frame, result)
            self._pending = None
        except BaseException as error:
            self._failure = error
            raise

    def close(self) -> None:
        """Let go of source and threads. What is committed stays; the rest is left to a later run."""
        if self._failure is None and not self._ended:
            self._failure = RuntimeError("the stream is closed: open another one, which goes on from here")
        try:
            if self._frames is not None:
                self._frames.close()
        finally:
            self._writer.close()
            self.source.close()

    def _end_chunk(self, following: Frame) -> None:
        """Commit the chunk that ends before a frame, if one does."""
        if following.frame_index % self.settings.commit.chunk_frames:
            return
        # Not earlier: losses at the very end of a video belong into its last chunk.
        if following.frame_index > self._first:
            self._commit(following.frame_index)
        # While frames are repeated too, lest a run that is killed again and again gets nowhere.
        if (
            self._next - self._snapshot_at
            >= self.settings.commit.snapshot_chunks * self.settings.commit.chunk_frames
        ):
            self._take_snapshot()

    def _arrive(self, frame: Frame) -> StepInput:
        for loss in frame.losses:
            self._add_event(loss)
        # A live source tells of it by itself.
        told = any(loss.kind == "resized" and loss.reason is None for loss in frame.losses)
        if self._previous_size is not None and frame.size != self._previous_size and not told:
            detail = {"from": list(self._previous_size), "to": list(frame.size)}
            self._event(frame, "resized", detail=detail)
        prompt = self._prompt_at(frame)
        for object_id in self._prompts.removals_at(frame.frame_index):
            self._remove(frame, object_id)
        masks = {} if prompt is None else dict(prompt.masks)
        if prompt is not None:
            for object_id in prompt.masks:
                known = object_id in self.state.object_ids
                kind = "corrected" if known else "object_added"
                self._event(frame, kind, object_id=object_id, reason="prompt")
                category = prompt.categories.get(object_id)
                if category is not None or not known:
                    self._categories[object_id] = category
        for new in self._found(frame, masks):
            masks[new.object_id] = new.mask
            self._categories[new.object_id] = new.category
            self._event(
                frame,
                "object_added",
                object_id=new.object_id,
                reason="detector",
                detail={"score": round(new.score, 4)},
            )
        return StepInput(self.state, frame.image, Prompt(masks) if masks else None)

    def _found(self, frame: Frame, given: Mapping[int, NDArray[np.bool_]]) -> list[NewObject]:
        """Give up what the detector started and is long out of sight, and find what is new."""
        if self._finder is None:
            return []
        for object_id in self._finder.given_up(frame.frame_index):
            if object_id in self.state.object_ids and object_id not in given:
                self._forget(frame, object_id, "out_of_sight")
        return self._finder.look(frame, self.state.object_ids, given)

    def _take(self, frame: Frame, result: StepResult) -> None:
        recorded = frame.frame_index >= self._committed and bool(result.object_ids)
        if recorded or self._finder is not None:
            label_map = result.label_map.cpu().numpy()  # once: it may come off a GPU
        if self._finder is not None:
            self._finder.saw(frame.frame_index, label_map, result.object_ids)
        if recorded:
            records = tracked_records(result, label_map, frame, self._categories)
            self._records.extend(records)
            for record in records:
                seen = self.summary.objects.setdefault(record.object_id, [frame.frame_index, -1, 0])
                if record.area:
                    seen[1] = frame.frame_index
                    seen[2] += 1
        self.summary.tracked += 1
        self._next = frame.frame_index + 1
        self._previous_pts = frame.pts_seconds
        self._previous_size = frame.size
        # Counted for repeated frames too: a snapshot may be older than the last commit.
        self._rows += len(result.object_ids)

    def _prompt_at(self, frame: Frame) -> ResolvedPrompt | None:
        if not self._prompts.at(frame.frame_index):
            return None
        known = self._resolved.get(frame.frame_index)
        if known is not None:
            return known
        if self._tried is not None and self._tried[0] == frame.frame_index:
            resolved, self._tried = self._tried[1], None
        else:
            resolved = self._resolve(frame, self._prompts)
        if self._resolved.has(frame.frame_index):
            # Durable before any row that rests on it: a box becomes a mask once.
            self._writer.drain()
            self._record.update(RUNNING, self.summary)
        return resolved

    def _resolve(self, frame: Frame, prompts: PromptSet) -> ResolvedPrompt:
        if self._boxes is None:
            self._boxes = load_box_segmenter(self.settings.commit.box_segmenter)
        objects = prompts.at(frame.frame_index)
        resolved = resolve(objects, frame, self._boxes)
        self.summary.warnings.extend(resolved.warnings)
        if any(entry.box is not None for entry in objects):
            self._resolved.put(frame.frame_index, resolved)
        return resolved

    def _remove(self, frame: Frame, object_id: int) -> None:
        if object_id not in self.state.object_ids:
            if frame.frame_index >= self._committed:
                self._warn(
                    f"frame {frame.frame_index}: no object {object_id} is tracked that could be removed"
                )
            return
        self._forget(frame, object_id, "requested")

    def _forget(self, frame: Frame, object_id: int, reason: str) -> None:
        self.state.remove_objects([object_id])
        self._event(frame, "object_removed", object_id=object_id, reason=reason)
        self._categories.pop(object_id, None)

    def _event(self, frame: Frame, kind: str, **values: Any) -> None:
        self._add_event(
            Event(frame.frame_index, kind, pts_seconds=frame.pts_seconds, wall_time=frame.wall_time, **values)
        )

    def _add_event(self, event: Event) -> None:
        if event.kind == "corrupt":
            self.summary.losses += event.count
        if self._next >= self._committed:
            self._events.append(event)

    # --- committing ------------------------------------------------------------------------------

    def _commit(self, next_frame: int) -> None:
        """Hand frames `_first` .. next_frame - 1 to the writing thread."""
        first, records, events, rows = self._first, self._records, self._events, self._rows
        self._first, self._records, self._events = next_frame, [], []

        def write() -> None:
            if first == 0:
                # Two runs that began at the same time, and this one's record was replaced by the other's.
                self._record.check_ours()
            tracks, happened = tracks_table(records), events_table(events)
            # Whoever committed these frames meanwhile has told the sinks; older rows must not replace those.
            if self._sinks and not self.store.holds(first):
                self._sinks.commit(self.store.stream_id, first, next_frame - 1, tracks, happened)
            self.store.commit(first, next_frame - 1, tracks, happened)
            self.summary.frames, self.summary.rows = next_frame, rows

        self._writer.submit(write)

    def _take_snapshot(self) -> None:
        """Of the state before the frame that arrives; written after the commit of all frames before it."""
        snapshot = self._snapshot()
        self._snapshot_at = self._next
        self._writer.submit(lambda: self.store.save_snapshot(snapshot.next_frame, snapshot.to_bytes()))

    def _snapshot(self) -> Snapshot:
        return Snapshot(
            next_frame=self._next,
            tracker=self.state.to_bytes(),
            run=self._identity.digest(),
            previous_pts_seconds=None if self.source.damaged else self._previous_pts,
            previous_size=self._previous_size,
            categories=tuple(self._categories.items()),
            rows=self._rows,
            losses=self.summary.losses,
            finder=None if self._finder is None else self._finder.to_bytes(),
        )

    def _finish(self) -> None:
        if self._next < self._committed:
            raise SourceError(
                f"{self.source.uri}: ends at frame {self._next}, but {self._committed} frames of it were "
                "tracked before: it has changed, or is read by another version of FFmpeg; what is committed "
                "stays"
            )
        for loss in self.source.trailing_losses if self._exhausted else ():
            self._add_event(loss)
        # Without a new frame the last chunk was committed before, and these events with it.
        if self._next > self._first:
            self._commit(self._next)
            if not self._exhausted:  # with a larger max_frames it goes on from here
                self._take_snapshot()
        self._writer.drain()
        late = [f for f in self._prompts.frames if f >= self._next]
        if late:
            more = f" and {len(late) - _NAMED_FRAMES} more" if len(late) > _NAMED_FRAMES else ""
            frames = f"{late[:_NAMED_FRAMES]}{more}"
            self._warn(f"the video ended at frame {self._next}, before the prompts at frames {frames}")
        self._record.update(FINISHED, self.summary)
        self.summary.state = FINISHED
        self._ended = True

    def _warn(self, message: str) -> None:
        logger.warning("stream %s: %s", self.store.stream_id, message)
        self.summary.warnings.append(message)
