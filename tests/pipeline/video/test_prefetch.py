"""Prefetching: order, bounds, persistent errors, ended threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from pipeline.video.prefetch import Prefetch


@pytest.fixture
def running() -> Callable[[], list[str]]:
    """The decoding threads that run and were started in this test; those of sources left open don't count."""
    before = set(threading.enumerate())
    return lambda: [t.name for t in threading.enumerate() if t.name == "xmem-decode" and t not in before]


def test_order_and_content_stay_and_the_thread_ends(running: Callable[[], list[str]]) -> None:
    items = Prefetch(iter(range(50)), depth=3)
    assert list(items) == list(range(50))
    assert next(items, None) is None
    items.close()
    assert not running()


def test_no_more_than_depth_items_are_made_ahead() -> None:
    made: list[int] = []
    halted = threading.Event()

    def source() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            if len(made) == 4:
                halted.set()
            yield i

    items = Prefetch(source(), depth=3)
    assert halted.wait(30)
    # Three in the queue and one in the thread's hands.
    items.close()
    assert made == [0, 1, 2, 3]


def test_a_failure_comes_out_in_its_place_and_again() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    items = Prefetch(source())
    assert next(items) == 1
    for _ in range(3):
        with pytest.raises(OSError, match="the disk is gone"):
            next(items)
    items.close()


def test_closing_closes_the_source_in_its_own_thread() -> None:
    closed_by: list[str] = []

    def source() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed_by.append(threading.current_thread().name)

    items = Prefetch(source(), depth=2)
    assert next(items) == 1
    items.close()
    assert closed_by == ["xmem-decode"]
    # Not StopIteration: what was closed has not come to its end.
    with pytest.raises(RuntimeError, match="closed"):
        next(items)


def test_closing_waits_for_a_source_that_is_busy(running: Callable[[], list[str]]) -> None:
    entered, let_go = threading.Event(), threading.Event()

    def source() -> Iterator[int]:
        entered.set()
        let_go.wait(30)
        yield 1

    items = Prefetch(source())
    assert entered.wait(30)
    threading.Timer(0.1, let_go.set).start()
    items.close()
    assert let_go.is_set()
    assert not running()
