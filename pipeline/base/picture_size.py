"""Pixel limit for images: the size is read from the header before anything is decoded.

A picture of one colour compresses by a factor of thousands: a PNG of one megabyte may decode to gigabytes.
"""

from __future__ import annotations

from pipeline.base.errors import PictureTooLargeError, UsageError

MAX_PIXELS = 8192 * 8192
"""Default limit for the pixels of a picture; larger ones are not decoded."""

_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257
_TIFF_INTEGERS = {1: 1, 3: 2, 4: 4, 16: 8}
"""Size in bytes of the integer types of TIFF tags: BYTE, SHORT, LONG, LONG8."""


def check_limit(max_pixels: int) -> int:
    """Return the limit if it is valid, else raise UsageError."""
    if isinstance(max_pixels, bool) or not isinstance(max_pixels, int) or max_pixels < 1:
        raise UsageError(f"max_pixels={max_pixels!r} is not allowed: a whole number of at least 1")
    return max_pixels


def check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    """Raise PictureTooLargeError if a picture has more pixels than allowed.

    Args:
        name: name of the picture in the message.
        width, height: pixels.
        max_pixels: the limit.
    """
    if width * height > max_pixels:
        raise PictureTooLargeError(
            f"{name}: a picture of {width}x{height} has {width * height} pixels; at most {max_pixels} are "
            "decoded; if the file can be trusted, set a larger --max-pixels (max_pixels in Python)"
        )


def header_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) from the header of a JPEG, PNG, BMP, WebP or TIFF file.

    None if there is no such header: the picture is damaged or of another format.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        size = _png(data)
    elif data.startswith(b"\xff\xd8"):
        size = _jpeg(data)
    elif data.startswith(b"BM"):
        size = _bmp(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        size = _webp(data)
    elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        size = _tiff(data)
    else:
        size = None
    return None if size is None or min(size) < 1 else size


def _png(data: bytes) -> tuple[int, int] | None:
    if data[12:16] != b"IHDR" or len(data) < 24:
        return None
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def _jpeg(data: bytes) -> tuple[int, int] | None:
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:  # decoders skip bytes that are not markers
            at += 1
            continue
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
        elif marker in _WITHOUT_LENGTH or marker == 0:
            at += 2
        elif marker in _START_OF_FRAME:
            size = data[at + 5 : at + 9]
            return (
                (int.from_bytes(size[2:], "big"), int.from_bytes(size[:2], "big")) if len(size) == 4 else None
            )
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _bmp(data: bytes) -> tuple[int, int] | None:
    if len(data) < 26:
        return None
    if int.from_bytes(data[14:18], "little") < 36:  # OS/2 header
        return int.from_bytes(data[18:20], "little"), int.from_bytes(data[20:22], "little")
    width, height = (int.from_bytes(data[at : at + 4], "little", signed=True) for at in (18, 22))
    return abs(width), abs(height)


def _webp(data: bytes) -> tuple[int, int] | None:
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    return None


def _tiff(data: bytes) -> tuple[int, int] | None:
    """Size from the tags of the first picture, which is the one that is decoded."""
    order = "little" if data.startswith(b"II") else "big"
    big = b"+" in data[2:4]
    wide = 8 if big else 4  # size of offsets and counts
    entry, head = (20, 8) if big else (12, 2)

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)  # type: ignore[arg-type]

    start = number(8 if big else 4, wide)
    found: dict[int, int] = {}
    for k in range(min(number(start, head), 4096)):
        at = start + head + k * entry
        tag, kind = number(at, 2), number(at + 2, 2)
        if tag in (_TIFF_WIDTH, _TIFF_HEIGHT) and kind in _TIFF_INTEGERS and at + entry <= len(data):
            found[tag] = number(at + 4 + wide, _TIFF_INTEGERS[kind])
    if len(found) < 2:
        return None
    return found[_TIFF_WIDTH], found[_TIFF_HEIGHT]
