"""The ledger's counts add up, with any number of threads and after restarts."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.live.camera.ledger import Ledger, LedgerCounts


def test_it_adds_up() -> None:
    ledger = Ledger()
    ledger.received(10)
    ledger.tracked(4)
    ledger.dropped("queue full", 2)
    ledger.dropped("queue full")
    ledger.dropped("too old")
    ledger.corrupt("decode error")
    counts = ledger.counts()
    assert (counts.received, counts.tracked, counts.dropped_total, counts.corrupt_total) == (10, 4, 4, 1)
    assert dict(counts.dropped) == {"queue full": 3, "too old": 1}
    assert counts.in_flight == 1
    assert not counts.settled
    ledger.tracked()
    assert ledger.counts().settled
    assert counts.in_flight == 1  # what was taken before stays as it was


def test_a_frame_is_settled_once() -> None:
    ledger = Ledger()
    ledger.received()
    ledger.tracked()
    again: list[Callable[[], None]] = [ledger.tracked]
    again += [lambda: ledger.dropped("x"), lambda: ledger.corrupt("x")]
    for settle in again:
        with pytest.raises(ValueError, match="settled once"):
            settle()
    with pytest.raises(ValueError, match="upwards"):
        ledger.received(-1)


def test_it_goes_through_json() -> None:
    ledger = Ledger()
    ledger.received(5)
    ledger.dropped("b")
    ledger.dropped("a", 2)
    counts = LedgerCounts.from_json(json.loads(json.dumps(ledger.counts().to_json())))
    assert counts == LedgerCounts(5, 0, {"a": 2, "b": 1}, {})
    assert Ledger(counts).counts().in_flight == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"received": 1, "tracked": 2, "dropped": {}, "corrupt": {}},
        {"received": -1, "tracked": 0, "dropped": {}, "corrupt": {}},
        {"received": True, "tracked": 0, "dropped": {}, "corrupt": {}},
        {"received": 1, "tracked": 0, "dropped": [], "corrupt": {}},
        {"received": 1, "tracked": 0, "dropped": {"a": 0.5}, "corrupt": {}},
    ],
)
def test_what_is_no_ledger_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="no ledger"):
        LedgerCounts.from_json(wrong)


def test_after_a_restart_what_nobody_finished_was_dropped() -> None:
    counts = LedgerCounts(received=10, tracked=7, dropped={"queue full": 1})
    ledger = Ledger.resumed(counts, next_frame=15)
    assert ledger.counts() == LedgerCounts(15, 7, {"queue full": 1, "restart": 7}, {})
    assert Ledger.resumed(LedgerCounts(3, 3), 3).counts() == LedgerCounts(3, 3)
    with pytest.raises(ValueError, match="used twice"):
        Ledger.resumed(counts, next_frame=9)


def test_threads_lose_nothing() -> None:
    ledger = Ledger()

    def work(reason: str) -> None:
        for _ in range(500):
            ledger.received(2)
            ledger.tracked()
            ledger.dropped(reason)

    threads = [threading.Thread(target=work, args=(f"r{i % 2}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = ledger.counts()
    assert counts == LedgerCounts(8000, 4000, {"r0": 2000, "r1": 2000}, {})
    assert counts.settled


@given(st.lists(st.tuples(st.sampled_from("rtdc"), st.integers(0, 5), st.sampled_from("ab")), max_size=40))
def test_no_order_of_calls_makes_it_lie(calls: list[tuple[str, int, str]]) -> None:
    ledger = Ledger()
    for what, count, reason in calls:
        before = ledger.counts()
        try:
            if what == "r":
                ledger.received(count)
            elif what == "t":
                ledger.tracked(count)
            elif what == "d":
                ledger.dropped(reason, count)
            else:
                ledger.corrupt(reason, count)
        except ValueError:
            assert ledger.counts() == before
        counts = ledger.counts()
        total = counts.tracked + counts.dropped_total + counts.corrupt_total
        assert 0 <= total <= counts.received
        assert counts.received == total + counts.in_flight
