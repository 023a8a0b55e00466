"""Pacing of a live stream: arrival and tracking rates, and which frames to drop."""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from pipeline.live.camera.ledger import TOO_OLD, Ledger
from pipeline.live.spec import LiveSettings

CATCH_UP_SECONDS = 2.0
"""How many seconds a rate-limited stream, held up by other streams, may catch up on."""

_KEPT = 512  # lags
_RATE_SECONDS = 10.0
_SAMPLE_SECONDS = 0.25
_HELD_UP_SECONDS = 0.05  # gap between two polls from which on the stream counts as held up by others
_FORGOTTEN = 0.02  # decay of a slow frame's time with each frame after it
_LOOKING = 0.4  # share of the time that runs of the detector may take while frames are dropped
_NEW_FRAME, _NEW_LOOK = 0.2, 0.3  # weight of the last one in the mean time of a frame and of a look


class Pace:
    """One stream's pace. One thread updates it; `rates` and `lag_seconds` are thread-safe.

    Args:
        settings: the stream's settings: policy, allowed lag and requested frames per second.
    """

    def __init__(self, settings: LiveSettings) -> None:
        self._settings = settings
        self._lags: deque[float] = deque(maxlen=_KEPT)
        self._samples: deque[tuple[float, int, int]] = deque()  # time, frames received and tracked by then
        self._step_seconds = 0.0  # of slow frames
        self._mean: float | None = None  # seconds of a frame
        self._due = -math.inf  # with a limited rate: time at which the next frame is wanted
        self._looked_at: float | None = None
        self._missed = 0.0  # seconds held up by other streams, not yet caught up on
        self._slow_told = False

    def looks(self, now: float) -> None:
        """Record that the source is being polled. After a long gap, because frames of other streams were
        tracked, a rate-limited stream may catch up on the frames that its rate allowed in the meantime.
        """
        if self._looked_at is not None and now - self._looked_at > _HELD_UP_SECONDS:
            self._missed = min(self._missed + now - self._looked_at, CATCH_UP_SECONDS)
        self._looked_at = now

    def sample(self, now: float, ledger: Ledger) -> None:
        """Sample the ledger's counts. Call it often; calls too soon after the last sample are ignored."""
        if self._samples and now - self._samples[-1][0] < _SAMPLE_SECONDS:
            return
        counts = ledger.counts()
        self._samples.append((now, counts.received, counts.tracked))
        while now - self._samples[0][0] > _RATE_SECONDS:
            self._samples.popleft()

    def unwanted(self, lag: float, read_at: float) -> str | None:
        """The reason to drop a frame; None if it should be tracked. A wanted frame counts for the rate.

        Args:
            lag: age of the frame, in seconds, when it was read from its source at `read_at`.
        """
        chosen = self._settings
        if chosen.policy == "latest":
            room = max(chosen.max_lag_seconds - self._step_seconds, chosen.max_lag_seconds / 4)
            if lag > room:
                return TOO_OLD
        if chosen.fps is not None:
            arrival, gap = read_at - lag, 1 / chosen.fps
            if arrival < self._due - gap / 4:
                return "rate limit"
            self._due = max(self._due, arrival - gap - self._missed) + gap
            if self._due >= arrival - gap:  # caught up
                self._missed = 0.0
        return None

    def is_late(self, lag: float) -> bool:
        """Whether a frame of this age, in seconds, is older than allowed even before it is tracked."""
        return self._settings.policy == "latest" and lag > self._settings.max_lag_seconds

    def tracked(self, lag: float, took: float) -> bool:
        """Record a tracked frame, its lag and its tracking time in seconds.

        Returns:
            True, once only, if the allowed lag cannot be kept even by dropping frames.
        """
        # Follows the slow frames, which are added to memory or given to the detector: with the mean of
        # all frames, every slow one would exceed the lag.
        self._step_seconds = max(took, (1 - _FORGOTTEN) * self._step_seconds + _FORGOTTEN * took)
        self._mean = _mean(self._mean, took, _NEW_FRAME)
        self._lags.append(lag + took)
        chosen = self._settings
        slow = took > chosen.max_lag_seconds and chosen.policy == "latest" and not self._slow_told
        self._slow_told = self._slow_told or slow
        return slow

    @property
    def frame_seconds(self) -> float | None:
        """Mean tracking time of the last frames; None before the first."""
        return self._mean

    def rates(self) -> dict[str, float]:
        """Recent rates of received and tracked frames per second."""
        samples = list(self._samples)
        if len(samples) < 2:
            return {"received_fps": 0.0, "tracked_fps": 0.0}
        (t0, r0, k0), (t1, r1, k1) = samples[0], samples[-1]
        span = max(1e-3, t1 - t0)
        return {"received_fps": (r1 - r0) / span, "tracked_fps": (k1 - k0) / span}

    def lag_seconds(self) -> dict[str, float | None]:
        """Recent age of frames once tracked, in seconds: median and 99th percentile."""
        lags = list(self._lags)
        if not lags:
            return {"p50": None, "p99": None}
        low, high = np.percentile(lags, [50, 99]).tolist()
        return {"p50": round(low, 4), "p99": round(high, 4)}


class LookPace:
    """Which frames of a stream the detector may look at. To be used by the thread that steps the stream.

    Where every frame is tracked, all that are due. Where frames are dropped, a run of the detector takes the
    time of several tracked frames, and masks then move so far from one to the next that each run finds more
    to correct: so runs are spaced such that they take a limited share of the time.
    """

    def __init__(self) -> None:
        self._mean: float | None = None  # seconds of a look
        self._began = 0.0
        self._late = 0  # frames dropped before the last look because tracking took too long

    def may_look(self, now: float, late: int) -> bool:
        """Whether the detector may look at a frame.

        Args:
            now: seconds.
            late: frames of the stream dropped so far because tracking took too long.
        """
        behind = late > self._late
        return self._mean is None or not behind or now - self._began >= self._mean / _LOOKING

    def looked(self, began: float, ended: float, late: int) -> None:
        """Record a look, in seconds, and the dropped frames when it began."""
        self._mean = _mean(self._mean, ended - began, _NEW_LOOK)
        self._began, self._late = began, late


def _mean(known: float | None, newest: float, weight: float) -> float:
    """A running mean after one more value of this weight."""
    return newest if known is None else known + weight * (newest - known)
