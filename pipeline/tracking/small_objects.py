"""Recognises small objects in the first masks: their videos are tracked at a larger network size."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

LEAST_SIDE = 64
"""Pixels of the network's input. An object whose longer side is less counts as small: memory, in cells of 16
pixels, hardly tells two such persons apart."""


def has_small_object(masks: Mapping[int, NDArray[np.bool_]], scale: float) -> bool:
    """Whether one of the masks is small at the network's input.

    Args:
        masks: object id -> H x W bool, with at least one pixel set.
        scale: pixels of the network's input per pixel of the frame.
    """
    return any(_longer_side(mask) * scale < LEAST_SIDE for mask in masks.values())


def _longer_side(mask: NDArray[np.bool_]) -> int:
    """Longer side of a mask's bounding box, in pixels."""
    spans = (np.flatnonzero(mask.any(axis)) for axis in (0, 1))
    return max(int(span[-1] - span[0]) + 1 for span in spans)
