"""Adaptive read-ahead for remote files: small after a seek, growing while reading in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

LEAST_BYTES = 1 << 18
KEPT = 3


class ReadAhead:
    """Reads byte ranges of a file in spans that double from `LEAST_BYTES` to `most` while read in order.

    The last few spans are kept, since the head of a file is read again after the index at its end.

    Args:
        fetch: returns bytes start..end (exclusive) of the file.
        size: size of the file, in bytes.
        most: longest span, in bytes; up to `KEPT` times as much memory is used.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size: int, most: int) -> None:
        self._fetch = fetch
        self._size = size
        self._most = max(1, most)
        self._spans: deque[tuple[int, bytes]] = deque(maxlen=KEPT)
        self._next: int | None = None
        self._length = 0

    def read(self, start: int, end: int) -> bytes:
        """Return bytes start..end (exclusive), up to the end of the file. Raises what `fetch` raises."""
        end = min(end, self._size)
        parts: list[bytes] = []
        while start < end:
            first, data = self._span_with(start) or self._fetched(start, end)
            part = data[start - first : end - first]
            parts.append(part)
            start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _span_with(self, position: int) -> tuple[int, bytes] | None:
        for first, data in reversed(self._spans):
            if first <= position < first + len(data):
                return first, data
        return None

    def _fetched(self, start: int, end: int) -> tuple[int, bytes]:
        length = 2 * self._length if start == self._next else LEAST_BYTES
        length = min(max(length, 1), self._most)
        stop = min(self._size, max(end, start + length))
        data = self._fetch(start, stop)
        if len(data) != stop - start:
            raise EOFError(f"received {len(data)} bytes instead of {stop - start}")
        self._length, self._next = length, stop
        self._spans.append((start, data))
        return start, data
