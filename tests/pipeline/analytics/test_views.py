"""The views `objects`, `frames`, `files` and `gaps`, and the mistakes that they make impossible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.chunks import NO_EVENTS, START, events

from pipeline.analytics.query import query
from pipeline.analytics.views import FILES_SCHEMA, FRAMES_SCHEMA
from pipeline.base.records import Event, MaskRecord, events_table, tracks_table
from pipeline.tracks.layout import chunk_name
from pipeline.tracks.store import StreamStore


def record(frame: int, object_id: int, x: float | None, **more: Any) -> MaskRecord:
    """An object at (x, 0), or out of sight."""
    seen = {} if x is None else {"centroid": (x, 0.0), "bbox": (int(x), 0, 1, 1), "mask_rle": "9"}
    return MaskRecord(
        frame_index=frame, object_id=object_id, frame_height=48, frame_width=64,
        area=0 if x is None else 10 + frame, score=0.0 if x is None else 0.5, pts_seconds=frame / 25,
        **{"category": "person"} | seen | more,
    )  # fmt: skip


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """`a`: object 1 on frames 2..4 and 8..9, out of sight on 3; frames 0, 1, 5..7, 10..14 are empty.

    `b`: another object 1.
    """
    store = StreamStore(tmp_path / "out", "a")
    store.write_record({"rate": 25.0, "state": "finished"})
    chunk = [record(2, 1, 10.0), record(3, 1, None), record(4, 1, 16.0)]
    store.commit(0, 4, tracks_table(chunk), NO_EVENTS)
    store.commit(5, 9, tracks_table([record(8, 1, 40.0), record(9, 1, 43.0)]), NO_EVENTS)
    store.commit(10, 14, tracks_table([]), NO_EVENTS)
    StreamStore(tmp_path / "out", "b").commit(0, 4, tracks_table([record(0, 1, 5.0)]), events(3))
    return tmp_path / "out"


def test_objects_are_those_of_their_stream_and_count_what_was_in_sight(out: Path) -> None:
    first, second = query(out, "FROM objects ORDER BY stream_id").to_pylist()
    assert (first["stream_id"], first["object_id"], second["stream_id"]) == ("a", 1, "b")
    assert (first["first_frame"], first["last_frame"]) == (2, 9)
    assert (first["first_seen"], first["last_seen"]) == (2 / 25, 9 / 25)
    assert (first["frames_tracked"], first["frames_visible"], first["longest_gap"]) == (5, 4, 3)
    assert (first["mean_area"], first["largest_area"], first["mean_score"]) == (
        (12 + 14 + 18 + 19) / 4,
        19,
        0.5,
    )
    assert first["path_length"] == 3.0, "neither the step over frame 3 nor that over 5..7"
    assert (second["frames_visible"], second["longest_gap"], second["path_length"]) == (1, 0, 0)


def test_an_object_that_was_never_in_sight_has_no_first_frame(tmp_path: Path) -> None:
    StreamStore(tmp_path, "a").commit(0, 1, tracks_table([record(0, 4, None)]), NO_EVENTS)
    (row,) = query(tmp_path, "FROM objects").to_pylist()
    assert (row["first_frame"], row["frames_visible"], row["mean_area"], row["path_length"]) == (
        None,
        0,
        None,
        0,
    )


def test_frames_without_objects_count(out: Path) -> None:
    rows = query(out, "FROM frames WHERE stream_id = 'a' ORDER BY frame_index").to_pylist()
    assert [row["frame_index"] for row in rows] == list(range(15))
    assert list(rows[0]) == ["stream_id", *FRAMES_SCHEMA.names]
    assert [row["visible"] for row in rows] == [0, 0, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    assert [row["objects"] for row in rows][:5] == [0, 0, 1, 1, 1]
    mean = query(out, "SELECT avg(visible) AS mean FROM frames WHERE stream_id = 'a'")
    assert mean["mean"].to_pylist() == [4 / 15]
    assert [row["pts_seconds"] for row in rows] == pytest.approx([i / 25 for i in range(15)])
    assert [row["frame_index"] for row in rows if not row["pts_estimated"]] == [2, 3, 4, 8, 9]
    some = query(
        out, "SELECT frame_index f, pts_seconds p FROM frames WHERE stream_id = 'a' AND frame_index > 11"
    )
    assert some["f"].to_pylist() == [12, 13, 14]
    assert some["p"].to_pylist() == [row["pts_seconds"] for row in rows[12:]]


def test_a_time_that_nothing_tells_is_null(out: Path) -> None:
    query_ = "SELECT pts_seconds FROM frames WHERE stream_id = 'b' ORDER BY frame_index"
    assert query(out, query_)["pts_seconds"].to_pylist() == [0, None, None, None, None]


def test_lost_frames_of_a_live_stream(tmp_path: Path) -> None:
    happened = [
        Event(4, "dropped", reason="queue full", count=2, wall_time=START),
        Event(4, "corrupt", reason="decode error", count=1, wall_time=START),
        Event(6, "gap", reason="silence", wall_time=START, detail={"seconds": 2.5}),
    ]
    rows = [record(frame, 1, 1.0, wall_time=START) for frame in (0, 4, 6)]
    StreamStore(tmp_path, "cam").commit(0, 6, tracks_table(rows), events_table(happened))
    found = query(tmp_path, "FROM frames ORDER BY frame_index").to_pylist()
    assert [row["frame_index"] for row in found if row["lost"]] == [1, 2, 3]
    assert [row["wall_time"] for row in found] == [START, None, None, None, START, None, START]
    gaps = query(
        tmp_path, "SELECT frame_index, kind, frames_lost, seconds FROM gaps ORDER BY kind"
    ).to_pylist()
    assert gaps == [
        {"frame_index": 4, "kind": "corrupt", "frames_lost": 1, "seconds": None},
        {"frame_index": 4, "kind": "dropped", "frames_lost": 2, "seconds": None},
        {"frame_index": 6, "kind": "gap", "frames_lost": 0, "seconds": 2.5},
    ]


def test_files_say_what_is_wrong_with_them(out: Path) -> None:
    sound = query(out, "FROM files ORDER BY stream_id, first_frame").to_pylist()
    assert list(sound[0]) == ["stream_id", *FILES_SCHEMA.names]
    assert [(r["first_frame"], r["last_frame"], r["rows"], r["problem"]) for r in sound] == [
        (0, 4, 3, None), (5, 9, 2, None), (10, 14, 0, None), (0, 4, 1, None)
    ]  # fmt: skip
    assert sound[1]["bytes"] == (out / sound[1]["file"]).stat().st_size
    (out / chunk_name("tracks", "a", 5)).unlink()
    pq.write_table(pa.table({"x": [1]}), out / chunk_name("tracks", "b", 5))
    (out / chunk_name("tracks", "b", 0)).write_bytes(b"PAR1")
    found = query(out, "SELECT file, problem FROM files WHERE problem IS NOT NULL ORDER BY ALL").to_pylist()
    problems = {row["file"].partition("=")[2]: row["problem"] for row in found}
    assert sorted(problems) == [f"{s}/frames-{n:012d}.parquet" for s, n in (("a", 0), ("b", 0), ("b", 5))]
    missing = problems["a/frames-000000000000.parquet"]
    assert missing.startswith("tracks/stream_id=a/frames-000000000005.parquet is missing")
    assert problems["b/frames-000000000000.parquet"].startswith("cannot be read (its end is missing)")
    assert problems["b/frames-000000000005.parquet"].startswith("is no tracks file of xmem")
