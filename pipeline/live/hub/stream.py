"""HubStream: a hub's bookkeeping for one stream: opening, failures, retries, closing."""

from __future__ import annotations

import copy
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
_TRIES = 3  # of a request on whose frame tracking fails


@dataclass
class HubStream:
    """One stream of a hub. `LiveHub` says which thread may do what with it.

    Args:
        since: when it was added, or its hub began; ISO 8601, UTC.
        segmenter: the hub's, or one of this stream's own size with the same weights.
        tracker: while it is open.
        busy: being opened or closed by another thread.
        failure: the last one there was.
        retry_at, opened_at: by `time.monotonic`.
        failures: since it last was stable.
        size: (height, width) of its frames, once that is known.
        reopen: it is to be closed, and opened again as `spec` says by now.
        unfit: why it does not fit, as it turned out when the size was known.
        last_ledger, last_frame: as they were when it was last closed.
        distrusted: why, by the number of a request, it is not to be done again.
        done: set when it has been removed, with all it had committed.
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
    _suspects: dict[int, int] = field(default_factory=dict)  # requests -> failures on their frames

    @classmethod
    def of(cls, spec: LiveSpec, settings: HubSettings, segmenter: VideoSegmenter) -> HubStream:
        """A stream that nothing has been done about yet.

        Args:
            segmenter: the hub's.
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
        """It is about to be opened as its spec says now: what failed before says nothing about that."""
        self.reopen = False
        self.failure, self.retry_at, self.failures = None, 0.0, 0
        self.unfit = self.size = None
        self.backoff.reset()

    def may_open(self, now: float) -> bool:
        """Whether it is time to try, and there is hope."""
        permanent = self.failure is not None and self.failure.permanent
        return not permanent and now >= self.retry_at

    def failed(self, error: Exception, now: float) -> Failure:
        """It could not be opened or tracked: keeps why, and when to try again."""
        self.failure = Failure.of(error)
        self.failures += 1
        self.retry_at = now + self.backoff.next_seconds()
        return self.failure

    def suspect(self, requests: Iterable[int], message: str) -> None:
        """Tracking failed on the frame of these requests. After some times they are distrusted: they would be
        done again with every try, and the stream never get beyond them.
        """
        for number in requests:
            times = self._suspects[number] = self._suspects.get(number, 0) + 1
            if times >= _TRIES:
                self.distrusted[number] = (
                    f"tracking failed {times} times on the frame that it came in at, last with {message}"
                )

    def tracked(self, ms: float, now: float) -> None:
        """A frame was tracked, which took so many milliseconds. The first ones are no measure of the next."""
        self._timed += 1
        if self._timed > _WARM_UP:
            known = self.ms_per_frame
            self.ms_per_frame = ms if known is None else 0.95 * known + 0.05 * ms
        if self.failures and now - self.opened_at > _STABLE_SECONDS:
            self.backoff.reset()
            self.failures = 0
