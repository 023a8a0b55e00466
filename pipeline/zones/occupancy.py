"""Occupancy: how many objects each zone held and each line counted, per period of time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class ZonePeriod:
    """One zone in one period.

    Args:
        object_seconds: sum of the objects inside over time; divided by the covered seconds it is the mean.
        most: at the same time.
        entered, left: visits that began and ended.
    """

    object_seconds: float = 0.0
    most: int = 0
    entered: int = 0
    left: int = 0


@dataclass(slots=True)
class LinePeriod:
    """One line in one period: crossings in both directions."""

    left_to_right: int = 0
    right_to_left: int = 0


@dataclass
class Period:
    """One period: seconds for which there was input, and its zones and lines by name."""

    covered_seconds: float = 0.0
    zones: dict[str, ZonePeriod] = field(default_factory=dict)
    lines: dict[str, LinePeriod] = field(default_factory=dict)


class Occupancy:
    """Counts by periods of `seconds`, which begin at multiples of it on the stream's clock.

    Objects inside count from the frame that they are seen on to the next one with rows. Between the removal
    of the last object and the next row there was input, without objects; gaps are not covered.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._periods: dict[int, Period] = {}
        self._at = 0.0
        self._inside: dict[str, int] = {}

    def advance(self, at: float, *, covered: bool, lost_seconds: float = 0.0) -> None:
        """Go on to the time of the next frame.

        Args:
            covered: whether there was input since the last one.
            lost_seconds: without input, just before it.
        """
        if covered:
            for number, seconds in self._parts(self._at, at - lost_seconds):
                period = self._period(number)
                period.covered_seconds += seconds
                for zone, count in self._inside.items():
                    held = period.zones.setdefault(zone, ZonePeriod())
                    held.object_seconds += seconds * count
                    held.most = max(held.most, count)
        self._at = at

    def inside(self, at: float, present: Mapping[str, Sequence[int]]) -> None:
        """The objects that are in each zone from this frame on."""
        self._inside = {zone: len(ids) for zone, ids in present.items()}
        period = self._period(self._number(at))
        for zone, count in self._inside.items():
            held = period.zones.setdefault(zone, ZonePeriod())
            held.most = max(held.most, count)

    def empty(self) -> None:
        """All objects were removed: nobody is inside."""
        self._inside = {}

    def entered(self, at: float, zone: str) -> None:
        """A visit began."""
        self._period(self._number(at)).zones.setdefault(zone, ZonePeriod()).entered += 1

    def left(self, at: float, zone: str) -> None:
        """A visit ended."""
        self._period(self._number(at)).zones.setdefault(zone, ZonePeriod()).left += 1

    def crossed(self, at: float, line: str, direction: str) -> None:
        """A line was crossed."""
        counts = self._period(self._number(at)).lines.setdefault(line, LinePeriod())
        setattr(counts, direction, getattr(counts, direction) + 1)

    def periods(self) -> list[tuple[float, Period]]:
        """(begin in seconds on the stream's clock, period), in order; only those with input."""
        return [(number * self.seconds, period) for number, period in sorted(self._periods.items())]

    def _number(self, at: float) -> int:
        return math.floor(at / self.seconds)

    def _period(self, number: int) -> Period:
        return self._periods.setdefault(number, Period())

    def _parts(self, start: float, end: float) -> Iterator[tuple[int, float]]:
        """A span of time cut at the periods' bounds: (period, seconds)."""
        number = self._number(start)
        while start < end:
            stop = min(end, (number + 1) * self.seconds)
            if stop > start:
                yield number, stop - start
            start, number = max(start, stop), number + 1
