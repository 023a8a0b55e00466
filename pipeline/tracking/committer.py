"""Committer: writes a stream's chunks, snapshots and record in the background, in order.

A range of frames is committed in three steps. First the stream's record is read, to see whether this run
still owns the stream; then sinks get the range; then the store commits it. So a run that lost its stream to
another one writes to no sink, and every sink has received whatever the store holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.base.records import Event, MaskRecord, events_table, tracks_table
from pipeline.tracking.background_writer import BackgroundWriter
from pipeline.tracks.sinks import Sinks
from pipeline.tracks.store import StreamStore


class Committer:
    """Commits the frame ranges of one stream and saves its snapshots. To be used by one thread.

    Jobs run one after another in a background thread. After the first failure no further job is run, and
    every later call raises the error of the failed job.

    Args:
        store: receives rows and snapshots.
        sinks: receive the rows before the store does.
        check_owner: called with the first frame of a range; raises AnotherWriterError if another run owns
            the stream by now.
        waiting: maximum number of unfinished jobs; further calls block.
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
        """Queue the commit of frames `first`..`last` (inclusive).

        Args:
            then: called in the background thread after the commit.
        """

        def write() -> None:
            self._check_owner(first)
            tracks, happened = tracks_table(records), events_table(events)
            # If another run has committed these frames meanwhile, the sinks have its rows already; older
            # rows must not replace them.
            if self._sinks and not self._store.holds(first):
                self._sinks.commit(self._store.stream_id, first, last, tracks, happened)
            self._store.commit(first, last, tracks, happened)
            then()

        self._writer.submit(write)

    def save_snapshot(
        self, next_frame: int, to_bytes: Callable[[], bytes], then: Callable[[], None] | None = None
    ) -> None:
        """Queue the saving of a snapshot, after all jobs queued before it.

        Args:
            to_bytes: returns the serialized snapshot; called in the background thread.
            then: called in the background thread after the snapshot is saved.
        """

        def write() -> None:
            self._store.save_snapshot(next_frame, to_bytes())
            if then is not None:
                then()

        self._writer.submit(write)

    def submit(self, job: Callable[[], None]) -> None:
        """Queue another job for the background thread."""
        self._writer.submit(job)

    @property
    def busy(self) -> bool:
        """Whether a job is queued or running."""
        return self._writer.busy

    def check(self) -> None:
        """Raise if a job has failed."""
        self._writer.check()

    def drain(self) -> None:
        """Wait until the queue is empty; raise if a job has failed."""
        self._writer.drain()

    def close(self) -> None:
        """Wait for every job and stop the thread. A failure that no call has raised yet is logged."""
        self._writer.close()
