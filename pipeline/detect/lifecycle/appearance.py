"""Appearance of detections: colour histograms, to tell which of several things a detection is."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.detect.protocol import Detection
from pipeline.prompts.box_segmenters import inscribed_ellipse

Colours = tuple[float, ...]
"""Square roots of the shares of colour bins, of the upper half, then of the lower half of a thing."""

# Bins of L, a and b (in OpenCV's 8-bit Lab): their number, and the range that they divide. Most colours of
# real scenes have a and b within 40 of grey, 128; stronger ones count as the outermost bin.
_BINS = (6, 5, 5)
_RANGES = ((0.0, 256.0), (98.0, 158.0), (98.0, 158.0))
# Pixels of a box beside this share of the ellipse inside it are mostly background.
_ELLIPSE = 0.75


def colours_of(picture: NDArray[np.uint8], detection: Detection) -> Colours:
    """The colours of a detection on an H x W x 3 RGB frame: inside its mask, or the middle of its box."""
    x, y, w, h = detection.bounds
    part = np.ascontiguousarray(picture[y : y + h, x : x + w])
    lab = np.asarray(cv2.cvtColor(part, cv2.COLOR_RGB2LAB), np.float32)
    inside = (
        detection.area() if detection.mask is not None else inscribed_ellipse((h, w), (0, 0, w, h), _ELLIPSE)
    )
    middle = max(1, h // 2)
    halves = [_histogram(lab[rows], inside[rows]) for rows in (slice(0, middle), slice(middle, h))]
    return tuple(float(value) for value in np.concatenate(halves))


def similarity(one: Colours, other: Colours) -> float:
    """0 to 1: how alike the colours of two things are (Bhattacharyya coefficient, mean of both halves)."""
    return float(np.dot(one, other)) / 2


def blended(old: Colours, new: Colours, share: float) -> Colours:
    """`old` moved towards `new` by a share, with the same norm of each half."""
    mixed = (1 - share) * np.asarray(old).reshape(2, -1) + share * np.asarray(new).reshape(2, -1)
    norms = np.maximum(np.linalg.norm(mixed, axis=1, keepdims=True), 1e-9)
    return tuple(float(value) for value in (mixed / norms).ravel())


def _histogram(lab: NDArray[np.float32], inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    pixels = lab[inside]
    count = int(np.prod(_BINS))
    if not len(pixels):
        return np.full(count, (1 / count) ** 0.5)
    bins = np.zeros(len(pixels), np.intp)
    for axis, (number, (low, high)) in enumerate(zip(_BINS, _RANGES, strict=True)):
        at = np.clip(((pixels[:, axis] - low) * (number / (high - low))).astype(np.intp), 0, number - 1)
        bins = bins * number + at
    shares = np.bincount(bins, minlength=count) / len(pixels)
    root: NDArray[np.float64] = np.sqrt(shares)
    return root
