"""A background writer: one thread runs queued jobs in order, with a bounded queue."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

logger = logging.getLogger(__name__)


class BackgroundWriter:
    """Does jobs in the order given, in a thread of its own.

    The first job that fails is the last one done: what comes after would rest on it. Its error is raised by
    every later call, so that nobody goes on as if it had been written.

    Args:
        waiting: how many unfinished jobs there may be; storage slower than tracking slows it then, instead of
            filling memory.
    """

    def __init__(self, waiting: int = 2) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="xmem-write")
        self._waiting = waiting
        self._unfinished: deque[Future[None]] = deque()
        self._failure: BaseException | None = None
        self._raised = False

    def submit(self, job: Callable[[], None]) -> None:
        """Have a job done; waits for earlier ones while there are too many."""
        while len(self._unfinished) >= self._waiting:
            self._unfinished.popleft().result()
            self.check()
        self.check()
        self._unfinished.append(self._pool.submit(self._do, job))

    @property
    def busy(self) -> bool:
        """Whether a job is not done yet."""
        return any(not job.done() for job in self._unfinished)

    def check(self) -> None:
        """Raise if a job has failed."""
        if self._failure is not None:
            self._raised = True
            raise self._failure

    def drain(self) -> None:
        """Wait until every job is done."""
        while self._unfinished:
            self._unfinished.popleft().result()
        self.check()

    def close(self) -> None:
        """Wait for every job and stop the thread. A failure that nobody was told of is logged."""
        self._pool.shutdown(wait=True)
        if self._failure is not None and not self._raised:
            logger.warning("what was tracked last could not be written: %s", self._failure)

    def _do(self, job: Callable[[], None]) -> None:
        if self._failure is not None:
            return
        try:
            job()
        except BaseException as error:
            self._failure = error
