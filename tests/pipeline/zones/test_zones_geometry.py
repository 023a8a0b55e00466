"""Geometry of zones against plain references."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.zones.geometry import (
    box_share,
    crossing_edges,
    in_polygon,
    polygon_area,
    position_along,
    raster_down_columns,
    signed_distance,
)

STAR = ((50.0, 5.0), (60.0, 40.0), (95.0, 40.0), (66.0, 60.0), (80.0, 95.0), (50.0, 70.0), (15.0, 90.0))
DENT = ((10.0, 10.0), (90.0, 10.0), (90.0, 90.0), (50.0, 30.0), (10.0, 90.0))


@pytest.mark.parametrize("polygon", [STAR, DENT, DENT[::-1]])
def test_points_in_polygons_as_opencv_has_them(polygon: tuple[tuple[float, float], ...]) -> None:
    ys, xs = np.mgrid[0:101, 0:101].astype(np.float64)
    ours = in_polygon(xs.ravel(), ys.ravel(), polygon)
    contour = np.array(polygon, np.float32)
    theirs = [
        cv2.pointPolygonTest(contour, (x, y), False) >= 0 for x, y in zip(xs.flat, ys.flat, strict=True)
    ]
    assert ours.tolist() == theirs


def test_corners_and_edges_are_inside() -> None:
    x = np.array([10.0, 50.0, 90.0, 50.0, 10.0, 9.999])
    y = np.array([10.0, 10.0, 50.0, 30.0, 50.0, 50.0])
    assert in_polygon(x, y, DENT).tolist() == [True, True, True, True, True, False]


def test_the_right_hand_side_is_positive() -> None:
    x, y = np.array([5.0, 5.0, 5.0]), np.array([13.0, 7.0, 10.0])
    assert signed_distance(x, y, (0, 10), (20, 10)).tolist() == [3.0, -3.0, 0.0]  # y grows downwards
    assert position_along(x, y, (0, 10), (20, 10)).tolist() == [0.25, 0.25, 0.25]


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 90),
    st.integers(0, 90),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([STAR, DENT]),
)
def test_the_share_of_a_box_is_that_of_its_pixels(
    x: int, y: int, w: int, h: int, polygon: tuple[tuple[float, float], ...]
) -> None:
    n = 8  # sub-pixels a side
    sub_y, sub_x = (np.mgrid[0 : h * n, 0 : w * n].astype(np.float64) + 0.5) / n
    share = in_polygon(sub_x.ravel() + x, sub_y.ravel() + y, polygon).mean()
    edge = 2 * (w + h) / (w * h * n)  # what sub-pixels on the outline may be wrong by
    assert abs(box_share(polygon, (x, y, w, h)) - share) <= max(0.02, edge)


def test_rasters_count_down_the_columns() -> None:
    counts = raster_down_columns(STAR, 100, 100)
    ys, xs = np.mgrid[0:100, 0:100] + 0.5
    inside = in_polygon(xs.ravel(), ys.ravel(), STAR).reshape(100, 100)
    assert np.array_equal(np.diff(counts).astype(bool), inside.T.ravel())
    assert abs(int(counts[-1]) - polygon_area(STAR)) < 40
    outside = raster_down_columns(((200.0, 0.0), (210.0, 0.0), (210.0, 10.0)), 100, 100)
    assert outside.tolist() == [0] * 10001


def test_self_crossing() -> None:
    assert crossing_edges(STAR) is None
    assert crossing_edges(DENT) is None
    assert crossing_edges([(0, 0), (10, 10), (10, 0), (0, 10)]) == (0, 2)
    assert crossing_edges([(0, 0), (10, 0), (5, 0), (5, 5)]) == (0, 1)  # folds back
    assert crossing_edges([(0, 0), (10, 0), (10, 10), (5, 0), (0, 10)]) is not None  # a corner on an edge
