"""A PNG writer for every bit depth and colour type, row by row and value by value."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6


def plain_png(
    values: np.ndarray,
    depth: int = 8,
    kind: int = GREY,
    palette: Sequence[tuple[int, int, int]] | None = None,
    extra: Sequence[tuple[bytes, bytes]] = (),
) -> bytes:
    """Encode `values` (H x W, or H x W x channels) as a PNG; `extra` chunks come before the pixels."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + _packed(row.ravel().tolist(), depth) for row in values)
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, kind, 0, 0, 0])
    chunks = [(b"IHDR", header)]
    if palette is not None:
        chunks.append((b"PLTE", bytes(c for colour in palette for c in colour)))
    chunks += [*extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def _packed(row: list[int], depth: int) -> bytes:
    if depth == 16:
        return b"".join(v.to_bytes(2, "big") for v in row)
    bits = "".join(f"{v:0{depth}b}" for v in row)
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))


def _chunk(name: bytes, content: bytes) -> bytes:
    body = name + content
    return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
