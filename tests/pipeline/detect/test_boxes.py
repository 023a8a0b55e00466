"""Arithmetic of boxes: whole pixels inside the frame, non-maximum suppression."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.detect.boxes import pixel_box, suppressed


def test_suppression_keeps_the_best_of_what_overlaps() -> None:
    boxes = np.array([(0, 0, 10, 10), (1, 1, 11, 11), (20, 0, 30, 10), (0, 0, 10, 10)], np.float32)
    scores = np.array([0.5, 0.9, 0.7, 0.5], np.float32)
    assert suppressed(boxes, scores, iou=0.5) == [1, 2]
    assert suppressed(boxes, scores, iou=0.7) == [1, 2, 0]
    assert suppressed(boxes, scores, iou=0.7, most=1) == [1]
    assert suppressed(boxes[:0], scores[:0], iou=0.5) == []


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((10.4, 5.6, 4.0, 8.0), (10, 6, 4, 8)),
        ((-3, 2, 10, 10), (0, 2, 7, 10)),
        ((20, 10, 30, 40), (20, 10, 20, 20)),
        ((5.2, 5.2, 0.1, 0.1), (5, 5, 1, 1)),
        ((40, 5, 3, 3), None),
        ((-4, 5, 3, 3), None),
    ],
)
def test_boxes_in_whole_pixels_are_cut_at_the_edge_of_the_frame(
    box: tuple[float, float, float, float], expected: tuple[int, int, int, int] | None
) -> None:
    assert pixel_box(box, width=40, height=30) == expected
