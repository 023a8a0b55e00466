"""Data classes: validation, and tables that are sorted, typed and complete."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
import pytest

from pipeline.base.records import (
    EVENT_KINDS,
    EVENTS_SCHEMA,
    TRACKS_SCHEMA,
    Event,
    Frame,
    FrameChunk,
    MaskRecord,
    events_table,
    tracks_table,
)


def record(frame: int, object_id: int, **more: object) -> MaskRecord:
    return MaskRecord(frame, object_id, 48, 64, area=3, score=0.5, **more)  # type: ignore[arg-type]


def test_the_schemas_are_the_documented_ones() -> None:
    """The README and users' queries depend on these names and types."""
    assert TRACKS_SCHEMA.names[:5] == ["frame_index", "pts_seconds", "wall_time", "object_id", "category"]
    assert TRACKS_SCHEMA.names[5:8] == ["frame_height", "frame_width", "area"]
    assert TRACKS_SCHEMA.names[8:12] == ["bbox_x", "bbox_y", "bbox_w", "bbox_h"]
    assert TRACKS_SCHEMA.names[12:] == ["centroid_x", "centroid_y", "score", "presence", "mask_rle"]
    types = {field.name: str(field.type) for field in TRACKS_SCHEMA}
    assert types["frame_index"] == types["area"] == "int64"
    assert types["wall_time"] == "timestamp[us, tz=UTC]"
    assert types["object_id"] == types["frame_height"] == types["bbox_x"] == "int32"
    assert types["centroid_x"] == types["score"] == types["presence"] == "float"
    assert types["category"].startswith("dictionary<values=string, indices=int32")
    assert EVENTS_SCHEMA.names == [
        *TRACKS_SCHEMA.names[:3],
        "kind",
        "reason",
        "count",
        "object_id",
        "detail",
    ]


def test_rows_are_sorted_by_frame_then_object() -> None:
    table = tracks_table([record(5, 2), record(3, 9), record(5, 1), record(3, 10)])
    assert list(zip(*table.select(["frame_index", "object_id"]).to_pydict().values(), strict=True)) == [
        (3, 9),
        (3, 10),
        (5, 1),
        (5, 2),
    ]
    assert table.schema.equals(TRACKS_SCHEMA)


def test_every_field_reaches_its_column() -> None:
    when = datetime(2024, 5, 6, 9, 8, 9, 123456, tzinfo=timezone(timedelta(hours=2)))
    row = MaskRecord(
        frame_index=2**40,
        object_id=2**31 - 1,
        frame_height=1080,
        frame_width=1920,
        area=12,
        score=0.25,
        presence=0.75,
        pts_seconds=1.5,
        wall_time=when,
        category="person",
        bbox=(1, 2, 3, 4),
        centroid=(2.5, 3.5),
        mask_rle="abc",
    )
    assert tracks_table([row]).to_pylist() == [
        {
            "frame_index": 2**40,
            "pts_seconds": 1.5,
            "wall_time": datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC),
            "object_id": 2**31 - 1,
            "category": "person",
            "frame_height": 1080,
            "frame_width": 1920,
            "area": 12,
            "bbox_x": 1,
            "bbox_y": 2,
            "bbox_w": 3,
            "bbox_h": 4,
            "centroid_x": 2.5,
            "centroid_y": 3.5,
            "score": 0.25,
            "presence": 0.75,
            "mask_rle": "abc",
        }
    ]


def test_an_object_out_of_sight_has_nulls() -> None:
    (row,) = tracks_table([MaskRecord(0, 1, 48, 64, area=0, score=0.0)]).to_pylist()
    assert (row["area"], row["score"]) == (0, 0.0)
    absent = ["bbox_x", "bbox_y", "bbox_w", "bbox_h", "centroid_x", "centroid_y", "mask_rle", "wall_time"]
    assert [row[name] for name in (*absent, "presence")] == [None] * 9


def test_no_records_make_a_table_of_the_same_schema() -> None:
    assert tracks_table([]).schema.equals(TRACKS_SCHEMA)
    assert events_table([]).schema.equals(EVENTS_SCHEMA)
    assert tracks_table([]).num_rows == events_table([]).num_rows == 0


def test_an_id_too_large_for_its_column_is_an_error_not_another_id() -> None:
    with pytest.raises((OverflowError, pa.ArrowInvalid)):
        tracks_table([record(0, 2**31)])


def test_events_keep_their_order_and_their_details() -> None:
    given = [
        Event(7, "corrupt", reason="bad slice", count=4, pts_seconds=0.28),
        Event(3, "object_added", object_id=5, detail={"b": [1, 2], "a": "ü"}),
    ]
    first, second = events_table(iter(given)).to_pylist()
    assert (first["frame_index"], first["kind"], first["reason"], first["count"]) == (
        7,
        "corrupt",
        "bad slice",
        4,
    )
    assert (first["pts_seconds"], first["object_id"], first["detail"]) == (0.28, None, None)
    assert (second["count"], second["object_id"]) == (1, 5)
    assert json.loads(second["detail"]) == {"a": "ü", "b": [1, 2]}
    assert (
        second["detail"]
        == events_table([Event(3, "object_added", detail={"a": "ü", "b": [1, 2]})])["detail"][0].as_py()
    )


def test_an_unknown_kind_of_event_is_refused() -> None:
    with pytest.raises(ValueError, match=r"event kind 'lost' is not one of clock, corrected, corrupt"):
        Event(0, "lost")
    for kind in EVENT_KINDS:
        assert Event(0, kind).kind == kind


@pytest.mark.parametrize(("first", "last"), [(-1, 3), (4, 3)])
def test_a_chunk_covers_frames(first: int, last: int) -> None:
    with pytest.raises(ValueError, match=rf"chunk {first}\.\.{last} of 'cam'"):
        FrameChunk("cam", first, last)
    assert FrameChunk("cam", 3, 3).last == 3


def test_a_frame_says_its_size() -> None:
    frame = Frame(np.zeros((48, 64, 3), np.uint8), 7, 0.28)
    assert frame.size == (48, 64)
    assert repr(frame) == "Frame(7, 64x48, pts_seconds=0.28)"
