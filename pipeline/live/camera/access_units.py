"""Access units: joins pictures that arrive in several packets.

Some servers repeat a stream's parameter sets before every slice of a keyframe (GStreamer's payloader does
with `config-interval=-1`, if the encoder splits pictures into slices, as encoders tuned for low delay do).
FFmpeg takes each repetition for the start of a new picture: one keyframe becomes two packets, each decoded
separately; both pictures are damaged, and so is everything predicted from them. The first bits of a packet's
first slice tell whether the packet begins a picture.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import av

_START = re.compile(rb"\x00\x00\x01")
_LOOKED_AT = 4096  # the first slice of a packet must begin within this many bytes
_MOST_BYTES = 16 << 20  # limit of one joined picture


def continues(codec: str, data: bytes) -> bool:
    """Return whether a packet (Annex B) continues a picture: it has slices, but not the first one.

    Args:
        codec: FFmpeg's codec name; False for all but h264 and hevc.
    """
    first_slice = _FIRST_SLICE.get(codec)
    if first_slice is None:
        return False
    for start in _START.finditer(data, 0, _LOOKED_AT):
        answer = first_slice(data[start.end() : start.end() + 3])
        if answer is not None:
            return not answer
    return False


def _h264(unit: bytes) -> bool | None:
    """Whether a slice is its picture's first (`first_mb_in_slice` 0 is a 1 bit).

    None if it is not a slice.
    """
    return bool(unit[1] & 0x80) if len(unit) > 1 and unit[0] & 0x1F in (1, 2, 5) else None


def _hevc(unit: bytes) -> bool | None:
    """As `_h264`; HEVC has a flag for it, after a header of two bytes."""
    return bool(unit[2] & 0x80) if len(unit) > 2 and unit[0] >> 1 & 0x3F < 32 else None


_FIRST_SLICE: dict[str, Callable[[bytes], bool | None]] = {"h264": _h264, "hevc": _hevc}


class Joiner:
    """Joins the packets of a split keyframe into one.

    Only keyframes can be split in this way. A keyframe is known to be complete when the next packet begins
    another picture, so it is held back until then. This is done for the first keyframe of a connection, to
    learn how the camera sends them, and for all others only if that one was split.

    Args:
        codec, container: FFmpeg's names. Only RTSP streams are examined; others pass unchanged.
    """

    def __init__(self, codec: str, container: str) -> None:
        self._codec = codec
        self._wanted = container == "rtsp" and codec in _FIRST_SLICE
        self._known = self._in_pieces = False
        self._held: list[Any] = []
        self._bytes = 0

    def take(self, packet: Any) -> list[Any]:
        """Add a packet and return the packets that can be decoded now."""
        if not self._wanted:
            return [packet]
        # Keyframes only: a packet of another picture may begin in its middle because the first slice was
        # lost.
        if packet.is_keyframe and continues(self._codec, bytes(memoryview(packet)[:_LOOKED_AT])):
            self._in_pieces = True
            if not self._held or self._bytes + packet.size > _MOST_BYTES:
                return [*self.rest(), packet]
            self._hold(packet)
            return []
        out = self.rest()
        self._known = self._known or bool(out)
        if packet.is_keyframe and (self._in_pieces or not self._known):
            self._hold(packet)
            return out
        return [*out, packet]

    def rest(self) -> list[Any]:
        """Return the packets held back, joined into at most one."""
        held, self._held, self._bytes = self._held, [], 0
        return [_joined(held)] if len(held) > 1 else held

    def _hold(self, packet: Any) -> None:
        self._held.append(packet)
        self._bytes += packet.size


def _joined(parts: list[Any]) -> Any:
    """Join several packets into one; its times are the first known ones."""
    whole = av.Packet(b"".join(bytes(part) for part in parts))
    first = parts[0]
    if first.time_base is not None:
        whole.time_base = first.time_base
    whole.is_keyframe = first.is_keyframe
    whole.is_corrupt = any(part.is_corrupt for part in parts)
    whole.pts = next((part.pts for part in parts if part.pts is not None), None)
    whole.dts = next((part.dts for part in parts if part.dts is not None), None)
    whole.duration = first.duration
    for part in parts:
        if part.has_sidedata("prft"):  # prft: capture time
            whole.set_sidedata(part.get_sidedata("prft"))
            break
    return whole
