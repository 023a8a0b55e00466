"""Recent results of a live stream for viewers: mask records and the newest frame as JPEG.

Written by the tracking thread, which never waits for a reader; read by any number of others.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import UsageError, XmemError
from pipeline.base.records import Event, Frame, MaskRecord
from pipeline.draw.overlay import overlay as drawn_over
from pipeline.draw.pictures import THUMBNAIL_SIDE, within
from pipeline.live.spec import JPEG_QUALITIES, JPEG_SIDES

_KEPT_JPEGS = 4
_KEPT_EVENTS = 500
_MEMORY_SECONDS = 1.0
# Tracked frames whose small pictures wait for the next listing of the memory, at most.
_WAITING = 64


def record_json(record: MaskRecord) -> dict[str, Any]:
    """A mask record as JSON: box as [x, y, w, h] and centroid as [x, y], null if not visible."""
    return {
        "frame_index": record.frame_index,
        "pts_seconds": record.pts_seconds,
        "wall_time": None if record.wall_time is None else record.wall_time.isoformat(),
        "object_id": record.object_id,
        "category": record.category,
        "frame_height": record.frame_height,
        "frame_width": record.frame_width,
        "area": record.area,
        "bbox": None if record.bbox is None else list(record.bbox),
        "centroid": None if record.centroid is None else list(record.centroid),
        "score": record.score,
        "presence": record.presence,
        "mask_rle": record.mask_rle,
    }


def event_json(event: Event) -> dict[str, Any]:
    """An event as JSON; `name` is its reason, for events of zones the name of the zone, line or rule."""
    return {
        "kind": event.kind,
        "name": event.reason,
        "frame_index": event.frame_index,
        "pts_seconds": event.pts_seconds,
        "wall_time": None if event.wall_time is None else event.wall_time.isoformat(),
        "object_id": event.object_id,
        "detail": dict(event.detail or {}),
    }


class LiveView:
    """Recent results of one live stream. Thread-safe.

    Args:
        most_records: maximum number of mask records kept.
    """

    def __init__(self, most_records: int = 2000) -> None:
        self._changed = threading.Condition()
        self._records: deque[MaskRecord] = deque(maxlen=most_records)
        self._events: deque[Event] = deque(maxlen=_KEPT_EVENTS)
        self._happened: deque[Event] = deque(maxlen=_KEPT_EVENTS)
        self._newest: tuple[Frame, tuple[MaskRecord, ...]] | None = None
        self._jpegs: OrderedDict[tuple[Any, ...], bytes] = OrderedDict()
        self._drawing = threading.Lock()
        self._closed = False
        self._remembered: tuple[float, dict[str, Any]] | None = None
        self._waiting: deque[tuple[int, NDArray[np.uint8]]] = deque(maxlen=_WAITING)
        self._thumbnails: dict[int, bytes] = {}

    def publish(
        self,
        frame: Frame,
        records: list[MaskRecord],
        events: Sequence[Event] = (),
        happened: Sequence[Event] = (),
    ) -> None:
        """Add a tracked frame, its records, the events of its zones and lines, and all events up to it."""
        with self._changed:
            self._events.extend(events)
            self._happened.extend(happened)
            self._newest = (frame, tuple(records))
            self._records.extend(records)
            self._changed.notify_all()

    def memory_due(self, now: float) -> bool:
        """Whether the listing of the memory is older than a second."""
        return self._remembered is None or now - self._remembered[0] >= _MEMORY_SECONDS

    def seen_at(self, moment: int, picture: NDArray[np.uint8]) -> None:
        """Keep a small copy of a tracked frame, in case it is remembered.

        Args:
            moment: its time, as in the listing of the memory.
            picture: H x W x 3 RGB.
        """
        self._waiting.append((moment, within(picture, THUMBNAIL_SIDE)))

    def remember(self, listing: dict[str, Any], now: float) -> None:
        """Set the listing of the memory, see `pipeline.memory.stream_memory.memory_listing`."""
        times = {entry["time"] for entry in listing["frames"] if entry["age"] is not None}
        kept = {moment: data for moment, data in self._thumbnails.items() if moment in times}
        # Until the first prompt time stands still: the last frame of a time is the one that is remembered.
        for moment, picture in reversed(self._waiting):
            if moment in times and moment not in kept:
                kept[moment] = _as_jpeg(picture, 80)
        self._waiting.clear()
        self._thumbnails = kept  # readers have the old one or the new one
        self._remembered = (now, listing)

    def thumbnail(self, moment: int) -> bytes | None:
        """A remembered frame as JPEG; None if it is not remembered, or was before this process began.

        Args:
            moment: its time in the listing of the memory.
        """
        return self._thumbnails.get(moment)

    def memory(self) -> dict[str, Any]:
        """What the stream remembers, at most about a second old while frames arrive.

        Raises:
            XmemError: nothing has been tracked yet.
        """
        if self._remembered is None:
            raise XmemError("no frame has been tracked yet: try again")
        return self._remembered[1]

    def close(self) -> None:
        """Mark the stream as ended and wake all waiting readers."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """Whether the stream has ended."""
        return self._closed

    @property
    def frame_index(self) -> int | None:
        """Index of the newest frame; None before the first."""
        newest = self._newest
        return None if newest is None else newest[0].frame_index

    def newest(self) -> tuple[MaskRecord, ...]:
        """The records of the newest frame."""
        newest = self._newest
        return () if newest is None else newest[1]

    def tracks(self, since: int | None = None, limit: int = 500) -> list[dict[str, Any]]:
        """Kept mask records of frames after `since`, oldest first; without `since`, the newest records.

        At most `limit` records. Frames are not split, unless a single frame has more records.
        """
        if limit < 1:
            raise UsageError(f"limit={limit} is not allowed: at least 1")
        with self._changed:
            kept = list(self._records)
        if since is None:
            return [record_json(r) for r in kept[-limit:]]
        wanted = [r for r in kept if r.frame_index > since]
        taken = wanted[:limit]
        if len(wanted) > limit and taken[0].frame_index != wanted[limit].frame_index:
            # The rest of a split frame could not be requested.
            taken = [r for r in taken if r.frame_index != wanted[limit].frame_index]
        return [record_json(r) for r in taken]

    def events(self, limit: int = 50) -> list[dict[str, Any]]:
        """The newest events of every kind but lost frames, newest first, at most `limit`.

        They are those since the stream was opened in this process; all are in the stored events.
        """
        if limit < 1:
            raise UsageError(f"limit={limit} is not allowed: at least 1")
        with self._changed:
            kept = list(self._happened)[-limit:]
        return [event_json(e) for e in reversed(kept)]

    def wait(self, after: int, timeout: float) -> dict[str, Any] | None:
        """Wait for a frame after `after`; returns the newest frame's records, or None after the timeout.

        Readers that call it too rarely miss frames in between, but no events of zones (up to 500); with
        `after` below 0, the newest frame's alone.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while self._newest is None or self._newest[0].frame_index <= after:
                left = deadline - time.monotonic()
                if self._closed or left <= 0:
                    return None
                self._changed.wait(left)
            frame, records = self._newest
            since = after if after >= 0 else frame.frame_index - 1
            events = [event_json(e) for e in self._events if e.frame_index > since]
        return {
            "seq": frame.frame_index,
            "frame_index": frame.frame_index,
            "pts_seconds": frame.pts_seconds,
            "wall_time": None if frame.wall_time is None else frame.wall_time.isoformat(),
            "frame_height": frame.size[0],
            "frame_width": frame.size[1],
            "records": [record_json(r) for r in records],
            "events": events,
        }

    def jpeg(self, overlay: bool = True, max_side: int = 960, quality: int = 80) -> bytes:
        """The newest frame as JPEG, with its objects drawn over it; encoded on demand, once per frame.

        Raises:
            UsageError: a number is out of range. XmemError: there is no frame yet.
        """
        if not JPEG_SIDES[0] <= max_side <= JPEG_SIDES[1]:
            raise UsageError(f"max_side={max_side} is not allowed: {JPEG_SIDES[0]} .. {JPEG_SIDES[1]} pixels")
        if not JPEG_QUALITIES[0] <= quality <= JPEG_QUALITIES[1]:
            raise UsageError(f"quality={quality} is not allowed: {JPEG_QUALITIES[0]} .. {JPEG_QUALITIES[1]}")
        newest = self._newest
        if newest is None:
            raise XmemError("no frame has been tracked yet: ask again later")
        key = (newest[0].frame_index, overlay, max_side, quality)
        with self._drawing:
            found = self._jpegs.get(key)
            if found is None:
                found = _encoded(*newest, overlay, max_side, quality)
                self._jpegs[key] = found
                while len(self._jpegs) > _KEPT_JPEGS:
                    self._jpegs.popitem(last=False)
        return found


def _encoded(
    frame: Frame, records: tuple[MaskRecord, ...], overlay: bool, max_side: int, quality: int
) -> bytes:
    image: NDArray[np.uint8] = drawn_over(frame.image, records) if overlay else frame.image
    return _as_jpeg(within(image, max_side), quality)


def _as_jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    done, data = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise XmemError(f"a picture of {image.shape[1]}x{image.shape[0]} could not be encoded as JPEG")
    return bytes(data.tobytes())
