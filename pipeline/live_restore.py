"""What a live stream goes on from: its newest usable snapshot, made to agree with what is committed since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from pipeline.boxes import BoxSegmenter
from pipeline.finder import ObjectFinder
from pipeline.live_record import Books
from pipeline.live_snapshot import LiveSnapshot
from pipeline.live_spec import LiveSpec
from pipeline.resume import new_finder, restored_state
from pipeline.store import StreamStore
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
