"""StreamStore: one stream's tracks, events, snapshots and record in the output folder.

The resume rule: the gapless files of `tracks/` from frame 0 on define how far a stream is committed.
A writer that starts, or starts again, calls `prepare()`, asks `committed()` for the next frame, loads the
newest snapshot not after it, repeats the frames from there without committing them, and commits from
`next_frame` on.

The commit point is the creation of the tracks file: before it nothing of the chunk counts, after it all of it
does. It never overwrites; if the name is taken by the same bytes, the commit succeeded earlier (a retried
request, a repeated chunk), by any others, another writer works on this stream and this one stops. The events
file is written before it, so that a reader who sees a tracks file finds its events too; one without a tracks
file is what a killed writer left, and readers ignore it. Who creates the tracks file, and nobody else, may
replace a leftover events file of other content; the tracks file's footer carries the events, so if that
writer dies just then, `prepare()` repairs the copy.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.base.errors import AnotherWriterError, StoreError
from pipeline.base.redaction import redacted
from pipeline.base.stream_ids import generate_stream_id, validate_stream_id
from pipeline.storage.opening import open_files
from pipeline.tracks.chunk_file import ChunkFooter, check_chunk, events_bytes, tracks_bytes
from pipeline.tracks.copies import withdraw_stream
from pipeline.tracks.edit_log import EditLog, LoggedEdit, edits_made
from pipeline.tracks.layout import (
    MEND,
    RECORD_VERSION,
    backward_folder,
    chunk_folder,
    chunk_footer,
    chunk_name,
    list_chunks,
    list_snapshots,
    load_record,
    record_name,
    remove_folder,
    snapshot_name,
)
from pipeline.tracks.object_copies import ObjectCopies
from pipeline.tracks.reader import TrackReader

__all__ = ["CommittedRange", "StreamStore", "generate_stream_id", "validate_stream_id"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
RESTARTING = "restarting"
_FOOTER_THREADS = 16


@dataclass(frozen=True, slots=True)
class CommittedRange:
    """The committed part of a stream: frames 0..next_frame - 1, in `files` files."""

    next_frame: int
    files: int


class StreamStore:
    """One stream's part of an output folder.

    Nothing is read or written before a method is called. Every failure is a StoreError of one line and leaves
    what is committed as it was. Commits come from one thread; snapshots and records may come from others.

    Args:
        root: the output folder, a local path or any fsspec URI.
        stream_id: see `validate_stream_id`; UsageError if it is not allowed.
        storage_options: passed to the fsspec file system.
        snapshots: number of snapshots that are kept, the newest.
        spread: bytes up to which more are kept, spread over the whole stream; None: only the newest.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        stream_id: str,
        storage_options: Mapping[str, Any] | None = None,
        *,
        snapshots: int = 2,
        spread: int | None = None,
    ) -> None:
        self.stream_id = validate_stream_id(stream_id)
        self._files = open_files(root, storage_options)
        self._options = storage_options
        self._kept_snapshots, self._spread = snapshots, spread
        self.edit_log = EditLog(self._files, self.stream_id)
        self.object_copies = ObjectCopies(self._files, self.stream_id)
        self._next_frame: int | None = None
        self._last_name: str | None = None

    def __repr__(self) -> str:
        return f"StreamStore({redacted(self._files.root)!r}, {self.stream_id!r})"

    @property
    def root(self) -> str:
        """The output folder, as an absolute path or a URI."""
        return self._files.root

    @property
    def storage_options(self) -> Mapping[str, Any] | None:
        """The options of the file system."""
        return self._options

    # Committed frames

    def prepare(self) -> None:
        """Cleans up after writers that were killed; a writer must call it first.

        Finishes a restart that was interrupted, removes temporary files, and makes the newest events file
        match its tracks file. A newest chunk that lacks an edit of its frames is removed: its writer was
        killed before it could do so, see `pipeline.tracks.edit_log`. Does nothing to a stream that was
        closed properly.
        """
        self._files.sweep(self.stream_id)
        try:
            record = self._load_record()
        except StoreError:
            record = None  # read_record() reports it
        if record is not None and record.get("state") == RESTARTING:
            logger.warning("stream %s: finishing a restart that was interrupted", self.stream_id)
            self._remove_all()
        firsts = list_chunks(self._files, self.stream_id)
        if firsts:
            footer = self._footer(firsts[-1])
            lacking = self.edit_log.missing(footer.first, footer.last, edits_made(footer.events))
            if lacking is not None:
                logger.warning("stream %s: frames from %d on lack an edit", self.stream_id, footer.first)
                self._take_back(footer.first)
                return
            data = events_bytes(self.stream_id, footer.first, footer.last, footer.events)
            self._settle_events(footer.first, data)

    def committed(self, check: bool = False, *, newest_only: bool = False) -> CommittedRange:
        """Lists what is committed.

        Reads the newest file's footer, and the footers of files where the names alone do not show whether
        frames are missing.

        Args:
            check: read all footers.
            newest_only: read only the newest file's footer. For live streams, whose files differ in length
                and may number hundreds of thousands.

        Raises:
            StoreError: a file is missing or damaged; the message names it. Nothing is changed.
        """
        firsts = list_chunks(self._files, self.stream_id)
        if not firsts:
            return self._know(CommittedRange(0, 0), None)
        if firsts[0] != 0:
            missing = self._files.uri(chunk_name("tracks", self.stream_id, 0))
            raise StoreError(f"{missing} is missing, though files of later frames exist: {MEND}")
        nexts: list[int | None] = [*firsts[1:], None]
        if newest_only:
            return self._know(CommittedRange(self._footer(firsts[-1]).last + 1, len(firsts)), firsts[-1])
        doubtful = [i for i in range(len(firsts)) if check or _is_doubtful(firsts, i)]
        if len(doubtful) > 2:
            with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
                footers = list(pool.map(self._footer, [firsts[i] for i in doubtful]))
        else:
            footers = [self._footer(firsts[i]) for i in doubtful]
        for i, footer in zip(doubtful, footers, strict=True):
            following = nexts[i]
            if following is not None and footer.last + 1 != following:
                raise StoreError(self._gap_message(footer, following))
        return self._know(CommittedRange(footers[-1].last + 1, len(firsts)), firsts[-1])

    def footers(self, since: int) -> list[ChunkFooter]:
        """Footers, with their events, of the committed chunks that begin at frame `since` or later."""
        return [self._footer(f) for f in list_chunks(self._files, self.stream_id) if f >= since]

    def read_rows(self, first: int) -> pa.Table:
        """The rows of the committed chunk that begins at frame `first`."""
        name = chunk_name("tracks", self.stream_id, first)
        try:
            data = pa.BufferReader(self._files.read(name))
            return pq.read_table(data, page_checksum_verification=True)
        except FileNotFoundError:
            raise StoreError(f"{self._files.uri(name)} has vanished: is another run starting over?") from None
        except (pa.ArrowException, OSError) as error:
            raise StoreError(f"{self._files.uri(name)} is damaged: {MEND}") from error

    def holds(self, first: int) -> bool:
        """Whether a chunk that begins at frame `first` is committed, by this or any other run."""
        return self._files.exists(chunk_name("tracks", self.stream_id, first))

    def commit(self, first: int, last: int, tracks: pa.Table, events: pa.Table) -> bool:
        """Commits the rows and events of frames `first`..`last` (inclusive); durable when it returns.

        Args:
            tracks: of `TRACKS_SCHEMA`, sorted by frame_index, object_id; may have no rows.
            events: of `EVENTS_SCHEMA`; may have no rows.

        Returns:
            True if this call committed them, False if the same bytes were committed before.

        Raises:
            AnotherWriterError: another run committed different rows for these frames, or restarted the
            stream. StoreError: the files cannot be written, or frames before `first` are not committed.
            ValueError: the tables have another schema, order or range.
        """
        tracks, events = check_chunk(first, last, tracks, events)
        if self._next_frame is None:
            self.committed()
        assert self._next_frame is not None
        name = chunk_name("tracks", self.stream_id, first)
        if first > self._next_frame:
            raise StoreError(
                f"stream {self.stream_id}: frames {first}..{last} cannot be committed before frames "
                f"{self._next_frame}..{first - 1} are"
            )
        if first < self._next_frame and not self._files.exists(name):
            raise ValueError(
                f"stream {self.stream_id}: frames up to {self._next_frame - 1} are committed, and none of "
                f"the committed chunks begins at {first}"
            )
        appends = first == self._next_frame
        edited = edits_made(events)
        if appends:
            self._check_not_started_over()
            self._check_edits(first, last, edited)
        data = events_bytes(self.stream_id, first, last, events)
        settled = self._files.create(chunk_name("events", self.stream_id, first), data, self.stream_id)
        created = self._create_tracks(name, tracks_bytes(self.stream_id, first, last, tracks, events))
        if appends:
            try:
                # Check again: a restart that began since the first check may have listed the files before
                # this one existed. Either its last listing sees this file, or this check sees the restart.
                self._check_not_started_over()
            except AnotherWriterError:
                self._take_back(first)
                raise
            try:
                self._check_edits(first, last, edited)  # again, likewise
            except AnotherWriterError:
                if created:
                    self._take_back(first)
                raise
        if not settled:
            self._settle_events(first, data)
        if last + 1 > self._next_frame:
            self._next_frame, self._last_name = last + 1, name
        return created

    # Snapshots

    def save_snapshot(self, next_frame: int, blob: bytes, keep: int | None = None) -> None:
        """Saves the tracker's state after frames 0..next_frame - 1; keeps `keep` up to it, see `StreamStore`.

        Snapshots of later frames are removed: they are unusable, or rows were removed since.
        """
        keep = self._kept_snapshots if keep is None else keep
        if next_frame < 0 or keep < 1:
            raise ValueError(f"snapshot of frame {next_frame}, keep {keep}: need next_frame >= 0, keep >= 1")
        self._files.replace(self._snapshot_name(next_frame), blob, self.stream_id)
        frames = self._snapshots()
        kept = [frame for frame in frames if frame <= next_frame]
        if self._spread is None:
            kept = kept[-keep:]
        else:
            kept = _spread_out(kept, max(keep, self._spread // max(1, len(blob))))
        for frame in frames:
            if frame not in kept:
                self._files.remove(self._snapshot_name(frame))

    def load_snapshot(self, max_next_frame: int, validate: Callable[[bytes], T]) -> tuple[int, T] | None:
        """The newest usable snapshot not after `max_next_frame` (see `committed`); None: start from frame 0.

        Args:
            validate: parses the bytes; raises ValueError if they are damaged or of another stream. Then a
                warning is logged and the next older snapshot is tried.
        """
        for frame in reversed([f for f in self._snapshots() if f <= max_next_frame]):
            name = self._snapshot_name(frame)
            try:
                return frame, validate(self._files.read(name))
            except FileNotFoundError:
                continue  # another writer removed it after our listing
            except ValueError as error:
                logger.warning(
                    "snapshot %s is not usable, trying an older one: %s",
                    redacted(self._files.uri(name)),
                    error,
                )
        return None

    # Edits

    def edits(self, since: int, committed: int) -> list[tuple[int, dict[str, Any]]]:
        """The frame and content of the edits at frame `since` or later that a run must make, in order.

        Args:
            committed: number of committed frames; of those, only edits whose events have rows count.

        Raises:
            StoreError: an edit or a footer is damaged.
        """
        found = [edit for edit in self.edit_log.list() if edit.frame >= since]
        firsts = list_chunks(self._files, self.stream_id) if found and found[0].frame < committed else []
        made: dict[int, dict[int, int]] = {}

        def counts(edit: LoggedEdit) -> bool:
            if edit.frame >= committed:
                return True
            first = max((first for first in firsts if first <= edit.frame), default=0)
            if first not in made:
                made[first] = edits_made(self._footer(first).events)
            return edit.number < made[first].get(edit.frame, 0)

        return [(edit.frame, self.edit_log.read(edit)) for edit in found if counts(edit)]

    # The stream record

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Replaces the stream record as a whole; `format_version` and `stream_id` are added."""
        whole = {"format_version": RECORD_VERSION, "stream_id": self.stream_id}
        whole |= {key: value for key, value in record.items() if key not in whole}
        text = json.dumps(whole, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        self._files.replace(record_name(self.stream_id), text.encode(), self.stream_id)

    def read_record(self) -> dict[str, Any] | None:
        """The stream record, None if there is none; StoreError if damaged, foreign or of a newer format."""
        return self._load_record()

    # Backward passes

    def backward(self, digest: str) -> StreamStore:
        """The store of a backward pass of this stream, see `pipeline.tracking.files.backward`.

        Args:
            digest: says what determines its rows.
        """
        folder = self._files.uri(f"{backward_folder(self.stream_id)}/{digest}")
        return StreamStore(
            folder, self.stream_id, self._options, snapshots=self._kept_snapshots, spread=self._spread
        )

    def remove_backward(self) -> None:
        """Remove the stores of all backward passes of this stream."""
        folder = backward_folder(self.stream_id)
        for digest in self._files.folders(folder):
            self.backward(digest)._files.sweep(self.stream_id)
        remove_folder(self._files, folder)
        self._files.remove_empty_folder(folder.rpartition("/")[0])

    def reader(self) -> TrackReader:
        """Reads the rows that are committed now; UsageError if there are none."""
        return TrackReader(self.root, self.stream_id, self._options)

    # Restart

    def restart(self) -> None:
        """Removes all files of this stream and of no other. Call it instead of `prepare()`, or after it.

        Killed half-way, it leaves a record whose state is "restarting" and rows that still have no gap
        (tracks go from the newest to the oldest, the record last); the next `prepare()` finishes it. A writer
        that is still at work on the stream stops at its next commit with AnotherWriterError.
        """
        try:
            record = self._load_record() or {}
        except StoreError:
            record = {}
        self._files.sweep(self.stream_id)
        self.write_record(record | {"state": RESTARTING})
        self._remove_all()

    def _remove_all(self) -> None:
        withdraw_stream(self._files, self.stream_id)
        for kind in ("tracks", "events"):
            # Until none is listed: a writer at work may have added one since the listing (see `commit`).
            while firsts := list_chunks(self._files, self.stream_id, kind):
                for first in reversed(firsts):
                    self._files.remove(chunk_name(kind, self.stream_id, first))
            self._files.remove_empty_folder(chunk_folder(kind, self.stream_id))
        # Again: copies may have been planned before the rows were gone.
        withdraw_stream(self._files, self.stream_id)
        self.edit_log.remove_all()
        self.object_copies.remove_all()
        self.remove_backward()
        for frame in self._snapshots():
            self._files.remove(self._snapshot_name(frame))
        self._files.remove_empty_folder(f"state/{self.stream_id}")
        self._files.remove(record_name(self.stream_id))
        self._know(CommittedRange(0, 0), None)

    def _check_not_started_over(self) -> None:
        if self._last_name and not self._files.exists(self._last_name):
            raise AnotherWriterError(
                f"{self._files.uri(self._last_name)} has vanished: another run started this stream over; "
                f"this one stops"
            )

    def _check_edits(self, first: int, last: int, made: Mapping[int, int]) -> None:
        frame = self.edit_log.missing(first, last, made)
        if frame is not None:
            raise AnotherWriterError(
                f"the memory of stream {self.stream_id} in {self.root} was edited before frame {frame} while "
                "this run tracked on: it stops, and the next run of the same command goes on from the edited "
                "memory"
            )

    def _take_back(self, first: int) -> None:
        # Events first: while the rows are there, nobody else can have committed these frames.
        self._files.remove(chunk_name("events", self.stream_id, first))
        self._files.remove(chunk_name("tracks", self.stream_id, first))

    def _create_tracks(self, name: str, data: bytes) -> bool:
        if self._files.create(name, data, self.stream_id):
            return True
        try:
            same = self._files.read(name) == data
        except FileNotFoundError:
            same = False
        if not same:
            raise AnotherWriterError(
                f"{self._files.uri(name)} already holds other rows: another run writes stream "
                f"{self.stream_id} in this folder; this one stops (give it another --stream-id or --out)"
            )
        return False

    def _settle_events(self, first: int, data: bytes) -> None:
        """Writes or repairs the events file of a committed chunk."""
        name = chunk_name("events", self.stream_id, first)
        try:
            if self._files.read(name) == data:
                return
        except FileNotFoundError:
            pass
        self._files.replace(name, data, self.stream_id)

    def _know(self, committed: CommittedRange, last_first: int | None) -> CommittedRange:
        self._next_frame = committed.next_frame
        self._last_name = None if last_first is None else chunk_name("tracks", self.stream_id, last_first)
        return committed

    def _footer(self, first: int) -> ChunkFooter:
        return chunk_footer(self._files, self.stream_id, first)

    def _gap_message(self, footer: ChunkFooter, following: int) -> str:
        if footer.last + 1 > following:
            name = self._files.uri(chunk_name("tracks", self.stream_id, following))
            return f"{name} begins before frame {footer.last + 1}, where the file before it ends: {MEND}"
        missing = self._files.uri(chunk_name("tracks", self.stream_id, footer.last + 1))
        return f"{missing} is missing, though files of later frames exist: {MEND}"

    def _snapshot_name(self, next_frame: int) -> str:
        return snapshot_name(self.stream_id, next_frame)

    def _snapshots(self) -> list[int]:
        return list_snapshots(self._files, self.stream_id)

    def _load_record(self) -> dict[str, Any] | None:
        return load_record(self._files, self.stream_id)


def _is_doubtful(firsts: Sequence[int], i: int) -> bool:
    """Whether the footer of file i must be read to know that no frames are missing before the next file.

    Chunks of one run have the same length. A footer is skipped only if the distance to the next file equals
    the distance before it, which was verified in the same way; a missing file changes the distance.
    """
    if i == 0 or i == len(firsts) - 1:
        return True
    return firsts[i + 1] - firsts[i] != firsts[i] - firsts[i - 1]


def _spread_out(frames: list[int], most: int) -> list[int]:
    """At most `most` of ascending frames, with the last one, and without large gaps, also from 0."""
    kept = list(frames)
    while len(kept) > most:
        gaps = [after - before for before, after in zip([0, *kept], kept[1:], strict=False)]
        del kept[gaps.index(min(gaps)) if gaps else 0]
    return kept
