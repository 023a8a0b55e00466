"""Rows: mask records in columns, the input of the zone engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.base.records import MaskRecord

COLUMNS = (
    "frame_index", "pts_seconds", "wall_time", "object_id", "category", "frame_height", "frame_width", "area",
    "bbox_x", "bbox_y", "bbox_w", "bbox_h", "centroid_x", "centroid_y",
)  # fmt: skip
"""Columns of `tracks` that zones need; those with the part "mask" need `mask_rle` too."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Moment:
    """A frame and its times."""

    frame_index: int
    pts_seconds: float | None = None
    wall_time: datetime | None = None

    def seconds(self, frame_rate: float | None) -> float | None:
        """On a clock for differences: wall time, else pts, else by the frame rate; None without any."""
        if self.wall_time is not None:
            since = self.wall_time - _EPOCH
            return (since.days * 86_400_000_000 + since.seconds * 1_000_000 + since.microseconds) / 1e6
        if self.pts_seconds is not None:
            return self.pts_seconds
        return None if frame_rate is None else self.frame_index / frame_rate


@dataclass(frozen=True)
class Rows:
    """Mask records of whole frames, sorted by frame, then object; all arrays have one element a row.

    Args:
        moments: the frame of each row.
        object_ids, categories: of each row.
        size: N x 2, height and width of the frame.
        visible: whether the object is in sight.
        box: N x 4, x, y, width and height in pixels; 0 where out of sight.
        centroid: N x 2, in coordinates of pixel centres as stored; 0 where out of sight.
        area: pixels.
        masks: compressed counts; None where they are not needed.
    """

    moments: Sequence[Moment]
    object_ids: Sequence[int]
    categories: Sequence[str | None]
    size: NDArray[np.float64]
    visible: NDArray[np.bool_]
    box: NDArray[np.float64]
    centroid: NDArray[np.float64]
    area: NDArray[np.int64]
    masks: Sequence[str | None] | None = None

    def __len__(self) -> int:
        return len(self.object_ids)

    @classmethod
    def from_table(cls, table: pa.Table) -> Rows:
        """From a table with `COLUMNS`, and `mask_rle` where masks are needed."""

        def numbers(name: str) -> NDArray[np.float64]:
            column = table[name].cast(pa.float64()).combine_chunks()
            return np.asarray(column.fill_null(0.0).to_numpy(zero_copy_only=False), np.float64)

        frames = table["frame_index"].to_pylist()
        pts, walls = table["pts_seconds"].to_pylist(), table["wall_time"].to_pylist()
        moments = [Moment(f, p, w) for f, p, w in zip(frames, pts, walls, strict=True)]
        area = np.asarray(table["area"].to_numpy(), np.int64)
        located = table["bbox_x"].is_valid().to_numpy() & table["centroid_x"].is_valid().to_numpy()
        return cls(
            moments,
            table["object_id"].to_pylist(),
            table["category"].cast(pa.string()).to_pylist(),
            np.stack([numbers("frame_height"), numbers("frame_width")], 1),
            (area > 0) & located,
            np.stack([numbers(f"bbox_{n}") for n in "xywh"], 1),
            np.stack([numbers(f"centroid_{n}") for n in "xy"], 1),
            area,
            table["mask_rle"].to_pylist() if "mask_rle" in table.column_names else None,
        )

    @classmethod
    def from_records(cls, records: Sequence[MaskRecord]) -> Rows:
        """From mask records, sorted here."""
        rows = sorted(records, key=lambda r: (r.frame_index, r.object_id))

        def array(values: list[Any], width: int) -> NDArray[np.float64]:
            return np.array(values, np.float64).reshape(len(rows), width)

        return cls(
            [Moment(r.frame_index, r.pts_seconds, r.wall_time) for r in rows],
            [r.object_id for r in rows],
            [r.category for r in rows],
            array([(r.frame_height, r.frame_width) for r in rows], 2),
            np.array([r.area > 0 and None not in (r.bbox, r.centroid) for r in rows], np.bool_),
            array([r.bbox or (0, 0, 0, 0) for r in rows], 4),
            array([r.centroid or (0, 0) for r in rows], 2),
            np.array([r.area for r in rows], np.int64),
            [r.mask_rle for r in rows],
        )
