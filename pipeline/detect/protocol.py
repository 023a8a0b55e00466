"""Detector protocol: what a detector is given, and the detections that it returns.

A detector gets a stream's frames in order and returns detections. It does not know which objects are already
tracked; `pipeline.detect.lifecycle` matches the two. A detector may have a state (the built-in "motion"
learns the static background), which is saved in the stream's snapshots: a restored detector behaves exactly
as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pipeline.base.records import Frame
from pipeline.prompts.box_segmenters import Box

ENTRY_POINT_GROUP = "xmem.detectors"


@dataclass(frozen=True, slots=True, eq=False)
class Detection:
    """One detected object on one frame, given by its mask, its box, or both.

    Args:
        mask: H x W bool of the frame's size, with at least one pixel; objects are started from it.
        box: x, y, width, height in whole pixels, inside the frame; by default the mask's bounding box.
            Without a mask, the stream's box segmenter makes one when an object is started.
        category: class of the object, if known.
        score: confidence of the detector, 0..1.

    Raises:
        ValueError: mask and box are both missing, one is empty or has a wrong shape, or the score is out of
            range.
    """

    mask: NDArray[np.bool_] | None = None
    box: Box | None = None
    category: str | None = None
    score: float = 1.0

    def __post_init__(self) -> None:
        if self.mask is None and self.box is None:
            raise ValueError("a detection has neither mask nor box: give one")
        if self.mask is not None and (self.mask.ndim != 2 or self.mask.dtype != np.bool_):
            raise ValueError(
                f"detection's mask is {self.mask.dtype} of shape {self.mask.shape}: must be H x W bool"
            )
        if self.mask is not None and self.box is None:
            rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
            if not rows.size:
                raise ValueError("detection's mask is empty: leave the detection out")
            left, top = int(columns[0]), int(rows[0])
            box = (left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top)
            object.__setattr__(self, "box", box)
        if self.box is not None and (len(self.box) != 4 or min(self.box) < 0 or min(self.box[2:]) < 1):
            raise ValueError(f"detection's box {self.box}: must have x, y >= 0 and width, height >= 1")
        if not 0 <= self.score <= 1:
            raise ValueError(f"detection's score {self.score}: must be 0 .. 1")

    def __repr__(self) -> str:
        pixels = "" if self.mask is None else f", {int(self.mask.sum())} pixels"
        return f"Detection({self.bounds}{pixels}, category={self.category!r}, score={self.score:.2f})"

    @property
    def bounds(self) -> Box:
        """The detection's box; every detection has one."""
        assert self.box is not None
        return self.box

    def area(self) -> NDArray[np.bool_]:
        """h x w mask of the pixels covered within the box; all of them if there is no mask."""
        x, y, w, h = self.bounds
        if self.mask is None:
            return np.ones((h, w), np.bool_)
        return self.mask[y : y + h, x : x + w]

    def check_fits(self, frame: Frame) -> None:
        """Raise ValueError if the detection does not fit a frame of that size."""
        height, width = frame.size
        if self.mask is not None and self.mask.shape != (height, width):
            raise ValueError(f"detection's mask has shape {self.mask.shape}, the frame {frame.size}")
        x, y, w, h = self.bounds
        if x + w > width or y + h > height:
            raise ValueError(f"detection's box {self.bounds} reaches outside the frame of {width}x{height}")
        if self.mask is not None and not self.area().any():
            raise ValueError(f"detection's mask has no pixel in its box {self.bounds}")


@runtime_checkable
class Detector(Protocol):
    """Detects objects on the frames of one stream; `check_detector` tests an implementation.

    `detect` gets frames in order, not necessarily every one, and must not modify them. The frame size may
    change. Equal sequences of frames must give equal detections, in any process.

    `to_bytes` serializes the detector's state. After `from_bytes` the detector behaves like the one that was
    serialized. `from_bytes` raises ValueError on bytes that are damaged or of another kind.

    A detector may have an attribute `categories`, a tuple of all classes that it knows (empty: its detections
    have no class). Classes that are asked of it are then checked when it is loaded.
    """

    def detect(self, frame: Frame) -> list[Detection]: ...

    def to_bytes(self) -> bytes: ...

    def from_bytes(self, blob: bytes) -> None: ...


def categories_of(detector: Detector) -> tuple[str, ...] | None:
    """The classes that a detector knows; None if it does not say."""
    categories = getattr(detector, "categories", None)
    return None if categories is None else tuple(categories)


@dataclass(frozen=True, slots=True)
class Look:
    """What one run of a detector found, and where it looked.

    Args:
        detections: of the frame.
        regions: the parts of the frame that were searched; None: all of it.
        least_share: a region is searched for things whose longer side is at least this share of the region's
            shorter side.
        instances: whether each detection is of one thing, and every visible thing of its class is detected in
            the regions. False for movement: what stands still is not detected, and two things that move
            together are one detection.
    """

    detections: list[Detection]
    regions: tuple[Box, ...] | None = None
    least_share: float = 0.0
    instances: bool = True

    def covers(self, box: Box) -> bool:
        """Whether a thing with that box would have been found, had it been visible."""
        if self.regions is None:
            return True
        x, y, w, h = box
        return any(
            left <= x
            and top <= y
            and x + w <= left + across
            and y + h <= top + down
            and max(w, h) >= self.least_share * min(across, down)
            for left, top, across, down in self.regions
        )


@runtime_checkable
class PartialDetector(Detector, Protocol):
    """A detector that may search only parts of a frame, to save time.

    `look` is like `detect`, which is a look without wanted boxes, but says where it searched. `wanted` are
    boxes in which something is looked for, such as where an object was lost; the detector prefers them.
    """

    def look(self, frame: Frame, wanted: Sequence[Box] = ()) -> Look: ...


def look_with(detector: Detector, frame: Frame, wanted: Sequence[Box] = ()) -> Look:
    """Run a detector of either kind on a frame; see `PartialDetector` for `wanted`."""
    if isinstance(detector, PartialDetector):
        return detector.look(frame, wanted)
    return Look(detector.detect(frame))
