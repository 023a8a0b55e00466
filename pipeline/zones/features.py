"""Per-row features: share of the mask in a zone, distance from a line, position in metres."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import StoreError
from pipeline.tracks.masks import run_lengths
from pipeline.zones.config import Homography, Line, Zone, ZoneSet
from pipeline.zones.geometry import (
    Floats,
    Point,
    box_share,
    in_polygon,
    position_along,
    raster_down_columns,
    signed_distance,
)
from pipeline.zones.rows import Rows

_KEPT_RASTERS = 64


@dataclass(frozen=True)
class Features:
    """Of N rows; values of rows out of sight mean nothing.

    Args:
        inside: for each zone, whether each row is in it.
        lines: for each line, the signed distance of each row and its position along the line.
        foot: x and y of each row's foot point.
        ground: X and Y in metres, NaN where the homography maps to infinity; None without one.
    """

    inside: list[list[bool]]
    lines: list[tuple[list[float], list[float]]]
    foot: tuple[list[float], list[float]]
    ground: tuple[list[float], list[float]] | None


class Measurer:
    """Computes the features of rows of one stream.

    Args:
        zones: entries for the stream.
    """

    def __init__(self, zones: ZoneSet) -> None:
        self._zones = zones
        self._rasters: dict[tuple[str, int, int], NDArray[np.int64]] = {}

    def __call__(self, rows: Rows) -> Features:
        """The features of rows. StoreError for a mask that is damaged."""
        foot = rows.box[:, 0] + rows.box[:, 2] / 2, rows.box[:, 1] + rows.box[:, 3]
        centroid = rows.centroid[:, 0] + 0.5, rows.centroid[:, 1] + 0.5
        points = {"foot": foot, "centroid": centroid}
        inside = [self._inside(zone, rows, points).tolist() for zone in self._zones.zones]
        lines = []
        for line in self._zones.lines:
            distance, along = _line_features(line, rows, *points[line.part])
            lines.append((distance.tolist(), along.tolist()))
        ground = None
        for homography in self._zones.homographies[:1]:
            x, y = on_ground(homography, *foot)
            ground = x.tolist(), y.tolist()
        return Features(inside, lines, (foot[0].tolist(), foot[1].tolist()), ground)

    def _inside(self, zone: Zone, rows: Rows, points: dict[str, tuple[Floats, Floats]]) -> NDArray[np.bool_]:
        result = np.zeros(len(rows), np.bool_)
        for (height, width), chosen in _by_size(rows):
            polygon = scaled(zone.polygon, zone.units, height, width)
            if zone.part in points:
                x, y = points[zone.part]
                result[chosen] = in_polygon(x[chosen], y[chosen], polygon)
            elif zone.part == "box":
                for k in chosen.tolist():
                    if rows.visible[k]:
                        x0, y0, w, h = rows.box[k].tolist()
                        result[k] = box_share(polygon, (x0, y0, w, h)) >= zone.least_share
            else:
                counts = self._raster(zone, polygon, height, width)
                for k in chosen.tolist():
                    if rows.visible[k]:
                        result[k] = _mask_share(rows, k, counts, height, width) >= zone.least_share
        return result & rows.visible

    def _raster(self, zone: Zone, polygon: Sequence[Point], height: int, width: int) -> NDArray[np.int64]:
        key = zone.name, height, width
        found = self._rasters.get(key)
        if found is None:
            while len(self._rasters) >= _KEPT_RASTERS:
                del self._rasters[next(iter(self._rasters))]
            found = self._rasters[key] = raster_down_columns(polygon, height, width)
        return found


def scaled(points: Sequence[Point], units: str, height: int, width: int) -> tuple[Point, ...]:
    """Points of a zone or line in pixels of a frame."""
    if units == "pixels":
        return tuple(points)
    return tuple((x * width, y * height) for x, y in points)


def on_ground(homography: Homography, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Positions in metres of points in pixels; NaN for points on the horizon."""
    (a, b, c), (d, e, f), (g, h, i) = homography.matrix
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = g * x + h * y + i
        scale = np.where(scale == 0, np.nan, scale)
        return (a * x + b * y + c) / scale, (d * x + e * y + f) / scale


def _line_features(line: Line, rows: Rows, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    distance, along = np.zeros(len(rows)), np.zeros(len(rows))
    for (height, width), chosen in _by_size(rows):
        start, end = scaled((line.start, line.end), line.units, height, width)
        distance[chosen] = signed_distance(x[chosen], y[chosen], start, end)
        along[chosen] = position_along(x[chosen], y[chosen], start, end)
    return distance, along


def _by_size(rows: Rows) -> list[tuple[tuple[int, int], NDArray[np.int64]]]:
    """The rows of each frame size: ((height, width), positions)."""
    if not len(rows):
        return []
    first = rows.size[0]
    if bool((rows.size == first).all()):
        return [((int(first[0]), int(first[1])), np.arange(len(rows)))]
    sizes, which = np.unique(rows.size, axis=0, return_inverse=True)
    return [
        ((int(size[0]), int(size[1])), np.flatnonzero(which.reshape(-1) == k)) for k, size in enumerate(sizes)
    ]


def _mask_share(rows: Rows, k: int, counts: NDArray[np.int64], height: int, width: int) -> float:
    mask = None if rows.masks is None else rows.masks[k]
    if mask is None:
        return 0.0
    try:
        ends = np.cumsum(run_lengths(mask, height, width))
    except ValueError as error:
        frame, object_id = rows.moments[k].frame_index, rows.object_ids[k]
        raise StoreError(f"mask of object {object_id} on frame {frame} is damaged: {error}") from error
    stops = ends[1::2]
    starts = ends[0::2][: len(stops)]
    area = int((stops - starts).sum())
    return int((counts[stops] - counts[starts]).sum()) / area if area else 0.0
