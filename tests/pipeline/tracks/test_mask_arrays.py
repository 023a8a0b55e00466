"""Operations on run lengths of many masks, against the same on pixels."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.tracks.mask_arrays import MaskArray, outline
from pipeline.tracks.masks import mask_to_rle
from pipeline.zones.geometry import raster_down_columns

Mask = NDArray[np.bool_]


def masks(random: np.random.Generator, count: int) -> list[Mask]:
    """Random masks of random sizes; some are empty, full, or of blocks."""
    found = []
    for _ in range(count):
        height, width = random.integers(1, 14, size=2).tolist()
        kind = random.integers(6)
        if kind == 0:
            mask = np.zeros((height, width), np.bool_)
        elif kind == 1:
            mask = np.ones((height, width), np.bool_)
        elif kind == 2:
            mask = np.kron(random.random((height, width)) < 0.5, np.ones((3, 2), np.bool_)) > 0
        else:
            mask = random.random((height, width)) < random.random()
        found.append(mask)
    return found


def array(found: list[Mask]) -> MaskArray:
    sizes = np.array([mask.shape for mask in found], np.int64).reshape(-1, 2)
    return MaskArray.from_counts([mask_to_rle(mask).encode() for mask in found], sizes[:, 0], sizes[:, 1])


@pytest.fixture(params=range(12))
def random(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(request.param)


def test_counts_come_back_and_measures_are_those_of_the_pixels(random: np.random.Generator) -> None:
    found = masks(random, 30)
    runs = array(found)
    assert runs.counts() == [mask_to_rle(mask) for mask in found]
    assert runs.areas().tolist() == [mask.sum() for mask in found]
    x, y = runs.centroids()
    for i, mask in enumerate(found):
        np.testing.assert_array_equal(runs.mask(i), mask)
        rows, columns = np.nonzero(mask)
        if len(rows):
            assert (x[i], y[i]) == pytest.approx((columns.mean(), rows.mean()), rel=1e-12)
            left, top, pixels = runs.boxed(i)
            assert (left, top) == (columns.min(), rows.min())
            np.testing.assert_array_equal(pixels, mask[top : rows.max() + 1, left : columns.max() + 1])
        else:
            assert np.isnan(x[i])
            assert runs.boxed(i)[2].size == 0


def test_two_masks(random: np.random.Generator) -> None:
    found = masks(random, 30)
    others = [random.random(mask.shape) < random.random() for mask in found]
    a, b = array(found), array(others)
    assert a.unions(b).counts() == [mask_to_rle(m | n) for m, n in zip(found, others, strict=True)]
    assert a.intersections(b).tolist() == [(m & n).sum() for m, n in zip(found, others, strict=True)]
    expected = [(m & n).sum() / max(1, (m | n).sum()) for m, n in zip(found, others, strict=True)]
    assert a.ious(b).tolist() == expected


def test_points_and_regions(random: np.random.Generator) -> None:
    found = masks(random, 40)
    x, y = random.uniform(-2, 15, size=(2, len(found)))
    x[0], y[1], x[2] = np.nan, np.inf, -0.5
    expected = [
        bool(0 <= px < m.shape[1] and 0 <= py < m.shape[0] and m[int(py), int(px)])
        for px, py, m in zip(x.tolist(), y.tolist(), found, strict=True)
    ]
    assert array(found).contain(x, y).tolist() == expected
    some = [random.random((9, 11)) < 0.6 for _ in range(10)]
    polygon = [(1.0, 0.5), (10.5, 2.0), (7.0, 8.5)]
    region = raster_down_columns(polygon, 9, 11)
    inside = np.diff(region).reshape(11, 9).T > 0
    assert array(some).pixels_in(region).tolist() == [(mask & inside).sum() for mask in some]
    chosen = np.array([3, 0, 3])
    assert array(some).take(chosen).counts() == [mask_to_rle(some[i]) for i in chosen]


def test_crops_have_the_size_of_their_box(random: np.random.Generator) -> None:
    found = masks(random, 30)
    x, y = random.integers(-6, 16, size=(2, len(found)))
    width, height = random.integers(1, 12, size=(2, len(found)))
    crops = array(found).crops(x, y, width, height)
    for i, mask in enumerate(found):
        around = np.pad(mask, 40)
        top, left = y[i] + 40, x[i] + 40
        expected = around[top : top + height[i], left : left + width[i]]
        np.testing.assert_array_equal(crops.mask(i), expected)
        assert crops.counts()[i] == mask_to_rle(expected)


def test_the_rings_of_an_outline_enclose_the_pixels(random: np.random.Generator) -> None:
    for mask in masks(random, 20):
        rows, columns = np.mgrid[: mask.shape[0], : mask.shape[1]] + 0.5
        inside, area = np.zeros(mask.shape, np.bool_), 0.0
        for ring in outline(mask):
            for k, ((ax, ay), (bx, by)) in enumerate(zip(ring, [*ring[1:], ring[0]], strict=True)):
                assert (ax == bx) != (ay == by), "each edge is horizontal or vertical"
                assert (ax == bx) == (ring[k - 1][1] == ay), "corners turn"
                if ax == bx:
                    inside ^= ((ay > rows) != (by > rows)) & (columns < ax)
                area += (ax * by - bx * ay) / 2
        np.testing.assert_array_equal(inside, mask)
        assert area == mask.sum(), "outer rings go clockwise in the picture, holes the other way"


def test_pixels_that_meet_in_a_corner_are_in_rings_of_their_own() -> None:
    assert sorted(outline(np.eye(2) > 0)) == [
        [(0, 0), (1, 0), (1, 1), (0, 1)],
        [(1, 1), (2, 1), (2, 2), (1, 2)],
    ]
    ring = np.ones((3, 3), np.bool_)
    ring[1, 1] = False
    assert outline(ring) == [[(0, 0), (3, 0), (3, 3), (0, 3)], [(1, 2), (2, 2), (2, 1), (1, 1)]]
    assert outline(np.zeros((2, 2), np.bool_)) == []


def test_no_masks_at_all() -> None:
    none = array([])
    assert (len(none), none.counts(), none.areas().tolist()) == (0, [], [])
    assert none.unions(none).counts() == []
    assert none.contain(np.zeros(0), np.zeros(0)).tolist() == []


def test_large_runs_take_several_characters() -> None:
    mask = np.zeros((1080, 1920), np.bool_)
    mask[100:900, 300:1500] = True
    mask[500, 1500] = True
    assert array([mask]).counts() == [mask_to_rle(mask)]


@pytest.mark.parametrize(
    ("counts", "height", "width", "message"),
    [
        (b"", 2, 2, "counts are empty"),
        (b"4~", 2, 2, "counts hold '~', which no COCO encoder writes"),
        (b"4P", 2, 2, "end in the middle of a number; they were cut off"),
        (b"PPPPPPPP0", 2, 2, "a number of more than 35 bits"),
        (b"4", 2, 3, r"counts cover 4 pixels, not the 6 of a mask of 2x3 \(height x width\)"),
        (b"O5", 2, 2, "counts hold a run of -1 pixels"),
        (b"4", 0, 4, r"mask of size 0x4 \(height x width\): both must be at least 1"),
    ],
)
def test_damaged_counts(counts: bytes, height: int, width: int, message: str) -> None:
    sizes = np.array([1, height]), np.array([1, width])
    with pytest.raises(ValueError, match=message):
        MaskArray.from_counts([b"1", counts], *sizes)


def test_masks_of_other_sizes_and_empty_boxes() -> None:
    a, b = array([np.ones((2, 3), np.bool_)]), array([np.ones((3, 2), np.bool_)])
    for operation in (a.unions, a.intersections, a.ious):
        with pytest.raises(
            ValueError, match=r"masks of 2x3 and 3x2 \(height x width\): both must have one size"
        ):
            operation(b)
    one = np.array([1])
    with pytest.raises(ValueError, match=r"box of 0x1 \(width x height\): both must be at least 1"):
        a.crops(one, one, np.array([0]), one)
