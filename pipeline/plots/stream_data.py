"""Rows of one stream in columns, thinned if there are many, as the figures need them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.analytics.query import query
from pipeline.analytics.zones import query_zones
from pipeline.base.errors import StoreError, UsageError
from pipeline.tracks.masks import rle_to_mask
from pipeline.tracks.reader import chosen_stream
from pipeline.zones.config import ZoneSet

Clock = Literal["wall", "seconds", "frames"]

MAX_ROWS = 1_000_000
"""Streams with more rows are thinned: every k-th frame is used."""
MAX_MASKS = 2_000
"""Masks that a heat map is made of, at most about so many."""
_PERIODS = 100
"""Periods into which the occupancy of zones is divided, at most."""


@dataclass(frozen=True)
class ObjectData:
    """The rows of one object, by ascending frame.

    Args:
        frames: (N,) frame_index.
        visible: (N,) whether the object was in sight.
        area: (N,) pixels of the frame; 0 if out of sight.
        foot: (N, 2) middle of the box's lower edge in pixels (x, y); NaN if out of sight.
        score, presence: (N,) as in the rows; NaN if there is none.
    """

    object_id: int
    category: str | None
    frames: NDArray[np.int64]
    visible: NDArray[np.bool_]
    area: NDArray[np.float64]
    foot: NDArray[np.float64]
    score: NDArray[np.float64]
    presence: NDArray[np.float64]

    @property
    def label(self) -> str:
        """Id and category."""
        return f"{self.object_id} {self.category}" if self.category else str(self.object_id)

    def spans(self, every: int = 1) -> list[tuple[int, int]]:
        """First and last frame of each stretch in which the object was in sight.

        Args:
            every: only each so-manieth frame is there.
        """
        seen = self.frames[self.visible]
        if not seen.size:
            return []
        ends = np.flatnonzero(np.diff(seen) > every)
        firsts, lasts = np.concatenate([[0], ends + 1]), np.concatenate([ends, [seen.size - 1]])
        return [(int(seen[a]), int(seen[b])) for a, b in zip(firsts, lasts, strict=True)]


@dataclass(frozen=True)
class StreamData:
    """What the figures show of one stream.

    Args:
        first, last: range of frame_index.
        every: only each so-manieth frame was read.
        size: (height, width) of most rows' frames; coordinates of other rows are scaled to it.
        objects: by first frame in sight.
        frames, counts: (N,) committed frames, and the number of visible objects on each.
        clock: what the axis of time shows. known: (N,) frames with a time, and their times: seconds, or
            seconds since 1970 for "wall".
        events, gaps: rows of the views of these names.
        facts: the stream's row of the view `streams`.
    """

    stream_id: str
    first: int
    last: int
    every: int
    size: tuple[int, int] | None
    objects: tuple[ObjectData, ...]
    frames: NDArray[np.int64]
    counts: NDArray[np.int64]
    clock: Clock
    known: tuple[NDArray[np.float64], NDArray[np.float64]]
    events: list[dict[str, Any]]
    gaps: list[dict[str, Any]]
    facts: dict[str, Any]

    def times(self, frames: Any) -> NDArray[np.float64]:
        """Frames to values of the clock; between frames with known times by interpolation."""
        at = np.asarray(frames, float)
        if self.clock == "frames":
            return at
        known, times = self.known
        found: NDArray[np.float64] = np.interp(at, known, times)
        return found

    @cached_property
    def duration(self) -> float | None:
        """Seconds from the first to the last frame; None if frames have no times."""
        if self.clock == "frames":
            return None
        begin, end = self.times([self.first, self.last])
        return float(end - begin)


def load_stream(
    root: str | os.PathLike[str],
    stream_id: str | None = None,
    *,
    first: int = 0,
    last: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> StreamData:
    """Read one stream of an output folder.

    Args:
        stream_id: may be left out if there is one only.
        first, last: range of frame_index; default: all committed frames.

    Raises:
        UsageError: no such stream, or no committed frames in the range. StoreError: files cannot be read.
    """
    name = chosen_stream(root, stream_id, storage_options)

    def ask(sql: str) -> pa.Table:
        return query(root, sql, storage_options)

    here = f"stream_id = '{name.replace(chr(39), 2 * chr(39))}'"
    facts = ask(f"SELECT * FROM streams WHERE {here}").to_pylist()[0]
    if facts["next_frame"] is None:  # a warning has said why
        raise StoreError(
            f"the newest tracks file of stream {name!r} cannot be read: restore it from a copy, or "
            "start this stream over with --restart"
        )
    committed = int(facts["next_frame"])
    end = committed - 1 if last is None else min(last, committed - 1)
    if not 0 <= first <= end:
        asked = f"{first} to {'the end' if last is None else last}"
        raise UsageError(f"no frames {asked} of stream {name!r}: frames 0 to {committed - 1} are committed")
    within = f"{here} AND frame_index BETWEEN {first} AND {end}"
    rows = int(ask(f"SELECT count(*) AS n FROM tracks WHERE {within}")["n"][0].as_py())
    every = 1 + rows // MAX_ROWS
    thinned = within if every == 1 else f"{within} AND frame_index % {every} = 0"
    table = ask(
        "SELECT frame_index, pts_seconds, wall_time, object_id, category, area, frame_width, frame_height, "
        "bbox_x + bbox_w / 2.0 AS foot_x, (bbox_y + bbox_h)::DOUBLE AS foot_y, score, presence "
        f"FROM tracks WHERE {thinned} ORDER BY object_id, frame_index"
    )
    frames = ask(
        f"SELECT frame_index, pts_seconds, visible FROM frames WHERE {thinned} AND NOT lost ORDER BY ALL"
    )
    clock, known = _clock(table, frames)
    size = _usual_size(table)
    return StreamData(
        name,
        first,
        end,
        every,
        size,
        _objects(table, size),
        frames["frame_index"].to_numpy(),
        frames["visible"].to_numpy(),
        clock,
        known,
        ask(f"SELECT * FROM events WHERE {within} ORDER BY frame_index").to_pylist(),
        ask(f"SELECT * FROM gaps WHERE {within} ORDER BY frame_index").to_pylist(),
        facts,
    )


def mask_heat(
    root: str | os.PathLike[str], data: StreamData, storage_options: Mapping[str, Any] | None = None
) -> tuple[NDArray[np.float32], int]:
    """How often each pixel was covered by an object.

    Returns:
        H x W of `data.size`: share of the frames looked at, 0 to 1; and the number of these frames.

    Raises:
        UsageError: a mask is damaged. StoreError: files cannot be read.
    """
    assert data.size is not None, "there are no rows"
    height, width = data.size
    rows = sum(int(o.visible.sum()) for o in data.objects) * data.every
    every = max(1, rows // MAX_MASKS)
    where = (
        f"stream_id = '{data.stream_id.replace(chr(39), 2 * chr(39))}' AND frame_index % {every} = 0 "
        f"AND frame_index BETWEEN {data.first} AND {data.last}"
    )
    table = query(
        root,
        f"SELECT frame_index, mask_rle, frame_height, frame_width FROM tracks WHERE {where} AND area > 0 "
        "ORDER BY frame_index",
        storage_options,
    )
    count = query(root, f"SELECT count(*) AS n FROM frames WHERE {where} AND NOT lost", storage_options)
    looked_at = int(count["n"][0].as_py())
    heat = np.zeros((height, width), np.float32)
    covered, frame = np.zeros((height, width), np.bool_), -1
    for row in table.to_pylist():
        if row["frame_index"] != frame:
            heat += covered
            covered[:], frame = False, row["frame_index"]
        try:
            mask = rle_to_mask(row["mask_rle"], row["frame_height"], row["frame_width"])
        except ValueError as error:
            raise UsageError(f"frame {frame} of {data.stream_id}: a mask is damaged: {error}") from error
        if mask.shape != (height, width):
            resized = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
            mask = np.asarray(resized, np.bool_)
        covered |= mask
    heat += covered
    share: NDArray[np.float32] = heat / np.float32(max(1, looked_at))
    return share, looked_at


def zone_occupancy(
    root: str | os.PathLike[str],
    data: StreamData,
    zones: ZoneSet,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Mean number of objects in each zone over time.

    Returns:
        by zone: (N,) begin of each period on the stream's clock, and (N,) the mean, NaN without input.

    Raises:
        UsageError: frames have no times. StoreError: files cannot be read.
    """
    period = max(1.0, float(round((data.duration or 0.0) / _PERIODS)))
    table = query_zones(
        root,
        zones,
        "SELECT zone, begin_seconds, epoch(begin_time) AS begin_time, mean_objects FROM occupancy "
        "ORDER BY ALL",
        streams=[data.stream_id],
        period_seconds=period,
        storage_options=storage_options,
    )
    lowest, highest = data.times([data.first, data.last])
    found: dict[str, list[tuple[float, float]]] = {zone.name: [] for zone in zones.zones}
    for row in table.to_pylist():
        begin = row["begin_seconds"] if row["begin_seconds"] is not None else row["begin_time"]
        if lowest - period < begin <= highest:
            mean = row["mean_objects"]
            found[row["zone"]].append((float(begin), np.nan if mean is None else float(mean)))
    return {
        name: (np.array([b for b, _ in pairs]), np.array([m for _, m in pairs]))
        for name, pairs in found.items()
    }


