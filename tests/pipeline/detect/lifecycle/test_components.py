"""Homes and strays of objects on drawn label maps."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.detect.lifecycle.components import STRIDE, homes_of, without_strays


def labels_with(*boxes: tuple[int, int, int, int, int], size: tuple[int, int] = (96, 160)) -> np.ndarray:
    """Boxes (id, x, y, w, h) on an empty label map."""
    labels = np.zeros(size, np.int32)
    for object_id, x, y, w, h in boxes:
        labels[y : y + h, x : x + w] = object_id
    return labels


def kept(labels: np.ndarray, ids: list[int], before: np.ndarray | None) -> np.ndarray:
    homes = homes_of(labels, ids, before)
    left = labels.copy()
    without_strays(left, ids, homes)
    return left


def test_one_part_is_home_wherever_it_is() -> None:
    labels = labels_with((3, 10, 10, 20, 40))
    assert np.array_equal(kept(labels, [3], None), labels)
    elsewhere = homes_of(labels_with((3, 120, 50, 20, 40)), [3], None)
    assert np.array_equal(kept(labels, [3], elsewhere), labels)


def test_the_part_that_follows_from_before_is_home_not_the_larger_one() -> None:
    before = homes_of(labels_with((3, 10, 10, 20, 40)), [3], None)
    labels = labels_with((3, 16, 10, 20, 40), (3, 100, 20, 50, 70))
    assert np.array_equal(kept(labels, [3], before), labels_with((3, 16, 10, 20, 40)))
    # Without a before, or where that has gone, it is the larger one.
    for unknown in (None, np.zeros_like(before), homes_of(labels_with((3, 60, 0, 8, 8)), [3], None)):
        assert np.array_equal(kept(labels, [3], unknown), labels_with((3, 100, 20, 50, 70)))


def test_parts_close_by_belong_to_it() -> None:
    before = homes_of(labels_with((3, 40, 10, 24, 60)), [3], None)
    cut_in_two = labels_with((3, 40, 10, 24, 28), (3, 40, 44, 24, 26))
    assert np.array_equal(kept(cut_in_two, [3], before), cut_in_two)
    too_far = labels_with((3, 40, 10, 24, 28), (3, 90, 10, 24, 28))
    assert np.array_equal(kept(too_far, [3], before), labels_with((3, 40, 10, 24, 28)))


def test_objects_do_not_touch_each_other() -> None:
    labels = labels_with((3, 10, 10, 20, 40), (3, 100, 10, 20, 30), (8, 100, 50, 30, 40), (8, 10, 60, 12, 12))
    before = homes_of(labels_with((3, 10, 10, 20, 40), (8, 100, 50, 30, 40)), [3, 8], None)
    expected = labels_with((3, 10, 10, 20, 40), (8, 100, 50, 30, 40))
    assert np.array_equal(kept(labels, [3, 8], before), expected)
    # 8 is none of ours: it keeps both of its parts.
    only = labels_with((3, 10, 10, 20, 40), (8, 100, 50, 30, 40), (8, 10, 60, 12, 12))
    assert np.array_equal(kept(labels, [3], before), only)


@pytest.mark.parametrize("size", [(96, 160), (97, 161), (95, 159), (3, 5)])
def test_any_size_and_things_too_thin_for_the_grid(size: tuple[int, int]) -> None:
    labels = np.zeros(size, np.int32)
    labels[1:2, 1:3] = 7
    labels[-1, -1] = 9
    left = kept(labels, [7, 9], None)
    assert np.array_equal(left, labels)
    assert homes_of(labels, [7], None).shape == (-(-size[0] // STRIDE), -(-size[1] // STRIDE))


def test_a_change_of_size_forgets_where_things_were() -> None:
    before = homes_of(labels_with((3, 10, 10, 20, 40)), [3], None)
    labels = labels_with((3, 5, 5, 10, 20), (3, 50, 5, 20, 30), size=(48, 80))
    assert np.array_equal(kept(labels, [3], before), labels_with((3, 50, 5, 20, 30), size=(48, 80)))
