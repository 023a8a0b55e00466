"""LiveCommitter: commits a live stream's rows and snapshots, and decides when.

Files have no gaps between them: each covers all frames that were received, tracked or not. A file is
committed after a number of seconds or rows, whichever comes first. A snapshot is saved after a number of
seconds, or earlier if objects were added or removed.
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
from pipeline.live.spec import LiveSettings
from pipeline.live.zones import LiveZones
from pipeline.tracking.committer import Committer
from pipeline.tracking.objects import TrackedObjects
from pipeline.tracking.snapshots.live import LiveSnapshot
from pipeline.zones.events import ZONE_EVENTS

logger = logging.getLogger(__name__)

FRAMES_AHEAD = 64  # minimum number of frame numbers reserved in advance
MOST_WAITING = 8  # files' worth of rows that may wait for a slow store
_MARGIN = 8  # frames that may arrive during the check
_EMPTY_SECONDS = 60.0  # between files without rows
_HASTY_SNAPSHOT_SECONDS = 1.0  # after a request
# After the detector started or corrected objects, which it does every few frames where people walk. A
# snapshot of eight people has 40 to 100 MB.
_FOUND_SNAPSHOT_SECONDS = 10.0


class LiveCommitter:
    """Commits one live stream. To be used by the thread that steps the stream.

    Args:
        stream_id, settings: id and settings of the stream.
        committer: writes files and snapshots.
        record: the stream record, updated after each commit.
        unwritten, objects, requests, zones: the stream's content for files and snapshots.
        run: stored in its snapshots, see `pipeline.live.recovery.run_of`.
        previous: pts (seconds) and wall time of the last tracked frame.
        facts: returns the source's fields of the record.
        received_fps: returns the recent rate of received frames per second.
        now: seconds, by the stream's clock.
        told: called in the background after events of zones were committed, with the file's first frame.

    Attributes:
        previous: as above; set by the tracker.
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
        zones: LiveZones,
        *,
        run: str,
        previous: tuple[float | None, datetime | None],
        facts: Callable[[], Mapping[str, Any]],
        received_fps: Callable[[], float],
        now: float,
        told: Callable[[int], None] | None = None,
    ) -> None:
        self.previous = previous
        self._stream_id, self._settings, self._run = stream_id, settings, run
        self._committer, self._record, self._unwritten = committer, record, unwritten
        self._objects, self._requests = objects, requests
        self._facts, self._received_fps, self._zones = facts, received_fps, zones
        self._told = told
        self._rotated_at = self._snapshot_at = now
        self._snapshot_tracked = unwritten.tracked
        self._snapshot_applied = requests.applied

    @property
    def backlogged(self) -> bool:
        """Whether too many rows wait for the store, so that tracking must pause."""
        most = MOST_WAITING * self._settings.rotate_rows
        return self._committer.busy and self._unwritten.waiting_rows > most

    def numbers_run_out(self, ledger: Ledger) -> bool:
        """Whether the next frame's number may not be reserved yet; if so, queues the reservation."""
        received = ledger.counts().received
        if received + _MARGIN <= self._record.frames_reserved:
            return False
        if not self._committer.busy:
            frames = received + self.ahead()
            self._committer.submit(lambda: self._record.reserve(frames=frames))
        return True

    def ahead(self) -> int:
        """Number of frames to reserve beyond the newest: those of three files."""
        return FRAMES_AHEAD + math.ceil(3 * self._settings.rotate_seconds * self._received_fps())

    def tick(self, now: float) -> None:
        """Queue the commits and snapshots that are due."""
        if self._committer.busy:
            return
        chosen = self._settings
        since = now - self._rotated_at
        age = now - self._snapshot_at
        hasty = self._objects.changed and age >= _HASTY_SNAPSHOT_SECONDS
        found = self._objects.found and age >= _FOUND_SNAPSHOT_SECONDS
        snapshot = (
            hasty
            or found
            or (age >= chosen.snapshot_seconds and self._unwritten.tracked > self._snapshot_tracked)
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
        """Queue the commit of all frames received so far."""
        self._rotated_at = now
        self._zones.settle()
        content = self._unwritten.cut()
        if content is None:
            return
        counts = content.counts
        if not counts.settled:
            logger.error("stream %s: the ledger does not add up: %r", self._stream_id, counts)
        next_frame = content.last + 1
        books = Books(next_frame, counts, content.rows, self._objects.living(), *self.previous)
        reserved, facts = next_frame + self.ahead(), self._facts()
        zones = self._zones.keep(next_frame)
        told = self._told if any(e.kind in ZONE_EVENTS for e in content.events) else None

        def committed() -> None:
            self._record.committed(books, frames=reserved, facts=facts, zones=zones)
            if told is not None:
                told(content.first)

        self._committer.commit(content.first, content.last, content.records, content.events, committed)

    def take_snapshot(self, now: float) -> None:
        """Queue a snapshot of the state after all frames queued for commit; written after them."""
        self._snapshot_at, self._snapshot_tracked = now, self._unwritten.tracked
        self._objects.changed = self._objects.found = False
        next_frame = self._unwritten.first
        stream = self._objects.snapshot(
            next_frame,
            self._run,
            self.previous[0],
            rows=self._unwritten.rows,
            losses=self._unwritten.corrupt,
        )
        facts = self.previous[1], self._requests.applied, self._requests.paused
        # The store keeps two snapshots: requests that are in both need not be kept.
        done, self._snapshot_applied = self._snapshot_applied, self._requests.applied
        self._committer.save_snapshot(
            next_frame,
            lambda: LiveSnapshot(stream(), *facts).to_bytes(),
            lambda: self._record.forget(done),
        )

    def check(self) -> None:
        """Raise if a write has failed."""
        self._committer.check()

    def drain(self) -> None:
        """Wait until everything queued is written; raise if a write has failed."""
        self._committer.drain()

    def close(self) -> None:
        """Wait for the background thread and stop it."""
        self._committer.close()
