"""Sinks: found by name, and called for every range before it is committed."""

from __future__ import annotations

import threading
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from support.chunks import NO_EVENTS, events, rows

import pipeline.base.plugins
from pipeline.base.errors import StoreError, UsageError
from pipeline.tracks.sinks import Sink, Sinks, load_sink


class Kept:
    """Keeps the rows it gets."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int, pa.Table, pa.Table]] = []

    def commit(self, stream_id: str, first: int, last: int, tracks: pa.Table, events: pa.Table) -> None:
        self.calls.append((stream_id, first, last, tracks, events))


class Full(Kept):
    def commit(self, stream_id: str, first: int, last: int, tracks: pa.Table, events: pa.Table) -> None:
        raise ConnectionError("no space\nleft at db://me:hunter2@host/x?token=abc")


def no_sink() -> object:
    return object()


def faulty() -> object:
    raise OSError("no such\nhost")


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry points as an installed package would register them."""
    registered = EntryPoints(
        EntryPoint(name, value, "xmem.sinks")
        for name, value in [
            ("kept", "test_sinks:Kept"),
            ("full", "test_sinks:Full"),
            ("useless", "test_sinks:no_sink"),
            ("faulty", "test_sinks:faulty"),
            ("gone", "no_such_package:Thing"),
        ]
    )
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setattr(pipeline.base.plugins, "entry_points", lambda group: registered.select(group=group))


def test_a_sink_is_found_by_name(plugins: None) -> None:
    assert isinstance(load_sink("kept"), Sink)
    assert type(load_sink("kept")).__name__ == "Kept"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nobody", r"no sink 'nobody'; available: faulty, full, gone, kept, useless$"),
        ("useless", r"has no method commit"),
        ("gone", r"cannot be loaded: ModuleNotFoundError: No module named 'no_such_package'"),
        ("faulty", r"cannot be loaded: OSError: no such host; repair or uninstall it$"),
    ],
)
def test_unusable_sinks_are_named(plugins: None, name: str, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        load_sink(name)
    with pytest.raises(UsageError, match=complaint):
        Sinks.load(["kept", name])


def test_without_any_plugin_the_message_says_what_to_do() -> None:
    with pytest.raises(
        UsageError, match=r"^no sink 'kept'; available: none; install the package that provides it$"
    ):
        load_sink("kept")


def test_each_gets_the_range_once_in_the_order_given() -> None:
    order: list[str] = []

    class Named(Kept):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def commit(self, *given: Any) -> None:
            order.append(self.name)
            super().commit(*given)

    a, b = Named("a"), Named("b")
    sinks = Sinks({"b": b, "a": a})
    tracks, happened = rows(10, 14), events(10)
    sinks.commit("cam", 10, 14, tracks, happened)
    assert order == ["b", "a"]
    for sink in (a, b):
        ((stream_id, first, last, got_tracks, got_events),) = sink.calls
        assert (stream_id, first, last) == ("cam", 10, 14)
        assert got_tracks.equals(tracks)
        assert got_events.equals(happened)


def test_a_name_given_twice_is_one_sink_and_none_is_false(plugins: None) -> None:
    assert repr(Sinks.load(["kept", "full", "kept"])) == "Sinks(kept, full)"
    assert Sinks.load(["kept"])
    assert not Sinks.load([])
    Sinks({}).commit("cam", 0, 4, rows(0, 4), NO_EVENTS)


def test_a_failure_names_the_sink_without_credentials_and_ends_the_call() -> None:
    before, after = Kept(), Kept()
    sinks = Sinks({"before": before, "db": Full(), "after": after})
    with pytest.raises(StoreError) as caught:
        sinks.commit("cam", 5, 9, rows(5, 9), NO_EVENTS)
    assert str(caught.value) == (
        "sink 'db' did not take frames 5..9 of stream cam; nothing is lost, mend it and run again: "
        "ConnectionError: no space left at db://host/x?token=***"
    )
    assert type(caught.value) is StoreError  # not one that says: never try again
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert (len(before.calls), len(after.calls)) == (1, 0)


def test_a_usage_error_of_a_sink_is_no_usage_error_of_the_run() -> None:
    class Picky(Kept):
        def commit(self, *given: Any) -> None:
            raise UsageError("I don't like these rows")

    with pytest.raises(StoreError, match="sink 'picky'"):
        Sinks({"picky": Picky()}).commit("cam", 0, 0, rows(0, 0), NO_EVENTS)


def test_calls_to_one_sink_do_not_overlap() -> None:
    inside = threading.Event()
    go_on = threading.Event()
    overlaps: list[int] = []

    class Slow(Kept):
        busy = 0

        def commit(self, *given: Any) -> None:
            self.busy += 1
            overlaps.append(self.busy)
            inside.set()
            assert go_on.wait(20)
            super().commit(*given)
            self.busy -= 1

    slow = Slow()
    sinks = Sinks({"slow": slow})
    threads = [
        threading.Thread(target=sinks.commit, args=(f"cam-{i}", 0, 0, rows(0, 0), NO_EVENTS))
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    assert inside.wait(20)
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert overlaps == [1, 1, 1]
    assert sorted(call[0] for call in slow.calls) == ["cam-0", "cam-1", "cam-2"]
