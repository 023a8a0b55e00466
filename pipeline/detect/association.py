"""Association: which detection is of which object.

Three cues say whether a detection is of an object: the object's mask on the previous frame, the box that its
movement leads to expect, and its colours. Where the masks of two people were exchanged while they passed each
other, the other two cues tell. An object that has no mask is sought by movement and colours alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.detect.appearance import Colours, similarity
from pipeline.detect.assignment import assignment
from pipeline.detect.found_object import FoundObject, centre_of, iou, overlap
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
# Colours of a lost object and a detection must be as alike as this, at once and after `long` frames.
_ALIKE_SOON, _ALIKE_LATE = 0.65, 0.8
_LOST_SIZES = 2.0
# An object was confirmed lately if it was within this share of `long` frames.
_LATELY = 0.2


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


def share_inside(labels: NDArray[np.int32], object_id: int, shown: Shown, detection: Detection) -> float:
    """Share of an object's mask that lies in a detection."""
    if not overlap(shown.box, detection.bounds):
        return 0.0
    x, y, w, h = detection.bounds
    part = labels[y : y + h, x : x + w] == object_id
    return int((part & detection.area()).sum()) / shown.area


def visible_pairs(
    objects: Mapping[int, FoundObject],
    shown: Mapping[int, Shown],
    labels: NDArray[np.int32],
    detections: Sequence[Detection],
    colours: Callable[[int], Colours],
    frame_index: int,
    long: int,
) -> dict[int, int]:
    """Which detection each object with a mask has.

    The mask of an object that was not confirmed lately may have moved to another thing: it takes no detection
    where the object itself cannot be.

    Args:
        objects: the objects, by id.
        shown: their masks, for those that have one.
        labels: H x W, the label map in which they are.
        detections: the detections.
        colours: returns the colours of a detection, given its position.
        frame_index: the detections' frame.
        long: frames after which an object may be far from where it is expected, see `reach`.

    Returns:
        position of the detection, by object id; objects without one are left out.
    """
    ids = sorted(i for i in objects if i in shown)
    gain = np.zeros((len(ids), len(detections)))
    for row, object_id in enumerate(ids):
        found, mask = objects[object_id], shown[object_id]
        expected = found.expected(frame_index)
        for k, detection in enumerate(detections):
            box = detection.bounds
            if not may_be(found, detection, _SIZES):
                continue
            unsure = frame_index - found.frame > _LATELY * long
            if unsure and distance(expected, box) > reach(frame_index - found.frame, long):
                continue
            held = share_inside(labels, object_id, mask, detection)
            by_mask = max(iou(mask.box, box), held / 2)
            by_motion = iou(expected, box)
            if max(by_mask, by_motion) < _LEAST:
                continue
            value = _MASK * by_mask + _MOTION * by_motion
            if found.colours is not None:
                value += _COLOURS * max(0.0, similarity(found.colours, colours(k)) - _ALIKE) / (1 - _ALIKE)
            gain[row, k] = value * (1 - _BY_SCORE * (1 - detection.score)) + _OLDER * (1 - row / len(ids))
    return {ids[row]: k for row, k in assignment(gain) if gain[row, k] > 0}


def lost_pairs(
    objects: Mapping[int, FoundObject],
    detections: Mapping[int, Detection],
    colours: Callable[[int], Colours],
    frame_index: int,
    long: int,
) -> dict[int, int]:
    """Which detection each lost object is, if any.

    Args:
        objects: objects without a mask, by id.
        detections: detections of nothing that is tracked, by position.
        colours, frame_index: as for `visible_pairs`.
        long: frames after which an object is sought widely, and must look the more alike.

    Returns:
        position of the detection, by object id.
    """
    ids, positions = sorted(objects), sorted(detections)
    gain = np.zeros((len(ids), len(positions)))
    for row, object_id in enumerate(ids):
        found = objects[object_id]
        for column, k in enumerate(positions):
            detection = detections[k]
            if not may_be(found, detection, _LOST_SIZES):
                continue
            since = min(1.0, (frame_index - found.seen) / long)
            most = reach(frame_index - found.seen, long)
            away = distance(found.expected(frame_index), detection.bounds)
            if away > most:
                continue
            alike = 1.0 if found.colours is None else similarity(found.colours, colours(k))
            if alike < _ALIKE_SOON + since * (_ALIKE_LATE - _ALIKE_SOON):
                continue
            gain[row, column] = alike - 0.3 * away / most
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
