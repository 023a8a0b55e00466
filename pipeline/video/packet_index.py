"""Packet index of a video: the keyframe from which to decode frame N.

The index is a prediction: it assumes that the output frames are the packets sorted by presentation time.
`build` returns None if the timestamps show that this may be wrong. The decoding code compares the actual
frames with `order` and starts over from the beginning at the first difference.
"""

from __future__ import annotations

import logging
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

log = logging.getLogger(__name__)

MAX_REORDER = 64
"""No codec known to us shows a frame this many packets away from where it is stored."""


class PacketLike(Protocol):
    """Attributes of a demuxed packet that the index reads (`av.Packet` has them)."""

    pts: int | None
    dts: int | None
    size: int
    is_keyframe: bool
    is_corrupt: bool
    is_discard: bool


@dataclass(frozen=True)
class PacketIndex:
    """The first packets of a stream in decode order, and the frames that they contain.

    Args:
        pts: presentation time of each packet, in the stream's time base; unique.
        sizes: bytes of each packet.
        keyframes: positions (in decode order) of the packets that are keyframes.
        order: the presentation times of the packets that are shown, sorted: frame i has `order[i]`.
        complete: whether the index reaches the stream's end.
    """

    pts: array[int]
    sizes: array[int]
    keyframes: array[int]
    order: array[int]
    complete: bool
    positions: dict[int, int]

    @property
    def frames_known(self) -> int:
        """Number of certain entries of `order`: a partial index may lack packets shown before its last."""
        return len(self.order) if self.complete else max(0, len(self.order) - MAX_REORDER)

    def covers(self, frame_index: int) -> bool:
        return frame_index < self.frames_known

    def keyframe_before(self, frame_index: int, skip: int = 0) -> int | None:
        """Position of the last keyframe not shown after a frame, or of the one `skip` before it."""
        wanted = self.order[frame_index]
        usable = [p for p in self.keyframes if self.pts[p] <= wanted]
        return usable[-1 - skip] if len(usable) > skip else None

    def rank(self, position: int) -> int:
        """Number of shown frames that precede the packet at `position`."""
        return bisect_right(self.order, self.pts[position] - 1)

    def __repr__(self) -> str:
        return (
            f"PacketIndex({len(self.pts)} packets, {len(self.keyframes)} keyframes, "
            f"{len(self.order)} frames, complete={self.complete})"
        )


def build(packets: Iterable[PacketLike], frames: int) -> PacketIndex | None:
    """Index packets until `frames` frames are certain, or all; None if the timestamps cannot be trusted."""
    pts, sizes, keyframes, order = array("q"), array("q"), array("q"), array("q")
    positions: dict[int, int] = {}
    last_dts: int | None = None
    complete = True
    for packet in packets:
        if packet.size == 0:
            continue
        position = len(pts)
        if packet.pts is None or packet.is_corrupt or packet.pts in positions:
            log.debug("packet %d: pts %s, corrupt %s: no index", position, packet.pts, packet.is_corrupt)
            return None
        if packet.dts is not None:
            if last_dts is not None and packet.dts <= last_dts:
                log.debug("packet %d: dts %d after %d: no index", position, packet.dts, last_dts)
                return None
            last_dts = packet.dts
        positions[packet.pts] = position
        pts.append(packet.pts)
        sizes.append(packet.size)
        if packet.is_keyframe:
            keyframes.append(position)
        if not packet.is_discard:
            order.append(packet.pts)
        if len(order) >= frames + 2 * MAX_REORDER:
            complete = False
            break
    if not pts or not keyframes or keyframes[0] != 0:
        return None
    for shown, position in enumerate(sorted(range(len(pts)), key=pts.__getitem__)):
        if abs(shown - position) >= MAX_REORDER:
            log.debug("packet %d is shown as number %d: no index", position, shown)
            return None
    return PacketIndex(pts, sizes, keyframes, array("q", sorted(order)), complete, positions)
