"""A background writer: one thread runs queued jobs in order, with a bounded queue."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

logger = logging.getLogger(__name__)


class BackgroundWriter:
    """Runs jobs one after another in a background thread, in the order of submission.

    After the first failure no further job is run, because later jobs depend on earlier ones. Every later
    call raises the error of the failed job.

    Args:
        waiting: maximum number of unfinished jobs. `submit` blocks above it, so that slow storage slows
            tracking down instead of filling memory.
    """

    def __init__(self, waiting: int = 2) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="xmem-write")
        self._waiting = waiting
        self._unfinished: deque[Future[None]] = deque()
        self._failure: BaseException | None = None
        self._raised = False

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job. Blocks while the queue is full."""
        while len(self._unfinished) >= self._waiting:
            self._unfinished.popleft().result()
            self.check()
        self.check()
        self._unfinished.append(self._pool.submit(self._do, job))

    @property
    def busy(self) -> bool:
        """Whether a job is queued or running."""
        return any(not job.done() for job in self._unfinished)

    def check(self) -> None:
        """Raise if a job has failed."""
        if self._failure is not None:
            self._raised = True
            raise self._failure

    def drain(self) -> None:
        """Wait until the queue is empty."""
        while self._unfinished:
            self._unfinished.popleft().result()
        self.check()

    def close(self) -> None:
        """Wait for every job and stop the thread. A failure that no call has raised yet is logged."""
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
