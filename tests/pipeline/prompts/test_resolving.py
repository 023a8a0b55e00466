"""Prompts resolved to masks of their frame: sizes, overlaps, boxes, polygons, and stored results."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.beside import Beside

from pipeline.base.errors import PromptError
from pipeline.base.records import Frame
from pipeline.prompts.box_segmenters import inscribed_ellipse
from pipeline.prompts.remembered_object import RememberedObject
from pipeline.prompts.resolving import PromptObject, PromptSet, ResolvedPrompt, resolve
from pipeline.tracks.masks import mask_to_rle

HEIGHT, WIDTH = 12, 16


class WholeBox:
    """Uses the box as mask, and records its calls."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def segment(self, frame: Any, box: Any) -> Any:
        self.asked.append(box)
        x, y, w, h = box
        mask = np.zeros(frame.shape[:2], np.bool_)
        mask[y : y + h, x : x + w] = True
        return mask


class Blind:
    def segment(self, frame: Any, box: Any) -> Any:
        return np.zeros(frame.shape[:2], np.bool_)


def frame(height: int = HEIGHT, width: int = WIDTH) -> Frame:
    return Frame(np.zeros((height, width, 3), np.uint8), 5, 0.5)


def box(object_id: int, *numbers: float, category: str | None = None) -> PromptObject:
    return PromptObject(object_id, category, box=numbers)  # type: ignore[arg-type]


def rectangle(x: int, y: int, w: int, h: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.bool_)
    mask[y : y + h, x : x + w] = True
    return mask


def rle(object_id: int, mask: np.ndarray) -> PromptObject:
    return PromptObject(object_id, rle=(*mask.shape, mask_to_rle(mask)))


def polygon(*outlines: tuple[float, ...]) -> np.ndarray:
    return resolve([PromptObject(1, polygons=outlines)], frame(), Blind()).masks[1]


def test_masks_boxes_and_polygons_become_masks_of_the_frame() -> None:
    mask = rectangle(0, 0, 2, 3)
    found = resolve(
        [
            rle(7, mask),
            box(3, 4, 5, 6, 2, category="car"),
            PromptObject(9, "dog", polygons=((12, 1, 16, 1, 16, 4, 12, 4),)),
        ],
        frame(),
        WholeBox(),
    )
    assert list(found.masks) == [7, 3, 9]
    np.testing.assert_array_equal(found.masks[7], mask)
    np.testing.assert_array_equal(found.masks[3], rectangle(4, 5, 6, 2))
    np.testing.assert_array_equal(found.masks[9], rectangle(12, 1, 4, 3))
    assert all(m.dtype == np.bool_ for m in found.masks.values())
    assert found.categories == {7: None, 3: "car", 9: "dog"}
    assert found.warnings == ()


@pytest.mark.parametrize("concurrent", [True, False])
def test_boxes_are_shared_with_another_thread_if_the_segmenter_allows_it(concurrent: bool) -> None:
    segmenter, beside = WholeBox(), Beside()
    if concurrent:
        segmenter.concurrent = True  # type: ignore[attr-defined]
    asked = [box(1, 1, 1, 4, 4), box(2, 8, 1, 4, 4), rle(3, rectangle(0, 8, 3, 3))]
    found = resolve(asked, frame(), segmenter, beside)
    alone = resolve(asked, frame(), WholeBox())
    assert list(found.masks) == list(alone.masks) == [1, 2, 3]
    assert all(np.array_equal(found.masks[i], alone.masks[i]) for i in (1, 2, 3))
    assert len(segmenter.asked) == 2
    assert beside.done == (2 if concurrent else 0)
    with pytest.raises(PromptError, match="object 4 on frame 5"):
        resolve([box(1, 1, 1, 4, 4), box(4, 90, 90, 2, 2)], frame(), segmenter, beside)


def test_where_prompts_overlap_the_later_entry_wins_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    entries = [box(1, 0, 0, 8, 8), box(2, 4, 0, 8, 8), box(4, 0, 6, 16, 4), box(3, 15, 0, 1, 1)]
    with caplog.at_level(logging.WARNING):
        found = resolve(entries, frame(), WholeBox())
    np.testing.assert_array_equal(found.masks[4], rectangle(0, 6, 16, 4))
    np.testing.assert_array_equal(found.masks[2], rectangle(4, 0, 8, 6))
    np.testing.assert_array_equal(found.masks[1], rectangle(0, 0, 4, 6))
    assert found.warnings == ("frame 5: prompts of objects 1, 2, 4 overlap; the later entry gets the pixels",)
    assert [r.getMessage() for r in caplog.records] == list(found.warnings)


