"""Timestamps of live frames: the camera's clock checked against arrival times.

`pts_seconds` counts from the stream's first frame and increases from frame to frame, across reconnects, clock
jumps and missing timestamps. `wall_time` is UTC: the camera's own (from RTCP sender reports) while it agrees
with this machine's, otherwise the arrival time without the network's jitter. The module computes only; its
callers read the clocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

WallSource = Literal["rtcp", "arrival"]

_SMALLEST_STEP = 0.001
_FOLLOW = 0.001
"""How fast (seconds per second) the arrival estimate follows frames that arrive ever later."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """Arrival time of a frame in seconds: on the monotonic clock, and in UTC since 1970."""

    monotonic: float
    utc: float


@dataclass(frozen=True, slots=True)
class ClockChange:
    """A change of a clock or of the source of wall time.

    Args:
        reason: "jumped ahead", "jumped back", "fell behind" (the camera's timestamps against arrival);
            "system clock stepped"; "camera clock off" (its UTC is not trusted); "source" (of wall time).
        seconds: size of the change; None if it has none.
        source: where wall time comes from, starting with this frame.
    """

    reason: str
    seconds: float | None
    source: WallSource


@dataclass(frozen=True, slots=True)
class Stamp:
    """A frame's times, and the clock changes just before it."""

    pts_seconds: float
    wall_time: datetime
    source: WallSource
    changes: tuple[ClockChange, ...] = ()


class LiveClock:
    """Stamps the frames of one stream, in display order.

    Args:
        max_jump_seconds: largest difference between timestamps and arrival before timestamps are corrected.
        max_skew_seconds: largest difference between the camera's UTC and ours before it is not trusted.
        may_be_late: frames are read only when there is time for them (back-pressure), so arrival says nothing
            about timestamps that fall behind.
    """

    def __init__(
        self, *, max_jump_seconds: float = 5.0, max_skew_seconds: float = 2.0, may_be_late: bool = False
    ) -> None:
        if max_jump_seconds <= 0 or max_skew_seconds <= 0:
            raise ValueError(f"limits {max_jump_seconds} and {max_skew_seconds} s: must be positive")
        self._max_jump = max_jump_seconds
        self._max_skew = max_skew_seconds
        self._may_be_late = may_be_late
        self._pts: float | None = None
        self._arrival = Arrival(0.0, 0.0)
        self._raw: float | None = None
        self._step: float | None = None
        self._new_connection = True
        self._anchor = (0.0, 0.0)  # pts and monotonic arrival time of the same moment
        self._offset = 0.0  # estimate of UTC minus pts, from arrival times
        self._wall = float("-inf")
        self._source: WallSource | None = None
        self._skewed = False

    def reconnected(self) -> None:
        """Note that the next frame starts a new connection with unrelated timestamps."""
        self._new_connection = True

    def stamp(
        self,
        raw_seconds: float | None,
        arrival: Arrival,
        *,
        duration_seconds: float | None = None,
        camera_utc: float | None = None,
    ) -> Stamp:
        """Return the times of the next frame.

        Args:
            raw_seconds: its timestamp as received, from any origin; None if it has none.
            duration_seconds: display duration, if known; stands in for missing timestamps.
            camera_utc: capture time by the camera's UTC clock, seconds since 1970.
        """
        changes: list[ClockChange] = []
        stepped = self._system_step(arrival)
        pts, change = self._next_pts(raw_seconds, arrival, stepped)
        self._follow_arrival(pts, arrival, stepped)
        source, seconds, skew = self._wall_seconds(pts, camera_utc)
        if stepped:
            changes.append(ClockChange("system clock stepped", stepped, source))
            self._wall = seconds
        if change is not None:
            changes.append(ClockChange(change[0], change[1], source))
        if skew is not None:
            changes.append(ClockChange("camera clock off", skew, source))
        if source != self._source:
            changes.append(ClockChange("source", None, source))
        self._wall = max(self._wall, seconds)
        self._source = source
        self._pts, self._arrival, self._raw = pts, arrival, raw_seconds
        self._step = duration_seconds or self._step
        return Stamp(pts, datetime.fromtimestamp(self._wall, UTC), source, tuple(changes))

    def _next_pts(
        self, raw: float | None, arrival: Arrival, stepped: float | None
    ) -> tuple[float, tuple[str, float] | None]:
        if self._pts is None:
            self._anchor, self._new_connection = (0.0, arrival.monotonic), False
            return 0.0, None
        least = self._pts + _SMALLEST_STEP
        if self._new_connection:
            self._new_connection = False
            # From the estimate, not from the last frame: its delay would be carried along for ever.
            pts = max(least, arrival.utc - self._offset - (stepped or 0.0))
            self._anchor = (pts, arrival.monotonic)
            return pts, None
        by_arrival = max(least, self._anchor[0] + arrival.monotonic - self._anchor[1])
        if raw is None or self._raw is None:
            step = self._step if self._step is not None else by_arrival - self._pts
        else:
            step = raw - self._raw
        pts = self._pts + step
        reason = None
        if step < 0:
            reason = "jumped back"
        elif pts > by_arrival + self._max_jump:
            reason = "jumped ahead"
        elif pts < by_arrival - self._max_jump and not self._may_be_late:
            reason = "fell behind"
        if reason is None:
            return max(least, pts), None
        self._anchor = (by_arrival, arrival.monotonic)
        return by_arrival, (reason, pts - by_arrival)

    def _system_step(self, arrival: Arrival) -> float | None:
        """Return by how much UTC was set since the last frame; None if it was not."""
        if self._pts is None:
            return None
        ran = arrival.monotonic - self._arrival.monotonic
        stepped = arrival.utc - self._arrival.utc - ran
        return stepped if abs(stepped) > 1.0 else None

    def _follow_arrival(self, pts: float, arrival: Arrival, stepped: float | None) -> None:
        """Follow arrivals.

        Frames are late, never early: the estimate is the least delay seen, slowly forgotten.
        """
        seen = arrival.utc - pts
        if self._pts is None:
            self._offset = seen
            return
        self._offset += stepped or 0.0
        if seen < self._offset:
            self._offset = seen
        else:
            self._offset = min(seen, self._offset + _FOLLOW * max(0.0, pts - self._pts))

    def _wall_seconds(self, pts: float, camera_utc: float | None) -> tuple[WallSource, float, float | None]:
        """Return the source of wall time, the time, and the camera's error if it has just been noticed."""
        ours = pts + self._offset
        if camera_utc is None:
            return "arrival", ours, None
        skew = camera_utc - ours
        # Twice the limit to lose trust, once to regain it, so that a camera near the limit does not
        # alternate.
        limit = self._max_skew * (2 if self._source == "rtcp" else 1)
        if abs(skew) <= limit:
            self._skewed = False
            return "rtcp", camera_utc, None
        news = None if self._skewed else skew
        self._skewed = True
        return "arrival", ours, news
