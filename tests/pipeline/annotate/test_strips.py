"""Strips of rows."""

from __future__ import annotations

from pathlib import Path

from pipeline.annotate.strips import joined, strips_of_chunk, strips_of_rows
from pipeline.base.records import MaskRecord, events_table, tracks_table
from pipeline.storage.opening import open_files
from pipeline.tracks.store import StreamStore


def row(frame: int, area: int, presence: float | None, score: float = 0.9) -> MaskRecord:
    return MaskRecord(frame, 1, 8, 8, area, score, presence)


ROWS = [row(0, 5, 0.9), row(1, 5, 0.8), row(2, 5, 0.2), row(3, 0, 0.0), row(4, 5, None), row(5, 5, None, 0.5)]
RUNS = [(0, 1, "seen"), (2, 2, "doubtful"), (3, 3, "out"), (4, 4, "seen"), (5, 5, "doubtful")]


def test_strips_of_rows_and_of_their_file_are_the_same(tmp_path: Path) -> None:
    assert strips_of_rows({r.frame_index: [r] for r in ROWS}) == {1: RUNS}
    store = StreamStore(tmp_path, "v")
    store.prepare()
    store.commit(0, 5, tracks_table(ROWS), events_table([]))
    assert strips_of_chunk(open_files(str(tmp_path)), "v", 0) == {1: RUNS}


def test_parts_are_joined_and_cut() -> None:
    parts = [{1: [(0, 4, "seen")]}, {1: [(5, 9, "seen"), (10, 12, "out")]}]
    assert joined(parts, 2, 11) == {1: [(2, 9, "seen"), (10, 10, "out")]}
