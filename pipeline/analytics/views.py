"""Views derived from `tracks` and `events`: `objects`, `frames`, `files` and `gaps`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Set
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.analytics.scan.chunk_files import check_chunk_file, check_columns, open_chunk_file
from pipeline.analytics.scan.dataset import ChunkDataset
from pipeline.analytics.scan.listing import Chunk, Listing
from pipeline.base.errors import StoreError
from pipeline.base.records import TRACKS_SCHEMA
from pipeline.tracks.layout import chunk_name, load_record

FRAMES_SCHEMA = pa.schema(
    [
        pa.field("frame_index", pa.int64(), nullable=False),
        pa.field("pts_seconds", pa.float64()),
        pa.field("pts_estimated", pa.bool_(), nullable=False),
        pa.field("wall_time", pa.timestamp("us", tz="UTC")),
        pa.field("objects", pa.int64(), nullable=False),
        pa.field("visible", pa.int64(), nullable=False),
        pa.field("lost", pa.bool_(), nullable=False),
    ]
)
FILES_SCHEMA = pa.schema(
    [
        pa.field("file", pa.string(), nullable=False),
        pa.field("first_frame", pa.int64(), nullable=False),
        pa.field("last_frame", pa.int64()),
        pa.field("rows", pa.int64()),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("problem", pa.string()),
    ]
)

# Without rows of frames on which an object is out of sight, and without steps over such frames or over gaps:
# an object that comes back elsewhere has not gone there in a straight line.
OBJECTS_SQL = """
CREATE VIEW objects AS
WITH steps AS (
    SELECT *,
           frame_index - lag(frame_index) OVER sight AS step,
           sqrt(pow(centroid_x - lag(centroid_x) OVER sight, 2)
                + pow(centroid_y - lag(centroid_y) OVER sight, 2)) AS distance
    FROM (SELECT stream_id, object_id, frame_index, pts_seconds, wall_time, category, area, score, presence,
                 centroid_x::DOUBLE AS centroid_x, centroid_y::DOUBLE AS centroid_y FROM tracks)
    WINDOW sight AS (PARTITION BY stream_id, object_id, area > 0 ORDER BY frame_index)
)
SELECT stream_id, object_id,
       max(category) AS category,
       min(frame_index) FILTER (WHERE area > 0) AS first_frame,
       max(frame_index) FILTER (WHERE area > 0) AS last_frame,
       min(pts_seconds) FILTER (WHERE area > 0) AS first_seen,
       max(pts_seconds) FILTER (WHERE area > 0) AS last_seen,
       min(wall_time) FILTER (WHERE area > 0) AS first_wall_time,
       max(wall_time) FILTER (WHERE area > 0) AS last_wall_time,
       count(*) AS frames_tracked,
       count(*) FILTER (WHERE area > 0) AS frames_visible,
       coalesce(max(step - 1) FILTER (WHERE area > 0), 0) AS longest_gap,
       avg(area) FILTER (WHERE area > 0) AS mean_area,
       max(area) AS largest_area,
       coalesce(sum(distance) FILTER (WHERE area > 0 AND step = 1), 0) AS path_length,
       avg(score) FILTER (WHERE area > 0) AS mean_score,
       avg(presence) FILTER (WHERE area > 0) AS mean_presence
FROM steps GROUP BY stream_id, object_id
"""

GAPS_SQL = """
CREATE VIEW gaps AS
SELECT stream_id, frame_index, pts_seconds, wall_time, kind, reason,
       CASE WHEN kind IN ('dropped', 'corrupt') THEN count ELSE 0 END AS frames_lost,
       TRY_CAST(detail->>'$.seconds' AS DOUBLE) AS seconds
