"""LiveHub: several live streams in one process, sharing one segmenter. No Ray in here; `actor.py` adds it.

One thread tracks, stream after stream, a frame of each in turn. Opening and closing streams, which may wait
for storage and networks, is done by others. A stream that fails is closed with its cause and tried again
later; the others do not notice. All methods answer at once: none waits for tracking.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pipeline.backoff import Backoff
from pipeline.closing import Closing
from pipeline.detectors import load_detector
from pipeline.errors import UsageError, XmemError
from pipeline.executor import open_segmenter
from pipeline.files import open_files
from pipeline.ledger import Ledger, LedgerCounts
from pipeline.live import LiveFeed, LiveTracker, OpenFeed
from pipeline.live_capacity import Capacity, Load
from pipeline.live_list import LiveList
from pipeline.live_options import LiveOptions
from pipeline.live_spec import LiveSpec
from pipeline.live_view import LiveView
from pipeline.redact import redacted, redacted_trace
from pipeline.rtsp import LiveSource
from pipeline.settings import TrackSettings
from pipeline.sinks import Sinks
from pipeline.store import StreamStore
from pipeline.stream_record import FINISHED, RUNNING
from pipeline.work import Failure
from xmem_core import MemoryConfig, VideoSegmenter

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 0.005
_STABLE_SECONDS = 30.0
_OPENERS = 4
_TRIES = 3  # of a request on whose frame tracking fails


Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class HubSettings:
    """What all streams of one hub have in common. Model and device as for `pipeline.executor.track`.

    Args:
        out: the output folder, a path or any fsspec URI.
        hub: name of the hub; one process at a time may use it in one folder.
        options: how cameras are read; what streams choose themselves (`LiveSettings`) replaces it. Its guard
            says where they may come from.
        max_streams: that may be there at the same time.
        memory_bytes: device memory that may be used; None: most of the device's.
        load: share of the device's time that admitted frame rates may ask for.
        kept_records: recent mask records per stream.
        secrets: folder for URLs with credentials, see `pipeline.live_list`.
        first_backoff_seconds, most_backoff_seconds: between tries to open a stream that failed.
        calibrate: measure a frame's time before the first stream is admitted.
    """

    out: str
    hub: str = "default"
    model: str = "xmem-lite"
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    size: int | None = None
    full_size: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    options: LiveOptions = field(default_factory=LiveOptions)
    sinks: tuple[str, ...] = ()
    max_streams: int = 16
    memory_bytes: int | None = None
    load: float = 0.9
    kept_records: int = 2000
    secrets: str | None = None
    first_backoff_seconds: float = 1.0
    most_backoff_seconds: float = 60.0
    calibrate: bool = True
    out_storage_options: Mapping[str, Any] | None = field(default=None, repr=False)


@dataclass
class _Stream:
    spec: LiveSpec
    view: LiveView
    backoff: Backoff
    since: str
    segmenter: VideoSegmenter
    tracker: LiveTracker | None = None
    busy: bool = False  # being opened or closed by another thread
    failure: Failure | None = None
    retry_at: float = 0.0
    opened_at: float = 0.0
    failures: int = 0
    ms_per_frame: float | None = None
    removed: bool = False
    size: tuple[int, int] | None = None  # of its frames
    unfit: UsageError | None = None  # as it turned out when that was known
    last_ledger: LedgerCounts = field(default_factory=LedgerCounts)
    last_frame: int = 0
    suspects: dict[int, int] = field(default_factory=dict)  # requests -> failures on their frames
    distrusted: dict[int, str] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)


class LiveHub(Closing):
    """Live streams, followed for as long as the hub lives. Use it as a context manager.

    A hub that starts goes on with all streams that the one of the same name and folder had, however it ended.

    Args:
        settings: of all its streams.
        segmenter: by default the one that the settings describe.
        open_feed: makes a stream's source; by default a `LiveSource`.

    Raises:
        UsageError: the settings are wrong. XmemError: the model cannot be had, or the folder be read.
    """

    def __init__(
        self,
        settings: HubSettings,
        *,
        segmenter: VideoSegmenter | None = None,
        open_feed: OpenFeed | None = None,
    ) -> None:
        self.settings = settings
        self._sinks = Sinks.load(settings.sinks)
        self._segmenter = segmenter or open_segmenter(
            settings.model,
            settings.memory,
            size=settings.size,
            full_size=settings.full_size,
            device=settings.device,
            dtype=settings.dtype,
            threads=settings.threads,
        )
        self._open_feed = open_feed or self._live_source
        files = open_files(settings.out, settings.out_storage_options)
        self._list = LiveList(files, settings.hub, Path(settings.secrets) if settings.secrets else None)
        self._capacity = Capacity(self._segmenter, settings.memory_bytes, settings.load)
        if settings.calibrate:
            torch.set_num_threads(settings.threads)
            self._capacity.calibrate()
        self._streams: dict[str, _Stream] = {}
        self._listed: dict[str, LiveSpec] = {}
        self._lock = threading.Lock()  # of the two above; never held while something slow is done
        self._listing = threading.Lock()  # of the durable list
        self._pool = ThreadPoolExecutor(_OPENERS, thread_name_prefix="xmem-hub")
        self._wake = threading.Event()
        self._stop = threading.Event()
        specs, self._unusable = self._list.load()
        for spec in specs:
            self._listed[spec.stream_id] = spec
            self._streams[spec.stream_id] = self._new(spec)
        for name, error in self._unusable.items():
            logger.error("stream %s: %s", name, error)
        self._thread = threading.Thread(target=self._run, name="xmem-hub-tracking", daemon=True)
        self._thread.start()

    # --- for everybody, from any thread ----------------------------------------------------------

    def add(self, spec: LiveSpec) -> dict[str, Any]:
        """Follow a stream from now on; durable when it returns. Its status.

        Raises:
            UsageError: the spec is wrong, the URL is not allowed, the id is taken, or there is no room: the
                message has the numbers. StoreError: it could not be kept.
        """
        if self._stop.is_set():
            raise XmemError("the hub is closed: it takes no streams")
        if self.settings.options.guard is not None:
            self.settings.options.guard.parse(spec.url)
        if spec.detector is not None:
            load_detector(spec.detector)
        self._capacity.admit(spec, ())  # what it finds out about the network takes time, and is remembered
        with self._listing:
            with self._lock:
                if spec.stream_id in self._streams:
                    raise UsageError(
                        f"stream {spec.stream_id} is there already: choose another id, or remove it"
                    )
                most = self.settings.max_streams
                if len(self._streams) >= most:
                    raise UsageError(
                        f"there are {len(self._streams)} streams, {most} are allowed: remove one"
                    )
                self._capacity.admit(spec, self._load())
                stream = self._streams[spec.stream_id] = self._new(spec)
                stream.busy = True  # nothing is begun before it is durable
                self._listed[spec.stream_id] = spec
                listed = list(self._listed.values())
            try:
                self._list.save(listed)
            except BaseException:
                with self._lock:
                    del self._streams[spec.stream_id], self._listed[spec.stream_id]
                raise
        self._unusable.pop(spec.stream_id, None)
        stream.busy = False
        self._wake.set()
        return self._status(stream)

    def remove(self, stream_id: str, wait: float = 0.0) -> dict[str, Any]:
        """Stop following a stream; its rows stay. Durable when it returns. Its last status.

        Args:
            wait: seconds to wait for its last rows to be committed.

        Raises:
            UsageError: there is none of that id. StoreError: it could not be kept.
        """
        with self._listing:
            with self._lock:
                stream = self._streams.get(stream_id)
                if stream is None and stream_id not in self._unusable:
                    raise UsageError(self._unknown(stream_id))
                listed = [s for i, s in self._listed.items() if i != stream_id]
            self._list.save(listed, without=stream_id)
            self._unusable.pop(stream_id, None)
            with self._lock:
                self._listed.pop(stream_id, None)
                if stream is None:
                    return {"id": stream_id, "state": "stopped"}
                stream.removed = True
        self._wake.set()
        if wait > 0:
            stream.done.wait(wait)
        return self._status(stream)

    def list(self) -> Rows:
        """The statuses of all streams, by id."""
        with self._lock:
            streams = sorted(self._streams.items())
        lost = [
            {"id": name, "state": "failed", "cause": str(error)}
            for name, error in sorted(self._unusable.copy().items())
        ]
        return [self._status(stream) for _, stream in streams] + lost

    def status(self, stream_id: str) -> dict[str, Any]:
        """How a stream is, at once. UsageError if there is none of that id."""
        return self._status(self._get(stream_id))

    def request(self, stream_id: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """Ask something of a stream, see `LiveTracker.request`; durable when it returns.

        Raises:
            UsageError: it is wrong. XmemError: the stream is not open just now, or it could not be kept.
        """
        stream = self._get(stream_id)
        tracker = stream.tracker
        if tracker is None:
            state = self._state(stream)
            raise XmemError(f"stream {stream_id} is {state} just now: ask again later")
        answer = tracker.request(content)
        self._wake.set()
        return answer

    def tracks(self, stream_id: str, since: int | None = None, limit: int = 500) -> Rows:
        """Recent mask records, see `LiveView.tracks`."""
        return self._get(stream_id).view.tracks(since, limit)

    def wait_tracks(
        self, stream_id: str, after_seq: int = -1, timeout: float = 10.0
    ) -> dict[str, Any] | None:
        """The newest frame's records once there is one above `after_seq`, see `LiveView.wait`."""
        return self._get(stream_id).view.wait(after_seq, timeout)

    def jpeg(self, stream_id: str, overlay: bool = True, max_side: int = 960, quality: int = 80) -> bytes:
        """The newest frame, see `LiveView.jpeg`."""
        return self._get(stream_id).view.jpeg(overlay, max_side, quality)

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Counters and gauges by stream: numbers only, and dicts of them by reason."""
        with self._lock:
            streams = sorted(self._streams.items())
        return {name: self._metrics(stream) for name, stream in streams}

    def capacity(self) -> dict[str, Any]:
        """What the device has, what of it is predicted to be used, and how long a frame takes."""
        with self._lock:
            return {
                **self._capacity.report(self._load()),
                "streams": len(self._streams),
                "max_streams": self.settings.max_streams,
            }

    def close(self) -> None:
        """Close all streams with everything committed; they are followed again by the next hub."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._wake.set()
        self._thread.join()
        with self._lock:
            streams = list(self._streams.values())
        for stream in streams:
            if stream.tracker is not None:
                self._pool.submit(self._close_one, stream, stream.tracker, RUNNING)
        self._pool.shutdown(wait=True)
        for stream in streams:
            if stream.tracker is not None:  # was being opened; what is closed already stays as it is
                self._close_one(stream, stream.tracker, RUNNING)
        for stream in streams:
            stream.view.close()

    # --- the tracking thread ---------------------------------------------------------------------

    def _run(self) -> None:
        torch.set_num_threads(self.settings.threads)  # counts for the thread that says so
        while not self._stop.is_set():
            with self._lock:
                streams = list(self._streams.values())
            worked = False
            for stream in streams:
                try:
                    worked |= self._turn(stream)
                except Exception as error:  # a fault of the hub's own: no reason to stop the others
                    logger.error("stream %s: %s", stream.spec.stream_id, redacted_trace(error))
            if not worked:
                self._wake.wait(_IDLE_SECONDS)
                self._wake.clear()

    def _turn(self, stream: _Stream) -> bool:
        """One frame of a stream, if there is one."""
        if stream.busy or self._stop.is_set():
            return False
        tracker = stream.tracker
        if stream.removed:
            self._retire(stream)
            return True
        if tracker is None:
            permanent = stream.failure is not None and stream.failure.permanent
            if not permanent and time.monotonic() >= stream.retry_at:
                stream.busy = True
                self._pool.submit(self._open_one, stream)
            return False
        begun = time.perf_counter()
        try:
            if stream.unfit is not None:
                raise stream.unfit
            step = tracker.next_input()
            if step is None:
                return False
            if stream.size != (size := (tracker.source.height, tracker.source.width)):
                stream.size = size
                self._pool.submit(self._recheck, stream)
            result = stream.segmenter.step(step.state, step.image, step.prompt)
            tracker.accept(result)
            took = 1000 * (time.perf_counter() - begun)
        except Exception as error:
            self._failed(stream, tracker, error)
            return True
        known = stream.ms_per_frame
        stream.ms_per_frame = took if known is None else 0.95 * known + 0.05 * took
        if stream.failures and time.monotonic() - stream.opened_at > _STABLE_SECONDS:
            stream.backoff.reset()
            stream.failures = 0
        return True

    def _failed(self, stream: _Stream, tracker: LiveTracker, error: Exception) -> None:
        tracker.failed(error)
        self._note(stream, error)
        for number in tracker.applying:
            times = stream.suspects[number] = stream.suspects.get(number, 0) + 1
            if times >= _TRIES and stream.failure is not None:
                # It would be done again with every try, and the stream never get beyond it.
                stream.distrusted[number] = (
                    f"tracking failed {times} times on the frame that it came in at, last with "
                    f"{stream.failure.message}"
                )
        stream.busy, stream.tracker = True, None
        self._pool.submit(self._close_one, stream, tracker, RUNNING)

    def _note(self, stream: _Stream, error: Exception) -> None:
        stream.failure = Failure.of(error)
        stream.failures += 1
        delay = stream.backoff.next_seconds()
        stream.retry_at = time.monotonic() + delay
        if isinstance(error, XmemError):
            logger.warning("stream %s: %s", stream.spec.stream_id, error)
        else:
            logger.error("stream %s: %s", stream.spec.stream_id, redacted_trace(error))
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()

    def _retire(self, stream: _Stream) -> None:
        tracker, stream.tracker, stream.busy = stream.tracker, None, True

        def retire() -> None:
            if tracker is not None:
                self._close_one(stream, tracker, FINISHED)
            stream.view.close()
            with self._lock:
                if self._streams.get(stream.spec.stream_id) is stream:
                    del self._streams[stream.spec.stream_id]
            stream.done.set()

        self._pool.submit(retire)

    # --- others ----------------------------------------------------------------------------------

    def _open_one(self, stream: _Stream) -> None:
        try:
            tracker = self._tracker(stream)
        except Exception as error:
            self._note(stream, error)
        else:
            stream.opened_at = time.monotonic()
            stream.tracker = tracker
        finally:
            stream.busy = False
            self._wake.set()

    def _close_one(self, stream: _Stream, tracker: LiveTracker, state: str) -> None:
        try:
            tracker.close(state)
        except Exception as error:
            logger.warning("stream %s: closing it failed: %s", stream.spec.stream_id, redacted(str(error)))
        finally:
            stream.last_ledger, stream.last_frame = tracker.source.ledger.counts(), tracker.next_frame
            stream.busy = False
            self._wake.set()

    def _recheck(self, stream: _Stream) -> None:
        """Its frames may be larger than was expected when it was admitted."""
        with self._lock:
            there = self._load()
        try:
            self._capacity.check_memory(stream.spec.stream_id, there)
        except UsageError as error:
            stream.unfit = error

    def _tracker(self, stream: _Stream) -> LiveTracker:
        spec, options = stream.spec, self.settings
        store = StreamStore(options.out, spec.stream_id, options.out_storage_options)
        chosen = spec.settings
        settings = TrackSettings(
            model=options.model,
            model_fingerprint=stream.segmenter.fingerprint,
            memory=stream.segmenter.memory_config,
            size=stream.segmenter.size,
            dtype=options.dtype,
            threads=options.threads,
            box_segmenter=chosen.box_segmenter,
            detector=spec.detector,
            detect_every=chosen.detect_every,
            detect_confirmations=chosen.detect_confirmations,
            max_objects=chosen.max_objects,
            out_of_sight_frames=chosen.out_of_sight_frames,
        )
        return LiveTracker(
            spec,
            store,
            stream.segmenter,
            settings,
            self._open_feed,
            view=stream.view,
            sinks=self._sinks,
            distrusted=stream.distrusted,
        )

    def _live_source(self, spec: LiveSpec, ledger: Ledger) -> LiveFeed:
        chosen = spec.settings
        options = replace(
            self.settings.options,
            policy=chosen.policy,
            transport=chosen.transport,
            queue_frames=chosen.queue_frames,
            max_age_seconds=chosen.max_lag_seconds if chosen.policy == "latest" else None,
        )
        return LiveSource(spec.url, options, ledger=ledger)

    def _new(self, spec: LiveSpec) -> _Stream:
        backoff = Backoff(self.settings.first_backoff_seconds, self.settings.most_backoff_seconds)
        segmenter = self._segmenter
        if spec.settings.size is not None and spec.settings.size != segmenter.size:
            segmenter = copy.copy(segmenter)  # shares the weights
            segmenter.size = spec.settings.size
        view = LiveView(self.settings.kept_records)
        return _Stream(spec, view, backoff, datetime.now(UTC).isoformat(timespec="seconds"), segmenter)

    def _get(self, stream_id: str) -> _Stream:
        stream = self._streams.get(stream_id)
        if stream is None:
            raise UsageError(self._unknown(stream_id))
        return stream

    def _unknown(self, stream_id: str) -> str:
        if stream_id in self._unusable:
            return str(self._unusable[stream_id])
        return f"there is no stream {str(stream_id)[:128]!r} here"

    # --- how they are ----------------------------------------------------------------------------

    def _state(self, stream: _Stream) -> str:
        tracker = stream.tracker
        if stream.removed:
            return "stopped"
        if tracker is None:
            return "failed" if stream.failure is not None else "starting"
        if tracker.paused:
            return "paused"
        feed = str(getattr(tracker.source.status(), "state", "streaming"))
        if feed == "streaming":
            return "running" if tracker.began else "starting"
        return "waiting"

    def _ledger(self, stream: _Stream) -> LedgerCounts:
        tracker = stream.tracker
        return stream.last_ledger if tracker is None else tracker.source.ledger.counts()

    def _status(self, stream: _Stream) -> dict[str, Any]:
        spec, tracker = stream.spec, stream.tracker
        state, counts = self._state(stream), self._ledger(stream)
        answer: dict[str, Any] = {
            "id": spec.stream_id,
            "state": state,
            "cause": None,
            "url": spec.shown_url,
            "since": stream.since,
            "detector": spec.detector,
            "settings": spec.settings.to_dict(),
            "ledger": {**counts.to_json(), "in_flight": counts.in_flight},
            "rates": {"received_fps": 0.0, "tracked_fps": 0.0},
            "lag_seconds": {"p50": None, "p99": None},
            "ms_per_frame": stream.ms_per_frame,
            "failures": stream.failures,
            "next_frame": stream.last_frame,
            "committed_frames": None,
            "width": 0,
            "height": 0,
            "objects": [],
            "requests": {"last": 0, "applied": 0, "rejected": []},
        }
        if tracker is None:
            if state == "failed" and stream.failure is not None:
                answer["cause"] = stream.failure.message
            return answer
        feed = tracker.source.status()
        if state == "waiting":
            answer["cause"] = getattr(feed, "failure", None)
        answer |= {
            "rates": {name: round(rate, 2) for name, rate in tracker.rates().items()},
            "lag_seconds": tracker.lag_seconds(),
            "next_frame": tracker.next_frame,
            "committed_frames": tracker.record.books.frames,
            "width": tracker.source.width,
            "height": tracker.source.height,
            "objects": [
                {
                    "id": r.object_id,
                    "category": r.category,
                    "score": round(r.score, 4),
                    "area": r.area,
                    "bbox": None if r.bbox is None else list(r.bbox),
                }
                for r in stream.view.newest()
            ],
            "requests": {
                "last": tracker.record.last_request,
                "applied": tracker.applied,
                "rejected": [{"seq": r.number, "cause": r.cause} for r in list(tracker.rejected)],
            },
        }
        return answer

    def _metrics(self, stream: _Stream) -> dict[str, Any]:
        status = self._status(stream)
        ledger = status["ledger"]
        return {
            "up": int(status["state"] in ("running", "paused")),
            "received": ledger["received"],
            "tracked": ledger["tracked"],
            "dropped": ledger["dropped"],
            "corrupt": ledger["corrupt"],
            "in_flight": ledger["in_flight"],
            "objects": len(status["objects"]),
            "failures": status["failures"],
            **status["rates"],
            "lag_p50_seconds": status["lag_seconds"]["p50"],
            "lag_p99_seconds": status["lag_seconds"]["p99"],
            "ms_per_frame": status["ms_per_frame"],
            "next_frame": status["next_frame"],
        }

    def _load(self) -> Load:
        """What the capacity is reckoned from: each stream, its size if that is known, and its time."""
        found = []
        for stream in self._streams.values():
            if stream.removed or stream.unfit is not None:
                continue
            found.append((stream.spec, stream.size, stream.ms_per_frame))
        return found
