"""Boxes in frames, and the ellipse inside a box."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Box = tuple[int, int, int, int]
"""x, y, width, height in whole pixels, inside the frame."""


def inscribed_ellipse(size: tuple[int, ...], box: Box, share: float = 1.0) -> NDArray[np.bool_]:
    """H x W mask of the ellipse that touches the box's sides, axes scaled by `share`; never empty."""
    x, y, w, h = box
    mask = np.zeros(size[:2], np.bool_)
    across = (np.arange(w) + 0.5 - w / 2) / (w / 2 * share)
    down = (np.arange(h) + 0.5 - h / 2) / (h / 2 * share)
    inside = across[None, :] ** 2 + down[:, None] ** 2 <= 1
    inside[h // 2, w // 2] = True
    mask[y : y + h, x : x + w] = inside
    return mask
