"""One connection to a live stream: opened with FFmpeg, read until it ends, with an account of what was lost.

How FFmpeg is used, and why (measured with FFmpeg 8 against GStreamer):

* Probing is cut short (`analyzeduration`), or opening takes a second and more. `fflags=nobuffer` would throw
  the packets away that probing has read, the first keyframe among them; at a camera with a keyframe every
  ten seconds that is ten seconds of nothing.
* The first packet of a connection may have no timestamp. `LiveClock` gives it one.
* A server that is gone looks like a clean end of the stream; one that falls silent blocks a read for ever.
  So every read has a time limit, and pictures, not bytes, count as signs of life.
* The decoder flags the picture that was damaged, not those that are predicted from it. After damage nothing
  is shown before a keyframe; a camera that refreshes its pictures bit by bit has none, and is trusted again
  after a while.
"""

from __future__ import annotations

import errno
import logging
import struct
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import av

from pipeline.base.closeable import Closing
from pipeline.base.errors import one_line
from pipeline.base.redaction import redacted
from pipeline.live_clock import Arrival
from pipeline.live_options import LiveOptions
from pipeline.rtsp_relay import RelayError, RtspRelay
from pipeline.split_pictures import Joiner
from pipeline.storage.locations import scheme_of
from pipeline.url_guard import UrlRefusedError

log = logging.getLogger(__name__)

_PROBE_MICROSECONDS = "100000"
_MOST_READ_FAILURES = 16
_OUT_OF_SIGHT = 64
_HIDES_PICTURES = ("vp8", "libvpx")
_PROTOCOLS = "rtsp,rtp,tcp,udp"

AFTER_DAMAGE = "after damage"

Reason = Literal["unreachable", "refused", "stalled", "closed", "read error", "no video"]


