"""FoundObject: what is known of an object that a detection started, besides its mask."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.detect.lifecycle.appearance import Colours, blended
from pipeline.prompts.box_segmenters import Box

# Share that a new measurement has in the colours.
_COLOURS = 0.2
# Frames over which the movement of a thing is as uncertain as the box of a detection. Box and velocity follow
# the detections by an alpha-beta filter, the sooner the longer the last one is ago; the gain of the velocity
# is the one that Benedict and Bordner found best (IRE Trans. Automatic Control, 1962).
_STEADY = 2.0
# A thing is not expected further away than so many of its own sizes, however long it is out of sight.
_FURTHEST = 1.5


@dataclass(frozen=True)
class FoundObject:
    """An object that a detection started, as of the last detection that confirmed it.

    Args:
        box: its box, filtered over the detections that confirmed it.
        frame: frame_index of that detection.
        seen: last frame on which it had a mask.
        category: its class, if known.
        colours: its appearance, averaged over confirmations; None: not measured.
        velocity: movement of the box's centre in pixels per frame, x and y.
        hits: detections that confirmed it, the first one included.
        misses: looks in a row that searched where it is and did not confirm it.
        disagreed: looks in a row on which its mask was not where its detection was.
        portrait, views: colours of its mask while it was alone, averaged over so many looks; None: not yet.
        met: ids of the objects that it met and was not compared with since, see
            `pipeline.detect.lifecycle.contacts`.
        since, since_views: like portrait and views, but since it met them.
        before: its box and the frame of it when it met the first of them; None: it met none.
        born: its box when it was started, and the frame; None: not known.
    """

    box: Box
    frame: int
    seen: int
    category: str | None = None
    colours: Colours | None = None
    velocity: tuple[float, float] = (0.0, 0.0)
    hits: int = 1
    misses: int = 0
    disagreed: int = 0
    portrait: Colours | None = None
    views: int = 0
    met: tuple[int, ...] = ()
    since: Colours | None = None
    since_views: int = 0
    before: tuple[Box, int] | None = None
    born: tuple[Box, int] | None = None

    @property
    def size(self) -> float:
        """Mean side of the box in pixels."""
        return (self.box[2] + self.box[3]) / 2

    def expected(self, frame_index: int) -> Box:
        """Where its box should be on a frame; may reach outside the picture."""
        x, y, w, h = self.box
        dx, dy = self.way(frame_index - self.frame)
        return round(x + dx), round(y + dy), w, h

    def way(self, frames: int) -> tuple[float, float]:
        """How far it should move in so many frames, in pixels, x and y."""
        dx, dy = (v * frames for v in self.velocity)
        far = math.hypot(dx, dy) / (_FURTHEST * self.size)
        return (dx / far, dy / far) if far > 1 else (dx, dy)

    def moved(self, box: Box) -> Box:
        """Where a box of it should be one frame later."""
        x, y, w, h = box
        return round(x + self.velocity[0]), round(y + self.velocity[1]), w, h

    def confirmed(self, box: Box, frame_index: int, colours: Colours | None) -> FoundObject:
        """After a detection that agrees with its mask, or replaces it."""
        passed = max(1, frame_index - self.frame)
        place = passed / (passed + _STEADY)
        speed = place**2 / (2 - place)
        expected = self.expected(frame_index)
        (x, y), measured = centre_of(expected), centre_of(box)
        dx, dy = measured[0] - x, measured[1] - y
        w, h = (round(old + place * (new - old)) for old, new in zip(self.box[2:], box[2:], strict=True))
        x, y = x + place * dx, y + place * dy
        vx, vy = self.velocity[0] + speed * dx / passed, self.velocity[1] + speed * dy / passed
        if self.colours is not None and colours is not None:
            colours = blended(self.colours, colours, _COLOURS)
        return replace(
            self,
            box=(round(x - w / 2), round(y - h / 2), w, h),
            frame=frame_index,
            colours=self.colours if colours is None else colours,
            velocity=(vx, vy),
            hits=self.hits + 1,
            misses=0,
            disagreed=0,
        )

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dict for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> FoundObject:
        """Build from `to_json`'s output; LookupError, TypeError or ValueError for anything else."""
        x, y, w, h = (int(v) for v in values["box"])
        vx, vy = (float(v) for v in values["velocity"])
        category = values["category"]
        # Earlier versions did not know contacts.
        portrait, since = (_colours(values.get(name)) for name in ("portrait", "since"))
        return cls(
            box=(x, y, w, h),
            frame=int(values["frame"]),
            seen=int(values["seen"]),
            category=None if category is None else str(category),
            colours=_colours(values["colours"]),
            velocity=(vx, vy),
            hits=int(values["hits"]),
            misses=int(values["misses"]),
            disagreed=int(values["disagreed"]),
            portrait=portrait,
            views=int(values.get("views", 0)),
            met=tuple(int(i) for i in values.get("met", ())),
            since=since,
            since_views=int(values.get("since_views", 0)),
            before=_place(values.get("before")),
            born=_place(values.get("born")),
        )


def _place(values: Any) -> tuple[Box, int] | None:
    if values is None:
        return None
    (x, y, w, h), frame = values
    return (int(x), int(y), int(w), int(h)), int(frame)


def _colours(values: Any) -> Colours | None:
    return None if values is None else tuple(float(v) for v in values)


def centre_of(box: Box) -> tuple[float, float]:
    """The middle of a box, x and y."""
    x, y, w, h = box
    return x + w / 2, y + h / 2


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes."""
    shared = overlap(one, other)
    return shared / (one[2] * one[3] + other[2] * other[3] - shared)


def overlap(one: Box, other: Box) -> int:
    """Number of pixels that two boxes share."""
    across = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    down = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    return max(0, across) * max(0, down)


def smaller_area(one: Box, other: Box) -> int:
    """Number of pixels of the smaller one of two boxes."""
    return min(one[2] * one[3], other[2] * other[3])
