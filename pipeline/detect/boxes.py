"""Arithmetic of boxes that detectors share: whole pixels inside the frame, non-maximum suppression."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.prompts.box_segmenters import Box


def pixel_box(box: tuple[float, float, float, float], width: int, height: int) -> Box | None:
    """A box x, y, w, h in whole pixels, cut at the edge of the frame; None if nothing of it is inside."""
    x, y, w, h = box
    left, top = max(0, round(x)), max(0, round(y))
    right, bottom = min(width, max(round(x + w), round(x) + 1)), min(height, max(round(y + h), round(y) + 1))
    return (left, top, right - left, bottom - top) if left < right and top < bottom else None


def suppressed(
    boxes: NDArray[np.float32], scores: NDArray[np.float32], iou: float, most: int | None = None
) -> list[int]:
    """Non-maximum suppression: of boxes that overlap by more than `iou`, the one with the best score is kept.

    Args:
        boxes: N x 4, two opposite corners.
        scores: N.
        most: maximum number of boxes that are kept.

    Returns:
        Indices of the kept boxes, best first; of equal scores the lower index first.
    """
    kept: list[int] = []
    sizes = np.maximum(boxes[:, 2] - boxes[:, 0], 0) * np.maximum(boxes[:, 3] - boxes[:, 1], 0)
    order = np.argsort(-scores, kind="stable")
    while order.size and (most is None or len(kept) < most):
        best, rest = int(order[0]), order[1:]
        kept.append(best)
        low = np.maximum(boxes[rest, :2], boxes[best, :2])
        high = np.minimum(boxes[rest, 2:], boxes[best, 2:])
        shared = np.maximum(high - low, 0).prod(-1)
        union = sizes[rest] + sizes[best] - shared
        order = rest[shared <= iou * union]
    return kept
