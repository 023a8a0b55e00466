"""Prefetching: a thread produces an iterator's next items while the current one is used."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterates `items` in a background thread, at most `depth` items ahead.

    Order and content are unchanged. An exception is raised at its position and again on every later call, so
    that a failed source never looks like one that ended. `close()` stops the thread, which closes `items` if
    it can be closed, as generators can.

    Args:
        items: used by the thread only.
        depth: number of items that may wait; one more may be finished and wait for room.
        name: name of the thread.
    """

    def __init__(self, items: Iterator[T], depth: int = 4, *, name: str = "xmem-decode") -> None:
        self._items = items
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetch[T]:
        return self

    def __next__(self) -> T:
        if self._end is None:
            item, self._end = self._queue.get()
            if self._end is None:
                return item  # type: ignore[return-value]
        if isinstance(self._end, StopIteration):
            raise StopIteration
        raise self._end

    def there(self, seconds: float) -> bool:
        """Wait for the next item, or the end; False if it takes longer."""
        waiting = self._queue
        with waiting.not_empty:
            return self._end is not None or waiting.not_empty.wait_for(waiting._qsize, seconds) > 0

    def close(self) -> None:
        """Stop decoding and wait until the thread has released the source."""
        self._stop.set()
        if self._end is None:
            self._end = RuntimeError("the iterator has been closed")
        # While it waits for room, the thread checks the stop flag ten times a second.
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._put((next(self._items), None))
        except BaseException as error:
            self._put((None, error))
        try:
            # Closed here, not by the garbage collector: open files are closed by the thread that opened them.
            getattr(self._items, "close", lambda: None)()
        except Exception as error:
            logger.debug("closing the iterator failed: %s", error)

    def _put(self, entry: tuple[T | None, BaseException | None]) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return
            except queue.Full:
                continue
