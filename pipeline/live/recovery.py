"""Recovery of a live stream: the newest usable snapshot, reconciled with committed rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pipeline.base.records import Event, Frame
from pipeline.detect.lifecycle.object_finder import ObjectFinder
from pipeline.live.record import Books
from pipeline.live.spec import LiveSpec
from pipeline.prompts.box_segmenters import BoxSegmenter
from pipeline.tracking.resume import new_finder, restored_state
from pipeline.tracking.snapshots.live import LiveSnapshot
from pipeline.tracks.store import StreamStore
from xmem_core import TrackerState, VideoSegmenter


@dataclass(frozen=True)
class Restored:
    """The state that a stream resumes from; without a usable snapshot, a new state without objects.

    Args:
        finder: None without a detector.
        previous: pts (seconds) and wall time of the last tracked frame.
        previous_size: (height, width) of the last frame in the snapshot.
        next_frame: `next_frame` of the snapshot; None without one.
        lost: objects that are tracked according to the files, but missing in the snapshot.
        applied, paused: as in `LiveSnapshot`.
    """

    state: TrackerState
    finder: ObjectFinder | None
    previous: tuple[float | None, datetime | None]
    categories: Mapping[int, str | None] = field(default_factory=dict)
    previous_size: tuple[int, int] | None = None
    next_frame: int | None = None
    lost: tuple[int, ...] = ()
    applied: int = 0
    paused: bool = False


def restore(
    store: StreamStore, books: Books, spec: LiveSpec, segmenter: VideoSegmenter, boxes: BoxSegmenter
) -> Restored:
    """Restore the state of a stream.

    Args:
        books: state of its committed files.

    Raises:
        StoreError: the folder cannot be read. UsageError: there is no such detector.
    """

    def fresh() -> ObjectFinder | None:
        device = str(segmenter.device)
        finder = spec.settings.finder
        return new_finder(spec.detector, finder, lambda: boxes, device=device, aside=segmenter.aside)

    def validated(blob: bytes) -> tuple[LiveSnapshot, TrackerState, ObjectFinder | None]:
        snapshot = LiveSnapshot.from_bytes(blob)
        if snapshot.stream.run != run_of(segmenter):
            raise ValueError("it was taken with another model, memory or size")
        finder = fresh()
        state = restored_state(snapshot.stream, segmenter, finder)
        return snapshot, state, finder

    previous = (books.pts_seconds, books.wall_time)
    found = store.load_snapshot(books.frames, validated)
    if found is None:
        finder = fresh()
        return Restored(segmenter.new_state(), finder, previous, lost=tuple(books.objects))
    snapshot, state, finder = found[1]
    lost = tuple(i for i in books.objects if i not in state.object_ids)
    # Their removal is committed; the snapshot is older.
    gone = [i for i in state.object_ids if i not in books.objects]
    if gone:
        state.remove_objects(gone)
    # Times of day may have been set back in between, those of the stream never are.
    pts = snapshot.stream.previous_pts_seconds
    if pts is not None and (previous[0] is None or pts > previous[0]):
        previous = (pts, snapshot.wall_time)
    return Restored(
        state,
        finder,
        previous,
        categories={i: c for i, c in snapshot.stream.categories if i not in gone},
        previous_size=snapshot.stream.previous_size,
        next_frame=snapshot.stream.next_frame,
        lost=lost,
        applied=snapshot.applied,
        paused=snapshot.paused,
    )


def run_of(segmenter: VideoSegmenter) -> str:
    """Text that identifies what a state depends on; a snapshot is usable only if it carries the same one."""
    return f"{segmenter.fingerprint} {segmenter.size} {segmenter.memory_config}"


def restart_events(
    frame: Frame | None,
    first: int,
    *,
    previous: datetime | None,
    frames_lost: int,
    snapshot: int | None,
    objects_lost: Sequence[int],
) -> Iterator[Event]:
    """Events that report a restart, at the first frame after it.

    Args:
        frame: the first frame; None if none arrived.
        first: frame number to use without a frame.
        previous: wall time of the last frame tracked before the restart.
        frames_lost: number of reserved frame numbers that were not committed.
        snapshot: frame of the snapshot.
        objects_lost: objects that are missing in the snapshot.
    """
    seconds = None
    if frame is not None and frame.wall_time is not None and previous is not None:
        seconds = round((frame.wall_time - previous).total_seconds(), 3)
    index = first if frame is None else frame.frame_index
    pts, wall = (None, None) if frame is None else (frame.pts_seconds, frame.wall_time)
    detail: dict[str, Any] = {"seconds": seconds, "frames": frames_lost, "snapshot": snapshot}
    yield Event(index, "restart", "resumed", 1, pts_seconds=pts, wall_time=wall, detail=detail)
    for object_id in objects_lost:
        yield Event(
            index,
            "object_removed",
            "restart",
            pts_seconds=pts,
            wall_time=wall,
            object_id=object_id,
            detail={"why": "it is in no snapshot"},
        )
