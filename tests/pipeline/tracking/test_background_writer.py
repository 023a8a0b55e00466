"""The background writer: order, bounded queue, and failures that are raised."""

from __future__ import annotations

import logging
import threading

import pytest

from pipeline.tracking.background_writer import BackgroundWriter


def test_jobs_are_done_in_order() -> None:
    writer, done = BackgroundWriter(), []
    for i in range(20):
        writer.submit(lambda i=i: done.append(i))  # type: ignore[misc]
    writer.drain()
    writer.close()
    assert done == list(range(20))


def test_few_jobs_wait() -> None:
    writer, may_go = BackgroundWriter(waiting=2), threading.Event()

    def wait() -> None:
        may_go.wait(30)

    writer.submit(wait)
    writer.submit(lambda: None)
    third = threading.Thread(target=writer.submit, args=(lambda: None,))
    third.start()
    third.join(0.2)
    assert third.is_alive()  # the first is being done, the second waits: no room for it
    may_go.set()
    third.join(30)
    assert not third.is_alive()
    writer.close()


def test_after_a_failure_nothing_is_done_and_everybody_hears_of_it() -> None:
    writer, done = BackgroundWriter(waiting=5), []

    def fail() -> None:
        raise OSError("disk full")

    writer.submit(lambda: done.append(1))
    writer.submit(fail)
    with pytest.raises(OSError, match="disk full"):
        writer.drain()
    for call in (writer.check, writer.drain, lambda: writer.submit(lambda: None)):
        with pytest.raises(OSError, match="disk full"):
            call()
    writer.close()
    assert done == [1]


def test_a_failure_nobody_asked_about_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    writer = BackgroundWriter()

    def fail() -> None:
        raise OSError("disk full")

    writer.submit(fail)
    with caplog.at_level(logging.WARNING):
        writer.close()
    assert "disk full" in caplog.text
