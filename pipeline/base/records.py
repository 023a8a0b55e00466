"""Data classes of the pipeline (frames, chunks, events) and the Arrow schemas of stored tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

TRACKS_SCHEMA = pa.schema(
    [
        pa.field("frame_index", pa.int64(), nullable=False),
        pa.field("pts_seconds", pa.float64()),
        pa.field("wall_time", pa.timestamp("us", tz="UTC")),
        pa.field("object_id", pa.int32(), nullable=False),
        pa.field("category", pa.dictionary(pa.int32(), pa.string())),
        pa.field("frame_height", pa.int32(), nullable=False),
        pa.field("frame_width", pa.int32(), nullable=False),
        pa.field("area", pa.int64(), nullable=False),
        pa.field("bbox_x", pa.int32()),
        pa.field("bbox_y", pa.int32()),
        pa.field("bbox_w", pa.int32()),
        pa.field("bbox_h", pa.int32()),
        pa.field("centroid_x", pa.float32()),
        pa.field("centroid_y", pa.float32()),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("presence", pa.float32()),
        pa.field("mask_rle", pa.string()),
    ]
)

EVENTS_SCHEMA = pa.schema(
    [
        pa.field("frame_index", pa.int64(), nullable=False),
        pa.field("pts_seconds", pa.float64()),
        pa.field("wall_time", pa.timestamp("us", tz="UTC")),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("count", pa.int64(), nullable=False),
        pa.field("object_id", pa.int32()),
        pa.field("detail", pa.string()),
    ]
)

EVENT_KINDS = frozenset(
    {
        "object_added",
        "object_removed",
        "corrected",
        "dropped",
        "corrupt",
        "gap",
        "reconnect",
        "restart",
        "resized",
        "clock",
        "zone_entered",
        "zone_left",
        "line_crossed",
        "near_began",
        "near_ended",
        "zones_changed",
        "memory_edited",
    }
)


@dataclass(frozen=True, slots=True)
class Event:
    """An event of a stream at a frame: an object was added, input was lost, the size changed.

    `frame_index` is the frame that was about to be delivered; `detail` is stored as JSON.
    """

    frame_index: int
    kind: str
    reason: str | None = None
    count: int = 1
    pts_seconds: float | None = None
    wall_time: datetime | None = None
    object_id: int | None = None
    detail: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.kind not in EVENT_KINDS:
            raise ValueError(f"event kind {self.kind!r} is not one of {', '.join(sorted(EVENT_KINDS))}")


@dataclass(frozen=True, slots=True)
class Frame:
    """One decoded image.

    Args:
        image: H x W x 3 uint8, RGB, upright (rotation metadata applied).
        frame_index: number of frames before this one, decoding from the start.
        pts_seconds: presentation time of the container, unshifted; None if it has none.
        wall_time: UTC capture time for live streams, otherwise None.
        losses: losses of the source between the previous frame and this one.
    """

    image: NDArray[np.uint8]
    frame_index: int
    pts_seconds: float | None
    wall_time: datetime | None = None
    losses: tuple[Event, ...] = field(default=())

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return int(self.image.shape[0]), int(self.image.shape[1])

    @property
    def picture(self) -> Any:
        """The image for the tracker: `image`, or a tensor of it on the device that decoded it."""
        return self.image

    def renumbered(self, frame_index: int, pts_seconds: float | None, losses: tuple[Event, ...]) -> Frame:
        """The frame with another number, time and losses."""
        return replace(self, frame_index=frame_index, pts_seconds=pts_seconds, losses=losses)

    def __repr__(self) -> str:
        height, width = self.size
        return f"Frame({self.frame_index}, {width}x{height}, pts_seconds={self.pts_seconds})"


@dataclass(frozen=True, slots=True)
class FrameChunk:
    """Frames `first`..`last` (inclusive) of one stream: the unit of transfer, commit and retry."""

    stream_id: str
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last:
            chunk = f"chunk {self.first}..{self.last} of {self.stream_id!r}"
            raise ValueError(f"{chunk}: must be 0 <= first <= last")


@dataclass(frozen=True, slots=True)
class MaskRecord:
    """One object on one frame, in pixels of the source frame; box and centroid are None if it is not visible.

    score: mean probability inside the mask. presence: probability that the mask is on its object; None if the
    model's weights have no presence head. Both are 0 if the object is not visible.
    """

    frame_index: int
    object_id: int
    frame_height: int
    frame_width: int
    area: int
    score: float
    presence: float | None = None
    pts_seconds: float | None = None
    wall_time: datetime | None = None
    category: str | None = None
    bbox: tuple[int, int, int, int] | None = None
    centroid: tuple[float, float] | None = None
    mask_rle: str | None = None


def tracks_table(records: Iterable[MaskRecord]) -> pa.Table:
    """Mask records as a table of `TRACKS_SCHEMA`, sorted by frame_index, then object_id."""
    rows = sorted(records, key=lambda r: (r.frame_index, r.object_id))
    boxes = [r.bbox or (None, None, None, None) for r in rows]
    centroids = [r.centroid or (None, None) for r in rows]
    columns: dict[str, list[Any]] = {
        "frame_index": [r.frame_index for r in rows],
        "pts_seconds": [r.pts_seconds for r in rows],
        "wall_time": [r.wall_time for r in rows],
        "object_id": [r.object_id for r in rows],
        "category": [r.category for r in rows],
        "frame_height": [r.frame_height for r in rows],
        "frame_width": [r.frame_width for r in rows],
        "area": [r.area for r in rows],
        **{f"bbox_{n}": [b[i] for b in boxes] for i, n in enumerate("xywh")},
        **{f"centroid_{n}": [c[i] for c in centroids] for i, n in enumerate("xy")},
        "score": [r.score for r in rows],
        "presence": [r.presence for r in rows],
        "mask_rle": [r.mask_rle for r in rows],
    }
    return pa.table([pa.array(columns[f.name], type=f.type) for f in TRACKS_SCHEMA], schema=TRACKS_SCHEMA)


def events_table(events: Iterable[Event]) -> pa.Table:
    """Events as a table of `EVENTS_SCHEMA`, in the order given."""
    rows = list(events)
    details = [None if e.detail is None else json.dumps(e.detail, sort_keys=True) for e in rows]
    columns: dict[str, list[Any]] = {
        name: [getattr(e, name) for e in rows] for name in EVENTS_SCHEMA.names if name != "detail"
    }
    columns["detail"] = details
    return pa.table([pa.array(columns[f.name], type=f.type) for f in EVENTS_SCHEMA], schema=EVENTS_SCHEMA)
