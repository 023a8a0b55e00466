"""Synthetic chunks of a stream; equal arguments give equal rows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.base.records import Event, MaskRecord, events_table, tracks_table
from pipeline.tracks.store import StreamStore

START = datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
NO_EVENTS = events_table([])
FRAMES = 5


def rows(first: int, last: int, salt: int = 0) -> pa.Table:
    """Two objects on frames `first`..`last`, the second out of sight on every third frame.

    `salt` changes the masks.
    """
    records = []
    for frame in range(first, last + 1):
        common: dict[str, Any] = {
            "frame_index": frame,
            "frame_height": 48,
            "frame_width": 64,
            "pts_seconds": frame / 25,
            "wall_time": START + timedelta(milliseconds=40 * frame),
        }
        area = 10 + (frame + salt) % 7
        records.append(
            MaskRecord(
                **common,
                object_id=1,
                category="person",
                area=area,
                score=0.75,
                bbox=(1, 2, 3, 4),
                centroid=(2.5, 3.5),
                mask_rle=f"{frame}-{salt}-" + "0" * (frame % 5),
            )
        )
        if frame % 3 == 0:
            records.append(MaskRecord(**common, object_id=7, area=0, score=0.0))
        else:
            records.append(
                MaskRecord(
                    **common,
                    object_id=7,
                    category="dog",
                    area=5,
                    score=0.5,
                    bbox=(9, 9, 2, 3),
                    centroid=(9.5, 10.0),
                    mask_rle="9",
                )
            )
    return tracks_table(records)


def events(first: int, salt: int = 0) -> pa.Table:
    """A few events of a chunk that begins at frame `first`."""
    return events_table(
        [
            Event(
                first, "gap", reason="lost packets", count=3 + salt, pts_seconds=first / 25, wall_time=START
            ),
            Event(first + 1, "object_added", object_id=7, detail={"by": "prompt", "größe": [1, 2.5]}),
        ]
    )


def fill(
    root: str | Path, stream_id: str, first: int = 0, chunks: int = 6, salt: int = 0, **more: Any
) -> None:
    """Chunks of `FRAMES` frames with two rows each; two events in each second one."""
    store = StreamStore(root, stream_id, more.get("options"))
    for start in range(first, first + chunks * FRAMES, FRAMES):
        last = start + FRAMES - 1
        store.commit(start, last, rows(start, last, salt), events(start, salt) if start % 2 else NO_EVENTS)
