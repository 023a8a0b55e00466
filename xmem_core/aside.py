"""Runs independent parts of a computation on a second thread, beside the calling one.

Most operations of a step are too small for several threads of torch, but a step has parts that do not depend
on each other: objects, blocks of queries. Which thread computes a part makes no difference to its result, if
both have as many threads of torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, wait
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# Numbers in an entry of a batch from which it is worth a call of its own.
_LEAST_ENTRY = 1 << 16

_here = threading.local()


@contextmanager
def shared_with(aside: Executor | None) -> Iterator[None]:
    """Let `helper` return a thread in the calling thread, as far as the block goes; None: no thread."""
    before = helper()
    _here.helper = aside
    try:
        yield
    finally:
        _here.helper = before


def helper() -> Executor | None:
    """The thread that the calling one shares its work with; None: it does it all."""
    if torch.compiler.is_compiling():
        return None  # a compiled function is one piece
    found: Executor | None = getattr(_here, "helper", None)
    return found


def each(calls: Sequence[Callable[[], T]], aside: Executor | None) -> list[T]:
    """Results of the calls, in their order.

    The calling thread takes them from the first on, that of `aside` from the last on. So nothing waits for a
    thread that is busy or gets no CPU, and a call may divide its own work likewise.

    Args:
        calls: independent of each other. They run without gradients, under the caller's autocast.
        aside: one thread, with as many threads of torch as the caller; None: the caller does it all.

    Raises:
        The first error of a call, once none of the calls runs any more.
    """
    if aside is None or len(calls) < 2:
        return [call() for call in calls]
    # These settings are the thread's.
    reduced, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def as_here(call: Callable[[], T]) -> T:
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=reduced), shared_with(aside):
            return call()

    begun = [aside.submit(as_here, call) for call in reversed(calls[1:])]
    begun.reverse()
    try:
        found = [calls[0]()]
        for call, other in zip(calls[1:], begun, strict=True):
            found.append(call() if other.cancel() else other.result())
        return found
    finally:
        # After an error: what is computed here may be changed by the caller next.
        wait([other for other in begun if not other.cancel()])


def in_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, which treats each entry of a batch alike, shared with `helper` entry by entry.

    Args:
        function: of (n, ...) tensors, to (n, ...).
        x: (N, ...)
    """
    if not divides(x):
        return function(x)
    return torch.cat(each([partial(function, part) for part in x.split(1)], helper()))


def divides(x: Tensor) -> bool:
    """Whether `in_parts` divides a batch, (N, ...)."""
    return helper() is not None and len(x) > 1 and x[0].numel() >= _LEAST_ENTRY
