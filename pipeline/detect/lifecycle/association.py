"""Association: which detection is of which object.

Three cues say whether a detection is of an object: the object's mask on the previous frame, the box that its
movement leads to expect, and its colours. Where the masks of two people were exchanged while they passed each
other, the other two cues tell. An object that has no mask is sought by movement and colours alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.detect.lifecycle.appearance import Colours, similarity
from pipeline.detect.lifecycle.assignment import assignment
from pipeline.detect.lifecycle.found_object import FoundObject, centre_of, iou, overlap
from pipeline.detect.protocol import Detection
from pipeline.prompts.box_segmenters import Box

FITS = 0.5
"""IoU from which two boxes are of the same thing."""

# Weights of the three cues.
_MASK, _MOTION, _COLOURS = 0.45, 0.35, 0.2
# A detection may be of an object if mask or expectation agree with it by at least this much.
_LEAST = 0.2
# Colours less alike than this say that it is another thing; 1 is the same.
_ALIKE = 0.5
# A smaller detection score counts less, by up to this share; the older of two equal objects wins.
_BY_SCORE, _OLDER = 0.3, 0.02
# Largest ratio of the areas of two boxes of the same thing, one of which may be partly hidden.
_SIZES = 3.0

# Where a lost object is sought: within this many of its sizes of where it is expected, at once and after it
# has been lost for `long` frames.
_NEAR, _FAR = 0.7, 1.5
# Colours of an object and a detection where its mask is not must be as alike as the first, at once, and by
# the second more after `long` frames ...
_ALIKE_SOON, _ALIKE_LATER = 0.65, 0.15
# ... unless the object was detected within this share of `long` frames, and the detection's box overlaps the
# expected one with this IoU.
_LATELY, _OVERLAPS = 0.2, 0.3
_LOST_SIZES = 2.0
# Share of an object's size from which its mask is moved on where frames were dropped.
_MOVES = 0.25


@dataclass(frozen=True)
class Shown:
    """An object's mask on the previous frame: its bounding box and its number of pixels."""

    box: Box
    area: int


def shown_in(labels: NDArray[np.int32], object_ids: Sequence[int]) -> dict[int, Shown]:
    """The masks of objects in an H x W label map; without those that have none."""
    found = {}
    for object_id in object_ids:
        mask = labels == object_id
        columns = np.flatnonzero(mask.any(0))
        if columns.size:
            rows = np.flatnonzero(mask.any(1))
            left, top = int(columns[0]), int(rows[0])
            box = (left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top)
            found[object_id] = Shown(box, int(mask.sum()))
    return found


def moved_on(labels: NDArray[np.int32], objects: Mapping[int, FoundObject], frames: int) -> NDArray[np.int32]:
    """An H x W label map in which the masks of objects are where their movement leads in so many frames.

    Masks that move little beside their sizes stay where they are: velocities are not that exact.
    """
    shown = shown_in(labels, sorted(objects))
    moved = np.where(np.isin(labels, list(shown)), 0, labels)
    height, width = labels.shape
    for object_id, mask in shown.items():
        x, y, w, h = mask.box
        dx, dy = (round(value) for value in objects[object_id].way(frames))
        if math.hypot(dx, dy) < _MOVES * objects[object_id].size:
            dx = dy = 0
        left, top = max(x, -dx, 0), max(y, -dy, 0)
        right, bottom = min(x + w, width - dx, width), min(y + h, height - dy, height)
        if left < right and top < bottom:
            part = labels[top:bottom, left:right] == object_id
            moved[top + dy : bottom + dy, left + dx : right + dx][part] = object_id
    return moved.astype(np.int32, copy=False)


def share_inside(labels: NDArray[np.int32], object_id: int, shown: Shown, detection: Detection) -> float:
    """Share of an object's mask that lies in a detection."""
    if not overlap(shown.box, detection.bounds):
        return 0.0
    x, y, w, h = detection.bounds
    part = labels[y : y + h, x : x + w] == object_id
    return int((part & detection.area()).sum()) / shown.area


