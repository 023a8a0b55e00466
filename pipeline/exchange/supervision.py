"""Export for Roboflow's supervision: CSV files as its `CSVSink` writes them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from pipeline.exchange.exported import NO_CATEGORY, Categories, Count, Stream, visible

# The columns of CSVSink; the others are in its custom data, which it sorts.
_COLUMNS = (
    "x_min", "y_min", "x_max", "y_max", "class_id", "confidence", "tracker_id",
    "class_name", "frame_height", "frame_index", "frame_width", "mask_rle", "pts_seconds",
)  # fmt: skip


def write_supervision(streams: Iterator[Stream], path: Path, count: Count) -> None:
    """Write a CSV per stream, a row per visible object and frame. Classes count from 0 in all of them.

    `mask_rle` are COCO compressed counts of a mask of frame_height x frame_width.
    """
    categories = Categories()
    path.mkdir()
    for stream in streams:
        with (path / f"{stream.stream_id}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            for frame, rows in stream.reader.frames():
                count.frames += 1
                for r in visible(rows):
                    count.rows += 1
                    x, y, width, height = map(float, r.bbox or ())
                    writer.writerow(
                        [
                            x, y, x + width, y + height,
                            categories.number(r.category) - 1, r.score, r.object_id,
                            r.category or NO_CATEGORY, r.frame_height, frame, r.frame_width, r.mask_rle,
                            r.pts_seconds,
                        ]
                    )  # fmt: skip
