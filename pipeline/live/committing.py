"""LiveCommitter: commits a live stream's rows and snapshots, and decides when.

Files follow one another without a gap: each covers all frames that were received, tracked or not. They come
after some seconds or rows, whichever is first; snapshots come after some seconds, sooner where objects came
or went.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from pipeline.live.camera.ledger import Ledger
from pipeline.live.pending_rows import Unwritten
from pipeline.live.record import Books, LiveRecord
from pipeline.live.requests import LiveRequests
from pipeline.live.snapshot import LiveSnapshot
from pipeline.live.spec import LiveSettings
from pipeline.tracking.committer import Committer
from pipeline.tracking.objects import TrackedObjects

logger = logging.getLogger(__name__)

FRAMES_AHEAD = 64  # that are reserved at least
MOST_WAITING = 8  # rotations' worth of rows that may wait for a slow store
_MARGIN = 8  # frames that may come while one looks
_EMPTY_SECONDS = 60.0  # between files that would have no rows
_HASTY_SNAPSHOT_SECONDS = 1.0


class LiveCommitter:
    """Commits one live stream. The thread that steps the stream uses it.

    Args:
        stream_id, settings: of the stream.
        committer: writes.
        record: told how far it is committed.
        unwritten, objects, requests: of the stream, for its files and snapshots.
        run: what its snapshots belong to, see `live_restore.run_of`.
        previous: pts (seconds) and wall time of the last frame that was tracked.
        facts: gives what the record shall say of the source.
        received_fps: gives the frames per second that come lately.
        now: seconds, by the stream's clock.

    Attributes:
        previous: as above; set by whoever tracks.
    """

    def __init__(
        self,
        stream_id: str,
        settings: LiveSettings,
        committer: Committer,
        record: LiveRecord,
        unwritten: Unwritten,
        objects: TrackedObjects,
        requests: LiveRequests,
        *,
        run: str,
        previous: tuple[float | None, datetime | None],
        facts: Callable[[], Mapping[str, Any]],
        received_fps: Callable[[], float],
        now: float,
    ) -> None:
        self.previous = previous
        self._stream_id, self._settings, self._run = stream_id, settings, run
        self._committer, self._record, self._unwritten = committer, record, unwritten
        self._objects, self._requests = objects, requests
        self._facts, self._received_fps = facts, received_fps
        self._rotated_at = self._snapshot_at = now
        self._snapshot_tracked = unwritten.tracked
        self._snapshot_applied = requests.applied

    @property
    def backlogged(self) -> bool:
        """Whether so many rows wait for the store that no more frames are to be tracked."""
        most = MOST_WAITING * self._settings.rotate_rows
        return self._committer.busy and self._unwritten.waiting_rows > most

    def numbers_run_out(self, ledger: Ledger) -> bool:
        """Whether the next frame might have a number that is not reserved; then that is being done."""
        received = ledger.counts().received
        if received + _MARGIN <= self._record.frames_reserved:
            return False
        if not self._committer.busy:
            frames = received + self.ahead()
            self._committer.submit(lambda: self._record.reserve(frames=frames))
        return True

    def ahead(self) -> int:
        """Frames to reserve beyond the newest: those of three rotations."""
        return FRAMES_AHEAD + math.ceil(3 * self._settings.rotate_seconds * self._received_fps())

    def tick(self, now: float) -> None:
        """Commit what is due."""
        if self._committer.busy:
            return
        chosen = self._settings
        since = now - self._rotated_at
        hasty = self._objects.changed and now - self._snapshot_at >= _HASTY_SNAPSHOT_SECONDS
        snapshot = hasty or (
            now - self._snapshot_at >= chosen.snapshot_seconds
            and self._unwritten.tracked > self._snapshot_tracked
        )
        due = (
            self._unwritten.waiting_rows >= chosen.rotate_rows
            or (since >= chosen.rotate_seconds and self._unwritten.worth_a_file)
            or since >= max(_EMPTY_SECONDS, chosen.rotate_seconds)
        )
        if due or snapshot:
            self.rotate(now)
            if snapshot:
                self.take_snapshot(now)

    def rotate(self, now: float) -> None:
        """Hand all frames received so far to the writing thread."""
        self._rotated_at = now
        content = self._unwritten.cut()
        if content is None:
            return
        counts = content.counts
        if not counts.settled:
            logger.error("stream %s: the ledger does not add up: %r", self._stream_id, counts)
        next_frame = content.last + 1
        books = Books(next_frame, counts, content.rows, self._objects.living(), *self.previous)
        reserved, facts = next_frame + self.ahead(), self._facts()

        def committed() -> None:
            self._record.committed(books, frames=reserved, facts=facts)

        self._committer.commit(content.first, content.last, content.records, content.events, committed)

    def take_snapshot(self, now: float) -> None:
        """Of the state after all frames that were handed to the writing thread; written after them."""
        self._snapshot_at, self._snapshot_tracked = now, self._unwritten.tracked
        self._objects.changed = False
        stream = self._objects.snapshot(
            self._unwritten.first,
            self._run,
            self.previous[0],
            rows=self._unwritten.rows,
            losses=self._unwritten.corrupt,
        )
        snapshot = LiveSnapshot(stream, self.previous[1], self._requests.applied, self._requests.paused)
        # The store keeps two: what is in both need not be asked again.
        done, self._snapshot_applied = self._snapshot_applied, self._requests.applied
        self._committer.save_snapshot(stream.next_frame, snapshot.to_bytes, lambda: self._record.forget(done))

    def check(self) -> None:
        """Raise if something could not be written."""
        self._committer.check()

    def drain(self) -> None:
        """Wait until everything is written that was handed over; raise if something could not be."""
        self._committer.drain()

    def close(self) -> None:
        """Wait for the writing thread, and stop it."""
        self._committer.close()
