"""Frames and masks of a data set: reading both, writing masks as palette PNGs."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import PromptError, UsageError
from pipeline.base.picture_size import MAX_PIXELS, check_size, header_size
from pipeline.prompts.index_png import decode_index_png


def read_frame(path: Path) -> NDArray[np.uint8]:
    """H x W x 3 RGB; UsageError if it is no picture or too large."""
    data = path.read_bytes()
    size = header_size(data)
    if size is not None:
        check_size(str(path), *size, MAX_PIXELS)
    picture = None if size is None else cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise UsageError(f"{path} cannot be decoded as a picture")
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), np.uint8)


def read_annotation(path: Path) -> NDArray[np.int32]:
    """H x W indices of a grey or palette PNG; UsageError if it is neither."""
    try:
        return decode_index_png(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except PromptError as error:
        raise UsageError(str(error)) from None


def _davis_palette() -> bytes:
    """The colours of PASCAL VOC, which DAVIS and YouTube-VOS use: bits of the index, spread over channels."""
    colours = np.zeros((256, 3), np.uint8)
    for index in range(256):
        rest = index
        for bit in range(7, -1, -1):
            for channel in range(3):
                colours[index, channel] |= ((rest >> channel) & 1) << bit
            rest >>= 3
    return colours.tobytes()


_PALETTE = _davis_palette()


def palette_png(labels: NDArray[np.integer]) -> bytes:
    """H x W indices of 0..255 as a PNG with the colours of DAVIS."""
    height, width = labels.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each row begins with its filter, none
    rows[:, 1:] = labels
    return _png(width, height, 3, [(b"PLTE", _PALETTE), (b"IDAT", zlib.compress(rows.tobytes(), 6))])


def grey_png(labels: NDArray[np.integer]) -> bytes:
    """H x W values of 0..255 as a grey PNG."""
    height, width = labels.shape
    rows = np.zeros((height, width + 1), np.uint8)
    rows[:, 1:] = labels
    return _png(width, height, 0, [(b"IDAT", zlib.compress(rows.tobytes(), 6))])


def _png(width: int, height: int, colour: int, chunks: list[tuple[bytes, bytes]]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, content in [(b"IHDR", header), *chunks, (b"IEND", b"")]:
        parts += [struct.pack(">I", len(content)), kind, content]
        parts.append(struct.pack(">I", zlib.crc32(kind + content)))
    return b"".join(parts)
