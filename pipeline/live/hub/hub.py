"""LiveHub: several live streams in one process with one segmenter. Does not import Ray.

One thread tracks frame by frame, streams with a promised rate first (`pipeline.live.hub.turns`), on a GPU
several streams at once (`pipeline.live.hub.together`). Other threads open and close streams, which may wait
for storage and networks. A stream that fails is closed with its cause and retried later; other streams are
not affected. No method waits for tracking.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

from pipeline.base.closeable import Closing
from pipeline.base.errors import UsageError, XmemError
from pipeline.base.redaction import redacted, redacted_trace
from pipeline.detect.loading import load_detector
from pipeline.live.camera.ledger import Ledger
from pipeline.live.camera.source import LiveSource
from pipeline.live.hub.capacity import Capacity, Load
from pipeline.live.hub.event_push import EventPush, Receiver
from pipeline.live.hub.registry import LiveList
from pipeline.live.hub.settings import HubSettings
from pipeline.live.hub.status import metrics_of, state_of, status_of
from pipeline.live.hub.stream import HubStream
from pipeline.live.hub.together import EXPECTED_SECONDS, MOST_TOGETHER, WAIT_SECONDS, Batch, Ready, stepped
from pipeline.live.hub.turns import Turn, Turns
from pipeline.live.hub.webhook import Webhook
from pipeline.live.recent import LiveView
from pipeline.live.spec import LiveSpec
from pipeline.live.tracker import LiveFeed, LiveTracker, OpenFeed
from pipeline.storage.failures import Failure
from pipeline.storage.opening import open_files
from pipeline.tracking.look_ahead import help_steps, threads_of_step
from pipeline.tracking.segmenters import open_segmenter
from pipeline.tracking.stream_record import FINISHED, RUNNING
from pipeline.tracks.sinks import Sinks
from pipeline.tracks.store import StreamStore
from xmem_core import StepResult, VideoSegmenter

__all__ = ["HubSettings", "LiveHub"]

logger = logging.getLogger(__name__)

_IDLE_SECONDS = 0.005
_OPENERS = 4

P = ParamSpec("P")
T = TypeVar("T")
Rows = list[dict[str, Any]]
Receivers = list[tuple[Receiver, tuple[float, float]]]  # with the backoff between tries


class LiveHub(Closing):
    """Tracks several live streams until it is closed. Use it as a context manager.

    A new hub resumes all streams of the previous hub with the same name and folder, however that one ended.

    Args:
        settings: settings of all its streams.
        segmenter: by default opened from the settings.
        open_feed: creates a stream's source; by default a `LiveSource`.

    Raises:
        UsageError: the settings are wrong. XmemError: the model cannot be loaded, or the folder not be read.
    """

    def __init__(
        self,
        settings: HubSettings,
        *,
        segmenter: VideoSegmenter | None = None,
        open_feed: OpenFeed | None = None,
    ) -> None:
        threads = settings.tracking.model.threads or torch.get_num_threads()
        tracking = settings.tracking.with_options({"threads": threads})
        self.settings = settings = replace(settings, tracking=tracking)
        self._sinks = Sinks.load(tracking.commit.sinks)
        self._segmenter = segmenter or open_segmenter(tracking.model, tracking.memory)
        help_steps(self._segmenter, threads)
        self._open_feed = open_feed or self._live_source
        files = open_files(settings.out, settings.out_storage_options)
        self._list = LiveList(files, settings.hub, Path(settings.secrets) if settings.secrets else None)
        self._capacity = Capacity(self._segmenter, settings.memory_bytes, settings.load)
        if settings.calibrate:
            torch.set_num_threads(threads_of_step(self._segmenter, threads))
            self._capacity.calibrate()
        self._turns = Turns(settings.load)
        self._streams: dict[str, HubStream] = {}
        self._listed: dict[str, LiveSpec] = {}
        self._lock = threading.Lock()  # guards the two above; never held during slow operations
        self._listing = threading.Lock()  # guards the stored registry
        self._pool = ThreadPoolExecutor(_OPENERS, thread_name_prefix="xmem-hub")
        self._wake = threading.Event()
        self._stop = threading.Event()
        specs, self._unusable = self._list.load()
        for spec in specs:
            self._listed[spec.stream_id] = spec
            self._streams[spec.stream_id] = self._new(spec)
        for name, error in self._unusable.items():
            logger.error("stream %s: %s", name, error)
        self._pushes = self._event_pushes()
        self._thread = threading.Thread(target=self._run, name="xmem-hub-tracking", daemon=True)
        self._thread.start()

    # --- public methods, thread-safe -------------------------------------------------------------

    def add(self, spec: LiveSpec) -> dict[str, Any]:
        """Add a stream and return its status. The stream is durably registered when this returns.

        Raises:
            UsageError: the spec is wrong, the URL is not allowed, the id is taken, or the device lacks
                capacity; the message gives the numbers. StoreError: the stream could not be registered.
        """
        if self._stop.is_set():
            raise XmemError("the hub is closed: it takes no streams")
        if self.settings.options.guard is not None:
            self.settings.options.guard.parse(spec.url)
        if spec.detector is not None:
            device = self.settings.tracking.model.device
            load_detector(spec.detector, device=device, classes=spec.settings.finder.classes)
        self._capacity.prepare(spec)
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
                stream.busy = True  # must not be opened before it is registered
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
        return status_of(stream)

    def remove(self, stream_id: str, wait: float = 0.0) -> dict[str, Any]:
        """Remove a stream and return its last status. Its rows are kept. Durable when it returns.

        Args:
            wait: seconds to wait for its last rows to be committed.

        Raises:
            UsageError: there is no stream with that id. StoreError: the removal could not be stored.
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
        return status_of(stream)

    def list(self) -> Rows:
        """The statuses of all streams, by id."""
        with self._lock:
            streams = sorted(self._streams.items())
        lost = [
            {"id": name, "state": "failed", "cause": str(error)}
            for name, error in sorted(self._unusable.copy().items())
        ]
        return [status_of(stream) for _, stream in streams] + lost

    def status(self, stream_id: str) -> dict[str, Any]:
        """Status of a stream, without waiting. UsageError if there is no stream with that id."""
        return status_of(self._get(stream_id))

    def request(self, stream_id: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """Submit a request to a stream; durable when it returns.

        Args:
            content: as for `LiveTracker.request`, or {"camera": change}, see `LiveSpec.with_camera`: the
                stream is closed and resumes with the new camera, keeping its objects, frame numbers and
                ledger. Or {"zones": content of a zones file, {} for none}: in force from the next frame on.

        Raises:
            UsageError: the request is wrong. XmemError: the stream is not open, or the request could not be
                stored.
        """
        if "camera" in content:
            return self._change_camera(stream_id, content)
        if "zones" in content:
            return self._change_zones(stream_id, content)
        stream = self._get(stream_id)
        tracker = stream.tracker
        if tracker is None:
            state = state_of(stream)
            raise XmemError(f"stream {stream_id} is {state} just now: ask again later")
        edit = content.get("memory") if isinstance(content, Mapping) else None
        if isinstance(edit, Mapping) and "copy" in edit:
            with self._lock:
                there = self._load()
            self._capacity.check_copy(stream_id, there)
        answer = tracker.request(content)
        self._wake.set()
        return answer

    def _change_camera(self, stream_id: str, content: Mapping[str, Any]) -> dict[str, Any]:
        if len(content) > 1:
            raise UsageError("a change of the camera is made by itself: ask for the rest after it")
        with self._listing:
            stream = self._get(stream_id)
            spec = stream.spec.with_camera(content["camera"])
            if self.settings.options.guard is not None:
                self.settings.options.guard.parse(spec.url)
            with self._lock:
                if stream.removed:
                    raise UsageError(f"stream {stream_id} is being removed")
                listed = [spec if i == stream_id else s for i, s in self._listed.items()]
            self._list.save(listed)
            with self._lock:
                self._listed[stream_id] = stream.spec = spec
                stream.reopen = True
        self._wake.set()
        return {"done": True}

    def _change_zones(self, stream_id: str, content: Mapping[str, Any]) -> dict[str, Any]:
        if len(content) > 1:
            raise UsageError("a change of the zones is made by itself: ask for the rest after it")
        with self._listing:
            stream = self._get(stream_id)
            spec = stream.spec.with_zones(content["zones"])
            with self._lock:
                if stream.removed:
                    raise UsageError(f"stream {stream_id} is being removed")
                listed = [spec if i == stream_id else s for i, s in self._listed.items()]
            self._list.save(listed)
            with self._lock:
                self._listed[stream_id] = stream.spec = spec
                tracker = stream.tracker
                if tracker is not None:
                    tracker.zones.change(spec.zones_here)
        return {"done": True}

    def view(
        self,
        stream_id: str,
        read: Callable[Concatenate[LiveView, P], T],
        /,
        *arguments: P.args,
        **options: P.kwargs,
    ) -> T:
        """Read a stream's recent results: `view("gate", LiveView.jpeg, max_side=640)`.

        Args:
            read: `LiveView.tracks`, `LiveView.events`, `LiveView.wait` or `LiveView.jpeg`.
            arguments, options: of that method.

        Raises:
            UsageError: there is no stream with that id, or an argument is not allowed.
        """
        return read(self._get(stream_id).view, *arguments, **options)

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Counters and gauges by stream: numbers only, and dicts of them by reason."""
        with self._lock:
            streams = sorted(self._streams.items())
        return {name: metrics_of(stream) for name, stream in streams}

    def capacity(self) -> dict[str, Any]:
        """Device memory, its predicted use, and the time per frame."""
        with self._lock:
            return {
                **self._capacity.report(self._load()),
                "streams": len(self._streams),
                "max_streams": self.settings.max_streams,
            }

    def close(self) -> None:
        """Close all streams after committing their rows. The next hub resumes them."""
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
        for push in self._pushes:
            push.close()

    # --- the tracking thread ---------------------------------------------------------------------

    def _run(self) -> None:
        threads = threads_of_step(self._segmenter, self.settings.tracking.threads)
        torch.set_num_threads(threads)  # applies to the calling thread only
        while not self._stop.is_set():
            with self._lock:
                streams = list(self._streams.values())
            worked = False
            for stream in streams:  # before each frame, whosever it is
                worked |= bool(self._guarded(self._manage, stream))
            worked |= self._advance(streams)
            if not worked:
                self._wake.wait(_IDLE_SECONDS)
                self._wake.clear()

    def _in_turn(self, streams: Iterable[HubStream]) -> Iterator[HubStream]:
        """The open streams, in the order in which they are asked for a frame."""
        ready = {stream.spec.stream_id: stream for stream in streams if stream.tracker is not None}
        order = self._turns.order([self._turn_of(stream) for stream in ready.values()], time.monotonic())
        return (ready[str(key)] for key in order)

    def _turn_of(self, stream: HubStream) -> Turn:
        seconds = (stream.ms_per_frame or 0.0) / 1000
        return Turn(stream.spec.stream_id, stream.spec.settings.fps, seconds)

    def _guarded(self, do: Callable[[HubStream], T], stream: HubStream) -> T | None:
        try:
            return do(stream)
        except Exception as error:  # a bug in the hub: must not stop the other streams
            logger.error("stream %s: %s", stream.spec.stream_id, redacted_trace(error))
            return None

    def _manage(self, stream: HubStream) -> bool:
        """Start pending work of a stream other than tracking. Returns whether there was any."""
        if stream.busy or self._stop.is_set():
            return False
        tracker = stream.tracker
        if stream.removed:
            self._retire(stream)
            return True
        if stream.reopen and tracker is not None:
            stream.busy, stream.tracker = True, None
            self._pool.submit(self._close_one, stream, tracker, RUNNING)
            return True
        if tracker is None:
            if stream.reopen:
                stream.renew()
            if stream.may_open(time.monotonic()):
                stream.busy = True
                self._pool.submit(self._open_one, stream)
            return False
        try:
            tracker.tick()  # streams that wait for their turn must commit in time, too
        except Exception as error:
            self._failed(stream, tracker, error)
            return True
        return False

    def _advance(self, streams: Sequence[HubStream]) -> bool:
        """Track the next frame of a stream, or of several together. Returns whether there was one."""
        batch = self._gathered(streams) if self._segmenter.batches_streams else self._first(streams)
        for ready, (outcome, seconds) in zip(batch, stepped(batch), strict=True):
            self._take(ready, outcome, seconds)
        return bool(batch)

    def _first(self, streams: Sequence[HubStream]) -> Batch:
        """The stream whose turn it is, if one has a frame."""
        for stream in self._in_turn(streams):
            if (ready := self._guarded(self._prepared, stream)) is not None:
                return [ready]
        return []

    def _gathered(self, streams: Sequence[HubStream]) -> Batch:
        """The streams to track together, in their order; waits a moment for others once there is one."""
        batch: Batch = []
        end: float | None = None
        while True:
            there = {id(ready.stream) for ready in batch}
            asked = [stream for stream in self._in_turn(streams) if id(stream) not in there]
            refused = self._join(batch, asked, self._turns.joins)
            if all(ready.stream.spec.settings.fps is None for ready in batch):
                # No promised stream has a frame, so the time is the others'.
                refused = self._join(batch, refused, partial(self._turns.joins, alone=True))
            now = time.monotonic()
            if end is None and batch:
                end = now + WAIT_SECONDS
            done = {id(stream) for stream in (*refused, *(ready.stream for ready in batch))}
            late = [s for s in asked if now - s.tracked_at < EXPECTED_SECONDS and id(s) not in done]
            if end is None or now >= end or len(batch) >= MOST_TOGETHER or not late:
                return batch
            self._stop.wait(WAIT_SECONDS / 3)

    def _join(
        self,
        batch: Batch,
        streams: Iterable[HubStream],
        may_join: Callable[[Turn, Sequence[Turn]], bool],
    ) -> Sequence[HubStream]:
        """Add those to a batch that have a frame and may join it; returns those that may not."""
        refused = []
        for stream in streams:
            if len(batch) >= MOST_TOGETHER:
                break
            if not may_join(self._turn_of(stream), [self._turn_of(ready.stream) for ready in batch]):
                refused.append(stream)
            elif (ready := self._guarded(self._prepared, stream)) is not None:
                batch.append(ready)
        return refused

    def _prepared(self, stream: HubStream) -> Ready | None:
        """The next frame of a stream, ready to be tracked; None if there is none."""
        tracker = stream.tracker
        if stream.busy or tracker is None or self._stop.is_set():
            return None
        begun = time.perf_counter()
        try:
            if stream.unfit is not None:
                raise stream.unfit
            step = tracker.next_input()
        except Exception as error:
            self._failed(stream, tracker, error)
            return None
        if step is None:
            return None
        if stream.size != (size := (tracker.source.height, tracker.source.width)):
            stream.size = size
            self._pool.submit(self._recheck, stream)
        return Ready(stream, tracker, step, time.perf_counter() - begun)

    def _take(self, ready: Ready, outcome: StepResult | Exception, seconds: float) -> None:
        """Take what the segmenter made of a stream's frame in its share of the time."""
        stream, begun = ready.stream, time.perf_counter()
        if isinstance(outcome, Exception):
            self._failed(stream, ready.tracker, outcome)
            return
        try:
            ready.tracker.accept(outcome)
        except Exception as error:
            self._failed(stream, ready.tracker, error)
            return
        took = ready.seconds + seconds + time.perf_counter() - begun
        stream.tracked(1000 * took, time.monotonic())
        self._turns.tracked(self._turn_of(stream), took, time.monotonic())

    def _failed(self, stream: HubStream, tracker: LiveTracker, error: Exception) -> None:
        tracker.failed(error)
        stream.suspect(tracker.applying, self._note(stream, error).message)
        stream.busy, stream.tracker = True, None
        self._pool.submit(self._close_one, stream, tracker, RUNNING)

    def _note(self, stream: HubStream, error: Exception) -> Failure:
        failure = stream.failed(error, time.monotonic())
        if isinstance(error, XmemError):
            logger.warning("stream %s: %s", stream.spec.stream_id, error)
        else:
            logger.error("stream %s: %s", stream.spec.stream_id, redacted_trace(error))
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        return failure

    def _retire(self, stream: HubStream) -> None:
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

    def _open_one(self, stream: HubStream) -> None:
        try:
            tracker = self._tracker(stream)
        except Exception as error:
            self._note(stream, error)
        else:
            for push in self._pushes:
                push.watch(stream.spec.stream_id, tracker.record.books.frames)
            stream.opened_at = time.monotonic()
            stream.tracker = tracker
        finally:
            stream.busy = False
            self._wake.set()

    def _close_one(self, stream: HubStream, tracker: LiveTracker, state: str) -> None:
        try:
            tracker.close(state)
        except Exception as error:
            logger.warning("stream %s: closing it failed: %s", stream.spec.stream_id, redacted(str(error)))
        finally:
            stream.last_ledger, stream.last_frame = tracker.source.ledger.counts(), tracker.next_frame
            stream.busy = False
            self._wake.set()

    def _recheck(self, stream: HubStream) -> None:
        """Repeat the admission check once the frame size is known; it may exceed the expected one."""
        with self._lock:
            there = self._load()
        try:
            self._capacity.recheck(stream.spec.stream_id, there)
        except UsageError as error:
            stream.unfit = error

    def _tracker(self, stream: HubStream) -> LiveTracker:
        spec, options = stream.spec, self.settings
        return LiveTracker(
            spec,
            StreamStore(options.out, spec.stream_id, options.out_storage_options),
            stream.segmenter,
            options.track_settings(spec, stream.segmenter),
            self._open_feed,
            view=stream.view,
            sinks=self._sinks,
            distrusted=stream.distrusted,
            told=partial(self._notify, spec.stream_id) if self._pushes else None,
        )

    def _event_pushes(self) -> Sequence[EventPush]:
        options = self.settings
        given: Receivers = []
        if options.webhook is not None:
            waits = options.webhook.first_backoff_seconds, options.webhook.most_backoff_seconds
            given.append((Webhook(options.webhook), waits))
        for broker in options.brokers:
            given.append((broker.connect(), (broker.first_backoff_seconds, broker.most_backoff_seconds)))
        return [
            EventPush(receiver, options.out, options.hub, options.out_storage_options, backoff_seconds=waits)
            for receiver, waits in given
        ]

    def _notify(self, stream_id: str, first: int) -> None:
        for push in self._pushes:
            push.notify(stream_id, first)

    def _live_source(self, spec: LiveSpec, ledger: Ledger) -> LiveFeed:
        return LiveSource(spec.url, self.settings.source_options(spec.settings), ledger=ledger)

    def _new(self, spec: LiveSpec) -> HubStream:
        return HubStream.of(spec, self.settings, self._segmenter)

    def _get(self, stream_id: str) -> HubStream:
        stream = self._streams.get(stream_id)
        if stream is None:
            raise UsageError(self._unknown(stream_id))
        return stream

    def _unknown(self, stream_id: str) -> str:
        if stream_id in self._unusable:
            return str(self._unusable[stream_id])
        return f"there is no stream {str(stream_id)[:128]!r} here"

    def _load(self) -> Sequence[Load]:
        """The load of every stream, for capacity checks."""
        found = []
        for stream in self._streams.values():
            if stream.removed or stream.unfit is not None:
                continue
            tracker = stream.tracker
            objects = 0 if tracker is None else len(tracker.state.object_ids)
            memory = None if tracker is None else tracker.state.memory
            copied = 0 if memory is None else memory.copied_elements
            found.append(Load(stream.spec, stream.size, stream.ms_per_frame, objects, copied))
        return found
