"""A thread for `xmem_core.aside` that takes all that it is given, whatever the machine's load."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from threading import Thread
from typing import Any

import torch


class Beside(Executor):
    """Each call is done by another thread, with one thread of torch, before `submit` returns.

    Attributes:
        done: number of calls.
    """

    def __init__(self) -> None:
        self.done = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            torch.set_num_threads(1)
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        thread = Thread(target=run)
        thread.start()
        thread.join()
        self.done += 1
        return future
