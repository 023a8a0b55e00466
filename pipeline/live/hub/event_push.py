"""Push of the zone events of live streams to a receiver (webhook, Kafka, MQTT), at least once.

Only committed events are pushed, read from the stream's files: nothing is sent that a crash takes back, and
nothing is lost while the receiver or this process is down. How far each stream is lies in the output folder
(`live/<hub>-<receiver>/<id>.json`), written after the receiver has confirmed, so events may come twice, with
the same `id`.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pipeline.base.backoff import Backoff
from pipeline.base.closeable import Closing
from pipeline.base.errors import StoreError, one_line
from pipeline.base.redaction import redacted
from pipeline.storage.opening import open_files
from pipeline.tracks.layout import chunk_footer
from pipeline.tracks.store import StreamStore
from pipeline.zones.events import ZONE_EVENTS

logger = logging.getLogger(__name__)

_MOST_EVENTS = 500  # of one call


class Receiver(Protocol):
    """Where events are pushed to."""

    name: str
    """In messages and in the names of files; one receiver of a hub has it."""

    def send(self, stream_id: str, events: Sequence[Mapping[str, Any]]) -> None:
        """Deliver events in order. Returns once the receiver has confirmed all; any error means: again."""

    def close(self) -> None:
        """End a call of `send` that waits, from another thread. Nothing is sent afterwards."""


class EventPush(Closing):
    """Pushes events in a thread of its own, each stream's in order. `watch` and `notify` do not wait.

    Args:
        receiver: where events go; closed with this.
        out, storage_options: the output folder.
        hub: name of the hub, whose streams these are.
        backoff_seconds: between tries: at first, and at most.
    """

    def __init__(
        self,
        receiver: Receiver,
        out: str,
        hub: str,
        storage_options: Mapping[str, Any] | None = None,
        *,
        backoff_seconds: tuple[float, float] = (1.0, 60.0),
    ) -> None:
        self._receiver, self._out, self._options = receiver, out, storage_options
        self._backoff_seconds = backoff_seconds
        self._files = open_files(out, storage_options)
        self._folder = f"live/{hub}-{receiver.name}"
        self._owner = hub
        self._lock = threading.Lock()
        self._due: dict[str, float] = {}  # stream id -> when, by time.monotonic
        self._begin: dict[str, int] = {}
        self._scan: set[str] = set()  # streams whose files since the cursor are to be looked through
        self._chunks: dict[str, list[int]] = {}  # first frames of committed files with events
        self._backoffs: dict[str, Backoff] = {}
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"xmem-{receiver.name}", daemon=True)
        self._thread.start()

    def watch(self, stream_id: str, committed_frames: int) -> None:
        """A stream was opened: push what is committed and was not pushed.

        Args:
            committed_frames: where a stream begins that was never watched before.
        """
        with self._lock:
            self._begin.setdefault(stream_id, committed_frames)
            self._scan.add(stream_id)
            self._due.setdefault(stream_id, 0.0)
        self._wake.set()

    def notify(self, stream_id: str, first: int) -> None:
        """Events of a stream were committed, in the file of the chunk that begins at frame `first`."""
        with self._lock:
            self._chunks.setdefault(stream_id, []).append(first)
            self._due.setdefault(stream_id, 0.0)
        self._wake.set()

    def close(self) -> None:
        """Stop; what was not pushed is pushed after the next start."""
        self._stop.set()
        self._wake.set()
        self._receiver.close()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            now = time.monotonic()
            with self._lock:
                ready = [stream_id for stream_id, due in self._due.items() if due <= now]
                for stream_id in ready:
                    del self._due[stream_id]
            for stream_id in ready:
                self._try(stream_id)
            with self._lock:
                soonest = min(self._due.values(), default=None)
            self._wake.wait(None if soonest is None else max(0.0, soonest - time.monotonic()))
            self._wake.clear()

    def _try(self, stream_id: str) -> None:
        backoff = self._backoffs.setdefault(stream_id, Backoff(*self._backoff_seconds))
        try:
            self._push(stream_id)
            backoff.reset()
        except Exception as error:  # whatever it is: what was not pushed is pushed later
            seconds = backoff.next_seconds()
            logger.warning(
                "stream %s: %s: %s; again in %.0f s",
                stream_id, self._receiver.name, redacted(one_line(error)), seconds,
            )  # fmt: skip
            with self._lock:
                self._due[stream_id] = time.monotonic() + seconds

    def _push(self, stream_id: str) -> None:
        """Push all events that are committed and were not pushed."""
        cursor = self._cursor(stream_id)
        with self._lock:
            scan, chunks = stream_id in self._scan, list(self._chunks.get(stream_id, ()))
        if scan:
            footers = StreamStore(self._out, stream_id, self._options).footers(cursor)
        else:
            footers = [chunk_footer(self._files, stream_id, first) for first in chunks if first >= cursor]
        for footer in footers:
            events = [
                _shown(stream_id, number, event)
                for number, event in enumerate(footer.events.to_pylist())
                if event["kind"] in ZONE_EVENTS
            ]
            for begin in range(0, len(events), _MOST_EVENTS):
                if self._stop.is_set():
                    return
                self._receiver.send(stream_id, events[begin : begin + _MOST_EVENTS])
            if events:
                self._save(stream_id, footer.last + 1)
        with self._lock:
            self._scan.discard(stream_id)
            self._chunks[stream_id] = self._chunks.get(stream_id, [])[len(chunks) :]

    def _cursor(self, stream_id: str) -> int:
        name = self._name(stream_id)
        try:
            return int(json.loads(self._files.read(name))["next_frame"])
        except FileNotFoundError:
            with self._lock:
                begin = self._begin.get(stream_id, 0)
            self._save(stream_id, begin)
            return begin
        except (ValueError, TypeError, LookupError) as error:
            raise StoreError(f"{self._files.uri(name)} is damaged: remove it, or restore a copy") from error

    def _save(self, stream_id: str, next_frame: int) -> None:
        content = json.dumps({"next_frame": next_frame}).encode()
        self._files.replace(self._name(stream_id), content, self._owner)

    def _name(self, stream_id: str) -> str:
        return f"{self._folder}/{stream_id}.json"


def _shown(stream_id: str, number: int, event: Mapping[str, Any]) -> dict[str, Any]:
    """An event as JSON; its `id` is the same whenever it is pushed."""
    wall = event["wall_time"]
    return {
        "id": f"{stream_id}:{event['frame_index']}:{number}",
        "kind": event["kind"],
        "name": event["reason"],
        "frame_index": event["frame_index"],
        "pts_seconds": event["pts_seconds"],
        "wall_time": None if wall is None else wall.isoformat(),
        "object_id": event["object_id"],
        "detail": json.loads(event["detail"] or "{}"),
    }
