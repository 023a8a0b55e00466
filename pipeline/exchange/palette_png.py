"""Palette PNGs as in DAVIS: pixel values are object ids."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

MAX_VALUE = 255


def palette_png(label_map: NDArray[np.int32]) -> bytes:
    """An H x W label map with values up to 255 as the bytes of a palette PNG with the colours of DAVIS."""
    height, width = label_map.shape
    if label_map.size and not 0 <= int(label_map.min()) <= int(label_map.max()) <= MAX_VALUE:
        raise ValueError(f"a palette PNG holds the values 0 to {MAX_VALUE}, not {int(label_map.max())}")
    lines = np.zeros((height, width + 1), np.uint8)  # each line begins with its filter: none
    lines[:, 1:] = label_map
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", _PALETTE),
        (b"IDAT", zlib.compress(lines.tobytes(), 6)),
        (b"IEND", b""),
    )
    found = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in chunks:
        found += [struct.pack(">I", len(content)), kind, content]
        found.append(struct.pack(">I", zlib.crc32(kind + content)))
    return b"".join(found)


def _palette() -> bytes:
    """The colours of PASCAL VOC and DAVIS: the bits of a value, spread over the three channels."""
    colours = bytearray()
    for value in range(MAX_VALUE + 1):
        channels, rest = [0, 0, 0], value
        for bit in range(7, -1, -1):
            for channel in range(3):
                channels[channel] |= (rest >> channel & 1) << bit
            rest >>= 3
        colours += bytes(channels)
    return bytes(colours)


_PALETTE = _palette()
