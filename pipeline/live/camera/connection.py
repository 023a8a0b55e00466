"""One connection to a live stream: opened with FFmpeg, read to its end, losses accounted for.

How FFmpeg is used, and why (measured with FFmpeg 8 against GStreamer):

* Probing is kept short (`analyzeduration`); otherwise opening takes more than a second. `fflags=nobuffer`
  would discard the packets that probing has read, including the first keyframe; with a keyframe every ten
  seconds, ten seconds of video would be lost.
* The first packet of a connection may have no timestamp. `LiveClock` assigns one.
* A server that has gone away looks like a clean end of the stream; a silent one blocks a read for ever. So
  every read has a time limit, and the watchdog counts pictures, not bytes.
* The decoder flags a damaged picture, but not those predicted from it. After damage nothing is delivered
  before a keyframe; a camera with intra refresh sends none, so its pictures are trusted again after a while.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from typing import Any, Literal

import av

from pipeline.base.closeable import Closing
from pipeline.base.errors import one_line
from pipeline.base.redaction import redacted
from pipeline.live.camera.access_units import Joiner
from pipeline.live.camera.options import LiveOptions
from pipeline.live.camera.picture_decoder import AFTER_DAMAGE, Lost, PictureDecoder, Shown, losses
from pipeline.live.camera.relay import RelayError, RtspRelay
from pipeline.live.camera.url_guard import UrlRefusedError
from pipeline.storage.locations import scheme_of

_PROBE_MICROSECONDS = "100000"
_MOST_READ_FAILURES = 16
_PROTOCOLS = "rtsp,rtp,tcp,udp"


Reason = Literal["unreachable", "refused", "stalled", "closed", "read error", "no video"]


class ConnectionLost(Exception):  # noqa: N818 - routine, not a program error
    """The connection failed or ended.

    Args:
        reason: one of a fixed set of short texts.
        detail: one line from FFmpeg or the relay, without credentials.
        transport: "refused": the camera does not offer the requested media transport; "silent": it sent
            nothing in time, possibly because of the transport.
    """

    def __init__(
        self, reason: Reason, detail: str, *, transport: Literal["refused", "silent"] | None = None
    ) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail
        self.transport = transport


class Connection(Closing):
    """An open live stream. Use it as a context manager.

    Attributes:
        codec, container: FFmpeg's names.

    Raises ConnectionLost if the connection fails or has no video.
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
            raise ConnectionLost("no video", "the stream has no video that FFmpeg can decode")
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
        """Frames per second as announced by the camera; often wrong."""
        rate = self._stream.guessed_rate or self._stream.average_rate
        return float(rate) if rate else None

    def close(self) -> None:
        """Close the connection."""
        if self._container is not None:
            self._container.close()
            self._container = None
        if self._relay is not None:
            self._relay.close()
            self._relay = None

    def items(self) -> Iterator[Shown | Lost]:
        """Yield pictures and losses in display order until the connection ends (ConnectionLost)."""
        decoding = PictureDecoder(self._stream, self._options.keyframe_seconds)
        joiner = Joiner(self.codec, self.container)
        lost = yield from self._read(decoding, joiner)
        # Pictures that arrived before the end are still delivered.
        for packet in joiner.rest():
            yield from decoding.take(packet, 0.0)
        yield from decoding.flush()
        raise lost

    def _read(
        self, decoding: PictureDecoder, joiner: Joiner
    ) -> Generator[Shown | Lost, None, ConnectionLost]:
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
                yield from losses("dropped", "before the first keyframe", waited)
                seen = now
            for whole in joiner.take(packet):
                for item in decoding.take(whole, silence):
                    yield item
                    # Read the clock only now: with back-pressure the yield takes time.
                    if isinstance(item, Shown):
                        self._shown = True
                        seen, silence = time.monotonic(), 0.0
                    elif item.reason == AFTER_DAMAGE:  # also a sign of life
                        seen = time.monotonic()
            if now - seen > options.stall_seconds:
                text = f"no picture for {now - seen:.1f} s{self._udp_hint()}"
                return ConnectionLost("stalled", text, transport="silent")

    def _failure(self, reason: Reason, error: Exception | None) -> ConnectionLost:
        """Return the cause of a failure, from FFmpeg's error or the relay's knowledge."""
        if self._relay is not None and self._relay.refusal is not None:
            return ConnectionLost("refused", self._relay.refusal)
        if isinstance(error, av.ExitError | av.TimeoutError):
            stalled = reason == "read error"
            return ConnectionLost(
                "stalled" if stalled else "unreachable",
                f"no response in time{self._udp_hint()}",
                transport="silent",
            )
        if error is None or isinstance(error, av.EOFError):
            return ConnectionLost("closed", "the camera closed the connection")
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
        """Return the likely cause if the camera agreed to UDP and nothing arrived; "" otherwise."""
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
            f" (no media arrived over UDP{where}: a firewall drops it, or the camera sends it from another "
            "of its addresses; use that address in the URL, or transport tcp)"
        )


def _ffmpeg_options(url: str, options: LiveOptions) -> dict[str, str]:
    given = {
        "analyzeduration": _PROBE_MICROSECONDS,
        "probesize": "65536",
        "max_pixels": str(options.max_pixels),
    }
    if scheme_of(url) in ("rtsp", "rtsps"):
        # RTP timestamps are already unwrapped; a second unwrapping turns a jump back into one of
        # 13 hours ahead.
        given |= {"allowed_media_types": "video", "correct_ts_overflow": "0"}
        if options.transport == "auto":
            given |= {"rtsp_transport": "tcp+udp", "rtsp_flags": "prefer_tcp"}
        else:
            given |= {"rtsp_transport": options.transport}
    return given | dict(options.ffmpeg_options)