def _clock(rows: pa.Table, frames: pa.Table) -> tuple[Clock, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """The best clock that the rows have, and the frames whose time is known."""
    indices = rows["frame_index"].to_numpy()
    if rows.num_rows and rows["wall_time"].null_count == 0:
        micros = rows["wall_time"].cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()
        known, at = np.unique(indices, return_index=True)
        return "wall", (known.astype(float), micros[at] / 1e6)
    if frames.num_rows and frames["pts_seconds"].null_count == 0:
        return "seconds", (frames["frame_index"].to_numpy().astype(float), frames["pts_seconds"].to_numpy())
    return "frames", (np.zeros(0), np.zeros(0))


def _usual_size(rows: pa.Table) -> tuple[int, int] | None:
    if not rows.num_rows:
        return None
    sizes = np.stack([rows["frame_height"].to_numpy(), rows["frame_width"].to_numpy()], 1)
    found, counts = np.unique(sizes, axis=0, return_counts=True)
    height, width = found[counts.argmax()]
    return int(height), int(width)


def _objects(rows: pa.Table, size: tuple[int, int] | None) -> tuple[ObjectData, ...]:
    if size is None:
        return ()
    ids = rows["object_id"].to_numpy()
    starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))
    scale = np.stack([size[1] / rows["frame_width"].to_numpy(), size[0] / rows["frame_height"].to_numpy()], 1)
    foot = np.stack([_floats(rows["foot_x"]), _floats(rows["foot_y"])], 1) * scale
    frames, area = rows["frame_index"].to_numpy(), rows["area"].to_numpy() * scale.prod(1)
    score, presence = _floats(rows["score"]), _floats(rows["presence"])
    objects = []
    for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        part = slice(int(begin), int(end))
        categories = [c for c in rows["category"][part].to_pylist() if c is not None]
        objects.append(
            ObjectData(
                int(ids[begin]),
                categories[-1] if categories else None,
                frames[part],
                area[part] > 0,
                area[part],
                foot[part],
                score[part],
                presence[part],
            )
        )
    return tuple(sorted(objects, key=lambda o: (o.frames[o.visible][:1].tolist() or [2**62], o.object_id)))


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    values: NDArray[np.float64] = column.cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values
