"""Export to GeoJSON (RFC 7946), for tools of geographic information; coordinates are pixels of the frame."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.base.records import MaskRecord
from pipeline.exchange.exported import Count, Stream, mask_in_box, visible
from pipeline.tracks.mask_arrays import outline

Ring = list[tuple[int, int]]


def write_geojson(streams: Iterator[Stream], path: Path, count: Count) -> None:
    """Write a feature per visible object and frame: its mask as (Multi)Polygon, its row as properties.

    y grows downwards, as in pictures. Rings run along the edges of pixels, so that the mask can be had back.
    """
    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for stream in streams:
            for _, rows in stream.reader.frames():
                count.frames += 1
                for r in visible(rows):
                    file.write(("," if count.rows else "") + "\n")
                    json.dump(_feature(stream, r), file, ensure_ascii=False)
                    count.rows += 1
        file.write("]}\n")


def _feature(stream: Stream, r: MaskRecord) -> dict[str, Any]:
    assert r.bbox is not None
    left, top, width, height = r.bbox
    rings = outline(mask_in_box(stream, r))
    polygons = [
        [[[x + left, y + top] for x, y in [*ring, ring[0]]] for ring in polygon]
        for polygon in polygons_of(rings)
    ]
    single = len(polygons) == 1
    return {
        "type": "Feature",
        "geometry": {
            "type": "Polygon" if single else "MultiPolygon",
            "coordinates": polygons[0] if single else polygons,
        },
        "properties": {
            "stream_id": stream.stream_id,
            "object_id": r.object_id,
            "frame_index": r.frame_index,
            "pts_seconds": r.pts_seconds,
            "wall_time": None if r.wall_time is None else r.wall_time.isoformat(),
            "category": r.category,
            "score": r.score,
            "presence": r.presence,
            "area": r.area,
            "bbox": [left, top, width, height],
            "frame_width": r.frame_width,
            "frame_height": r.frame_height,
        },
    }


def polygons_of(rings: Sequence[Ring]) -> list[list[Ring]]:
    """Rings of `outline` as polygons: an outer ring, then those of its holes."""
    outer = [ring for ring in rings if _doubled_area(ring) > 0]
    polygons = [[ring] for ring in outer]
    by_size = sorted(range(len(outer)), key=lambda i: _doubled_area(outer[i]))
    for hole in rings:
        if _doubled_area(hole) > 0:
            continue
        # A pixel of the mask beside the hole: the smallest outer ring around it is that of the hole.
        (x0, y0), (x1, y1) = hole[0], hole[1]
        right = int(np.sign(x1 - x0)), int(np.sign(y1 - y0))
        point = (x0 + x1 - right[1]) / 2, (y0 + y1 + right[0]) / 2
        polygons[next(i for i in by_size if _inside(outer[i], *point))].append(hole)
    return polygons


def _doubled_area(ring: Ring) -> int:
    """Twice the area; negative for a ring against the clock in the picture, which is a hole."""
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(ring, [*ring[1:], ring[0]], strict=True))


def _inside(ring: Ring, x: float, y: float) -> bool:
    crossed = False
    for (x0, y0), (_, y1) in zip(ring, [*ring[1:], ring[0]], strict=True):
        if x0 > x and (y0 > y) != (y1 > y):  # edges are vertical or horizontal
            crossed = not crossed
    return crossed
