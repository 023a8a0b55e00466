"""Access units: joins pictures that arrive in several packets.

Some servers repeat a stream's parameter sets before every slice of a keyframe (GStreamer's payloader does,
with `config-interval=-1`, for encoders that cut pictures into slices, as those tuned for low delay do).
FFmpeg takes each repetition for the start of another picture: one keyframe becomes two packets, each decoded
by itself, both damaged, and so is everything after them. Whether a packet begins a picture stands in the
first bits of its first slice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import av

_START = re.compile(rb"\x00\x00\x01")
_LOOKED_AT = 4096  # bytes, within which a packet's first slice has to begin
_MOST_BYTES = 16 << 20  # of one picture


def continues(codec: str, data: bytes) -> bool:
    """Whether a packet (Annex B) holds slices of a picture, and not the first one.

    Args:
        codec: FFmpeg's name; of all but h264 and hevc nothing is known, so it is False.
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
    """Whether a slice is its picture's first; None if it is no slice. `first_mb_in_slice` 0 is the bit 1."""
    return bool(unit[1] & 0x80) if len(unit) > 1 and unit[0] & 0x1F in (1, 2, 5) else None


def _hevc(unit: bytes) -> bool | None:
    """As `_h264`; here a flag says so, behind a header of two bytes."""
    return bool(unit[2] & 0x80) if len(unit) > 2 and unit[0] >> 1 & 0x3F < 32 else None


_FIRST_SLICE: dict[str, Callable[[bytes], bool | None]] = {"h264": _h264, "hevc": _hevc}


class Joiner:
    """Makes one packet again of those that a keyframe came in.

    Only keyframes can be split in this way. A keyframe is known to be whole when the next packet begins
    another picture, so it is held back until then: the first of a connection, to learn how the camera sends
    them, and all others where they come in pieces.

    Args:
        codec, container: FFmpeg's names. Only what comes by RTSP is looked at.
    """

    def __init__(self, codec: str, container: str) -> None:
        self._codec = codec
        self._wanted = container == "rtsp" and codec in _FIRST_SLICE
        self._known = self._in_pieces = False
        self._held: list[Any] = []
        self._bytes = 0

    def take(self, packet: Any) -> list[Any]:
        """Packets that can be decoded, now that one more has come."""
        if not self._wanted:
            return [packet]
        # Only of keyframes: another picture may begin in the middle because its first slice was lost.
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
        """What is held, joined; at most one packet."""
        held, self._held, self._bytes = self._held, [], 0
        return [_joined(held)] if len(held) > 1 else held

    def _hold(self, packet: Any) -> None:
        self._held.append(packet)
        self._bytes += packet.size


def _joined(parts: list[Any]) -> Any:
    """One packet of several; its times are the first that are known."""
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
        if part.has_sidedata("prft"):  # when it was taken
            whole.set_sidedata(part.get_sidedata("prft"))
            break
    return whole