class ConnectionLost(Exception):  # noqa: N818 - it happens all the time, and is no fault of the program
    """The connection failed or ended.

    Args:
        reason: a word for it.
        detail: FFmpeg's or the relay's, in one line, without credentials.
        transport: "refused": the camera does not send its media over the transport that was asked for;
            "silent": it sent nothing in time, for which the transport may be the reason.
    """

    def __init__(
        self, reason: Reason, detail: str, *, transport: Literal["refused", "silent"] | None = None
    ) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail
        self.transport = transport


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture that came out of the decoder.

    Args:
        picture: FFmpeg's frame.
        raw_seconds: its timestamp.
        duration_seconds: how long it is shown, if that is known.
        camera_utc: when it was taken, as the camera's sender reports say, seconds since 1970.
        arrival: when the packet that completed it was read.
        silence_seconds: how long the camera had sent nothing before, at most.
    """

    picture: Any
    raw_seconds: float | None
    duration_seconds: float | None
    camera_utc: float | None
    arrival: Arrival
    silence_seconds: float


@dataclass(frozen=True, slots=True)
class Lost:
    """Frames that came and gave no (good) picture."""

    kind: Literal["dropped", "corrupt"]
    reason: str
    count: int


class Connection(Closing):
    """An open live stream. Use it as a context manager.

    Attributes:
        codec, container: FFmpeg's names.

    Raises ConnectionLost if there is no connection to be had, or no video in it.
    """

    def __init__(self, url: str, options: LiveOptions) -> None:
        self._options = options
        self._relay: RtspRelay | None = None
        self._container: Any = None
        self._shown = False
        self._rtsp = scheme_of(url) in ("rtsp", "rtsps")
        try:
            self._open(url)
        except BaseException:
            self.close()
            raise

    def _open(self, url: str) -> None:
        options = self._options
        given = _ffmpeg_options(url, options)
        began = time.monotonic()
        if options.guard is not None:
            try:
                checked = options.guard.check(url)
                self._relay = RtspRelay(
                    checked,
                    connect_seconds=options.open_seconds,
                    verify=options.verify_certificate,
                    authorities=options.certificate_authorities,
                )
            except UrlRefusedError as error:
                raise ConnectionLost("refused", one_line(error)) from None
            except RelayError as error:
                raise ConnectionLost("unreachable", one_line(error)) from None
            given |= {"user_agent": self._relay.token, "protocol_whitelist": _PROTOCOLS}
            given["rtsp_flags"] = "+".join(filter(None, [given.get("rtsp_flags"), "filter_src"]))
            url = self._relay.url
        left = max(0.1, began + options.open_seconds - time.monotonic())
        try:
            self._container = av.open(
                url,
                mode="r",
                options=given,
                timeout=(left, options.stall_seconds),
                metadata_errors="replace",
            )
        except Exception as error:
            raise self._failure("unreachable", error) from None
        self._stream = self._video()
        self.container = str(self._container.format.name)
        self.codec = str(self._stream.codec_context.name)

    def _video(self) -> Any:
        found = [s for s in self._container.streams.video if s.codec_context is not None]
        if not found:
            raise ConnectionLost("no video", "the stream has no video that can be decoded")
        for other in self._container.streams:
            if other is not found[0]:
                with suppress(AttributeError, ValueError):
                    other.discard = "all"
        context = found[0].codec_context
        context.thread_count = self._options.threads
        context.thread_type = "NONE" if self._options.threads == 1 else "SLICE"
        context.options = {"max_pixels": str(self._options.max_pixels)}
        return found[0]

    @property
    def rate(self) -> float | None:
        """Frames per second as the camera announces them; often wrong."""
        rate = self._stream.guessed_rate or self._stream.average_rate
        return float(rate) if rate else None

    def close(self) -> None:
        """End the connection."""
        if self._container is not None:
            self._container.close()
            self._container = None
        if self._relay is not None:
            self._relay.close()
            self._relay = None

    def items(self) -> Iterator[Shown | Lost]:
        """Pictures and losses in the order shown, until the connection ends: that is a ConnectionLost."""
        decoding = _Decoding(self._stream, self._options.keyframe_seconds)
        joiner = Joiner(self.codec, self.container)
        lost = yield from self._read(decoding, joiner)
        # There are still pictures that came before the end.
        for packet in joiner.rest():
            yield from decoding.take(packet, 0.0)
        yield from decoding.flush()
        raise lost

    def _read(self, decoding: _Decoding, joiner: Joiner) -> Generator[Shown | Lost, None, ConnectionLost]:
        options = self._options
        opened = seen = time.monotonic()
        silence = 0.0
        waited, started = 0, False
        failures = 0
        demuxed = self._container.demux(self._stream)
        while True:
            asked = time.monotonic()
            try:
                packet = next(demuxed, None)
            except av.InvalidDataError as error:
                failures += 1
                if failures < _MOST_READ_FAILURES:
                    demuxed = self._container.demux(self._stream)
                    continue
                return self._failure("read error", error)
            except Exception as error:
                return self._failure("read error", error)
            if packet is None or not packet.size:
                return self._failure("closed", None)
            failures = 0
            now = time.monotonic()
            silence = max(silence, now - asked)
            if not started:
                started = packet.is_keyframe or now - opened > options.keyframe_seconds
                if not started:
                    waited += 1
                    seen = now
                    continue
                yield from _some("dropped", "before the first keyframe", waited)
                seen = now
            for whole in joiner.take(packet):
                for item in decoding.take(whole, silence):
                    yield item
                    if isinstance(item, Shown):  # only now: with back-pressure handing it on takes time
                        self._shown = True
                        seen, silence = time.monotonic(), 0.0
                    elif item.reason == AFTER_DAMAGE:  # a sign of life, too
                        seen = time.monotonic()
            if now - seen > options.stall_seconds:
                text = f"no picture for {now - seen:.1f} s{self._udp_hint()}"
                return ConnectionLost("stalled", text, transport="silent")

    def _failure(self, reason: Reason, error: Exception | None) -> ConnectionLost:
        """What went wrong, from what FFmpeg says, or the relay knows better."""
        if self._relay is not None and self._relay.refusal is not None:
            return ConnectionLost("refused", self._relay.refusal)
        if isinstance(error, av.ExitError | av.TimeoutError):
            stalled = reason == "read error"
            return ConnectionLost(
                "stalled" if stalled else "unreachable",
                f"no answer in time{self._udp_hint()}",
                transport="silent",
            )
        if error is None or isinstance(error, av.EOFError):
            return ConnectionLost("closed", "the other side ended the connection")
        if self._rtsp and getattr(error, "errno", None) == errno.EPROTONOSUPPORT:
            way = self._options.transport
            other = {"tcp": "udp", "udp": "tcp"}.get(way)
            advice = f": set transport to auto or {other}" if other else ""
            return ConnectionLost(
                reason,
                f"the camera does not send its media over {way.upper() if other else 'TCP or UDP'}{advice}",
                transport="refused",
            )
        text = getattr(error, "strerror", None) or type(error).__name__
        return ConnectionLost(reason, redacted(" ".join(str(text).split())))

    def _udp_hint(self) -> str:
        """What may be the matter where the camera agreed to send over UDP and nothing came; "" elsewhere."""
        if self._shown or not self._rtsp:
            return ""
        if self._relay is None:
            if self._options.transport != "udp":
                return ""
            where = ""
        elif self._relay.media_over_udp:
            where = f" from {self._relay.camera_address}"
        else:
            return ""
        return (
            f" (no media came over UDP{where}: a firewall drops it, or the camera sends it from another of "
            "its addresses; use that address in the URL, or transport tcp)"
        )


class _Decoding:
    """Feeds packets to the decoder and keeps account of which of them gave a picture.

    Args:
        patience: after damage a keyframe is waited for that long, seconds.
    """

    def __init__(self, stream: Any, patience: float) -> None:
        self._context = stream.codec_context
        self._base = float(stream.time_base)
        self._waiting: dict[int, tuple[int, bool]] = {}  # pts -> position, whether anything was wrong
        self._position = 0
        self._unnamed = 0
        self._utc_offset: float | None = None
        self._durations: float | None = None
        self._arrival = Arrival(time.monotonic(), time.time())
        self._may_hide = self._context.name in _HIDES_PICTURES
        self._patience = patience
        self._damaged_at: float | None = None  # since then there was no keyframe
        self._keyframes = True  # whether any is to be hoped for

    def take(self, packet: Any, silence: float) -> Iterator[Shown | Lost]:
        """Decode a packet; what comes out."""
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
        """At the end: what the decoder still holds, and what never came out."""
        try:
            frames = self._context.decode(None)
        except av.FFmpegError:
            frames = []
        for frame in frames:
            yield from self._account(frame, 0.0)
        wrong = sum(1 for _, bad in self._waiting.values() if bad)
        yield from _some("corrupt", "decode error", wrong + self._unnamed)
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
        yield from _some("corrupt", "decode error", lost)
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
        """Whether what a picture is predicted from is as it should be, as far as anybody knows."""
        if frame.key_frame:
            self._damaged_at, self._keyframes = None, True
        elif self._damaged_at is not None and time.monotonic() - self._damaged_at > self._patience:
            self._damaged_at, self._keyframes = None, False
        return self._damaged_at is None

    def _given_up(self) -> Iterator[Lost]:
        """Packets so old that no picture will come of them; timestamps that jump back leave them behind."""
        old = [t for t, (at, _) in self._waiting.items() if at < self._position - _OUT_OF_SIGHT]
        yield from _some("corrupt", "decode error", sum(1 for t in old if self._waiting[t][1]))
        for pts in old:
            del self._waiting[pts]


def camera_utc(packet: Any) -> float | None:
    """When a packet's picture was taken, from RTCP sender reports; None before the first one."""
    if not packet.has_sidedata("prft"):
        return None
    data = bytes(packet.get_sidedata("prft"))
    if len(data) < 8:
        return None
    (microseconds,) = struct.unpack_from("<q" if struct.pack("=H", 1)[0] else ">q", data)
    return float(microseconds) / 1e6 if microseconds > 0 else None


def _some(kind: Literal["dropped", "corrupt"], reason: str, count: int) -> Iterator[Lost]:
    if count:
        yield Lost(kind, reason, count)


def _ffmpeg_options(url: str, options: LiveOptions) -> dict[str, str]:
    given = {
        "analyzeduration": _PROBE_MICROSECONDS,
        "probesize": "65536",
        "max_pixels": str(options.max_pixels),
    }
    if scheme_of(url) in ("rtsp", "rtsps"):
        # RTP's timestamps are unwrapped already; done twice, a jump back looks like one of 13 hours ahead.
        given |= {"allowed_media_types": "video", "correct_ts_overflow": "0"}
        if options.transport == "auto":
            given |= {"rtsp_transport": "tcp+udp", "rtsp_flags": "prefer_tcp"}
        else:
            given |= {"rtsp_transport": options.transport}
    return given | dict(options.ffmpeg_options)
