"""Live sources: RTSP cameras and other endless streams that FFmpeg opens by URL.

A background thread reads, decodes and reconnects; frames wait in a short queue and become arrays when they
are taken. Guarantees:

* Frames are numbered in order of arrival, including lost and dropped ones; no number is used twice.
* `pts_seconds` increases from frame to frame, whatever happens to connections and clocks.
* During an outage there are no frames: none is made up, black or repeated. The first frame afterwards carries
  a `gap` event (reason, seconds) and a `reconnect` event.
* After connecting, nothing is delivered before a keyframe, and no picture that the decoder reports damaged.
* Ledger and events agree: every dropped and every corrupt frame is in both.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from pipeline.base.backoff import Backoff
from pipeline.base.closeable import Closing
from pipeline.base.errors import SourceError, UsageError, one_line
from pipeline.base.records import Event, Frame
from pipeline.base.redaction import redacted, redacted_trace
from pipeline.live.camera.clock import LiveClock, Stamp, WallSource
from pipeline.live.camera.connection import Connection, ConnectionLost
from pipeline.live.camera.ledger import Ledger, LedgerCounts
from pipeline.live.camera.options import LiveOptions
from pipeline.live.camera.picture_decoder import Lost, Shown
from pipeline.live.camera.queue import LiveQueue, Waiting
from pipeline.live.camera.transport import TransportChoice
from pipeline.video.decoding import Converter

log = logging.getLogger(__name__)

LiveState = Literal["idle", "connecting", "streaming", "waiting", "closed"]

_MARGIN_SECONDS = 5.0
_RATE_OVER = 64


@dataclass(frozen=True, slots=True)
class LiveStatus:
    """Status of a live source.

    Args:
        state: "idle": not started yet; "waiting": until the next attempt to connect.
        connections: number of connections made.
        tries: failed attempts to connect since the last picture.
        failure: why there is no connection, or why the last one ended; one line, without credentials.
        retry_seconds: time until the next attempt, while waiting.
        frames_per_second: recent receiving rate; 0 while there is no connection.
        silent_seconds: time since the last picture.
        lag_seconds: time between arrival and delivery of the frame that was delivered last.
        wall_source: where wall times come from.
    """

    state: LiveState
    connections: int
    tries: int
    failure: str | None
    retry_seconds: float | None
    height: int
    width: int
    codec: str
    frames_per_second: float
    silent_seconds: float | None
    lag_seconds: float | None
    wall_source: WallSource | None
    ledger: LedgerCounts


class LiveSource(Closing):
    """An endless live stream. A `VideoSource`; use it as a context manager.

    Nothing is opened before frames are read or `start` is called: an unreachable camera is waited for and is
    not an error. Reading and closing may happen in different threads; only one thread may read.

    Args:
        url: URL of the stream; kept secret.
        ledger: the ledger to count in, when one is kept across a restart.
        seed: makes the backoff repeatable.

    Attributes:
        uri: the URL without credentials.
        width, height, codec, container, rate: of the newest connection; 0, "" or None before the first one.
        trailing_losses: events that no frame carried; set once `frames` has ended.

    Raises UsageError for an invalid URL, or one that the guard refuses without a look-up.
    """

    frame_count: int | None = None
    fingerprint = "live"
    damaged = False

    def __init__(
        self,
        url: str,
        options: LiveOptions | None = None,
        *,
        ledger: Ledger | None = None,
        seed: int | None = None,
    ) -> None:
        self.options = options or LiveOptions()
        if "://" not in url or "\0" in url:
            raise UsageError(f"{url!r} is not a live stream: give a URL such as rtsp://camera/stream")
        if self.options.guard is not None:
            self.options.guard.parse(url)
        self._url = url
        self.uri = redacted(url)
        self.ledger = ledger or Ledger()
        self.width = self.height = 0
        self.rate: float | None = None
        self.codec = self.container = ""
        self.trailing_losses: tuple[Event, ...] = ()
        settings = self.options
        self._queue = LiveQueue(
            self.ledger,
            settings.policy,
            max_frames=settings.queue_frames,
            max_bytes=settings.queue_bytes,
            max_age_seconds=settings.max_age_seconds,
        )
        self._clock = LiveClock(
            max_jump_seconds=settings.max_jump_seconds,
            max_skew_seconds=settings.max_skew_seconds,
            may_be_late=settings.policy == "every",
        )
        self._backoff = Backoff(
            settings.first_backoff_seconds,
            settings.most_backoff_seconds,
            random=random.Random(seed),
        )
        self._transport = TransportChoice(settings.transport, url)
        self._pictures = False  # whether this connection gave any picture
        self._converter = Converter()
        self._numbers_from = 0  # offset added to the queue's numbers
        self._times_from = 0.0  # offset added to the clock's times
        self._resumed_after: tuple[float, datetime | None] | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._first = threading.Event()
        self._state: LiveState = "idle"
        self._failure: str | None = None
        self._connections = self._tries = 0
        self._retry_at: float | None = None
        self._arrivals: deque[float] = deque(maxlen=_RATE_OVER)
        self._lag: float | None = None
        self._outage: tuple[str, str] | None = None
        self._seen: tuple[tuple[int, int], str] | None = None  # size and codec of the last picture
        self._wall_source: WallSource | None = None
        self._crash: BaseException | None = None

    # --- for the reader ----------------------------------------------------------------------------

    def start(self) -> None:
        """Start connecting in the background."""
        with self._lock:
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._run, name="xmem-live", daemon=True)
                self._thread.start()

    def wait_ready(self, seconds: float) -> None:
        """Wait for the first picture.

        Raises SourceError with the reason if there is none in time; the source keeps trying to connect.
        """
        self.start()
        self._first.wait(seconds)
        self._check()
        if not self.width:
            why = self.status().failure or "no picture yet"
            raise SourceError(f"{self.uri}: no picture within {seconds:g} s ({why}); check URL and camera")

    def frames(
        self,
        start: int | None = None,
        *,
        previous_pts_seconds: float | None = None,
        previous_wall_time: datetime | None = None,
    ) -> Iterator[Frame]:
        """Yield frames as they arrive, until `close` is called.

        Args:
            start: number of the first frame; by default the numbering continues.
            previous_pts_seconds: timestamps continue after this one, after a restart.
            previous_wall_time: wall time of the same frame; tells how long the restart took.
        """
        self.resume(start, previous_pts_seconds, previous_wall_time)
        while True:
            frame = self.read()
            if frame is None:
                return
            yield frame

    def resume(
        self,
        start: int | None = None,
        previous_pts_seconds: float | None = None,
        previous_wall_time: datetime | None = None,
    ) -> None:
        """Continue with frame number `start`, and timestamps after those from before a restart."""
        if start is not None:
            if start < 0:
                raise SourceError(f"frames from {start}: frame numbers begin at 0")
            self._numbers_from = start - self._queue.oldest_index
        if previous_pts_seconds is not None:
            self._resumed_after = (previous_pts_seconds, previous_wall_time)
        self.start()

    def read(self, timeout: float | None = None) -> Frame | None:
        """Return the next frame; None on timeout or if the source is closed (see `closed`)."""
        self.start()
        item = self._queue.get(timeout)
        if item is None:
            self._check()
            return None
        self._lag = time.monotonic() - item.arrival
        return self._frame(item)

    @property
    def closed(self) -> bool:
        """Whether the source will deliver no more frames."""
        return self._queue.closed

    def status(self) -> LiveStatus:
        """Return the current status without blocking; callable from any thread."""
        now = time.monotonic()
        arrivals = list(self._arrivals)
        rate = 0.0
        if len(arrivals) > 1 and self._state == "streaming":
            rate = (len(arrivals) - 1) / max(1e-3, now - arrivals[0])
        retry = self._retry_at
        return LiveStatus(
            state="closed" if self._stop.is_set() else self._state,
            connections=self._connections,
            tries=self._tries,
            failure=self._failure,
            retry_seconds=None if retry is None else max(0.0, retry - now),
            height=self.height,
            width=self.width,
            codec=self.codec,
            frames_per_second=rate,
            silent_seconds=now - arrivals[-1] if arrivals else None,
            lag_seconds=self._lag,
            wall_source=self._wall_source,
            ledger=self.ledger.counts(),
        )

    def close(self) -> None:
        """Disconnect and wait for the thread, at most as long as a read or an attempt to connect may take."""
        self._stop.set()
        self._queue.close()
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            limit = max(self.options.open_seconds, self.options.stall_seconds) + _MARGIN_SECONDS
            thread.join(limit)
            if thread.is_alive():
                log.warning("%s: reading thread still busy after %.0f s, left running", self.uri, limit)
        self.trailing_losses = self._shifted(self._queue.trailing())

    def __repr__(self) -> str:
        return f"LiveSource({self.uri!r}, {self.width}x{self.height}, {self._state})"

    # --- background thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._state = "connecting"
                way = self._transport.current
                self._pictures = False
                try:
                    with Connection(self._url, replace(self.options, transport=way)) as connection:
                        self._follow(connection)
                except ConnectionLost as lost:
                    if self._transport.lost(lost, pictures=self._pictures):
                        log.info("%s: %s; trying %s", self.uri, lost.detail, self._transport.current.upper())
                        continue
                    self._lost(lost)
                if not self._stop.is_set():
                    self._wait()
        except BaseException as error:  # an internal error: the reader must see it
            self._crash = error
            log.error("%s: reading the live stream failed: %s", self.uri, redacted_trace(error))
        finally:
            self._state = "closed"
            self._queue.end()
            self._first.set()

    def _follow(self, connection: Connection) -> None:
        """Read a connection to its end."""
        self._connections += 1
        self._arrivals.clear()
        began: float | None = None
        self._clock.reconnected()
        for item in connection.items():
            if self._stop.is_set():
                return
            if isinstance(item, Lost):
                self._queue.lost(item.kind, item.reason, item.count)
                continue
            arrival = item.arrival.monotonic
            if began is None:
                began = arrival
                self._back(connection, arrival)
            elif item.silence_seconds > self.options.gap_seconds:
                self._queue.note("gap", "silence", {"seconds": round(item.silence_seconds, 3)})
            if arrival - began > self.options.stable_seconds:
                self._backoff.reset()
            self._put(connection, item)

    def _put(self, connection: Connection, item: Shown) -> None:
        picture = item.picture
        size = (int(picture.height), int(picture.width))
        if self._seen is not None:
            if size != self._seen[0]:
                self._queue.note("resized", None, {"from": list(self._seen[0]), "to": list(size)})
            if connection.codec != self._seen[1]:
                self._queue.note("resized", "codec", {"from": self._seen[1], "to": connection.codec})
        self._seen = (size, connection.codec)
        self.height, self.width = size
        stamp = self._clock.stamp(
            item.raw_seconds,
            item.arrival,
            duration_seconds=item.duration_seconds,
            camera_utc=item.camera_utc,
        )
        for change in stamp.changes:
            detail: dict[str, Any] = {"wall_time": change.source}
            if change.seconds is not None:
                detail["seconds"] = round(change.seconds, 3)
            self._queue.note("clock", change.reason, detail)
        self._wall_source = stamp.source
        self._last_arrival = item.arrival.monotonic
        self._arrivals.append(self._last_arrival)
        self._state = "streaming"
        self._tries = 0
        size_bytes = sum(plane.buffer_size for plane in picture.planes)
        self._queue.put(picture, stamp, size_bytes, item.arrival.monotonic)
        self._first.set()

    _last_arrival: float | None = None

    def _back(self, connection: Connection, arrival: float) -> None:
        """Note the first picture of a connection."""
        self._transport.worked()
        self._pictures = True
        self.codec, self.container = connection.codec, connection.container
        self.rate = connection.rate
        if self._last_arrival is not None and self._outage is not None:
            reason, text = self._outage
            seconds = round(arrival - self._last_arrival, 3)
            detail = {"seconds": seconds, "tries": self._tries + 1, "failure": text}
            self._queue.note("gap", reason, detail)
            self._queue.note("reconnect", reason, {"connection": self._connections})
            log.info("%s: connected again after %.1f s (%s)", self.uri, seconds, reason)
        self._outage = None
        self._failure = None

    def _lost(self, lost: ConnectionLost) -> None:
        self._tries += 1
        self._failure = self._transport.failure(lost)
        if self._outage is None:  # the first failure names the outage; later ones belong to it
            self._outage = (lost.reason, lost.detail)
            log.warning("%s: %s", self.uri, self._failure)
        else:
            log.debug("%s: %s", self.uri, self._failure)

    def _wait(self) -> None:
        self._state = "waiting"
        delay = self._backoff.next_seconds()
        self._retry_at = time.monotonic() + delay
        self._stop.wait(delay)
        self._retry_at = None

    # --- frames ------------------------------------------------------------------------------------

    def _frame(self, item: Waiting) -> Frame:
        stamp = self._resumed(item.stamp)
        image = self._converter.to_image(item.picture)
        number = item.frame_index + self._numbers_from
        return Frame(image, number, stamp.pts_seconds, stamp.wall_time, item.events.events(number, stamp))

    def _resumed(self, stamp: Stamp) -> Stamp:
        if self._resumed_after is not None:
            pts, wall = self._resumed_after
            away = 0.0 if wall is None else (stamp.wall_time - wall) / timedelta(seconds=1)
            self._times_from = pts + max(away, 0.001) - stamp.pts_seconds
            self._resumed_after = None
        return replace(stamp, pts_seconds=stamp.pts_seconds + self._times_from)

    def _shifted(self, events: tuple[Event, ...]) -> tuple[Event, ...]:
        return tuple(replace(event, frame_index=event.frame_index + self._numbers_from) for event in events)

    def _check(self) -> None:
        if self._crash is not None:
            raise SourceError(
                f"{self.uri}: reading failed ({one_line(self._crash)}); this is a bug in the program"
            ) from self._crash
