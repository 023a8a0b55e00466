"""A camera without a network: frames at a rate, through the queue that real live streams use."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from support.small_net import frame_at

from pipeline.base.records import Event, Frame
from pipeline.live.camera.clock import Stamp
from pipeline.live.camera.ledger import Ledger
from pipeline.live.camera.queue import LiveQueue
from pipeline.live.spec import LiveSpec
from pipeline.testing.detectors import drawn_scene

HEIGHT, WIDTH = 48, 64


@dataclass
class FakeStatus:
    state: str
    lag_seconds: float | None
    failure: str | None = None


class FakeFeed:
    """Shows `frame_at(i)` for ever; `url` is fake://host?fps=N&count=N, count 0 for no end.

    With scene=walk an object walks through the picture repeatedly, as in `drawn_scene`.
    """

    codec, container = "none", "fake"
    rate: float | None = None
    height, width = HEIGHT, WIDTH

    def __init__(self, spec: LiveSpec, ledger: Ledger) -> None:
        query = dict(p.split("=") for p in spec.url.partition("?")[2].split("&") if p)
        self.fps, self.count = float(query.get("fps", 50)), int(query.get("count", 0))
        self.scene = [f.image for f in drawn_scene(100)] if "scene" in query else None
        if self.scene:
            self.height, self.width = self.scene[0].shape[:2]
        self.uri, self.ledger = spec.shown_url, ledger
        settings = spec.settings
        self.queue = LiveQueue(
            ledger,
            settings.policy,
            max_frames=settings.queue_frames,
            max_age_seconds=settings.max_lag_seconds if settings.policy == "latest" else None,
        )
        self.trailing_losses: tuple[Event, ...] = ()
        self.first = 0
        self.times_from = 0.0
        self.lag: float | None = None
        self.stalled = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def closed(self) -> bool:
        return self.queue.closed

    def resume(
        self,
        start: int | None = None,
        previous_pts_seconds: float | None = None,
        previous_wall_time: datetime | None = None,
    ) -> None:
        self.first = start or 0
        if previous_pts_seconds is not None:
            away = 0.0
            if previous_wall_time is not None:
                away = (datetime.now(UTC) - previous_wall_time) / timedelta(seconds=1)
            self.times_from = previous_pts_seconds + max(0.001, away)
        self._thread.start()

    def read(self, timeout: float | None = None) -> Frame | None:
        item = self.queue.get(timeout)
        if item is None:
            return None
        self.lag = time.monotonic() - item.arrival
        number = item.frame_index + self.first
        events = item.events.events(number, item.stamp)
        return Frame(item.picture, number, item.stamp.pts_seconds, item.stamp.wall_time, events)

    def status(self) -> FakeStatus:
        state = "closed" if self.closed else "waiting" if self.stalled else "streaming"
        return FakeStatus(state, self.lag)

    def close(self) -> None:
        self._stop.set()
        self.queue.close()
        if self._thread.ident is not None:
            self._thread.join(10)
        self.trailing_losses = tuple(
            replace(e, frame_index=e.frame_index + self.first) for e in self.queue.trailing()
        )

    def _run(self) -> None:
        begun, shown = time.monotonic(), 0
        while not self._stop.is_set() and (not self.count or shown < self.count):
            due = begun + shown / self.fps
            if (wait := due - time.monotonic()) > 0:
                self._stop.wait(wait)
            if self.stalled:
                begun += 0.01
                time.sleep(0.01)
                continue
            arrival = time.monotonic()
            stamp = Stamp(self.times_from + arrival - begun, datetime.now(UTC), "arrival")
            index = shown + self.first
            picture = self.scene[index % len(self.scene)] if self.scene else frame_at(index)
            self.queue.put(picture, stamp, picture.nbytes, arrival)
            shown += 1
        self.queue.end()
