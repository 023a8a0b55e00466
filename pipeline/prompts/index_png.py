"""Index PNGs: pixel values are object ids.

OpenCV rescales grey values of few bits and converts a palette to its colours, from which the indices cannot
always be recovered (unused entries are often black, like the background). So the palette is replaced, before
OpenCV decodes the picture, by one in which every index is its own colour.
"""

from __future__ import annotations

import zlib

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.base.errors import PictureTooLargeError, PromptError
from pipeline.base.picture_size import MAX_PIXELS, check_size, header_size

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3
_ADVICE = "give a PNG with one value per object (grey or palette)"


def decode_index_png(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> NDArray[np.int32]:
    """Decode the values of an index PNG, grey of 1 to 16 bits or palette of 1 to 8.

    Colour PNGs whose channels are all equal count as grey; an alpha channel is ignored.

    Args:
        data: the file's bytes.
        name: name of the file in messages.
        max_pixels: larger pictures are refused before they are decoded.

    Returns:
        H x W int32.

    Raises:
        PromptError: the data is not a PNG, damaged, coloured, or too large.
    """
    if not data.startswith(_SIGNATURE):
        raise PromptError(f"{name} is not a PNG: {_ADVICE}")
    chunks = _chunks(data, name)
    if chunks[0][0] != b"IHDR" or len(chunks[0][1]) != 13:
        raise PromptError(f"{name} is a damaged PNG (its header is wrong): write it again")
    try:
        check_size(name, *(header_size(data) or (0, 0)), max_pixels)
    except PictureTooLargeError as error:
        raise PromptError(str(error)) from error
    depth, kind = chunks[0][1][8:10]
    if kind == _PALETTE or (kind == _GREY and depth < 8):
        data = _with_plain_palette(chunks, depth)
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        picture = None
    if picture is None:
        raise PromptError(f"{name} is a PNG that cannot be decoded: write it again")
    if picture.ndim == 2:
        return picture.astype(np.int32)
    colours = picture[..., :3]
    if (colours != colours[..., :1]).any():
        raise PromptError(f"{name} is a coloured picture: {_ADVICE}")
    return colours[..., 0].astype(np.int32)


def _chunks(data: bytes, name: str) -> list[tuple[bytes, bytes]]:
    """Return (type, content) of every chunk up to the end marker."""
    found = []
    at = len(_SIGNATURE)
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        body, check = data[at + 4 : at + 8 + length], data[at + 8 + length : at + 12 + length]
        if len(check) < 4:
            break
        if zlib.crc32(body) != int.from_bytes(check, "big"):
            raise PromptError(f"{name} is a damaged PNG (a checksum is wrong): write it again")
        found.append((body[:4], body[4:]))
        if body[:4] == b"IEND":
            return found
        at += 12 + length
    raise PromptError(f"{name} is a damaged PNG (cut off after {len(data)} bytes): write it again")


def _with_plain_palette(chunks: list[tuple[bytes, bytes]], depth: int) -> bytes:
    """Return the picture as a palette PNG whose entry i is the colour (i, i, i)."""
    header = bytearray(chunks[0][1])
    header[9] = _PALETTE
    palette = bytes(i for i in range(1 << min(depth, 8)) for _ in range(3))
    pixels = [chunk for chunk in chunks if chunk[0] == b"IDAT"]
    out = [_SIGNATURE]
    for kind, content in [(b"IHDR", bytes(header)), (b"PLTE", palette), *pixels, (b"IEND", b"")]:
        body = kind + content
        out += [len(content).to_bytes(4, "big"), body, zlib.crc32(body).to_bytes(4, "big")]
    return b"".join(out)
