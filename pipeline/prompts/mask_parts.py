"""Trims a click's mask: keeps the clicked one of several similar things, drops small fragments."""

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
# Pieces without a click, as a share of the largest piece, that are dropped.
_CRUMB = 0.05
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


def tidied(mask: Mask, clicks: Sequence[Click], height: int, width: int) -> Mask:
    """The mask without small pieces that no click is in, and right at the clicks.

    Args:
        mask: of the whole frame or of a window, whose pixels the clicks are in.
        height: the frame's.
        width: the frame's.
    """
    radius = max(1, round(0.004 * min(height, width)))
    drawn = mask.astype(np.uint8)
    for c in clicks:
        if mask[c.y, c.x] != c.positive:
            cv2.circle(drawn, (c.x, c.y), radius, int(c.positive), -1)
    for c in clicks:  # a disc of a neighbour may have covered it
        drawn[c.y, c.x] = c.positive
    return without_crumbs(drawn, clicks)


def without_crumbs(mask: NDArray[np.uint8] | Mask, clicks: Sequence[Click], crumb: float = _CRUMB) -> Mask:
    """The mask without pieces that no click is in and that are below this share of the largest piece."""
    _, pieces, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = np.asarray(stats[:, cv2.CC_STAT_AREA])
    areas[0] = 0
    kept = areas > crumb * areas.max()
    kept[[int(pieces[c.y, c.x]) for c in clicks if c.positive]] = True
    kept[0] = False
    tidy: Mask = kept[pieces]
    return tidy


def _cut(mask: NDArray[np.bool_]) -> NDArray[np.int32] | None:
    """Parts of a mask, numbered from 1, cut at the widest necks that are narrow enough; None without one."""
    padded = cv2.distanceTransform(np.pad(mask.astype(np.uint8), 1), cv2.DIST_L2, 5)
    depth = np.asarray(padded, np.float32)[1:-1, 1:-1]
    top = float(depth.max(initial=0))
    # Pixels of the mask, the deepest last.
    order = np.flatnonzero(mask)
    order = order[np.argsort(depth.ravel()[order])]
    depths = depth.ravel()[order]
    for level in np.linspace(0.05, 0.9, 18) * top:
        count, pieces = cv2.connectedComponents((depth > level).astype(np.uint8), connectivity=4)
        if count < 3:
            continue
        # Of each piece: how deep it is. At this level it meets the others in a neck of this half width.
        deepest = np.zeros(count)
        deepest[pieces.ravel()[order]] = depths
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
