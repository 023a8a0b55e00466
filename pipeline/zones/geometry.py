"""Plane geometry of zones and lines, over arrays of points.

Coordinates are those of the picture's pixel edges: x from 0 to the width, y downwards from 0 to the height,
so the centre of the first pixel is (0.5, 0.5). All array functions work element by element: a point's result
does not depend on which other points are computed with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Point = tuple[float, float]
Floats = NDArray[np.float64]


def in_polygon(x: Floats, y: Floats, polygon: Sequence[Point]) -> NDArray[np.bool_]:
    """Whether each point (x, y) lies in a polygon, its outline included."""
    inside = np.zeros(x.shape, np.bool_)
    on_edge = np.zeros(x.shape, np.bool_)
    for (ax, ay), (bx, by) in zip(polygon, (*polygon[1:], polygon[0]), strict=True):
        # Twice the area of the triangle of edge and point: 0 on the edge's line.
        turn = (bx - ax) * (y - ay) - (by - ay) * (x - ax)
        spans = (ay > y) != (by > y)
        inside ^= spans & ((turn > 0) == (by > ay)) & (turn != 0)
        within = (x >= min(ax, bx)) & (x <= max(ax, bx)) & (y >= min(ay, by)) & (y <= max(ay, by))
        on_edge |= (turn == 0) & within
    return inside | on_edge


def signed_distance(x: Floats, y: Floats, start: Point, end: Point) -> Floats:
    """Distance of each point from the infinite line through two points, in pixels.

    Positive on the right-hand side for somebody who goes from `start` to `end` in the picture.
    """
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = float(np.hypot(dx, dy))
    result: Floats = (dx * (y - start[1]) - dy * (x - start[0])) / length
    return result


def position_along(x: Floats, y: Floats, start: Point, end: Point) -> Floats:
    """Where each point's foot of the perpendicular lies on a segment: 0 at `start`, 1 at `end`."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    result: Floats = (dx * (x - start[0]) + dy * (y - start[1])) / (dx * dx + dy * dy)
    return result


def polygon_area(polygon: Sequence[Point]) -> float:
    """Area of a polygon that does not cross itself, in square pixels."""
    total = 0.0
    for (ax, ay), (bx, by) in zip(polygon, (*polygon[1:], polygon[0]), strict=True):
        total += ax * by - bx * ay
    return abs(total) / 2


def box_share(polygon: Sequence[Point], box: tuple[float, float, float, float]) -> float:
    """Share of a box (x, y, width, height) that a polygon covers."""
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return 0.0
    clipped: list[Point] = list(polygon)
    for axis, bound, keeps_less in (
        (0, x, False),
        (0, x + width, True),
        (1, y, False),
        (1, y + height, True),
    ):
        clipped = _clip(clipped, axis, bound, keeps_less)
        if not clipped:
            return 0.0
    return polygon_area(clipped) / (width * height)


def _clip(polygon: list[Point], axis: int, bound: float, keeps_less: bool) -> list[Point]:
    """The part of a polygon on one side of a vertical (axis 0) or horizontal (axis 1) line."""

    def kept(point: Point) -> bool:
        return point[axis] <= bound if keeps_less else point[axis] >= bound

    result: list[Point] = []
    for before, point in zip((polygon[-1], *polygon[:-1]), polygon, strict=True):
        if kept(before) != kept(point):
            part = (bound - before[axis]) / (point[axis] - before[axis])
            other = before[1 - axis] + part * (point[1 - axis] - before[1 - axis])
            result.append((bound, other) if axis == 0 else (other, bound))
        if kept(point):
            result.append(point)
    return result


def raster_down_columns(polygon: Sequence[Point], height: int, width: int) -> NDArray[np.int64]:
    """How many pixels of a polygon come before each position, counted down the columns as in COCO.

    A pixel belongs to the polygon if its centre does.

    Returns:
        height * width + 1 counts: a run of pixels `start`..`end` (exclusive) of a mask has
        `counts[end] - counts[start]` pixels in the polygon.
    """
    counts = np.zeros(height * width + 1, np.int64)
    xs = [p[0] for p in polygon]
    first, last = max(0, int(min(xs)) - 1), min(width, int(max(xs)) + 2)
    if first < last:
        columns = np.repeat(np.arange(first, last, dtype=np.float64) + 0.5, height)
        rows = np.tile(np.arange(height, dtype=np.float64) + 0.5, last - first)
        inside = in_polygon(columns, rows, polygon)
        counts[first * height + 1 : last * height + 1] = inside
    return np.cumsum(counts)


def crossing_edges(polygon: Sequence[Point]) -> tuple[int, int] | None:
    """Two edges of a polygon that touch or cross where they should not; None if it does not cross itself.

    Edge k goes from corner k to the next one; corners count from 0.
    """
    count = len(polygon)
    edges = [(polygon[k], polygon[(k + 1) % count]) for k in range(count)]
    for i in range(count):
        for j in range(i + 1, count):
            neighbours = j == i + 1 or (i == 0 and j == count - 1)
            if neighbours:
                shared = edges[j][0] if j == i + 1 else edges[i][0]
                ends = [p for p in (*edges[i], *edges[j]) if p != shared]
                if len(ends) < 2 or _folded_back(shared, ends[0], ends[1]):
                    return i, j
            elif _touch(edges[i], edges[j]):
                return i, j
    return None


def _turn(a: Point, b: Point, c: Point) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _folded_back(corner: Point, a: Point, b: Point) -> bool:
    along = (a[0] - corner[0]) * (b[0] - corner[0]) + (a[1] - corner[1]) * (b[1] - corner[1])
    return _turn(corner, a, b) == 0 and along > 0


def _touch(one: tuple[Point, Point], other: tuple[Point, Point]) -> bool:
    def sign(value: float) -> int:
        return (value > 0) - (value < 0)

    def on(a: Point, b: Point, p: Point) -> bool:
        return (
            _turn(a, b, p) == 0
            and min(a[0], b[0]) <= p[0] <= max(a[0], b[0])
            and min(a[1], b[1]) <= p[1] <= max(a[1], b[1])
        )

    (a, b), (c, d) = one, other
    if sign(_turn(a, b, c)) * sign(_turn(a, b, d)) < 0 and sign(_turn(c, d, a)) * sign(_turn(c, d, b)) < 0:
        return True
    return on(a, b, c) or on(a, b, d) or on(c, d, a) or on(c, d, b)
