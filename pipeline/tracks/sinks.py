"""Sinks: the protocol, plugin look-up, and several sinks as one.

When a sink is called, and what it may rely on:

* For each range of frames in order, just BEFORE the range is committed to the output folder. Whoever dies
  between the two starts again in front of that range, and the sink gets it again: at least once, never not
  at all. Whatever the output folder holds, each sink that the stream had all along has been given.
* So `commit` replaces: what the sink held of frames `first`..`last` of that stream goes, the new rows stay.
  On one CPU type the rows are the same ones; on a GPU they may differ in the last digits, and those of the
  last call are in Parquet.
* `first == 0` begins a stream, perhaps again (`--restart`): what the sink holds of the stream is void.
* Parquet is the truth. A sink may be ahead of it by one range, when a run died and was never taken up again.
  A sink that a stream was begun without gets what is committed from then on.
* Any exception stops the stream before the range counts as committed; the scheduler tries again. A sink
  cannot reject rows by raising errors.
* Calls to one sink do not overlap, but each process has its own instance, for other streams.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping
from typing import Protocol, Self, runtime_checkable

import pyarrow as pa

from pipeline.base.errors import StoreError, one_line
from pipeline.base.plugins import load_plugin

logger = logging.getLogger(__name__)

ENTRY_POINT_GROUP = "xmem.sinks"


@runtime_checkable
class Sink(Protocol):
    """Receives the rows of a stream, range by range; see the module's docstring. `check_sink` tests a sink.

    `commit` gets frames `first`..`last` (inclusive) of a stream, `tracks` as
    `pipeline.base.records.TRACKS_SCHEMA` (sorted by frame_index, object_id) and `events` as `EVENTS_SCHEMA`;
    either may have no rows. When it returns, the rows must be stored durably.
    """

    def commit(self, stream_id: str, first: int, last: int, tracks: pa.Table, events: pa.Table) -> None: ...


class Sinks:
    """Several sinks as one, called in the order given; the first that fails ends the call.

    May be shared by streams and threads. Without sinks it does nothing.

    Args:
        sinks: sinks by name; messages use the name.
    """

    def __init__(self, sinks: Mapping[str, Sink]) -> None:
        self._sinks = [(name, sink, threading.Lock()) for name, sink in sinks.items()]

    @classmethod
    def load(cls, names: Iterable[str]) -> Self:
        """Load sinks by name, see `load_sink`; duplicate names are loaded once. Raises UsageError."""
        return cls({name: load_sink(name) for name in dict.fromkeys(names)})

    def __bool__(self) -> bool:
        return bool(self._sinks)

    def __repr__(self) -> str:
        return f"Sinks({', '.join(name for name, _, _ in self._sinks)})"

    def commit(self, stream_id: str, first: int, last: int, tracks: pa.Table, events: pa.Table) -> None:
        """Hand a range of frames to every sink; see `Sink`.

        Raises:
            StoreError: a sink failed; the message names it. Later sinks were not called. Can be retried.
        """
        for name, sink, lock in self._sinks:
            began = time.monotonic()
            try:
                with lock:
                    sink.commit(stream_id, first, last, tracks, events)
            except Exception as error:
                raise StoreError(
                    f"sink {name!r} did not take frames {first}..{last} of stream {stream_id}; nothing is "
                    f"lost, mend it and run again: {type(error).__name__}: {one_line(error)}"
                ) from error
            logger.debug(
                "sink %s: frames %d..%d of %s in %.3f s",
                name, first, last, stream_id, time.monotonic() - began,
            )  # fmt: skip


def load_sink(name: str) -> Sink:
    """Load a sink by name: an entry point of the group `xmem.sinks`.

    The entry point is a class or function that returns the sink when called without arguments. It reads its
    configuration (an address, a password) from the environment.

    Raises:
        UsageError: no such sink is installed, it cannot be loaded, or it has no `commit`.
    """
    sink: Sink = load_plugin(
        name,
        group=ENTRY_POINT_GROUP,
        kind="sink",
        protocol=Sink,
        lacking="has no method commit(stream_id, first, last, ...)",
    )
    return sink
