"""Simulated users: where somebody who sees the mask would click next."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Point = tuple[float, float, bool]
"""x, y and whether the click is on the object."""


@dataclass(frozen=True)
class _Error:
    depth: NDArray[np.float32]
    positive: bool


def _largest_error(predicted: Mask, truth: Mask) -> _Error | None:
    """The distances to the border within what is missing or within what is too much, whichever is deeper."""
    missing, excess = _depth(truth & ~predicted), _depth(predicted & ~truth)
    if not missing.any() and not excess.any():
        return None
    if missing.max() >= excess.max():
        return _Error(missing, True)
    return _Error(excess, False)


def _depth(region: Mask) -> NDArray[np.float32]:
    # Padded: a region that touches the picture's edge is not deep there.
    padded = np.pad(region.astype(np.uint8), 1)
    return np.asarray(cv2.distanceTransform(padded, cv2.DIST_L2, 5), np.float32)[1:-1, 1:-1]


def next_click(
    predicted: Mask, truth: Mask, rng: np.random.Generator | None = None
) -> tuple[int, int, bool] | None:
    """The next click on the largest error: at its centre, as in the evaluations of the literature.

    Args:
        predicted: H x W bool, the mask so far; all False before the first click.
        truth: H x W bool.
        rng: if given, the click is anywhere in the inner half of the error, as users click.

    Returns:
        x, y and whether the click is on the object; None if the mask is right.
    """
    error = _largest_error(predicted, truth)
    if error is None:
        return None
    if rng is None:
        y, x = np.unravel_index(int(error.depth.argmax()), error.depth.shape)
        return int(x), int(y), error.positive
    inner = np.flatnonzero(error.depth > error.depth.max() / 2)
    y, x = np.unravel_index(int(rng.choice(inner)), error.depth.shape)
    return int(x), int(y), error.positive


def first_clicks(truth: Mask, rng: np.random.Generator) -> list[Point]:
    """Clicks before any mask: mostly one on the object, else several, or a stroke, with some beside it."""
    how = rng.random()
    if how < 0.25:
        click = next_click(np.zeros_like(truth), truth)
    elif how < 0.75:
        click = next_click(np.zeros_like(truth), truth, rng)
    else:
        click = _anywhere(truth, rng, True)
    points: list[Point] = [click] if click is not None else []
    kind = rng.random()
    if kind < 0.2:
        for _ in range(int(rng.integers(1, 4))):
            positive = bool(rng.random() < 0.5)
            more = _anywhere(truth if positive else _around(truth, rng), rng, positive)
            points += [more] if more is not None else []
    elif kind < 0.3:
        points += _stroke(truth, rng, True)
        if rng.random() < 0.4:
            points += _stroke(_around(truth, rng), rng, False)
    return points


def _anywhere(region: Mask, rng: np.random.Generator, positive: bool) -> tuple[int, int, bool] | None:
    inside = cv2.erode(region.astype(np.uint8), np.ones((5, 5), np.uint8))
    places = np.flatnonzero(inside) if inside.any() else np.flatnonzero(region)
    if not len(places):
        return None
    y, x = np.unravel_index(int(rng.choice(places)), region.shape)
    return int(x), int(y), positive


def _around(truth: Mask, rng: np.random.Generator) -> Mask:
    """What is not the object: a ring around it, or everything."""
    if rng.random() < 0.5:
        return ~truth
    near = cv2.dilate(truth.astype(np.uint8), np.ones((25, 25), np.uint8)).astype(bool)
    ring: Mask = near & ~cv2.dilate(truth.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    return ring


def _stroke(region: Mask, rng: np.random.Generator, positive: bool) -> list[Point]:
    """Points along a bent line, those that lie in the region."""
    ends = [_anywhere(region, rng, positive) for _ in range(3)]
    if any(end is None for end in ends):
        return []
    first, bend, last = (np.array(end[:2], float) for end in ends if end is not None)
    points: list[Point] = []
    for t in np.linspace(0, 1, int(rng.integers(5, 20))):
        x, y = (1 - t) ** 2 * first + 2 * t * (1 - t) * bend + t**2 * last
        if region[round(y), round(x)]:
            points.append((round(x), round(y), positive))
    return points


def spoilt(truth: Mask, rng: np.random.Generator) -> Mask:
    """A mask as a tracker or a user may leave it: shifted, grown or shrunk, a part missing or added."""
    height, width = truth.shape
    mask = truth.astype(np.uint8)
    size = int(rng.integers(3, 16))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    changed = cv2.dilate(mask, kernel) if rng.random() < 0.5 else cv2.erode(mask, kernel)
    mask = np.asarray(changed, np.uint8)
    if rng.random() < 0.5:
        dx, dy = rng.integers(-12, 13, 2)
        shift = np.array([[1, 0, dx], [0, 1, dy]], np.float32)
        mask = np.asarray(cv2.warpAffine(mask, shift, (width, height), flags=cv2.INTER_NEAREST), np.uint8)
    for _ in range(int(rng.integers(0, 3))):
        places = np.flatnonzero(cv2.dilate(truth.astype(np.uint8), np.ones((21, 21), np.uint8)))
        y, x = np.unravel_index(int(rng.choice(places)), truth.shape)
        axes = (int(rng.integers(6, 50)), int(rng.integers(6, 50)))
        value = int(rng.random() < 0.5)
        cv2.ellipse(mask, (int(x), int(y)), axes, float(rng.uniform(0, 180)), 0, 360, value, -1)
    return np.asarray(mask != 0)
