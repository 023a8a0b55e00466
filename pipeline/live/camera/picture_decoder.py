"""Decodes the pictures of a live stream and reports damaged ones."""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import av

from pipeline.base.errors import one_line
from pipeline.live.camera.clock import Arrival

log = logging.getLogger(__name__)


_OUT_OF_SIGHT = 64
_HIDES_PICTURES = ("vp8", "libvpx")
AFTER_DAMAGE = "after damage"


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture from the decoder.

    Args:
        picture: FFmpeg's frame.
        raw_seconds: its timestamp.
        duration_seconds: display duration, if known.
        camera_utc: capture time from the camera's sender reports, seconds since 1970.
        arrival: when the packet that completed it was read.
        silence_seconds: upper bound of the time for which the camera had sent nothing before.
    """

    picture: Any
    raw_seconds: float | None
    duration_seconds: float | None
    camera_utc: float | None
    arrival: Arrival
    silence_seconds: float


@dataclass(frozen=True, slots=True)
class Lost:
    """Frames that were received but gave no intact picture."""

    kind: Literal["dropped", "corrupt"]
    reason: str
    count: int


class PictureDecoder:
    """Feeds packets to the decoder and tracks which of them gave a picture.

    Args:
        patience: time to wait for a keyframe after damage, in seconds.
    """

    def __init__(self, stream: Any, patience: float) -> None:
        self._context = stream.codec_context
        self._base = float(stream.time_base)
        self._waiting: dict[int, tuple[int, bool]] = {}  # pts -> position, whether decoding reported an error
        self._position = 0
        self._unnamed = 0
        self._utc_offset: float | None = None
        self._durations: float | None = None
        self._arrival = Arrival(time.monotonic(), time.time())
        self._may_hide = self._context.name in _HIDES_PICTURES
        self._patience = patience
        self._damaged_at: float | None = None  # time of the damage; None after a keyframe
        self._keyframes = True  # whether keyframes are to be expected

    def take(self, packet: Any, silence: float) -> Iterator[Shown | Lost]:
        """Decode a packet and yield the resulting pictures and losses."""
        self._arrival = Arrival(time.monotonic(), time.time())
        self._position += 1
        self._durations = packet.duration * self._base if packet.duration else self._durations
        wrong = bool(packet.is_corrupt)
        if packet.pts is not None:
            self._waiting[packet.pts] = (self._position, wrong)
            utc = camera_utc(packet)
            if utc is not None:
                self._utc_offset = utc - packet.pts * self._base
        try:
            frames = self._context.decode(packet)
        except av.FFmpegError as error:
            log.debug("a packet could not be decoded: %s", one_line(error))
            frames = []
            if packet.pts is None:
                self._unnamed += 1
            else:
                self._waiting[packet.pts] = (self._position, True)
        for frame in frames:
            yield from self._account(frame, silence)
        yield from self._given_up()

    def flush(self) -> Iterator[Shown | Lost]:
        """Yield the decoder's remaining pictures at the end, and the packets that gave none."""
        try:
            frames = self._context.decode(None)
        except av.FFmpegError:
            frames = []
        for frame in frames:
            yield from self._account(frame, 0.0)
        wrong = sum(1 for _, bad in self._waiting.values() if bad)
        yield from losses("corrupt", "decode error", wrong + self._unnamed)
        self._waiting.clear()
        self._unnamed = 0

    def _account(self, frame: Any, silence: float) -> Iterator[Shown | Lost]:
        lost, self._unnamed = self._unnamed, 0
        if frame.pts is not None:
            position, _ = self._waiting.pop(frame.pts, (self._position, False))
            passed = [t for t, (at, _) in self._waiting.items() if t < frame.pts and at <= position]
            damaged = frame.is_corrupt or any(self._waiting[t][1] for t in passed)
            lost += len(passed) if damaged and not self._may_hide else 0
            for pts in passed:
                del self._waiting[pts]
        yield from losses("corrupt", "decode error", lost)
        if lost:
            self._damaged()
        if frame.is_corrupt:
            self._damaged()
            yield Lost("corrupt", "damaged picture", 1)
            return
        if not self._trusted(frame):
            yield Lost("corrupt", AFTER_DAMAGE, 1)
            return
        raw = None if frame.pts is None else frame.pts * self._base
        utc = None if raw is None or self._utc_offset is None else raw + self._utc_offset
        yield Shown(frame, raw, self._durations, utc, self._arrival, silence)

    def _damaged(self) -> None:
        if self._damaged_at is None and self._keyframes:
            self._damaged_at = time.monotonic()

    def _trusted(self, frame: Any) -> bool:
        """Return whether the pictures that this one is predicted from are intact, as far as is known."""
        if frame.key_frame:
            self._damaged_at, self._keyframes = None, True
        elif self._damaged_at is not None and time.monotonic() - self._damaged_at > self._patience:
            self._damaged_at, self._keyframes = None, False
        return self._damaged_at is None

    def _given_up(self) -> Iterator[Lost]:
        """Yield losses of packets too old to give a picture any more (timestamps jumped back)."""
        old = [t for t, (at, _) in self._waiting.items() if at < self._position - _OUT_OF_SIGHT]
        yield from losses("corrupt", "decode error", sum(1 for t in old if self._waiting[t][1]))
        for pts in old:
            del self._waiting[pts]


def camera_utc(packet: Any) -> float | None:
    """Return a packet's capture time from RTCP sender reports; None before the first report."""
    if not packet.has_sidedata("prft"):
        return None
    data = bytes(packet.get_sidedata("prft"))
    if len(data) < 8:
        return None
    (microseconds,) = struct.unpack_from("<q" if struct.pack("=H", 1)[0] else ">q", data)
    return float(microseconds) / 1e6 if microseconds > 0 else None


def losses(kind: Literal["dropped", "corrupt"], reason: str, count: int) -> Iterator[Lost]:
    if count:
        yield Lost(kind, reason, count)
