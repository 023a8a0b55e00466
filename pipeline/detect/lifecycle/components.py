"""Connected components of a mask: those that belong to the object, and those on look-alikes.

An object moves little from frame to frame. The connected part of its mask that overlaps its previous position
is its home, together with parts close by: a pole may cut a person in two. All other parts are strays.
"""

from __future__ import annotations

from collections.abc import Collection

import cv2
import numpy as np
from numpy.typing import NDArray

# Homes are kept on a grid with this spacing in pixels: they need not be exact, and are computed on every
# frame.
STRIDE = 4
# Largest distance of another part from the largest one, in their mean size, at which it still belongs to it.
_CLOSE = 0.35


def homes_of(
    labels: NDArray[np.int32], object_ids: Collection[int], before: NDArray[np.int32] | None
) -> NDArray[np.int32]:
    """Find the homes of objects on a frame.

    Args:
        labels: H x W, the frame's label map.
        object_ids: ids of the objects.
        before: homes on the previous frame, if there was one.

    Returns:
        Every STRIDE-th row and column of the labels, without strays and other objects.
    """
    grid = labels[::STRIDE, ::STRIDE]
    if before is not None and before.shape != grid.shape:
        before = None
    homes = np.zeros(grid.shape, np.int32)
    for object_id in object_ids:
        mask = grid == object_id
        if mask.any():
            homes[_home(mask, None if before is None else before == object_id)] = object_id
    return homes


def without_strays(labels: NDArray[np.int32], object_ids: Collection[int], homes: NDArray[np.int32]) -> None:
    """Remove the strays of objects, in place, from the label map on which the homes were found.

    An object too thin for the grid is left as it is.
    """
    for object_id in object_ids:
        home = homes == object_id
        if home.any():
            around = cv2.dilate(home.astype(np.uint8), np.ones((5, 5), np.uint8))
            reach = np.repeat(np.repeat(np.asarray(around, np.bool_), STRIDE, 0), STRIDE, 1)
            height, width = labels.shape
            labels[(labels == object_id) & ~reach[:height, :width]] = 0


def _home(mask: NDArray[np.bool_], before: NDArray[np.bool_] | None) -> NDArray[np.bool_]:
    """The part of a mask that overlaps most with its previous position; the largest one if none does."""
    count, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    if count == 2:
        return mask
    areas = np.asarray(stats[:, cv2.CC_STAT_AREA]).copy()
    areas[0] = 0
    shared = np.zeros(count, np.int64)
    if before is not None:
        shared = np.bincount(np.asarray(parts)[before], minlength=count)
        shared[0] = 0
    main = int(np.argmax(shared if shared.any() else areas))
    x, y, w, h = (int(v) for v in stats[main, :4])
    near = max(1.0, _CLOSE * (w + h) / 2)
    keep = np.zeros(count, np.bool_)
    for part in range(1, count):
        left, top, across, down = (int(v) for v in stats[part, :4])
        apart = max(left - (x + w), x - (left + across), top - (y + h), y - (top + down))
        keep[part] = part == main or apart <= near
    home: NDArray[np.bool_] = keep[np.asarray(parts)]
    return home
