"""Made-up mask records for zones: objects that walk, hide, leave and come back, with gaps in the input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from pipeline.base.records import Event, MaskRecord, events_table, tracks_table
from pipeline.tracks.masks import mask_to_rle
from pipeline.tracks.store import StreamStore
from pipeline.zones.engine import Removal
from pipeline.zones.rows import Moment

HEIGHT, WIDTH = 100, 100
BEGAN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
Place = tuple[float, float] | None


def record(
    frame: int,
    object_id: int,
    foot: Place,
    *,
    seconds: float | None = None,
    category: str | None = "person",
    size: tuple[int, int] = (HEIGHT, WIDTH),
    wall: bool = False,
    with_mask: bool = False,
) -> MaskRecord:
    """One object whose box of 4 x 8 pixels stands on `foot`; None: out of sight. A frame is 0.1 s."""
    pts = frame / 10 if seconds is None else seconds
    wall_time = BEGAN + timedelta(seconds=pts) if wall else None
    if foot is None:
        return MaskRecord(
            frame, object_id, *size, 0, 0.0, pts_seconds=pts, wall_time=wall_time, category=category
        )
    x, y = foot
    left, top = round(x - 2), round(y - 8)
    rle = None
    if with_mask:
        mask = np.zeros(size, np.bool_)
        mask[max(0, top) : max(0, top + 8), max(0, left) : max(0, left + 4)] = True
        rle = mask_to_rle(mask)
    return MaskRecord(
        frame,
        object_id,
        *size,
        32,
        0.9,
        pts_seconds=pts,
        wall_time=wall_time,
        category=category,
        bbox=(left, top, 4, 8),
        centroid=(float(np.float32(x - 0.5)), float(np.float32(y - 4.5))),
        mask_rle=rle,
    )


@dataclass(frozen=True)
class Walk:
    """Records by frame, and the events of removals."""

    frames: Mapping[int, Sequence[MaskRecord]]
    events: Sequence[Event] = ()

    @property
    def records(self) -> list[MaskRecord]:
        return [r for _, rows in sorted(self.frames.items()) for r in rows]

    @property
    def removals(self) -> list[Removal]:
        return [
            Removal(Moment(e.frame_index, e.pts_seconds, e.wall_time), e.object_id)
            for e in self.events
            if e.kind == "object_removed" and e.object_id is not None
        ]


def random_walk(seed: int, *, frames: int = 60, wall: bool = False, with_mask: bool = False) -> Walk:
    """Up to five objects that wander; the input has gaps, dropped frames and frames without objects."""
    rng = np.random.default_rng(seed)
    places: dict[int, np.ndarray] = {}
    rows: dict[int, list[MaskRecord]] = {}
    events: list[Event] = []
    next_id, clock, frame = 1, 0.0, 0
    for _ in range(frames):
        frame += int(rng.choice([1, 1, 1, 2, 5]))
        clock += float(rng.choice([0.1, 0.1, 0.1, 0.7, 3.0], p=[0.3, 0.3, 0.3, 0.06, 0.04]))
        at = round(clock, 6)
        for object_id in list(places):
            if rng.random() < 0.02:
                del places[object_id]
                wall_time = BEGAN + timedelta(seconds=at) if wall else None
                events.append(
                    Event(
                        frame, "object_removed", "test", pts_seconds=at, wall_time=wall_time,
                        object_id=object_id,
                    )
                )  # fmt: skip
        if len(places) < 5 and rng.random() < 0.15:
            places[next_id] = rng.uniform(10, 90, 2)
            next_id += 1
        rows[frame] = []
        for object_id, place in places.items():
            place += rng.normal(0, 8, 2)
            np.clip(place, 5, 95, out=place)
            hidden = rng.random() < 0.15
            foot = None if hidden else (float(round(place[0])), float(round(place[1])))
            rows[frame].append(record(frame, object_id, foot, seconds=at, wall=wall, with_mask=with_mask))
    return Walk(rows, events)


def walked_folder(
    root: str,
    stream_id: str,
    walk: Walk,
    options: Mapping[str, Any] | None = None,
    *,
    last: int | None = None,
    rate: float | None = None,
    chunk: int = 17,
) -> None:
    """Commit a walk to an output folder in chunks of some frames, up to frame `last`."""
    store = StreamStore(root, stream_id, options)
    end = max(walk.frames) if last is None else last
    for first in range(0, end + 1, chunk):
        stop = min(end, first + chunk - 1)
        records = [r for f, found in walk.frames.items() if first <= f <= stop for r in found]
        events = [e for e in walk.events if first <= e.frame_index <= stop]
        store.commit(first, stop, tracks_table(records), events_table(events))
    store.write_record({"source": stream_id, "state": "finished", "rate": rate})
