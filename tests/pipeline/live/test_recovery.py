"""Recovery of a live stream: without a snapshot, from one, and from one older than the committed files."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from support.small_net import SMALL_MEMORY, frame_at, small_model, square

from pipeline.live.record import Books
from pipeline.live.recovery import Restored, restore, run_of
from pipeline.live.spec import LiveSpec
from pipeline.prompts.box_segmenters import load_box_segmenter
from pipeline.tracking.snapshots.live import LiveSnapshot
from pipeline.tracking.snapshots.stream import Snapshot
from pipeline.tracks.store import StreamStore
from xmem_core import Prompt, VideoSegmenter

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
SPEC = LiveSpec("cam", "fake://cam")


@pytest.fixture(scope="module")
def segmenter() -> VideoSegmenter:
    return VideoSegmenter(small_model(), SMALL_MEMORY)


@pytest.fixture
def store(tmp_path: Path, segmenter: VideoSegmenter) -> StreamStore:
    """A stream with a snapshot of frame 5, in which 1 (a dog) and 2 are tracked."""
    state = segmenter.new_state()
    masks = {1: square(48, 64, 4, 4, 14), 2: square(48, 64, 20, 30, 14)}
    segmenter.step(state, frame_at(0, 48, 64), Prompt(masks))
    inner = Snapshot(
        next_frame=5,
        tracker=state.to_bytes(),
        run=run_of(segmenter),
        previous_pts_seconds=0.4,
        previous_size=(48, 64),
        categories=((1, "dog"), (2, None)),
        rows=10,
        losses=0,
    )
    store = StreamStore(tmp_path, "cam")
    store.prepare()
    store.save_snapshot(5, LiveSnapshot(inner, NOON, 3, True).to_bytes())
    return store


def restored(store: StreamStore, books: Books, segmenter: VideoSegmenter) -> Restored:
    return restore(store, books, SPEC, segmenter, load_box_segmenter("grabcut"))


def test_the_snapshot_as_it_is(store: StreamStore, segmenter: VideoSegmenter) -> None:
    books = Books(5, objects={1: "dog", 2: None}, pts_seconds=0.4, wall_time=NOON)
    found = restored(store, books, segmenter)
    assert found.state.object_ids == (1, 2)
    assert found.categories == {1: "dog", 2: None}
    assert (found.next_frame, found.applied, found.paused) == (5, 3, True)
    assert (found.previous, found.previous_size) == ((0.4, NOON), (48, 64))
    assert (found.lost, found.finder) == ((), None)


def test_the_files_know_better_who_lives(store: StreamStore, segmenter: VideoSegmenter) -> None:
    found = restored(store, Books(9, objects={2: None, 3: "cat"}), segmenter)
    assert found.state.object_ids == (2,)
    assert found.categories == {2: None}
    assert found.lost == (3,)


@pytest.mark.parametrize(("pts", "later"), [(None, True), (0.3, True), (0.5, False)])
@pytest.mark.parametrize("wall", [-1, 1])
def test_the_later_of_the_two_says_what_was_tracked_last(
    store: StreamStore, segmenter: VideoSegmenter, pts: float | None, later: bool, wall: int
) -> None:
    """By the stream's own time: the system's clock may have been set back."""
    time = None if pts is None else NOON + timedelta(seconds=wall)
    found = restored(store, Books(5, pts_seconds=pts, wall_time=time), segmenter)
    assert found.previous == ((0.4, NOON) if later else (pts, time))


def test_without_a_usable_snapshot_objects_are_lost(store: StreamStore, segmenter: VideoSegmenter) -> None:
    books = Books(9, objects={1: "dog"}, pts_seconds=0.8, wall_time=NOON)
    for books_of, by in (
        (books, VideoSegmenter(small_model(), SMALL_MEMORY, size=64)),  # another size: another run
        (Books(4, objects={1: "dog"}, pts_seconds=0.8, wall_time=NOON), segmenter),  # older than it
    ):
        found = restored(store, books_of, by)
        assert found.state.object_ids == ()
        assert (found.lost, found.next_frame, found.applied) == ((1,), None, 0)
        assert found.previous == (0.8, NOON)
