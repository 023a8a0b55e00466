"""A mask that holds several like things, cut at its necks: the part that was clicked."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.prompts.clicks import Click, Mask

# A mask is cut where it is narrower than this share of the narrower of the two bodies that meet there.
_NECK = 0.5
# Parts below this share of the mask are no things of their own.
_LEAST_SHARE = 0.1
# Longer side, in pixels, at which masks are cut.
_SIDE = 256
_LEAST_PIXELS, _LEAST_PART = 60, 30
# A group of many is cut again and again.
_MOST_CUTS = 4


def clicked_part(mask: Mask, clicks: Sequence[Click]) -> Mask:
    """The parts of an H x W mask that positive clicks are in; the mask itself if it has no neck.

    Args:
        clicks: in pixels of the mask; those outside it count for no part.
    """
    height, width = mask.shape
    scale = min(1.0, _SIDE / max(height, width))
    columns, rows = max(8, round(width * scale)), max(8, round(height * scale))
    small = cv2.resize(mask.astype(np.uint8), (columns, rows), interpolation=cv2.INTER_NEAREST) > 0
    whole = int(small.sum())
    if whole < _LEAST_PIXELS:
        return mask
    places = [
        (min(rows - 1, c.y * rows // height), min(columns - 1, c.x * columns // width))
        for c in clicks
        if c.positive and 0 <= c.x < width and 0 <= c.y < height
    ]
    for _ in range(_MOST_CUTS):
        parts = _cut(small)
        if parts is None:
            break
        wanted = {int(parts[place]) for place in places} - {0}
        kept = np.isin(parts, list(wanted))
        if kept.sum() < _LEAST_PART or kept.sum() == small.sum():
            break
        small = kept
    if small.sum() == whole:
        return mask
    large = cv2.resize(small.astype(np.float32), (width, height)) > 0.5
    part: Mask = np.asarray(large) & mask
    return part


def _cut(mask: NDArray[np.bool_]) -> NDArray[np.int32] | None:
    """Parts of a mask, numbered from 1, cut at the widest necks that are narrow enough; None without one."""
    padded = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 5)
    depth = np.asarray(padded, np.float32)[1:-1, 1:-1]
    top = float(depth.max(initial=0))
    for level in np.linspace(0.05, 0.9, 18) * top:
        count, pieces = cv2.connectedComponents((depth > level).astype(np.uint8), connectivity=4)
        # Of each piece: how deep it is. At this level it meets the others in a neck of this half width.
        deepest = np.zeros(count)
        np.maximum.at(deepest, pieces.ravel(), depth.ravel())
        bodies = [piece for piece in range(1, count) if level < _NECK * deepest[piece]]
        if len(bodies) < 2:
            continue
        parts = _grown(mask, depth / top, [pieces == body for body in bodies])
        areas = np.bincount(parts.ravel(), minlength=len(bodies) + 1)[1:]
        if (areas > _LEAST_SHARE * mask.sum()).sum() > 1:
            return parts
    return None


def _grown(
    mask: NDArray[np.bool_], depth: NDArray[np.float32], bodies: Sequence[NDArray[np.bool_]]
) -> NDArray[np.int32]:
    """Bodies grown over the mask, the deepest pixels first; numbered from 1, 0 outside."""
    labels = np.zeros(mask.shape, np.int32)
    for number, body in enumerate(bodies, 1):
        labels[body] = number
    outside = len(bodies) + 1
    labels[~mask] = outside
    shallow = np.clip(255 * (1 - depth), 0, 255).astype(np.uint8)
    cv2.watershed(np.repeat(shallow[..., None], 3, axis=-1), labels)
    labels[labels == outside] = 0
    # Pixels where two meet have no label yet.
    near = cv2.dilate(np.maximum(labels, 0).astype(np.float32), np.ones((3, 3), np.uint8))
    grown = np.where(labels < 0, np.asarray(near).astype(np.int32), labels)
    return np.where(mask, grown, 0).astype(np.int32)
