"""Decode ahead: an iterator's next items are made by a thread while the present one is worked on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterates `items` in a thread of its own, at most `depth` items ahead.

    Order and content stay the same, and an exception comes out where it was raised. `close()` stops the
    thread and leaves `items` alone afterwards.
    """

    def __init__(self, items: Iterator[T], depth: int = 4) -> None:
        self._items = items
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="xmem-decode", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetch[T]:
        return self

    def __next__(self) -> T:
        if self._ended:
            raise StopIteration
        item, error = self._queue.get()
        if error is not None:
            self._ended = True
            if isinstance(error, StopIteration):
                raise StopIteration
            raise error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Stop decoding and wait until the thread has let go of the source."""
        self._stop.set()
        self._ended = True
        while self._thread.is_alive():
            # Waiting for room it looks at the stop sign ten times a second.
            self._thread.join(0.05)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._put((next(self._items), None))
        except BaseException as error:
            self._put((None, error))

    def _put(self, entry: tuple[T | None, BaseException | None]) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return
            except queue.Full:
                continue
