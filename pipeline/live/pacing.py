"""Pacing of a live stream: arrival and tracking rates, and which frames to drop."""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from pipeline.live.camera.ledger import Ledger
from pipeline.live.spec import LiveSettings

CATCH_UP_SECONDS = 2.0
"""So much of what a stream with a limited rate missed while others were tracked it may catch up with."""

_KEPT = 512  # lags
_RATE_SECONDS = 10.0
_SAMPLE_SECONDS = 0.25
_HELD_UP_SECONDS = 0.05  # between two looks; from here on others have held the stream up
_FORGOTTEN = 0.02  # of a slow frame's time, with each frame after it


class Pace:
    """One stream's pace. One thread tells it what happens; `rates` and `lag_seconds` may be asked from any.

    Args:
        settings: of the stream: its policy, the lag it allows and the frames per second it asks for.
    """

    def __init__(self, settings: LiveSettings) -> None:
        self._settings = settings
        self._lags: deque[float] = deque(maxlen=_KEPT)
        self._samples: deque[tuple[float, int, int]] = deque()  # time, frames received and tracked by then
        self._step_seconds = 0.0
        self._due = -math.inf  # when the next frame is wanted, with a limited rate
        self._looked_at: float | None = None
        self._missed = 0.0  # seconds in which others were tracked, not yet caught up with
        self._slow_told = False

    def looks(self, now: float) -> None:
        """A frame is being looked for. Where that has not been done for a while, because frames of other
        streams were tracked, what a limited rate allowed in that time may be caught up with.
        """
        if self._looked_at is not None and now - self._looked_at > _HELD_UP_SECONDS:
            self._missed = min(self._missed + now - self._looked_at, CATCH_UP_SECONDS)
        self._looked_at = now

    def sample(self, now: float, ledger: Ledger) -> None:
        """Note how far the ledger is. To be called often; most calls come too soon to matter."""
        if self._samples and now - self._samples[-1][0] < _SAMPLE_SECONDS:
            return
        counts = ledger.counts()
        self._samples.append((now, counts.received, counts.tracked))
        while now - self._samples[0][0] > _RATE_SECONDS:
            self._samples.popleft()

    def unwanted(self, lag: float, read_at: float) -> str | None:
        """Why a frame is not to be tracked; None if it is. A frame that is wanted counts for the rate.

        Args:
            lag: how old it was, in seconds, when it came out of its source at `read_at`.
        """
        chosen = self._settings
        if chosen.policy == "latest":
            room = max(chosen.max_lag_seconds - self._step_seconds, chosen.max_lag_seconds / 4)
            if lag > room:
                return "too old"
        if chosen.fps is not None:
            arrival, gap = read_at - lag, 1 / chosen.fps
            if arrival < self._due - gap / 4:
                return "rate limit"
            self._due = max(self._due, arrival - gap - self._missed) + gap
            if self._due >= arrival - gap:  # caught up
                self._missed = 0.0
        return None

    def tracked(self, lag: float, took: float) -> bool:
        """A frame was tracked; both in seconds.

        Returns:
            True once only: the lag asked for cannot be kept, whatever is dropped.
        """
        # Follows the slow frames, those that go into memory or that the detector looks at: with the mean
        # of all, every one of them would come out too late.
        self._step_seconds = max(took, (1 - _FORGOTTEN) * self._step_seconds + _FORGOTTEN * took)
        self._lags.append(lag + took)
        chosen = self._settings
        slow = took > chosen.max_lag_seconds and chosen.policy == "latest" and not self._slow_told
        self._slow_told = self._slow_told or slow
        return slow

    def rates(self) -> dict[str, float]:
        """Frames per second lately, received and tracked."""
        samples = list(self._samples)
        if len(samples) < 2:
            return {"received_fps": 0.0, "tracked_fps": 0.0}
        (t0, r0, k0), (t1, r1, k1) = samples[0], samples[-1]
        span = max(1e-3, t1 - t0)
        return {"received_fps": (r1 - r0) / span, "tracked_fps": (k1 - k0) / span}

    def lag_seconds(self) -> dict[str, float | None]:
        """How old frames were once they were tracked, lately: the median, and 99 of 100."""
        lags = list(self._lags)
        if not lags:
            return {"p50": None, "p99": None}
        low, high = np.percentile(lags, [50, 99]).tolist()
        return {"p50": round(low, 4), "p99": round(high, 4)}