def test_touching_prompts_do_not_overlap() -> None:
    assert resolve([box(1, 0, 0, 8, 8), box(2, 8, 0, 8, 8)], frame(), WholeBox()).warnings == ()


def test_a_wholly_covered_object_is_refused() -> None:
    with pytest.raises(PromptError, match="object 1 on frame 5 is wholly covered by object 2: give it"):
        resolve([box(1, 2, 2, 3, 3), box(2, 0, 0, 8, 8), box(3, 12, 0, 1, 1)], frame(), WholeBox())
    with pytest.raises(PromptError, match="object 1 on frame 5 is wholly covered by object 3"):
        resolve([box(1, 2, 2, 4, 4), box(2, 2, 2, 2, 4), box(3, 4, 2, 9, 9)], frame(), WholeBox())


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(PromptError, match="object 2 on frame 5: its mask is 16x12, the frame 12x16; give"):
        resolve([rle(2, rectangle(0, 0, 1, 1))], frame(16, 12), Blind())


def test_an_object_of_another_streams_state_has_no_mask() -> None:
    entry = PromptObject(2, state=RememberedObject(7, "gate"))
    with pytest.raises(PromptError, match="object 2 on frame 5: it comes from another stream's state"):
        resolve([entry], frame(), Blind())


def test_an_empty_mask_is_refused() -> None:
    with pytest.raises(PromptError, match="object 2 on frame 5: its mask is empty; draw it again"):
        resolve([rle(2, rectangle(0, 0, 0, 0))], frame(), Blind())


# --- boxes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ((1, 2, 3, 4), (1, 2, 3, 4)),
        ((1.4, 2.6, 3.0, 4.0), (1, 3, 3, 4)),
        ((-3, -4, 10, 10), (0, 0, 7, 6)),
        ((10, 8, 100, 100), (10, 8, 6, 4)),
        ((-1e308, -1e308, 1.7e308, 1.7e308), (0, 0, 16, 12)),
        ((0, 0, 1.7e308, 1e-3 + 1), (0, 0, 16, 1)),
        ((15.2, 11.2, 0.8, 0.8), (15, 11, 1, 1)),
    ],
)
def test_boxes_are_rounded_and_cut_to_the_frame(given: Any, asked: Any) -> None:
    segmenter = WholeBox()
    resolve([box(1, *given)], frame(), segmenter)
    assert segmenter.asked == [asked]


@pytest.mark.parametrize(
    "outside",
    [
        (16, 0, 5, 5),
        (0, 12, 5, 5),
        (-5, 0, 5, 5),
        (0, -5, 5, 5),
        (1e308, 0, 1e308, 5),
        (-1e308, 0, 5, 5),
        (3.1, 3.1, 0.2, 0.2),
    ],
)
def test_boxes_without_a_pixel_of_the_frame_are_refused(outside: Any) -> None:
    with pytest.raises(
        PromptError, match=r"object 1 on frame 5: box .* has no pixel inside the frame of 16x12"
    ):
        resolve([box(1, *outside)], frame(), WholeBox())


def test_an_ellipse_is_taken_where_the_segmenter_finds_nothing() -> None:
    found = resolve([box(1, 2, 3, 9, 7)], frame(), Blind())
    np.testing.assert_array_equal(found.masks[1], inscribed_ellipse((HEIGHT, WIDTH), (2, 3, 9, 7)))
    assert found.warnings == ("object 1 on frame 5: no object found in the box; an ellipse is used instead",)


# --- polygons ------------------------------------------------------------------------------------


def plain_polygon(points: list[tuple[float, float]], height: int, width: int) -> np.ndarray:
    """Even-odd rule, pixel by pixel: counts how often a ray to the left crosses the outline."""
    mask = np.zeros((height, width), np.bool_)
    for py in range(height):
        for px in range(width):
            x, y = px + 0.5, py + 0.5
            crossings = 0
            for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
                if (ay <= y) != (by <= y) and ax + (y - ay) / (by - ay) * (bx - ax) <= x:
                    crossings += 1
            mask[py, px] = crossings % 2 == 1
    return mask