FROM events WHERE kind IN ('dropped', 'corrupt', 'gap', 'reconnect', 'restart')
"""


class FrameDataset(ChunkDataset):
    """A row for every committed frame, also for those without objects, which have no rows in `tracks`."""

    reads_copies = False

    def __init__(self, listing: Listing) -> None:
        super().__init__(listing, "tracks", FRAMES_SCHEMA)
        self._rates: dict[str, float | None] = {}

    def _read(
        self, chunk: Chunk, schema: pa.Schema, condition: pc.Expression | None, fields: Set[str]
    ) -> Iterator[Any]:
        with self._reporting(chunk):
            file = open_chunk_file(self._files, "tracks", chunk)
            check_chunk_file(file.metadata, "tracks", chunk, self._files)
            check_columns(file.names, TRACKS_SCHEMA)
            names = [n for n in ("frame_index", "pts_seconds", "wall_time", "area") if n in schema.names]
            rows = file.read(sorted({"frame_index", "area", *names}))
        meta = file.metadata.metadata
        first, last = int(meta[b"xmem.first"]), int(meta[b"xmem.last"])
        frames = np.arange(first, last + 1)
        position = rows["frame_index"].to_numpy() - first
        objects = np.bincount(position, minlength=len(frames))
        visible = np.bincount(position[rows["area"].to_numpy() > 0], minlength=len(frames))
        columns: dict[str, Any] = {"frame_index": frames, "objects": objects, "visible": visible}
        columns["lost"] = _lost(json.loads(meta[b"xmem.events"]), first, objects)
        if "pts_seconds" in schema.names or "pts_estimated" in schema.names:
            pts = np.full(len(frames), np.nan)
            if "pts_seconds" in rows.column_names:
                pts[position] = rows["pts_seconds"].to_numpy()
            columns["pts_estimated"] = np.isnan(pts)
            columns["pts_seconds"] = pa.array(self._filled(chunk.stream_id, frames, pts), from_pandas=True)
        if "wall_time" in schema.names:
            # Each frame's time is that of its first row; frames without rows have none.
            starts = np.searchsorted(position, np.arange(len(frames)))
            taken = pa.array(np.minimum(starts, max(0, len(position) - 1)), mask=objects == 0)
            times = rows["wall_time"].combine_chunks()
            columns["wall_time"] = times.take(taken) if len(position) else pa.nulls(len(frames), times.type)
        columns["stream_id"] = pa.repeat(chunk.stream_id, len(frames))
        arrays = [pa.array(columns[f.name], f.type) for f in schema]
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)

    def _filled(
        self, stream_id: str, frames: NDArray[np.int64], pts: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Times with estimates for frames without rows, of what the frame's own file and the record say.

        So a frame has the same time, whatever else a statement reads.
        """
        known = np.flatnonzero(~np.isnan(pts))
        if len(known) == len(pts):
            return pts
        rate = self._rate(stream_id)
        if not len(known):
            return frames / rate if rate else pts
        filled = np.interp(frames, frames[known], pts[known])
        low, high = known[0], known[-1]
        step = 1 / rate if rate else np.nan
        if high > low:
            step = (pts[high] - pts[low]) / (high - low)
        filled[:low] = pts[low] - step * np.arange(low, 0, -1)
        filled[high + 1 :] = pts[high] + step * np.arange(1, len(pts) - high)
        return filled

    def _rate(self, stream_id: str) -> float | None:
        if stream_id not in self._rates:
            try:
                rate = (load_record(self._files, stream_id) or {}).get("rate")
            except StoreError:
                rate = None
            good = isinstance(rate, (int, float)) and rate > 0
            self._rates[stream_id] = float(rate) if good and rate is not None else None
        return self._rates[stream_id]


class FileDataset(ChunkDataset):
    """A row for every tracks file, which says what is wrong with it instead of failing."""

    reads_copies = False

    def __init__(self, listing: Listing) -> None:
        super().__init__(listing, "tracks", FILES_SCHEMA)
        self._strict = False

    def _read(
        self, chunk: Chunk, schema: pa.Schema, condition: pc.Expression | None, fields: Set[str]
    ) -> Iterator[Any]:
        row: dict[str, Any] = {"stream_id": chunk.stream_id, "bytes": chunk.size, "first_frame": chunk.first}
        row["file"] = chunk_name("tracks", chunk.stream_id, chunk.first)
        try:
            with self._reporting(chunk):
                file = open_chunk_file(self._files, "tracks", chunk)
                row["rows"] = file.metadata.num_rows
                last = (file.metadata.metadata or {}).get(b"xmem.last", b"")
                row["last_frame"] = int(last) if last.isdigit() else None
                check_chunk_file(file.metadata, "tracks", chunk, self._files)
                check_columns(file.names, TRACKS_SCHEMA)
            if chunk.is_first:
                self._listing.check_begins([chunk])
        except StoreError as error:
            # Relative, as `file`, and without that name: tables cut long texts.
            problem = str(error).replace(self._files.uri("x").removesuffix("x"), "")
            row["problem"] = problem.removeprefix(f"{row['file']} ")
        yield pa.RecordBatch.from_pylist([row], schema=schema)


def _lost(events: list[dict[str, Any]], first: int, objects: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which frames of a live stream were dropped or corrupt: they have numbers, and no rows."""
    lost = np.zeros(len(objects), np.bool_)
    left: dict[int, int] = {}
    for event in events:
        if event["kind"] in ("dropped", "corrupt") and event["wall_time"] is not None:
            left[event["frame_index"]] = left.get(event["frame_index"], 0) + event["count"]
    for frame, count in left.items():
        # The event is at the next frame that was delivered, or at the frame itself if that was dropped later.
        at = min(frame - first, len(objects) - 1)
        while count > 0 and at >= 0:
            if not objects[at]:
                lost[at] = True
                count -= 1
            elif at < frame - first:
                break
            at -= 1
    return lost
