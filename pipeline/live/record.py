"""Durable record of a live stream: progress, accepted requests, used object ids and frame numbers.

The stream record holds the state at frame `frames`; the footers of files committed later hold the rest, so a
writer that is killed between a commit and its record loses nothing. Two things are written ahead: frame
numbers and object ids are reserved before they are used, and requests are stored before they are
acknowledged.
"""

from __future__ import annotations

import json
import math
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from pipeline.base.errors import AnotherWriterError, SettingsConflictError, StoreError, XmemError
from pipeline.live.camera.ledger import LedgerCounts
from pipeline.tracking.stream_record import FINISHED, RUNNING
from pipeline.tracks.chunk_file import ChunkFooter
from pipeline.tracks.store import RESTARTING, StreamStore

LIVE_FINGERPRINT = "live"
_MOST_REQUESTS = 1000
_MOST_WAITING_BYTES = 16 << 20  # of all requests together: each one rewrites the record


@dataclass(frozen=True)
class Books:
    """State of a live stream after all frames before `frames`, according to its committed files.

    Args:
        ledger: counts of those frames, with none in flight.
        rows: number of mask records.
        objects: categories of the tracked objects by id.
        pts_seconds, wall_time: times of the last tracked frame; of files whose commit the record does not
            know yet, of the last frame that has rows or events. No later frame's pts may be lower.
    """

    frames: int = 0
    ledger: LedgerCounts = field(default_factory=LedgerCounts)
    rows: int = 0
    objects: Mapping[int, str | None] = field(default_factory=dict)
    pts_seconds: float | None = None
    wall_time: datetime | None = None

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        return {
            "frames": self.frames,
            "ledger": self.ledger.to_json(),
            "rows": self.rows,
            "objects": [[i, c] for i, c in self.objects.items()],
            "pts_seconds": self.pts_seconds,
            "wall_time": None if self.wall_time is None else self.wall_time.isoformat(),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Books:
        """Restore from the output of `to_json`; ValueError, KeyError or TypeError for anything else."""
        wall = values["wall_time"]
        return cls(
            frames=int(values["frames"]),
            ledger=LedgerCounts.from_json(values["ledger"]),
            rows=int(values["rows"]),
            objects={int(i): c for i, c in values["objects"]},
            pts_seconds=values["pts_seconds"],
            wall_time=None if wall is None else datetime.fromisoformat(wall),
        )

    def after(self, footer: ChunkFooter, rows: pa.Table) -> Books:
        """The state after the next committed file, of its footer and its rows."""
        dropped, corrupt = dict(self.ledger.dropped), dict(self.ledger.corrupt)
        objects = dict(self.objects)
        for event in footer.events.to_pylist():
            book = {"dropped": dropped, "corrupt": corrupt}.get(event["kind"])
            if book is not None:
                book[str(event["reason"])] = book.get(str(event["reason"]), 0) + event["count"]
            elif event["kind"] == "object_added":
                detail = json.loads(event["detail"] or "{}")
                objects.setdefault(event["object_id"], detail.get("category"))
            elif event["kind"] == "object_removed":
                objects.pop(event["object_id"], None)
        received = footer.last + 1
        tracked = received - sum(dropped.values()) - sum(corrupt.values())
        ledger = LedgerCounts(received, tracked, dropped, corrupt)
        times = [(self.pts_seconds, self.wall_time)]
        # Rows are sorted by frame; events may be of later frames, on which nothing was seen.
        for table in (rows.slice(max(0, rows.num_rows - 1)), footer.events):
            times += zip(table["pts_seconds"].to_pylist(), table["wall_time"].to_pylist(), strict=True)
        pts, wall = max(times, key=lambda time: -math.inf if time[0] is None else time[0])
        return Books(received, ledger, self.rows + footer.rows, objects, pts, wall)


@dataclass(frozen=True)
class Request:
    """A request to a live stream, to be applied before its next frame.

    Args:
        number: sequence number, from 1.
        content: {"prompts": a prompts file's content}, {"remove": [ids]}, {"rename": {"id", "category"}},
            {"memory": edit} or {"pause": bool}.
    """

    number: int
    content: Mapping[str, Any] = field(repr=False)
    at: str = ""

    @property
    def object_ids(self) -> list[int]:
        """Ids of the objects that it prompts or copies."""
        prompts, edit = self.content.get("prompts") or {}, self.content.get("memory") or {}
        copied = [int(edit["object"])] if "copy" in edit else []
        return [int(entry["id"]) for entry in prompts.get("objects", [])] + copied


@dataclass(frozen=True)
class _Said:
    """Content of the record."""

    facts: Mapping[str, Any]
    state: str = RUNNING
    books: Books = field(default_factory=Books)
    requests: tuple[Request, ...] = ()
    last_request: int = 0
    frames_reserved: int = 0
    ids_reserved: int = 1
    prompts_asked: str = ""
    zones: Mapping[str, Any] | None = None


class LiveRecord:
    """A live stream's record. Thread-safe.

    Opening it cleans up after a writer that was killed, and reads the committed state. Its properties give
    durable values, and reading them never waits for a write. The first write takes ownership of the stream:
    an earlier owner, in this process or another, raises AnotherWriterError on its next write.

    Args:
        facts: further fields of the record (source, settings, ...), as in the records of files.

    Attributes:
        resumed: whether a record existed.
        finished: whether the stream was ended, not only interrupted.

    Raises:
        SettingsConflictError: the folder holds a stream of this id that is not live.
        StoreError: the folder cannot be read or written, or holds a damaged record.
    """

    def __init__(self, store: StreamStore, facts: Mapping[str, Any]) -> None:
        self._store = store
        self._owner = secrets.token_hex(8)
        self._owns = False  # ownership is taken with the first write
        self._lock = threading.Lock()
        self._over = False
        store.prepare()
        committed = store.committed(newest_only=True)
        record = store.read_record()
        live = None if record is None else record.get("live")
        if committed.files and not isinstance(live, dict):
            raise SettingsConflictError(
                f"{store.root} holds a stream {store.stream_id} that is not live: choose another id"
            )
        said = _Said(dict(facts))
        self.resumed = isinstance(live, dict)
        self.finished = record is not None and record.get("state") == FINISHED
        if isinstance(live, dict):
            try:
                said = replace(
                    said,
                    books=Books.from_json(live["books"]),
                    requests=tuple(Request(int(n), c, at) for n, c, at in live["requests"]),
                    last_request=int(live["last_request"]),
                    frames_reserved=int(live["frames_reserved"]),
                    ids_reserved=int(live["ids_reserved"]),
                    prompts_asked=str(live["prompts_asked"]),
                    zones=live.get("zones"),
                )
            except (KeyError, TypeError, ValueError) as error:
                raise StoreError(
                    f"the record of live stream {store.stream_id} in {store.root} is damaged ({error}): "
                    "restore it from a copy, or choose another id"
                ) from error
        books = said.books
        if books.frames > committed.next_frame:
            raise StoreError(
                f"stream {store.stream_id} in {store.root}: its record says {books.frames} frames, its "
                f"files hold {committed.next_frame}: restore the files from a copy, or choose another id"
            )
        for footer in store.footers(books.frames):
            books = books.after(footer, store.read_rows(footer.first))
        self._said = replace(said, books=books)

    @property
    def books(self) -> Books:
        """State of the committed files."""
        return self._said.books

    @property
    def frames_reserved(self) -> int:
        """Frame numbers below this may be in use."""
        return self._said.frames_reserved

    @property
    def ids_reserved(self) -> int:
        """Object ids below this may be in use or requested."""
        return self._said.ids_reserved

    @property
    def last_request(self) -> int:
        """Number of the newest request."""
        return self._said.last_request

    @property
    def zones(self) -> Mapping[str, Any] | None:
        """State of the zones as `committed` got it last, see `pipeline.live.zones`."""
        return self._said.zones

    def requests(self, after: int = 0) -> list[Request]:
        """Stored requests with numbers above `after`, in order."""
        return [r for r in self._said.requests if r.number > after]

    @property
    def prompts_asked(self) -> str:
        """Digest of the prompts in the stream's spec when it was first opened; "" if there were none."""
        return self._said.prompts_asked

    def ask(
        self,
        make: Callable[[int], tuple[Mapping[str, Any], Sequence[int]]],
        *,
        prompts_asked: str | None = None,
    ) -> Request:
        """Store a request; durable when it returns.

        Args:
            make: called with the first free id; returns the request's content and the ids in it, which are
                reserved with it.
            prompts_asked: digest to store, if the request holds the prompts of the stream's spec.
        """
        with self._lock:
            said = self._said
            if self._over:
                raise XmemError(f"stream {self._store.stream_id} is being closed just now: ask again later")
            if len(said.requests) >= _MOST_REQUESTS:
                raise StoreError(
                    f"stream {self._store.stream_id}: {len(said.requests)} requests wait to be done; "
                    "ask again later"
                )
            content, ids = make(said.ids_reserved)
            size = sum(len(json.dumps(c)) for c in (content, *(dict(r.content) for r in said.requests)))
            if said.requests and size > _MOST_WAITING_BYTES:
                raise StoreError(
                    f"stream {self._store.stream_id}: requests of {size >> 20} MiB would wait to be done, "
                    f"{_MOST_WAITING_BYTES >> 20} MiB may: ask again later"
                )
            at = datetime.now(UTC).isoformat(timespec="seconds")
            request = Request(said.last_request + 1, dict(content), at)
            self._put(
                replace(
                    said,
                    requests=(*said.requests, request),
                    last_request=request.number,
                    ids_reserved=max([said.ids_reserved, *(i + 1 for i in ids)]),
                    prompts_asked=said.prompts_asked if prompts_asked is None else prompts_asked,
                )
            )
            return request

    def reserve(self, *, frames: int = 0, ids: int = 0) -> None:
        """Reserve frame numbers and object ids below the given ones; durable when it returns."""
        with self._lock:
            self._put(_reserving(self._said, frames, ids))

    def committed(
        self,
        books: Books,
        *,
        frames: int,
        facts: Mapping[str, Any],
        zones: Mapping[str, Any] | None = None,
    ) -> None:
        """Record a committed file, and reserve frame numbers below `frames` with the same write.

        Args:
            zones: state of the zones after that file.
        """
        with self._lock:
            said = replace(self._said, books=books, facts={**self._said.facts, **facts}, zones=zones)
            self._put(_reserving(said, frames, 0))

    def forget(self, applied: int) -> None:
        """Drop requests up to this number, which are in every snapshot; stored with the next write."""
        with self._lock:
            kept = tuple(r for r in self._said.requests if r.number > applied)
            self._said = replace(self._said, requests=kept)

    def begin_zones(self, state: Mapping[str, Any] | None) -> None:
        """Set the state of the zones of a stream that had none; stored with the next write."""
        with self._lock:
            if self._said.zones is None:
                self._said = replace(self._said, zones=state)

    def close(self) -> None:
        """Accept no more requests; the next run of the stream opens its own record."""
        with self._lock:
            self._over = True

    def rest(self, state: str, *, frames: int, ids: int) -> None:
        """Record an orderly end: frame numbers and ids from these on are unused."""
        with self._lock:
            asked = [i + 1 for request in self._said.requests for i in request.object_ids]
            self._put(
                replace(self._said, state=state, frames_reserved=frames, ids_reserved=max([ids, *asked]))
            )

    def check_ours(self) -> None:
        """Raises AnotherWriterError if another run restarts the stream or has taken it over."""
        where = f"stream {self._store.stream_id} in {self._store.root}"
        record = self._store.read_record()
        if record is None or record.get("state") == RESTARTING:
            raise AnotherWriterError(f"{where} is being started over; this one stops")
        live = record.get("live")
        if self._owns and (not isinstance(live, dict) or live.get("owner") != self._owner):
            raise AnotherWriterError(f"{where} is tracked by another process by now; this one stops")

    def _put(self, said: _Said) -> None:
        if self._owns:
            self.check_ours()  # a write by a stale run would displace the owner
        books = said.books
        self._store.write_record(
            {
                "state": said.state,
                **said.facts,
                "source_fingerprint": LIVE_FINGERPRINT,
                "frames": books.frames,
                "rows": books.rows,
                "losses": books.ledger.corrupt_total,
                "live": {
                    "books": books.to_json(),
                    "requests": [[r.number, dict(r.content), r.at] for r in said.requests],
                    "last_request": said.last_request,
                    "frames_reserved": said.frames_reserved,
                    "ids_reserved": said.ids_reserved,
                    "prompts_asked": said.prompts_asked,
                    "zones": said.zones,
                    "owner": self._owner,
                },
            }
        )
        self._said, self._owns = said, True


def _reserving(said: _Said, frames: int, ids: int) -> _Said:
    return replace(
        said,
        frames_reserved=max(said.frames_reserved, frames),
        ids_reserved=max(said.ids_reserved, ids),
    )
