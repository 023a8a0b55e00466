"""Candidates: detections that are not tracked yet, until they are detected often enough to become objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pipeline.base.records import Frame
from pipeline.detect.protocol import Detection, Look
from pipeline.prompts.box_segmenters import Box

# Maximum distance of a candidate from its expected position, in its own size, and maximum ratio of sizes.
_NEAR, _SIZES = 0.8, 3.0
# Looks in a row that may miss a candidate, and looks in a row that may not search where it is.
_MISSES, _UNSEARCHED = 1, 5


@dataclass(frozen=True)
class Candidate:
    """A thing that was detected and may become an object.

    Args:
        box: the last detection's.
        step: movement of the centre between looks, x and y.
        hits: detections so far, each with its weight.
        misses: looks since the last one that searched its place.
        unsearched: other looks since the last detection.
    """

    box: Box
    step: tuple[float, float] = (0.0, 0.0)
    hits: int = 1
    misses: int = 0
    unsearched: int = 0

    @property
    def centre(self) -> tuple[float, float]:
        """The middle of the box, x and y."""
        x, y, w, h = self.box
        return x + w / 2, y + h / 2

    def expected(self) -> Box:
        """Its box at the next look."""
        x, y, w, h = self.box
        looks = 1 + self.misses + self.unsearched
        return round(x + looks * self.step[0]), round(y + looks * self.step[1]), w, h

    def distance(self, other: Box) -> float:
        """Distance of a box from the expected position, in mean sizes.

        Infinite if it cannot be the same thing.
        """
        (x, y), (_, _, w, h) = self.centre, self.box
        looks = 1 + self.unsearched
        dx = other[0] + other[2] / 2 - x - looks * self.step[0]
        dy = other[1] + other[3] / 2 - y - looks * self.step[1]
        ratio = other[2] * other[3] / (w * h)
        if not 1 / _SIZES <= ratio <= _SIZES:
            return float("inf")
        return float(np.hypot(dx, dy)) * 4 / (w + h + other[2] + other[3])

    def detected(self, box: Box, weight: int = 1) -> Candidate:
        """After another detection of it, which counts as `weight` hits."""
        moved = Candidate(box).centre
        looks = self.misses + self.unsearched + 1
        step = ((moved[0] - self.centre[0]) / looks, (moved[1] - self.centre[1]) / looks)
        return Candidate(box, step, self.hits + weight)

    def missed(self, look: Look | None, frame: Frame) -> Candidate | None:
        """After a look that did not detect it; None if it is no candidate any more.

        Args:
            look: None if it did not disprove it either.
            frame: the frame of the look.
        """
        if look is not None and look.covers(inside(self.expected(), frame)):
            return replace(self, misses=self.misses + 1) if self.misses < _MISSES else None
        return replace(self, unsearched=self.unsearched + 1) if self.unsearched < _UNSEARCHED else None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready dict for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Candidate:
        """Build from `to_json`'s output; LookupError, TypeError or ValueError for anything else."""
        x, y, w, h = (int(v) for v in values["box"])
        dx, dy = (float(v) for v in values["step"])
        counts = (int(values[name]) for name in ("hits", "misses", "unsearched"))
        return cls((x, y, w, h), (dx, dy), *counts)


def confirmed_among(
    candidates: Sequence[Candidate],
    unknown: Sequence[Detection],
    weak: Sequence[Box],
    look: Look,
    frame: Frame,
    needed: int,
    weight: int = 1,
) -> tuple[list[Candidate], list[tuple[Candidate, Detection]]]:
    """Match detections with candidates.

    Args:
        candidates: as of the previous look.
        unknown: the detections of nothing that is tracked.
        weak: boxes of detections with small scores, which do not count; a candidate there is not missed.
        look: where the detector searched.
        frame: the frame that they are of.
        needed: detections that make a candidate an object; twice as many while it touches the frame's edge.
        weight: what a detection of a known candidate counts; 0 if the last look saw nearly the same.

    Returns:
        the candidates for the next look, and those of them that may become objects now, with the detection.
    """
    pairs = sorted(
        (distance, i, k)
        for i, candidate in enumerate(candidates)
        for k, detection in enumerate(unknown)
        if (distance := candidate.distance(detection.bounds)) <= _NEAR
    )
    follows: dict[int, int] = {}  # detection -> candidate
    for _, i, k in pairs:
        if k not in follows and i not in follows.values():
            follows[k] = i
    kept, confirmed = [], []
    for k, detection in enumerate(unknown):
        box = detection.bounds
        candidate = candidates[follows[k]].detected(box, weight) if k in follows else Candidate(box)
        kept.append(candidate)
        if candidate.hits >= needed * (2 if reaches_out(box, frame) else 1):
            confirmed.append((candidate, detection))
    matched = set(follows.values())
    for i, candidate in enumerate(candidates):
        if i in matched:
            continue
        there = any(candidate.distance(box) <= _NEAR for box in weak)
        still = candidate.missed(None if there else look, frame)
        if still is not None:
            kept.append(still)
    return kept, confirmed


def reaches_out(box: Box, frame: Frame) -> bool:
    """Whether a box touches the frame's edge."""
    x, y, w, h = box
    height, width = frame.size
    return x <= 1 or y <= 1 or x + w >= width - 1 or y + h >= height - 1


def inside(box: Box, frame: Frame) -> Box:
    """The part of a box inside the frame; the nearest pixel if there is none."""
    x, y, w, h = box
    height, width = frame.size
    left, top = min(max(x, 0), width - 1), min(max(y, 0), height - 1)
    right, bottom = min(max(x + w, left + 1), width), min(max(y + h, top + 1), height)
    return left, top, right - left, bottom - top
