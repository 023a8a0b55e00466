"""FoundObject: box, velocity and colours, filtered over detections."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.detect.lifecycle.found_object import FoundObject, centre_of, iou


@pytest.mark.parametrize("every", [1, 2, 5])
def test_it_follows_a_steady_walk_in_spite_of_inexact_boxes(every: int) -> None:
    rng = np.random.default_rng(0)
    found = FoundObject((100, 50, 30, 80), 0, 0)
    errors = []
    for frame in range(every, 200, every):
        right = (100 + 3 * frame, 50, 30, 80)
        x, y, w, h = right
        dx, dy, dw, dh = rng.normal(0, 3, 4)
        if frame > 50:
            errors.append(np.subtract(centre_of(found.expected(frame)), centre_of(right)))
        found = found.confirmed((round(x + dx), round(y + dy), round(w + dw), round(h + dh)), frame, None)
    assert found.velocity == pytest.approx((3, 0), abs=1.5)
    # On the average it does not lag, and is about as exact as one detection.
    assert np.abs(np.mean(errors, 0)).max() < 1.5
    assert np.std(errors, 0).max() < 6


def test_who_stands_is_expected_where_he_stands() -> None:
    found = FoundObject((100, 50, 30, 80), 0, 0)
    for frame in range(2, 40, 2):
        # Boxes of a detector that has him now with, now without his bag.
        found = found.confirmed((100, 50, 30 if frame % 4 else 46, 80), frame, None)
    assert iou(found.expected(48), (104, 50, 36, 80)) > 0.6


def test_it_is_not_expected_very_far_away() -> None:
    found = FoundObject((100, 50, 30, 80), 0, 0, velocity=(10.0, 0.0))
    (x, _), (far, _) = centre_of(found.expected(5)), centre_of(found.expected(1000))
    assert x == 165
    assert far - 115 == pytest.approx(1.5 * found.size, abs=1)


def test_a_mask_moves_on_by_a_frame() -> None:
    found = FoundObject((100, 50, 30, 80), 0, 0, velocity=(4.0, -2.0))
    assert found.moved((10, 20, 5, 6)) == (14, 18, 5, 6)


def test_json_and_back() -> None:
    found = FoundObject((1, 2, 3, 4), 5, 6, "person", (0.5, 0.5), (1.5, -0.5), 3, 2, 1)
    assert FoundObject.from_json(found.to_json()) == found
    with pytest.raises((LookupError, TypeError, ValueError)):
        FoundObject.from_json({**found.to_json(), "box": [1, 2, 3]})
