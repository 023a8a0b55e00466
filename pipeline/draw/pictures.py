"""Pictures for viewers: scaled down to a longer side."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

THUMBNAIL_SIDE = 320
"""Longer side of pictures of remembered frames, in pixels."""


def within(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """An image scaled down to a longer side of `side` pixels; one that is small enough as it is."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return image
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
