"""HubStream: a hub's bookkeeping for one stream: opening, failures, retries, closing."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pipeline.base.backoff import Backoff
from pipeline.base.errors import UsageError
from pipeline.live.camera.ledger import LedgerCounts
from pipeline.live.hub.settings import HubSettings
from pipeline.live.recent import LiveView
from pipeline.live.spec import LiveSpec
from pipeline.live.tracker import LiveTracker
from pipeline.storage.failures import Failure
from xmem_core import VideoSegmenter

_STABLE_SECONDS = 30.0
_WARM_UP = 2  # frames
_TRIES = 3  # attempts of a request, if tracking fails on its frame


@dataclass
class HubStream:
    """One stream of a hub. `LiveHub` defines which thread may access it.

    Args:
        since: time at which it was added or its hub started; ISO 8601, UTC.
        segmenter: the hub's segmenter, or one with this stream's size and the same weights.
        tracker: the tracker while the stream is open, else None.
        busy: whether another thread is opening or closing it.
        failure: the last failure.
        retry_at, opened_at, tracked_at: times of `time.monotonic`; `tracked_at` of its last frame.
        failures: number of failures since it was last stable.
        size: (height, width) of its frames, once known.
        reopen: whether it must be closed and opened again with the current `spec`.
        unfit: why it exceeds the device's capacity, found once its frame size was known.
        last_ledger, last_frame: ledger and frame number when it was last closed.
        distrusted: reasons, by request number, why a request must not be applied again.
        done: set when it is removed and its rows are committed.
    """

    spec: LiveSpec
    view: LiveView
    backoff: Backoff
    since: str
    segmenter: VideoSegmenter
    tracker: LiveTracker | None = None
    busy: bool = False
    failure: Failure | None = None
    retry_at: float = 0.0
    opened_at: float = 0.0
    tracked_at: float = -math.inf
    failures: int = 0
    ms_per_frame: float | None = None
    removed: bool = False
    size: tuple[int, int] | None = None
    reopen: bool = False
    unfit: UsageError | None = None
    last_ledger: LedgerCounts = field(default_factory=LedgerCounts)
    last_frame: int = 0
    distrusted: dict[int, str] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)
    _timed: int = 0
    _suspects: dict[int, int] = field(default_factory=dict)  # request number -> failures on its frame

    @classmethod
    def of(cls, spec: LiveSpec, settings: HubSettings, segmenter: VideoSegmenter) -> HubStream:
        """A stream that is not opened yet.

        Args:
            segmenter: the hub's segmenter.
        """
        if spec.settings.size is not None and spec.settings.size != segmenter.size:
            segmenter = copy.copy(segmenter)  # shares the weights
            segmenter.size = spec.settings.size
        return cls(
            spec,
            LiveView(settings.kept_records),
            Backoff(settings.first_backoff_seconds, settings.most_backoff_seconds),
            datetime.now(UTC).isoformat(timespec="seconds"),
            segmenter,
        )

    def renew(self) -> None:
        """Reset earlier failures before opening with a changed spec; they say nothing about the new one."""
        self.reopen = False
        self.failure, self.retry_at, self.failures = None, 0.0, 0
        self.unfit = self.size = None
        self.backoff.reset()

    def may_open(self, now: float) -> bool:
        """Whether the stream may be opened: its last failure is not permanent and the backoff is over."""
        permanent = self.failure is not None and self.failure.permanent
        return not permanent and now >= self.retry_at

    def failed(self, error: Exception, now: float) -> Failure:
        """Record that opening or tracking failed, and schedule the next attempt."""
        self.failure = Failure.of(error)
        self.failures += 1
        self.retry_at = now + self.backoff.next_seconds()
        return self.failure

    def suspect(self, requests: Iterable[int], message: str) -> None:
        """Record that tracking failed on the frame of these requests.

        After `_TRIES` failures a request is distrusted: it would be applied again on every attempt, and the
        stream would never get past it.
        """
        for number in requests:
            times = self._suspects[number] = self._suspects.get(number, 0) + 1
            if times >= _TRIES:
                self.distrusted[number] = (
                    f"tracking failed {times} times on the frame that it came in at, last with {message}"
                )

    def tracked(self, ms: float, now: float) -> None:
        """Record the time of a tracked frame, in milliseconds. Warm-up frames are not counted."""
        self._timed += 1
        self.tracked_at = now
        if self._timed > _WARM_UP:
            known = self.ms_per_frame
            self.ms_per_frame = ms if known is None else 0.95 * known + 0.05 * ms
        if self.failures and now - self.opened_at > _STABLE_SECONDS:
            self.backoff.reset()
            self.failures = 0
