"""Recovery of a live stream: the newest usable snapshot, reconciled with committed rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pipeline.base.records import Event, Frame
from pipeline.detect.lifecycle import ObjectFinder
from pipeline.live.record import Books
from pipeline.live.snapshot import LiveSnapshot
from pipeline.live.spec import LiveSpec
from pipeline.prompts.box_segmenters import BoxSegmenter
from pipeline.tracking.resume import new_finder, restored_state
from pipeline.tracks.store import StreamStore
from xmem_core import TrackerState, VideoSegmenter


@dataclass(frozen=True)
class Restored:
    """What a stream goes on from; without a usable snapshot that is a new state, and no objects.

    Args:
        finder: None without a detector.
        previous: pts (seconds) and wall time of the last frame that was tracked.
        previous_size: (height, width) of the last frame in the snapshot.
        next_frame: that the snapshot is of; None without one.
        lost: objects that live as far as the files say, and are in no snapshot.
        applied, paused: as `LiveSnapshot` has them.
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
    """Find out what a stream goes on from.

    Args:
        books: what its committed files say.

    Raises:
        StoreError: the folder cannot be read. UsageError: there is no such detector.
    """

    def validated(blob: bytes) -> tuple[LiveSnapshot, TrackerState, ObjectFinder | None]:
        snapshot = LiveSnapshot.from_bytes(blob)
        if snapshot.stream.run != run_of(segmenter):
            raise ValueError("it was taken with another model, memory or size")
        finder = new_finder(spec.detector, spec.settings.finder, lambda: boxes)
        state = restored_state(snapshot.stream, segmenter, finder)
        return snapshot, state, finder

    previous = (books.pts_seconds, books.wall_time)
    found = store.load_snapshot(books.frames, validated)
    if found is None:
        finder = new_finder(spec.detector, spec.settings.finder, lambda: boxes)
        return Restored(segmenter.new_state(), finder, previous, lost=tuple(books.objects))
    snapshot, state, finder = found[1]
    lost = tuple(i for i in books.objects if i not in state.object_ids)
    # They were removed, and that is committed; the snapshot is older.
    gone = [i for i in state.object_ids if i not in books.objects]
    if gone:
        state.remove_objects(gone)
    wall = snapshot.wall_time
    if wall is not None and (previous[1] is None or wall > previous[1]):
        previous = (snapshot.stream.previous_pts_seconds, wall)
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
    """What a state belongs to: only with the same of it can a snapshot be gone on from."""
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
    """What is to be told of a restart, with the first frame after it.

    Args:
        frame: that one; None if none came.
        first: its number then.
        previous: wall time of the last frame that was tracked before.
        frames_lost: numbers of frames that nobody knows of.
        snapshot: the frame that the snapshot is of.
        objects_lost: objects that are in no snapshot.
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
