"""One run of the detector on a frame: its detections, and the label map that the decisions edit."""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
from numpy.typing import NDArray

from pipeline.base.records import Frame
from pipeline.detect.lifecycle.appearance import Colours, colours_of
from pipeline.detect.lifecycle.association import Shown
from pipeline.detect.lifecycle.found_object import overlap, smaller_area
from pipeline.detect.protocol import Detection, Look
from pipeline.prompts.box_segmenters import Box

# A detection matches a tracked object if this share of it lies on tracked objects ...
_COVERED = 0.25
# ... or if it covers this share of one that is not too small beside it.
HELD, CRUMB = 0.5, 0.15
# Of a matched object's mask, the part in its detection or expected box, enlarged by this share, is tracked.
_AROUND = 0.25
# Of two detections that share this much of the smaller one only that with the larger score counts: both are
# of the same thing, or one is of two things.
_SAME = 0.7
# Detections that overlap another one by this share of their area do not show one thing's colours alone.
_ALONE = 0.15


class DetectorRun:
    """One run of the detector: what it found, and the labels as they are changed by decisions."""

    def __init__(self, frame: Frame, look: Look, labels: NDArray[np.int32], given: Collection[int]) -> None:
        self.frame, self.look, self.labels, self.given = frame, look, labels, given
        self.tracked = labels  # without what objects hold of other things
        self.regular = True  # far enough from the last run to disprove something
        self.weight = 1  # what a detection or view of something known counts; 0: it saw nearly the same again
        self.free: list[int] = []  # positions of the detections that are not of users' objects
        self.distinct: frozenset[int] = frozenset()  # positions of those that are not another one's again
        self.shown: dict[int, Shown] = {}
        self.matched: dict[int, int] = {}  # object with a mask -> position of its detection
        self.lost: dict[int, int] = {}  # object without one -> position of its detection
        self.agreed: set[int] = set()  # objects that are where their masks are
        self._colours: dict[int, Colours] = {}

    def detection(self, k: int) -> Detection:
        return self.look.detections[k]

    def is_certain(self, k: int, least_score: float) -> bool:
        """Whether a detection may be of something new, or of an object whose mask is elsewhere."""
        return k in self.distinct and self.detection(k).score >= least_score

    def colours(self, k: int) -> Colours:
        if k not in self._colours:
            self._colours[k] = colours_of(self.frame.image, self.detection(k))
        return self._colours[k]

    def colours_of_mask(self, object_id: int) -> Colours:
        """The colours where an object's mask was on the previous frame."""
        return colours_of(self.frame.image, Detection(self.labels == object_id, self.shown[object_id].box))

    def alone(self, k: int) -> bool:
        """Whether no other detection covers much of a detection."""
        box = self.detection(k).bounds
        most = _ALONE * box[2] * box[3]
        return not any(
            overlap(box, other.bounds) > most for at, other in enumerate(self.look.detections) if at != k
        )

    def mark(self, mask: NDArray[np.bool_], object_id: int) -> None:
        for labels in (self.labels, self.tracked):
            labels[labels == object_id] = 0
            labels[mask] = object_id


def is_tracked(detection: Detection, labels: NDArray[np.int32]) -> bool:
    """Whether a detection covers objects of the labels, that is, is already tracked."""
    x, y, w, h = detection.bounds
    area = detection.area()
    pixels = int(area.sum())
    inside = labels[y : y + h, x : x + w][area]
    inside = inside[inside != 0]
    if inside.size >= _COVERED * pixels:
        return True
    for object_id, held in zip(*np.unique(inside, return_counts=True), strict=True):
        own = int((labels == object_id).sum())
        if held >= HELD * own and own >= CRUMB * pixels:
            return True
    return False


def distinct(look: Look) -> list[int]:
    """Positions of the detections without those that are another one's again, or that are of two at once."""
    if not look.instances:
        return list(range(len(look.detections)))
    kept: list[int] = []
    for k in sorted(range(len(look.detections)), key=lambda at: (-look.detections[at].score, at)):
        box = look.detections[k].bounds
        others = [look.detections[at].bounds for at in kept]
        if not any(overlap(box, other) >= _SAME * smaller_area(box, other) for other in others):
            kept.append(k)
    return sorted(kept)


def enlarged(box: Box) -> Box:
    x, y, w, h = box
    dx, dy = round(w * _AROUND / 2), round(h * _AROUND / 2)
    return x - dx, y - dy, w + 2 * dx, h + 2 * dy


def keep_inside(labels: NDArray[np.int32], object_id: int, boxes: Iterable[Box]) -> None:
    """Remove the part of an object that is in none of the boxes from the labels."""
    outside = labels == object_id
    for x, y, w, h in boxes:
        outside[max(0, y) : max(0, y + h), max(0, x) : max(0, x + w)] = False
    labels[outside] = 0
