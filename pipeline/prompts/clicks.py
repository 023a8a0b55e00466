"""Clicks and strokes: what a user points at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MOST_CLICKS = 200

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Click:
    """A click on the centre of pixel (x, y)."""

    x: int
    y: int
    positive: bool = True


@dataclass(frozen=True)
class Stroke:
    """A scribble: the points of a line drawn over the object, or over what does not belong to it."""

    points: tuple[tuple[float, float], ...]
    positive: bool = True

    def clicks(self, spacing: float, most: int = 40) -> list[Click]:
        """Clicks along the line, at most `spacing` pixels apart, unless they were more than `most`.

        Both ends are among them; a stroke of one point is a click.
        """
        ends = [(float(x), float(y)) for x, y in self.points]
        lengths = [math.dist(a, b) for a, b in pairwise(ends)]
        total = sum(lengths)
        count = min(most, 1 + math.ceil(total / spacing)) if total else 1
        along = np.concatenate([[0.0], np.cumsum(lengths)])
        places = np.linspace(0.0, total, count)
        xs = np.interp(places, along, [x for x, _ in ends])
        ys = np.interp(places, along, [y for _, y in ends])
        found = [Click(int(x), int(y), self.positive) for x, y in zip(xs, ys, strict=True)]
        return list(dict.fromkeys(found))


def joined(clicks: Sequence[Click], strokes: Sequence[Stroke], size: tuple[int, int]) -> list[Click]:
    """Clicks, and those along strokes, about 25 to a frame's shorter side; together at most `MOST_CLICKS`.

    Args:
        clicks: kept as they are.
        strokes: the more there are, the fewer clicks each becomes.
        size: height and width of the frame.
    """
    if not strokes:
        return list(clicks)
    most = max(2, min(40, (MOST_CLICKS - len(clicks)) // len(strokes)))
    spacing = max(2.0, min(size) / 25)
    return [*clicks, *(click for stroke in strokes for click in stroke.clicks(spacing, most))]
