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
* An error, whatever its class, stops the stream before the range counts as committed; the scheduler tries
  again. Errors are no way to refuse rows.
* Calls to one sink do not overlap, but there may be several of it: one in each process, for other streams.
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
    """Takes the rows of a stream, range by range; see the module's docstring. `check_sink` tries it out.

    `commit` gets frames `first`..`last` (inclusive) of a stream, `tracks` as
    `pipeline.base.records.TRACKS_SCHEMA` (sorted by frame_index, object_id) and `events` as `EVENTS_SCHEMA`;
    either may have no rows. When it returns, the rows are where they shall be, durably.
    """

    def commit(self, stream_id: str, first: int, last: int, tracks: pa.Table, events: pa.Table) -> None: ...


class Sinks:
    """Several sinks as one, called in the order given; the first that fails ends the call.

    May be shared by streams and threads. Without sinks it does nothing.

    Args:
        sinks: by the name that messages give them.
    """

    def __init__(self, sinks: Mapping[str, Sink]) -> None:
        self._sinks = [(name, sink, threading.Lock()) for name, sink in sinks.items()]

    @classmethod
    def load(cls, names: Iterable[str]) -> Self:
        """Those of these names, see `load_sink`; a name given twice is one sink. Raises UsageError."""
        return cls({name: load_sink(name) for name in dict.fromkeys(names)})

    def __bool__(self) -> bool:
        return bool(self._sinks)

    def __repr__(self) -> str:
        return f"Sinks({', '.join(name for name, _, _ in self._sinks)})"

    def commit(self, stream_id: str, first: int, last: int, tracks: pa.Table, events: pa.Table) -> None:
        """Hand a range of frames to every sink; see `Sink`.

        Raises:
            StoreError: one failed; the message names it. Later ones were not called. May be tried again.
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
    """The sink of that name: an entry point of the group `xmem.sinks`.

    An entry point names a class or function that gives the sink when called without arguments; what it needs
    to know (an address, a password) it takes from the environment.

    Raises:
        UsageError: there is none of that name, or what is registered cannot be loaded or has no `commit`.
    """
    sink: Sink = load_plugin(
        name,
        group=ENTRY_POINT_GROUP,
        kind="sink",
        protocol=Sink,
        lacking="has no method commit(stream_id, first, last, ...)",
    )
    return sink