_COORDINATES = st.integers(-8, 60).map(lambda n: n / 3) | st.integers(-2, 18) | st.floats(-40, 40, width=32)


@given(st.lists(st.tuples(_COORDINATES, _COORDINATES), min_size=3, max_size=9))
def test_polygons_are_filled_by_pixel_centres(points: Any) -> None:
    expected = plain_polygon(points, HEIGHT, WIDTH)
    flat = tuple(float(n) for point in points for n in point)
    if expected.any():
        np.testing.assert_array_equal(polygon(flat), expected)
    else:
        with pytest.raises(PromptError, match="its polygons cover no pixel of the frame of 16x12"):
            polygon(flat)


@pytest.mark.parametrize("sides", [(0, 0, 16, 12), (3, 2, 5, 4), (15, 11, 1, 1), (-9, -9, 12, 30)])
def test_the_polygon_around_a_box_has_the_boxs_pixels(sides: Any) -> None:
    x, y, w, h = sides
    around = (x, y, x + w, y, x + w, y + h, x, y + h)
    expected = resolve([box(1, *sides)], frame(), WholeBox()).masks[1]
    np.testing.assert_array_equal(polygon(around), expected)
    backwards = (x, y, x, y + h, x + w, y + h, x + w, y)
    np.testing.assert_array_equal(polygon(backwards), expected)


def test_several_polygons_are_one_object_and_cut_no_holes_into_each_other() -> None:
    first, second = (0, 0, 6, 0, 6, 6, 0, 6), (3, 3, 9, 3, 9, 9, 3, 9)
    np.testing.assert_array_equal(polygon(first, second), rectangle(0, 0, 6, 6) | rectangle(3, 3, 6, 6))


def test_neighbouring_polygons_share_no_pixel_and_leave_none_out() -> None:
    rng = np.random.default_rng(2)
    for _ in range(50):
        a, b = rng.uniform(0, 16, 2)
        left = PromptObject(1, polygons=((-1, -1, a, -1, b, 13, -1, 13),))
        right = PromptObject(2, polygons=((a, -1, 17, -1, 17, 13, b, 13),))
        found = resolve([left, right], frame(), Blind())
        assert found.warnings == ()
        assert (found.masks[1] ^ found.masks[2]).all()


def test_absurdly_large_polygons_are_filled() -> None:
    assert polygon((-1e308, -1e308, 1e308, -1e308, 1e308, 1e308, -1e308, 1e308)).all()


# --- what is kept --------------------------------------------------------------------------------


def test_resolved_prompts_come_back_from_the_stream_record() -> None:
    entries = [box(2147483647, 0, 0, 8, 8, category="läufer"), box(2, 4, 0, 8, 8)]
    found = resolve(entries, frame(), WholeBox())
    back = ResolvedPrompt.from_record(json.loads(json.dumps(found.to_record())))
    assert list(back.masks) == list(found.masks)
    for object_id, mask in found.masks.items():
        np.testing.assert_array_equal(back.masks[object_id], mask)
    assert back.categories == found.categories
    assert back.to_record() == found.to_record()


def test_what_a_prompts_file_says_is_what_is_tracked() -> None:
    content = {
        "version": 1,
        "objects": [
            {"box": [0, 0, 4, 4]},
            {"polygons": [[6, 0, 9, 0, 9, 3, 6, 3]], "category": "sign"},
            {"rle": {"size": [HEIGHT, WIDTH], "counts": mask_to_rle(rectangle(0, 8, 2, 2))}, "id": 1},
        ],
    }
    found = resolve(PromptSet.from_record(content).at(0), frame(), WholeBox())
    assert found.categories == {2: None, 3: "sign", 1: None}
    np.testing.assert_array_equal(found.masks[2], rectangle(0, 0, 4, 4))
    np.testing.assert_array_equal(found.masks[3], rectangle(6, 0, 3, 3))
    np.testing.assert_array_equal(found.masks[1], rectangle(0, 8, 2, 2))
