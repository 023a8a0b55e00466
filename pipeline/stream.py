"""StreamTracker: one stream's way from its source through the segmenter into the store. No Ray in here.

    while (step := stream.next_input()) is not None:
        stream.accept(segmenter.step(step.state, step.image, step.prompt))

The resume rule: rows are committed chunk by chunk, chunk k being frames k * chunk_frames and on. A stream
that starts again asks the store for the first frame without rows, takes the newest snapshot not after it, and
tracks from the snapshot's frame on. Frames that have rows already are repeated to rebuild the state and are
not written again. Since tracking is deterministic, the files are then those of an undisturbed run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from pipeline.boxes import BoxSegmenter, load_box_segmenter
from pipeline.errors import PromptError, SettingsConflictError
from pipeline.masks import mean_probability, records_from_label_map
from pipeline.prefetch import Prefetch
from pipeline.prompts import PromptSet, ResolvedPrompt, resolve
from pipeline.records import Event, Frame, MaskRecord, events_table, tracks_table
from pipeline.settings import TrackSettings
from pipeline.snapshot import Snapshot
from pipeline.sources import VideoSource
from pipeline.store import StreamStore
from xmem_core import Prompt, StepResult, TrackerState, VideoSegmenter

logger = logging.getLogger(__name__)

FINISHED = "finished"
RUNNING = "running"


@dataclass(frozen=True)
class StepInput:
    """What the segmenter gets for one frame."""

    state: TrackerState
    image: NDArray[np.uint8]
    prompt: Prompt | None


@dataclass
class StreamSummary:
    """How a stream stands.

    Args:
        stream_id, state: state is "running" or "finished".
        frames, rows: committed so far, over all runs.
        tracked: frames tracked by this run, repeated ones included.
        resumed_at: first frame this run commits, None for a fresh start.
        objects: per object id, [first frame, last visible frame, visible frames] as seen by this run.
        losses: frames or packets the source lost, as seen by this run.
        warnings: in the order in which they came.
    """

    stream_id: str
    state: str = RUNNING
    frames: int = 0
    rows: int = 0
    tracked: int = 0
    resumed_at: int | None = None
    objects: dict[int, list[int]] = field(default_factory=dict)
    losses: int = 0
    warnings: list[str] = field(default_factory=list)


class StreamTracker:
    """One stream. Use it as a context manager.

    Args:
        source: the opened video; closed with the stream.
        store: where its rows go.
        segmenter: makes and restores states; steps are done by whoever drives this stream.
        settings: what decides the rows.
        prompts: what to track; None on a stream that has a record: what the record says.
        box_segmenter: turns boxes into masks; by default the one that the settings name.

    Raises:
        SettingsConflictError: the folder holds this stream with other settings, prompts or another video.
        PromptError: there is nothing to track.
    """

    def __init__(
        self,
        source: VideoSource,
        store: StreamStore,
        segmenter: VideoSegmenter,
        settings: TrackSettings,
        prompts: PromptSet | None,
        box_segmenter: BoxSegmenter | None = None,
    ) -> None:
        self.source = source
        self.store = store
        self.settings = settings
        self.summary = StreamSummary(store.stream_id)
        self._segmenter = segmenter
        self._boxes = box_segmenter
        self._frames: Prefetch[Frame] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="xmem-write")
        self._writing: list[Future[None]] = []
        self._records: list[MaskRecord] = []
        self._events: list[Event] = []
        self._resolved: dict[int, ResolvedPrompt] = {}
        self._pending: tuple[Frame, ResolvedPrompt | None] | None = None
        self._chunks_since_snapshot = 0
        self._ended = False
        self._exhausted = False
        try:
            self._open(prompts)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> StreamTracker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- opening ---------------------------------------------------------------------------------

    def _open(self, prompts: PromptSet | None) -> None:
        self.store.prepare()
        committed = self.store.committed()
        self._committed = committed.next_frame
        record = self.store.read_record()
        if record is None and committed.files:
            raise SettingsConflictError(
                f"{self.store.root} holds rows of stream {self.store.stream_id} but no record of its "
                "settings: restart it (--restart), or give another --stream-id or --out"
            )
        if record is not None:
            self._compare(record, prompts)
            prompts = PromptSet.from_record(record["prompts"]) if prompts is None else prompts
            self._resolved = {
                int(frame): ResolvedPrompt.from_record(value)
                for frame, value in record.get("resolved_prompts", {}).items()
            }
        if prompts is None or prompts.is_empty():
            raise PromptError("nothing to track: give masks, boxes or a prompts file")
        self._prompts = prompts
        self.summary.frames = self._committed
        # The rows are the truth: a record that claims more than they hold is not believed.
        whole = record is not None and record.get("frames") == self._committed
        if record is not None and record.get("state") == FINISHED and whole:
            self.summary.state = FINISHED
            self.summary.rows = int(record.get("rows", 0))
            self._ended = True
            return
        if record is None:
            self._write_record(self._record(RUNNING))
        self._restore()
        self._frames = Prefetch(self._limited(self._next, self._previous_pts))

    def _compare(self, record: dict[str, Any], prompts: PromptSet | None) -> None:
        differing = self.settings.differences(record.get("settings", {}))
        source = redacted(self.source.uri)
        if record.get("source_fingerprint") != self.source.fingerprint:
            if record.get("source") != source:
                differing.append(f"source was {record.get('source')!r}, now {source!r}")
            else:
                differing.append(f"the content of {source} has changed")
        if prompts is not None and prompts.to_record() != record.get("prompts"):
            differing.append("prompts are others")
        if differing:
            raise SettingsConflictError(
                f"stream {self.store.stream_id} in {self.store.root} was tracked with other settings: "
                f"{'; '.join(differing)}; use the same, "
                "another --stream-id or --out, or start over (--restart)"
            )

    def _restore(self) -> None:
        """Take the newest usable snapshot, or start from the first frame."""
        found = self.store.load_snapshot(self._committed, self._validated)
        if found is None:
            self.state = self._segmenter.new_state()
            self._next = 0
            self._previous_pts: float | None = None
            self._previous_size: tuple[int, int] | None = None
            self._categories: dict[int, str | None] = {}
        else:
            self._next, (snapshot, self.state) = found
            self._previous_pts = snapshot.previous_pts_seconds
            self._previous_size = snapshot.previous_size
            self._categories = dict(snapshot.categories)
            self.summary.rows = snapshot.rows
        if self._committed:
            self.summary.resumed_at = self._committed
            logger.info(
                "stream %s: %d frames have rows, going on from frame %d",
                self.store.stream_id,
                self._committed,
                self._next,
            )
        self._first = self._committed

    def _validated(self, blob: bytes) -> tuple[Snapshot, TrackerState]:
        snapshot = Snapshot.from_bytes(blob)
        state = TrackerState.from_bytes(snapshot.tracker, device=self._segmenter.device)
        if state.model_fingerprint != self._segmenter.fingerprint:
            raise ValueError("it was taken with another model")
        return snapshot, state

    def _limited(self, start: int, previous_pts: float | None) -> Iterator[Frame]:
        limit = self.settings.max_frames
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

    # --- stepping --------------------------------------------------------------------------------

    def next_input(self) -> StepInput | None:
        """The next frame to track; None at the end, when everything is committed.

        Raises:
            SourceError, PromptError, StoreError: what is committed stays, and a later run goes on from it.
        """
        self._raise_writing(wait=False)
        if self._ended or self._frames is None:
            return None
        frame = next(self._frames, None)
        if frame is None:
            self._finish()
            return None
        # Not earlier: losses at the very end of a video belong into its last chunk.
        if frame.frame_index > self._first and frame.frame_index % self.settings.chunk_frames == 0:
            self._commit(frame.frame_index)
        self._note_arrival(frame)
        resolved = self._prompt_at(frame)
        gone = [i for i in self._prompts.removals_at(frame.frame_index) if i in self.state.object_ids]
        if gone:
            self.state.remove_objects(gone)
            for object_id in gone:
                self._event(frame, "object_removed", object_id=object_id, reason="requested")
                self._categories.pop(object_id, None)
        prompt = None
        if resolved is not None:
            for object_id in resolved.masks:
                known = object_id in self.state.object_ids
                self._event(
                    frame, "corrected" if known else "object_added", object_id=object_id, reason="prompt"
                )
                category = resolved.categories.get(object_id)
                if category is not None or not known:
                    self._categories[object_id] = category
            prompt = Prompt(resolved.masks)
        self._pending = (frame, resolved)
        return StepInput(self.state, frame.image, prompt)

    def accept(self, result: StepResult) -> None:
        """Take the segmenter's result for the frame that `next_input` gave last."""
        if self._pending is None:
            raise RuntimeError("accept() without a frame from next_input()")
        frame, _ = self._pending
        self._pending = None
        self.summary.tracked += 1
        self._next = frame.frame_index + 1
        self._previous_pts = frame.pts_seconds
        self._previous_size = frame.size
        # Counted for repeated frames too: a snapshot may be older than the last commit.
        self.summary.rows += len(result.object_ids)
        if frame.frame_index < self._committed or not result.object_ids:
            return
        label_map = result.label_map.cpu().numpy()
        scores = mean_probability(label_map, result.probabilities.cpu().numpy(), result.object_ids)
        records = records_from_label_map(label_map, scores, result.object_ids, frame, self._categories)
        self._records.extend(records)
        for record in records:
            seen = self.summary.objects.setdefault(record.object_id, [frame.frame_index, -1, 0])
            if record.area:
                seen[1] = frame.frame_index
                seen[2] += 1

    def close(self) -> None:
        """Let go of source and threads. What is committed stays; the rest is left to a later run."""
        if self._frames is not None:
            self._frames.close()
        self._writer.shutdown(wait=True)
        self.source.close()

    def _prompt_at(self, frame: Frame) -> ResolvedPrompt | None:
        objects = self._prompts.at(frame.frame_index)
        if not objects:
            return None
        known = self._resolved.get(frame.frame_index)
        if known is not None:
            return known
        if self._boxes is None:
            self._boxes = load_box_segmenter(self.settings.box_segmenter)
        resolved = resolve(objects, frame, self._boxes)
        self.summary.warnings.extend(resolved.warnings)
        self._resolved[frame.frame_index] = resolved
        # Durable before any row that rests on it: a box becomes a mask once.
        self._write_record(self._record(RUNNING))
        return resolved

    def _note_arrival(self, frame: Frame) -> None:
        for loss in frame.losses:
            self._add_event(loss)
        if self._previous_size is not None and frame.size != self._previous_size:
            detail = {"from": list(self._previous_size), "to": list(frame.size)}
            self._event(frame, "resized", detail=detail)

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
        first, records, events = self._first, self._records, self._events
        self._first, self._records, self._events = next_frame, [], []
        rows = self.summary.rows
        self._chunks_since_snapshot += 1
        snapshot = None
        if self._chunks_since_snapshot >= self.settings.snapshot_chunks:
            self._chunks_since_snapshot = 0
            snapshot = Snapshot(
                next_frame=self._next,
                tracker=self.state.to_bytes(),
                previous_pts_seconds=self._previous_pts,
                previous_size=self._previous_size,
                categories=tuple(self._categories.items()),
                rows=rows,
            )

        def write() -> None:
            self.store.commit(first, next_frame - 1, tracks_table(records), events_table(events))
            self.summary.frames = next_frame
            if snapshot is not None:
                self.store.save_snapshot(snapshot.next_frame, snapshot.to_bytes())

        self._submit(write)
        # One chunk may wait while one is written: storage slower than tracking slows it, and fills no memory.
        self._raise_writing(wait=len(self._writing) > 2)

    def _finish(self) -> None:
        for loss in self.source.trailing_losses if self._exhausted else ():
            self._add_event(loss)
        # Without a new frame the last chunk was committed before, and these events with it.
        if self._next > self._first:
            self._commit(self._next)
        self._raise_writing(wait=True)
        late = [f for f in self._prompts.frames if f >= self._next]
        if late:
            self._warn(f"the video ended at frame {self._next}, before the prompts at frames {late}")
        self.summary.state = FINISHED
        self.summary.frames = max(self._next, self._committed)
        self._write_record(self._record(FINISHED))
        self._ended = True

    def _warn(self, message: str) -> None:
        logger.warning("stream %s: %s", self.store.stream_id, message)
        self.summary.warnings.append(message)

    def _submit(self, job: Callable[[], None]) -> None:
        self._writing.append(self._writer.submit(job))

    def _raise_writing(self, wait: bool) -> None:
        while self._writing and (wait or self._writing[0].done()):
            self._writing.pop(0).result()

    def _write_record(self, record: dict[str, Any]) -> None:
        self._raise_writing(wait=True)
        self.store.write_record(record)

    def _record(self, state: str) -> dict[str, Any]:
        return {
            "state": state,
            "source": redacted(self.source.uri),
            "source_fingerprint": self.source.fingerprint,
            "width": self.source.width,
            "height": self.source.height,
            "rate": self.source.rate,
            "codec": self.source.codec,
            "container": self.source.container,
            "model": self.settings.model,
            "settings": self.settings.to_dict(),
            "prompts": self._prompts.to_record(),
            "resolved_prompts": {str(f): r.to_record() for f, r in sorted(self._resolved.items())},
            "frames": self.summary.frames,
            "rows": self.summary.rows,
        }


def redacted(uri: str) -> str:
    """A URI without user name and password, for records and messages."""
    parts = urlsplit(uri)
    if "://" not in uri or "@" not in parts.netloc:
        return uri
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
