"""Committer: writes a stream's chunks, snapshots and record in the background, in order.

A range of frames is committed in three steps. First the stream's record is read, to see whether this run
still owns the stream; then sinks get the range; then the store commits it. So a run that lost its stream to
another one reaches no sink, and whatever the store holds, every sink was given before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.base.records import Event, MaskRecord, events_table, tracks_table
from pipeline.tracking.background_writer import BackgroundWriter
from pipeline.tracks.sinks import Sinks
from pipeline.tracks.store import StreamStore


class Committer:
    """Commits the ranges of one stream, and saves its snapshots. One thread uses it.

    Jobs are done one after another in a thread of its own. Once one has failed, none is done any more, and
    every later call raises its error.

    Args:
        store: where rows and snapshots go.
        sinks: what gets the rows besides.
        check_owner: is called with the first frame of a range; raises AnotherWriterError if the stream is
            another run's by now.
        waiting: how many unfinished jobs there may be; further ones wait.
    """

    def __init__(
        self, store: StreamStore, sinks: Sinks | None, check_owner: Callable[[int], None], waiting: int = 2
    ) -> None:
        self._store, self._sinks, self._check_owner = store, sinks, check_owner
        self._writer = BackgroundWriter(waiting)

    def commit(
        self,
        first: int,
        last: int,
        records: Sequence[MaskRecord],
        events: Sequence[Event],
        then: Callable[[], None],
    ) -> None:
        """Have frames `first`..`last` (inclusive) committed.

        Args:
            then: called in the writing thread when they are.
        """

        def write() -> None:
            self._check_owner(first)
            tracks, happened = tracks_table(records), events_table(events)
            # Whoever committed these frames meanwhile has told the sinks; older rows must not replace those.
            if self._sinks and not self._store.holds(first):
                self._sinks.commit(self._store.stream_id, first, last, tracks, happened)
            self._store.commit(first, last, tracks, happened)
            then()

        self._writer.submit(write)

    def save_snapshot(
        self, next_frame: int, to_bytes: Callable[[], bytes], then: Callable[[], None] | None = None
    ) -> None:
        """Have a snapshot saved, after everything that was handed over before it.

        Args:
            to_bytes: gives the snapshot; called in the writing thread.
            then: called there when it is saved.
        """

        def write() -> None:
            self._store.save_snapshot(next_frame, to_bytes())
            if then is not None:
                then()

        self._writer.submit(write)

    def submit(self, job: Callable[[], None]) -> None:
        """Have something else done in the writing thread."""
        self._writer.submit(job)

    @property
    def busy(self) -> bool:
        """Whether jobs are not done yet."""
        return self._writer.busy

    def check(self) -> None:
        """Raise if a job has failed."""
        self._writer.check()

    def drain(self) -> None:
        """Wait until every job is done; raise if one has failed."""
        self._writer.drain()

    def close(self) -> None:
        """Wait for every job and stop the thread. A failure that nobody was told of is logged."""
        self._writer.close()
