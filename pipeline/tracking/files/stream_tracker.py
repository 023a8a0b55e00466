"""StreamTracker: tracks one stream from its source into the store. Does not import Ray.

    while (step := stream.next_input()) is not None:
        stream.accept(segmenter.step(step.state, step.image, step.prompt))

The resume rule: rows are committed chunk by chunk, chunk k being frames k * chunk_frames and on. A stream
that starts again asks the store for the first frame without rows, takes the newest snapshot not after it, and
tracks from the snapshot's frame on. Frames that have rows already are repeated to rebuild the state and are
not written again. Since tracking is deterministic, the files are then those of an undisturbed run.

With the direction `backward` or `both`, a stream has two passes, see `pipeline.tracking.files.backward`: the
backward one is a StreamTracker inside the stream's, and its rows are added to those of the forward pass.

Edits of the memory (`pipeline.tracks.edit_log`) are made before their frame, also when it is repeated.

A stream that ended at `max_frames` goes on with a larger one, or with none; the rows are those of a single
pass, only the files are cut there too. With a smaller one there is nothing to do.

Settings and prompts are fixed by the first commit: until then, a run with others may replace the record.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.base.closeable import Closing
from pipeline.base.errors import PromptError, SourceError
from pipeline.base.records import Frame, MaskRecord
from pipeline.prompts.box_segmenters import BoxSegmenter
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.committer import Committer
from pipeline.tracking.files.arrivals import Arrivals
from pipeline.tracking.files.backward import (
    BackwardPlan,
    BackwardPrompts,
    BackwardRows,
    backward_settings,
    first_prompts,
)
from pipeline.tracking.files.chunk_rows import ChunkRows
from pipeline.tracking.frame_prompts import FramePrompts
from pipeline.tracking.look_ahead import Arrived, arriving, looks_ahead, thread_aside
from pipeline.tracking.objects import TrackedObjects
from pipeline.tracking.resume import open_stream, resume
from pipeline.tracking.settings import BACKWARD, FORWARD, TrackSettings
from pipeline.tracking.snapshots.memory_edit import planned_edits
from pipeline.tracking.snapshots.stream import Snapshot
from pipeline.tracking.stream_record import FINISHED, RUNNING, StreamSummary
from pipeline.tracks.sinks import Sinks
from pipeline.tracks.store import StreamStore
from pipeline.video.prefetch import Prefetch
from pipeline.video.reversed_video import ReversedVideo
from pipeline.video.sources import VideoSource
from xmem_core import EncodedFrame, Prompt, StepResult, TrackerState, VideoSegmenter
from xmem_core.object_copy import MOST_ELEMENTS
from xmem_core.segmenter import Frame as Image

__all__ = ["FINISHED", "RUNNING", "StepInput", "StreamSummary", "StreamTracker"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
_NAMED_FRAMES = 5


@dataclass(frozen=True)
class StepInput:
    """The segmenter's input for one frame.

    Args:
        image: H x W x 3 uint8 RGB, encoded ahead or as it is.
    """

    state: TrackerState
    image: Image | EncodedFrame
    prompt: Prompt | None


class StreamTracker(Closing):
    """Tracks one stream. Use it as a context manager.

    After one of its methods has failed, `next_input` and `accept` raise the same error again, since a frame
    would be missing. Close it and open another one, which resumes after the last commit.

    Args:
        source: the opened video; closed with the stream.
        store: receives its rows.
        segmenter: creates and restores states; the caller runs the steps.
        settings: tracking settings; they determine the rows.
        prompts: what to track; None: the prompts of the stream's record. May be left out with a detector.
        box_segmenter: turns boxes into masks; by default the one that the settings name.
        restart: first remove everything the folder holds of this stream. Nothing is removed if there is
            nothing to track, or the first frame's prompts do not fit it.
        snapshot: result of `export` to resume from. If it belongs to another stream, or lies beyond the
            committed frames, the store's own snapshots are used.
        sinks: receive each chunk before it is committed to the store.
        extra: user data for the stream record, JSON-ready; None: the data of the record.
        frame_prompts: resolves the prompts; None: one made from the settings.

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
        frame_prompts: FramePrompts | None = None,
    ) -> None:
        self.source = source
        self.store = store
        self.settings = settings
        self.summary = StreamSummary(store.stream_id)
        self._segmenter = segmenter
        self._frame_prompts = frame_prompts or FramePrompts(
            settings.commit.box_segmenter, box_segmenter, self.summary.warnings, segmenter.aside
        )
        self._committer = Committer(store, sinks, self._check_owner)
        self._frames: Prefetch[Arrived] | None = None
        self._waiting: Arrived | None = None
        self._pending: tuple[Frame, StepInput] | None = None
        self._failure: BaseException | None = None
        self._ended = False
        self._exhausted = False
        self._backward: StreamTracker | None = None
        self._plan: BackwardPlan | None = None
        self._earlier: BackwardRows | None = None
        self._latest: Sequence[MaskRecord] | Future[list[MaskRecord]] = ()
        self._aside: ThreadPoolExecutor | None = None
        try:
            self._open(prompts, extra, restart, snapshot)
        except BaseException:
            self.close()
            raise

    # --- opening ---------------------------------------------------------------------------------

    def _open(
        self,
        prompts: PromptSet | None,
        extra: Mapping[str, Any] | None,
        restart: bool,
        snapshot: bytes | None,
    ) -> None:
        opened = open_stream(
            self.source,
            self.store,
            self.settings,
            prompts,
            self._frame_prompts,
            self.summary,
            extra=extra,
            restart=restart,
        )
        self._committed, self._prompts, self._record = opened.committed, opened.prompts, opened.record
        self.settings = opened.identity.settings
        self._run = opened.identity.digest()
        self._plan = BackwardPlan.of(self._prompts, self.settings.direction)
        if self._plan is not None and self._plan.prompts.states:
            frame, entry = self._plan.prompts.states[0]
            raise PromptError(
                f"object {entry.object_id} comes from another stream's state, which tells nothing of earlier "
                f"frames than frame {self._plan.last - frame}: track it forward (--direction forward)"
            )
        self._starts = {} if self.settings.direction == FORWARD else first_prompts(self._prompts)
        if self.summary.state == FINISHED:
            self._ended = True
            self._forget_backward()  # if the run before was killed just then
            return
        found = resume(
            opened, self.store, self.settings, self._segmenter, self._frame_prompts.boxes, snapshot
        )
        self._rows = ChunkRows(self.summary, self._committed, found.next_frame, found.rows)
        self._objects = TrackedObjects(
            found.state,
            self._rows,
            finder=found.finder,
            categories=found.categories,
            frame_size=found.previous_size,
        )
        self._previous_pts = found.previous_pts_seconds
        self.summary.losses, self.summary.rows = found.losses, found.rows
        if self._committed:
            self.summary.resumed_at = self._committed
            logger.info(
                "stream %s: %d frames have rows, going on from frame %d",
                self.store.stream_id,
                self._committed,
                found.next_frame,
            )
        if found.next_frame < self._committed:
            self.summary.rows += sum(footer.rows for footer in self.store.footers(found.next_frame))
        self._snapshot_at = found.next_frame
        self._arrivals = Arrivals(
            self.settings,
            self._segmenter,
            self.store,
            self.summary,
            self._frame_prompts,
            self._prompts,
            self._starts,
            planned_edits(self.store, found.next_frame, self._committed),
            self._rows,
            self._objects,
            self._keep_prompts,
        )
        if opened.outdated:
            self._record.update(RUNNING, self.summary)
        if self._plan is not None and found.next_frame < self._plan.rows_until:
            self._backward = self._begin_backward(self._plan)
            if self._backward.ended:
                self._end_backward()
        else:
            self._begin_forward()

    def _begin_backward(self, plan: BackwardPlan) -> StreamTracker:
        settings, source = backward_settings(self.settings), ReversedVideo(self.source, plan.last)
        store = self.store.backward(plan.digest(source, settings))
        prompts = BackwardPrompts(self._frame_prompts, self._prompts, plan.last, self._keep_prompts)
        return StreamTracker(source, store, self._segmenter, settings, plan.prompts, frame_prompts=prompts)

    def _end_backward(self) -> None:
        """Go on with the forward pass once the backward pass is committed."""
        backward, self._backward = self._backward, None
        assert backward is not None
        assert self._plan is not None
        backward.close()
        if backward.summary.frames:  # none if the video ends before all prompts
            self._earlier = BackwardRows(self._plan, backward.store.reader())
        self._begin_forward()

    def _forget_backward(self) -> None:
        """Remove the backward pass if all its rows are merged; else a larger `max_frames` may need it."""
        if self._plan is not None and (self._exhausted or self.summary.frames > self._plan.last):
            self.store.remove_backward()

    def _begin_forward(self) -> None:
        self._frames = self._arriving(self._rows.next_frame, self._previous_pts)

    def _arriving(self, start: int, previous_pts: float | None) -> Prefetch[Arrived]:
        frames = Prefetch(self._limited(start, previous_pts))
        if not self.looks_ahead:
            return frames
        state = self._objects.state
        return arriving(frames, self._segmenter, state, self.settings.threads, self._masks_begin)

    def _masks_begin(self, frame_index: int) -> bool:
        """Whether masks are given on a frame, and its size for the network is known before they are made."""
        if self.settings.direction == BACKWARD:
            return False
        sized = self.settings.model.small_size is None or self._objects.state.network_size is not None
        return sized and any(entry.state is None for entry in self._prompts.at(frame_index))

    @property
    def looks_ahead(self) -> bool:
        """Whether the next frames are encoded while one is tracked, which takes memory."""
        return looks_ahead(self._segmenter, self.settings.threads)

    def _limited(self, start: int, previous_pts: float | None) -> Iterator[Arrived]:
        limit = self._limit
        if limit is not None and start >= limit:
            return
        for frame in self.source.frames(start, previous_pts_seconds=previous_pts):
            yield frame, frame.picture
            # Reading another frame would decode it, and report losses beyond the limit.
            if limit is not None and frame.frame_index + 1 >= limit:
                return
        self._exhausted = True

    @property
    def _limit(self) -> int | None:
        """Number of frames of the forward pass, if it ends before the video may do so."""
        limits = [self.settings.commit.max_frames]
        if self.settings.direction == BACKWARD and self._starts:
            limits.append(max(self._starts.values()) + 1)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def state(self) -> TrackerState:
        """The segmenter's state of this stream, in the pass under way."""
        return self._objects.state if self._backward is None else self._backward.state

    @property
    def goes_backward(self) -> bool:
        """Whether the backward pass is under way."""
        return self._backward is not None

    @property
    def backward_frames(self) -> int:
        """Number of frames of the backward pass; 0 without one."""
        return 0 if self._plan is None else self._plan.frames

    @property
    def frame_count(self) -> int | None:
        """Number of frames of the forward pass, as far as it is known."""
        counts = [n for n in (self.source.frame_count, self._limit) if n is not None]
        return min(counts, default=None)

    @property
    def next_frame(self) -> int:
        """Index of the next frame to track in the pass under way; the backward one counts its own frames."""
        if self._backward is not None:
            return self._backward.next_frame
        return self.summary.frames if self._ended else self._rows.next_frame

    @property
    def position(self) -> int:
        """Index of the first frame not tracked yet in the pass under way, as `next_frame`.

        Frames repeated after a resume count as tracked.
        """
        if self._backward is not None:
            return self._backward.position
        return self.summary.frames if self._ended else max(self._rows.first, self._rows.next_frame)

    @property
    def rows(self) -> int:
        """Number of rows of the frames before `position`, committed or queued for the commit."""
        if self._ended or self._rows.next_frame < self._committed:
            return self.summary.rows
        return self._rows.rows

    @property
    def latest(self) -> tuple[MaskRecord, ...]:
        """Mask records of the frame that was accepted last; empty if the frame had rows already, and in the
        backward pass.
        """
        return tuple(self._latest.result() if isinstance(self._latest, Future) else self._latest)

    @property
    def ended(self) -> bool:
        """Whether all frames are tracked and committed."""
        return self._ended

    @property
    def ellipses(self) -> int:
        """Number of boxes so far that the box segmenter could not separate from the background."""
        return self._frame_prompts.resolved.ellipses

    @property
    def most_objects(self) -> int:
        """Maximum number of simultaneous objects, from prompts and detector."""
        found = 0 if self.settings.detector.name is None else self.settings.detector.finder.max_objects
        backward = 0 if self._plan is None else self._plan.prompts.most_objects
        return max(self._prompts.most_objects + found + self._copies_planned, backward)

    @property
    def copied_elements(self) -> int:
        """Maximum number of elements of memory that are copied from other streams' states."""
        if self._ended:
            return 0
        memory = self._objects.state.memory
        there = 0 if memory is None else memory.copied_elements
        ahead = sum(frame >= self._rows.next_frame for frame, _ in self._prompts.states)
        more = MOST_ELEMENTS * (ahead + self._copies_planned)
        return min(there + more, self._segmenter.memory_config.max_long_term_elements)

    @property
    def _copies_planned(self) -> int:
        return 0 if self._ended else self._arrivals.copies_planned

    # --- stepping --------------------------------------------------------------------------------

    def next_input(self) -> StepInput | None:
        """The next frame to track, the same until it is accepted; None at the end, when all is committed.

        Raises:
            SourceError, PromptError, StoreError: committed rows are kept; a later run resumes after them.
        """
        if self._failure is not None:
            raise self._failure
        if self._pending is not None:
            return self._pending[1]
        if not self.settle():
            return None
        if self._backward is not None:
            return self._in_backward(self._backward.next_input)
        arrived, self._waiting = self._waiting, None
        assert arrived is not None
        frame, image = arrived
        try:
            step = StepInput(self.state, image, self._arrivals.arrive(frame))
            self._pending = (frame, step)
        except BaseException as error:
            self._failure = error
            raise
        return step

    def settle(self) -> bool:
        """Read the next frame without tracking it; a chunk that ends before it is queued for the commit.

        A chunk is known to be complete only when the frame after it is read. `next_input` does this too;
        calling `settle` alone lets a stream pause between two chunks.

        Returns:
            whether there is another frame. If not, everything is committed.

        Raises:
            SourceError, StoreError: committed rows are kept; a later run resumes after them.
        """
        if self._failure is not None:
            raise self._failure
        if self._pending is not None or self._waiting is not None:
            return True
        if self._backward is not None:
            if self._in_backward(self._backward.settle):
                return True
            self._in_backward(self._end_backward)
        if self._ended or self._frames is None:
            return False
        try:
            self._committer.check()
            arrived = next(self._frames, None)
            if arrived is None:
                self._finish()
                return False
            self._end_chunk(arrived[0])
            self._waiting = arrived
        except BaseException as error:
            self._failure = error
            raise
        return True

    def settles_within(self, seconds: float) -> bool:
        """Whether `settle` need not wait for a frame, or only so long."""
        if self._backward is not None:
            return self._backward.settles_within(seconds)
        ready = self._failure is not None or self._pending is not None or self._waiting is not None
        return ready or self._frames is None or self._frames.there(seconds)

    def _in_backward(self, call: Callable[[], T]) -> T:
        """Call something of the backward pass, whose failures are failures of the stream."""
        try:
            return call()
        except BaseException as error:
            self._failure = error
            raise

    def export(self) -> bytes:
        """Serialize the state between two chunks, to continue the stream in another StreamTracker.

        Blocks until all rows are committed. The state of a backward pass is saved in the store.

        Raises:
            RuntimeError: in the middle of a chunk, or after the end. StoreError: rows could not be written.
        """
        if self._backward is not None:
            self._in_backward(self._backward.save)
        return self._between_chunks().to_bytes()

    def save(self) -> None:
        """Save a snapshot between two chunks; durable when it returns. Raises as `export` does."""
        if self._backward is not None:
            return self._in_backward(self._backward.save)
        snapshot = self._between_chunks()
        self._snapshot_at = snapshot.next_frame
        self.store.save_snapshot(snapshot.next_frame, snapshot.to_bytes())

    def _between_chunks(self) -> Snapshot:
        if self._failure is not None:
            raise self._failure
        next_frame = self._rows.next_frame
        if self._ended or self._pending is not None or next_frame > self._rows.first:
            raise RuntimeError(
                f"stream {self.store.stream_id} is not between two chunks at frame {next_frame}: "
                "its state can be taken only there"
            )
        try:
            self._committer.drain()
        except BaseException as error:
            self._failure = error
            raise
        return self._snapshot()()

    def commit_here(self) -> None:
        """Commit the frames that are tracked, and save the state after them; durable when it returns.

        The chunk under way is cut there, its rows stay the same. Does nothing while frames that have rows are
        repeated, nor after the end.

        Raises:
            RuntimeError: a frame waits for `accept`. SourceError, StoreError: as `settle` does.
        """
        if self._pending is not None:
            raise RuntimeError("commit_here() between next_input() and accept()")
        # Only what follows shows that no events of the video's end belong to the chunk.
        if not self.settle():
            return
        if self._backward is not None:
            return self._in_backward(self._backward.commit_here)
        try:
            next_frame = self._rows.next_frame
            if next_frame > self._rows.first:
                self._commit(next_frame)
            if next_frame == self._rows.first and next_frame > self._snapshot_at:
                self._take_snapshot()
            self._committer.drain()
        except BaseException as error:
            self._failure = error
            raise

    def accept(self, result: StepResult) -> None:
        """Take the segmenter's result for the frame that `next_input` gave last."""
        if self._failure is not None:
            raise self._failure
        if self._backward is not None:
            backward = self._backward
            self._in_backward(lambda: backward.accept(result))
            self.summary.tracked += 1
            return
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
        """Close the source and stop the threads. Rows that are not committed are left to a later run."""
        if self._failure is None and not self._ended:
            self._failure = RuntimeError("the stream is closed: open another one, which goes on from here")
        try:
            if self._backward is not None:
                self._backward.close()
            if self._frames is not None:
                self._frames.close()
        finally:
            if self._aside is not None:
                self._aside.shutdown(cancel_futures=True)
            self._committer.close()
            self.source.close()

    def _end_chunk(self, following: Frame) -> None:
        """Commit the chunk that ends before a frame, if one does."""
        if following.frame_index % self.settings.commit.chunk_frames:
            return
        # Not earlier: losses at the very end of a video belong to its last chunk.
        if following.frame_index > self._rows.first:
            self._commit(following.frame_index)
        # Also while frames are repeated, so that a run that is killed repeatedly still makes progress.
        chosen = self.settings.commit
        if self._rows.next_frame - self._snapshot_at >= chosen.snapshot_chunks * chosen.chunk_frames:
            self._take_snapshot()

    @property
    def network_shorter_side(self) -> int | None:
        """Shorter side of the network's input at most; None: that of the frames."""
        size, model = self._segmenter.size, self.settings.model
        if model.small_size is None or (not self._ended and self.state.memory is not None):
            chosen = None if self._ended else self.state.network_size
            return size if size is None or chosen is None else max(size, min(chosen))
        return model.small_size

    def _keep_prompts(self) -> None:
        """Store the resolved prompts before any row that depends on them: each box is segmented once."""
        self._committer.drain()
        self._record.update(RUNNING, self.summary)

    def _take(self, frame: Frame, result: StepResult) -> None:
        objects = len(result.object_ids)
        records: list[MaskRecord] | Future[list[MaskRecord]]
        aside = self.looks_ahead or result.finds_runs
        if aside and self._earlier is None and self._rows.is_new(frame):
            if self._aside is None:
                self._aside = thread_aside(self._segmenter, self.settings.threads, "xmem-rows")
            records = self._objects.seen_aside(self._aside, frame, result)
        else:
            records = made = self._objects.seen(frame, result, recorded=self._rows.is_new(frame))
            if self._earlier is not None:
                earlier = self._earlier.at(frame)
                objects += len(earlier)
                if self._rows.is_new(frame):
                    records = sorted([*earlier, *made], key=lambda record: record.object_id)
        self._rows.tracked(frame, records, objects)
        self._latest = records
        self._previous_pts = frame.pts_seconds

    # --- committing ------------------------------------------------------------------------------

    def _check_owner(self, first: int) -> None:
        # Two runs that begin at the same time may replace each other's record. Once there are rows, a run of
        # other settings is refused when it is opened, and one of the same settings commits the same rows.
        if first == 0:
            self._record.check_ours()

    def _commit(self, next_frame: int) -> None:
        """Queue the commit of the frames before `next_frame`."""
        content = self._rows.cut(next_frame)

        def committed() -> None:
            self.summary.frames, self.summary.rows = next_frame, content.rows

        self._committer.commit(content.first, content.last, content.records, content.events, committed)

    def _take_snapshot(self) -> None:
        """Queue a snapshot of the state before the next frame, to be written after the commits before it."""
        snapshot = self._snapshot()
        self._snapshot_at = self._rows.next_frame
        self._committer.save_snapshot(self._snapshot_at, lambda: snapshot().to_bytes())

    def _snapshot(self) -> Callable[[], Snapshot]:
        return self._objects.snapshot(
            self._rows.next_frame,
            self._run,
            None if self.source.damaged else self._previous_pts,
            rows=self._rows.rows,
            losses=self.summary.losses,
        )

    def _finish(self) -> None:
        next_frame = self._rows.next_frame
        if next_frame < self._committed:
            raise SourceError(
                f"{self.source.uri}: ends at frame {next_frame}, but {self._committed} frames of it were "
                "tracked before: it has changed, or is read by another version of FFmpeg; what is committed "
                "stays"
            )
        for loss in self.source.trailing_losses if self._exhausted else ():
            self._rows.add(loss)
        # Without a new frame the last chunk was committed before, and these events with it.
        if next_frame > self._rows.first:
            self._commit(next_frame)
        # A run with a larger max_frames resumes here; of a whole video, other streams may copy objects.
        if next_frame > self._snapshot_at and (not self._exhausted or self.settings.commit.keep_state):
            self._take_snapshot()
        self._committer.drain()
        used = set(self._starts.values()) if self.settings.direction == BACKWARD else self._prompts.frames
        late = sorted(f for f in used if f >= next_frame)
        if late:
            more = f" and {len(late) - _NAMED_FRAMES} more" if len(late) > _NAMED_FRAMES else ""
            frames = f"{late[:_NAMED_FRAMES]}{more}"
            self.summary.warn(f"the video ended at frame {next_frame}, before the prompts at frames {frames}")
        self._record.update(FINISHED, self.summary)
        self.summary.state = FINISHED
        self._ended = True
        self._forget_backward()