def matches(
    objects: Mapping[int, FoundObject],
    shown: Mapping[int, Shown],
    labels: NDArray[np.int32],
    detections: Mapping[int, Detection],
    certain: Collection[int],
    colours: Callable[[int], Colours],
    frame_index: int,
    long: int,
) -> dict[int, int]:
    """Which detection each object has. All objects compete for them, those without a mask included.

    Objects that were out of sight for long do not compete: where they are expected says little, so they have
    what the others leave.

    Args:
        objects: the objects, by id.
        shown: the masks of those that have one.
        labels: H x W, the label map in which the masks are.
        detections: the detections, by position.
        certain: positions of those that may be of an object whose mask is not there. The others (with small
            scores, or a part of another detection) can only be of an object whose mask is there.
        colours: returns the colours of a detection, given its position.
        frame_index: the detections' frame.
        long: frames after which an object is sought widely, and must look the more alike.

    Returns:
        position of the detection, by object id; objects without one are left out.
    """
    late = {i for i, found in objects.items() if i not in shown and frame_index - found.seen > long}
    if late and len(late) < len(objects):
        others = {i: found for i, found in objects.items() if i not in late}
        first = matches(others, shown, labels, detections, certain, colours, frame_index, long)
        left = {k: detection for k, detection in detections.items() if k not in first.values()}
        lost = {i: objects[i] for i in late}
        return first | matches(lost, shown, labels, left, certain, colours, frame_index, long)
    ids, positions = sorted(objects), sorted(detections)
    gain = np.zeros((len(ids), len(positions)))
    for row, object_id in enumerate(ids):
        found, mask = objects[object_id], shown.get(object_id)
        for column, k in enumerate(positions):
            detection = detections[k]
            box = detection.bounds
            if not may_be(found, detection, _SIZES if mask is not None else _LOST_SIZES):
                continue
            by_mask = 0.0
            if mask is not None:
                held = share_inside(labels, object_id, mask, detection)
                by_mask = max(iou(found.moved(mask.box), box), held / 2)
            passed = frame_index - (found.seen if mask is None else found.frame)
            expected = found.expected(frame_index)
            by_motion = max(0.0, 1 - distance(expected, box) / reach(passed, long))
            alike = 1.0 if found.colours is None else similarity(found.colours, colours(k))
            needed = _ALIKE_SOON + min(1.0, passed / long) * _ALIKE_LATER
            if by_mask >= (_LEAST if k in certain else FITS):
                # A mask that was not confirmed where it was searched may have moved to another thing.
                possible = by_motion > 0 or not found.misses or alike >= _ALIKE_SOON + _ALIKE_LATER
            elif passed <= _LATELY * long and iou(expected, box) >= _OVERLAPS:
                possible = k in certain and alike >= _ALIKE
            else:
                possible = k in certain and by_motion > 0 and alike >= needed
            if possible:
                value = _MASK * by_mask + _MOTION * by_motion
                value += _COLOURS * max(0.0, alike - _ALIKE) / (1 - _ALIKE)
                older = _OLDER * (1 - row / len(ids))
                gain[row, column] = value * (1 - _BY_SCORE * (1 - detection.score)) + older
    return {ids[row]: positions[column] for row, column in assignment(gain) if gain[row, column] > 0}


def reach(frames: int, long: int) -> float:
    """Distance in its own sizes that an object may have from where it is expected, so many frames later."""
    return _NEAR + min(1.0, frames / long) * (_FAR - _NEAR)


def may_be(found: FoundObject, detection: Detection, ratio: float) -> bool:
    """Whether classes and sizes allow that a detection is of an object."""
    if found.category is not None and detection.category not in (None, found.category):
        return False
    own, other = found.box[2] * found.box[3], detection.bounds[2] * detection.bounds[3]
    return 1 / ratio <= own / other <= ratio


def distance(one: Box, other: Box) -> float:
    """Distance of the centres of two boxes, in mean sizes."""
    (ax, ay), (bx, by) = centre_of(one), centre_of(other)
    return math.hypot(ax - bx, ay - by) * 4 / (one[2] + one[3] + other[2] + other[3])
