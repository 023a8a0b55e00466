"""`compact`: many small chunk files into few large ones, beside writers and readers at work.

What is new makes a file at each run. Such files are merged as those of a log-structured store: as soon as
there are eight of about one size, into one.

The layout and the rules that keep rows single are in `pipeline.tracks.copies`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.base.errors import StoreError, UsageError
from pipeline.base.records import EVENTS_SCHEMA, TRACKS_SCHEMA
from pipeline.storage.files import Files
from pipeline.storage.opening import open_files
from pipeline.tracks.chunk_file import ChunkFooter, read_footer
from pipeline.tracks.copies import (
    OWNER,
    Copy,
    Sizes,
    copy_name,
    copy_path,
    is_withdrawn,
    load_copies,
    plan_bytes,
    plan_name,
    retire_plans,
    withdraw,
)
from pipeline.tracks.layout import MEND, chunk_name, chunk_sizes

logger = logging.getLogger(__name__)

FILE_BYTES = 128 << 20
_ROWS_PER_GROUP = 1 << 15
_LEAST_CHUNKS = 2
_MERGED = 8
"""So many files of one size, within a factor of as much, are merged."""
_AHEAD = 8
_COPIED = "xmem.copied"
_GROUPS = "xmem.groups"

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Compacted:
    """What `compact` did.

    Args:
        files: compacted files that were written.
        chunks: chunk files that they replace.
        rows: their rows.
        merged: smaller compacted files that went into others.
        skipped: why streams were left out, by stream.
    """

    files: int
    chunks: int
    rows: int
    skipped: Mapping[str, str]
    merged: int = 0


class _StreamError(StoreError):
    """A stream whose files cannot be compacted."""

    def __init__(self, stream_id: str, message: str) -> None:
        super().__init__(message)
        self.stream_id = stream_id


def compact(
    root: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    *,
    file_bytes: int = FILE_BYTES,
) -> Compacted:
    """Copy the chunk files that are not compacted yet into large files under `compacted/`.

    Merges small ones of earlier runs, finishes what a killed run left, withdraws files whose streams were
    removed, and leaves `tracks/` and `events/` as they are. Takes about three times `file_bytes` of memory.
    May run beside writers, readers and itself.

    Args:
        file_bytes: chunk files of about so many bytes make one compacted file.

    Raises:
        UsageError: the folder has no tracks, or `file_bytes` is not positive.
        StoreError: the folder cannot be read or written.
    """
    if file_bytes < 1:
        raise UsageError(f"file size of {file_bytes} bytes is not allowed: at least 1")
    files = open_files(root, storage_options)
    sizes = chunk_sizes(files.sizes("tracks", recursive=True))
    if not sizes:
        raise UsageError(f"{files.root} is no output folder of xmem: nothing in it under tracks/")
    files.sweep(OWNER)
    skipped: dict[str, str] = {}
    done = [0, 0, 0, 0]
    while True:
        copies = load_copies(files)
        if copies.problem is not None:
            raise copies.problem
        covered: set[tuple[str, int]] = set()
        written: list[Copy] = []
        for copy in copies.files:
            if not copy.void and not all(copy.matches(s, sizes.get(s, {})) for s in copy.chunks):
                copy = _withdrawn(files, copy)  # a stream was removed, or started over by an older version
            if copy.void:
                if copy.bytes is not None:
                    withdraw(files, copy.name)
                continue
            if copy.bytes is None and not _write(files, copy, sizes, skipped, done):
                continue
            covered |= {(stream_id, first) for stream_id, firsts in copy.chunks.items() for first in firsts}
            written.append(copy)
        plan = _planned(sizes, covered, skipped, file_bytes)
        if not plan:
            small = _mergeable(written, skipped, file_bytes)
            if small:
                _merge(files, small, copies.next_plan, sizes, skipped, done)
                continue
            retire_plans(files, load_copies(files))
            return Compacted(done[0], done[1], done[2], skipped, done[3])
        # Written in the next round, as a plan that another run left would be.
        files.create(plan_name(copies.next_plan), plan_bytes(plan, secrets.token_hex(8)), OWNER)


def _withdrawn(files: Files, copy: Copy) -> Copy:
    withdraw(files, copy.name)
    return Copy(copy.name, copy.chunks, None, True)


def _planned(
    sizes: Sizes, covered: set[tuple[str, int]], skipped: Mapping[str, str], file_bytes: int
) -> list[Sizes]:
    """The chunks of each file of the next plan, sorted; none if there are too few."""
    fresh = [
        (stream_id, first, size)
        for stream_id, chunks in sorted(sizes.items())
        if stream_id not in skipped
        for first, size in sorted(chunks.items())
        if (stream_id, first) not in covered
    ]
    if len(fresh) < _LEAST_CHUNKS:
        return []
    plan: list[Sizes] = []
    filled = file_bytes
    for stream_id, first, size in fresh:
        if filled >= file_bytes:
            plan.append({})
            filled = 0
        plan[-1].setdefault(stream_id, {})[first] = size
        filled += size
    return plan


def _mergeable(written: list[Copy], skipped: Mapping[str, str], file_bytes: int) -> list[Copy]:
    """Files to merge into one; none if there are not enough of a size."""
    tiers: dict[int, list[tuple[int, Copy]]] = {}
    for copy in written:
        size = sum(sum(of_stream.values()) for of_stream in copy.chunks.values())
        if 2 * size < file_bytes and not skipped.keys() & copy.chunks.keys():
            tiers.setdefault(int(math.log(size, _MERGED)), []).append((size, copy))
    for tier in tiers.values():
        if len(tier) >= _MERGED:
            some: list[Copy] = []
            total = 0
            for size, copy in tier:
                if total < file_bytes:
                    some.append(copy)
                    total += size
            return some
    return []


def _merge(
    files: Files, small: list[Copy], number: int, sizes: Sizes, skipped: dict[str, str], done: list[int]
) -> None:
    """Make one file of several, unless another run does."""
    chunks: Sizes = {}
    for copy in small:
        for stream_id, of_stream in copy.chunks.items():
            chunks.setdefault(stream_id, {}).update(of_stream)
    chunks = {stream_id: dict(sorted(chunks[stream_id].items())) for stream_id in sorted(chunks)}
    merged = Copy(copy_name(number, 0), chunks)
    # Read first: the small files stay if a chunk file cannot be read by now.
    content = _readable(files, merged, sizes, skipped)
    if content is None:
        return
    for copy in small:
        withdraw(files, copy.name)
    if files.create(plan_name(number), plan_bytes([chunks], secrets.token_hex(8)), OWNER):
        _put(files, merged, content)
        done[3] += len(small)


def _write(files: Files, copy: Copy, sizes: Sizes, skipped: dict[str, str], done: list[int]) -> bool:
    """Write a planned file. False, with the file withdrawn, if a stream in it cannot be read."""
    content = _readable(files, copy, sizes, skipped)
    if content is None:
        withdraw(files, copy.name)
        return False
    created = _put(files, copy, content)
    if created is None:
        return False
    if created:
        done[0] += 1
        done[1] += sum(map(len, copy.chunks.values()))
        done[2] += content[2]
    return True


def _readable(
    files: Files, copy: Copy, sizes: Sizes, skipped: dict[str, str]
) -> tuple[bytes, bytes, int] | None:
    """The bytes and rows of `_content`; None if a stream cannot be read, which is added to `skipped`."""
    try:
        return _content(files, copy, sizes)
    except _StreamError as error:
        if error.stream_id not in skipped:
            logger.warning("stream %s is not compacted: %s", error.stream_id, error)
        skipped[error.stream_id] = str(error)
        return None


def _put(files: Files, copy: Copy, content: tuple[bytes, bytes, int]) -> bool | None:
    """Create a planned file. False if it is there, None if it is withdrawn."""
    tracks, events, _ = content
    # Events first, as in a commit: whoever sees the tracks finds their events.
    files.create(copy_path("events", copy.name), events, OWNER)
    created = files.create(copy_path("tracks", copy.name), tracks, OWNER)
    if is_withdrawn(files, copy.name):
        withdraw(files, copy.name)
        return None
    return created


def _content(files: Files, copy: Copy, sizes: Sizes) -> tuple[bytes, bytes, int]:
    """The bytes of the tracks file and the events file, and the rows of the former."""
    tracks, events = _Writer("tracks", TRACKS_SCHEMA), _Writer("events", EVENTS_SCHEMA)
    reach: dict[str, list[list[int]]] = {}
    for stream_id in copy.chunks:
        firsts = sorted(sizes[stream_id])
        following = dict(zip([-1, *firsts], firsts, strict=False))
        if following[-1] != 0:
            raise _missing(files, stream_id, 0)
        chunks = list(copy.chunks[stream_id].items())
        ranges = reach.setdefault(stream_id, [])
        read = _ahead(lambda chunk, stream_id=stream_id: _chunk(files, stream_id, *chunk), chunks)  # type: ignore[misc]
        for footer, table in read:
            end = footer.last + 1
            if following.get(footer.first, end) != end:
                raise _missing(files, stream_id, end)
            if ranges and ranges[-1][1] == footer.first:
                ranges[-1][1] = end
            else:
                ranges.append([footer.first, end])
            tracks.add(stream_id, table)
            events.add(stream_id, footer.events)
    metadata = {_COPIED: json.dumps(reach, separators=(",", ":"))}
    return tracks.finish(metadata), events.finish(metadata), tracks.rows


def _missing(files: Files, stream_id: str, first: int) -> _StreamError:
    missing = files.uri(chunk_name("tracks", stream_id, first))
    return _StreamError(stream_id, f"{missing} is missing, though files of later frames exist: {MEND}")


def _chunk(files: Files, stream_id: str, first: int, size: int) -> tuple[ChunkFooter, pa.Table]:
    """Footer and rows of a chunk file, whose checksums are verified."""
    name = chunk_name("tracks", stream_id, first)
    try:
        data = files.part(name, 0, size)
        footer = read_footer(lambda count: data[-count:], files.uri(name))
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True, use_threads=False)
    except FileNotFoundError:
        raise _StreamError(stream_id, f"{files.uri(name)} has vanished: is a run starting over?") from None
    except (ValueError, pa.ArrowException, OSError, StoreError) as error:
        raise _StreamError(stream_id, f"{files.uri(name)} cannot be read ({error}): {MEND}") from error
    if (footer.stream_id, footer.first) != (stream_id, first):
        raise _StreamError(
            stream_id,
            f"{files.uri(name)} holds frames {footer.first}..{footer.last} of stream {footer.stream_id!r}, "
            f"not what its name says: {MEND}",
        )
    return footer, table


class _Writer:
    """One Parquet file in memory, in row groups that are large enough to read and small enough to skip."""

    def __init__(self, kind: str, schema: pa.Schema) -> None:
        self.rows = 0
        self._schema = pa.schema([pa.field("stream_id", pa.string(), nullable=False), *schema])
        self._sink = pa.BufferOutputStream()
        key = ["stream_id", "frame_index"] + (["object_id"] if kind == "tracks" else [])
        long = {"mask_rle", "detail"}
        self._writer = pq.ParquetWriter(
            self._sink,
            self._schema,
            version="2.6",
            data_page_version="1.0",
            compression="zstd",
            compression_level=3,
            use_dictionary=[
                n
                for n in self._schema.names
                if n
                in ("stream_id", "category", "object_id", "frame_height", "frame_width", "kind", "reason")
            ],
            write_statistics=[name for name in self._schema.names if name not in long],
            write_page_checksum=True,
            store_schema=True,
            sorting_columns=[pq.SortingColumn(self._schema.names.index(name)) for name in key],
        )
        self._waiting: list[pa.Table] = []
        self._count = 0
        self._groups: list[int] = []

    def add(self, stream_id: str, table: pa.Table) -> None:
        """Add rows behind those there are."""
        columns = [pa.repeat(stream_id, table.num_rows)]
        for field in list(self._schema)[1:]:
            known = field.name in table.column_names
            columns.append(table[field.name] if known else pa.nulls(table.num_rows, field.type))
        self._waiting.append(
            pa.table(
                [c.cast(f.type) for c, f in zip(columns, self._schema, strict=True)], schema=self._schema
            )
        )
        self._count += table.num_rows
        if self._count >= _ROWS_PER_GROUP:
            self._flush()

    def finish(self, metadata: Mapping[str, str]) -> bytes:
        """The file's bytes."""
        self._flush()
        self._writer.add_key_value_metadata({**metadata, _GROUPS: json.dumps(self._groups)})
        self._writer.close()
        return bytes(self._sink.getvalue())

    def _flush(self) -> None:
        if self._count:
            self._groups.append(len(self._waiting))
            table = pa.concat_tables(self._waiting).unify_dictionaries().combine_chunks()
            self._writer.write_table(table, row_group_size=2 * self._count)
        self.rows += self._count
        self._waiting, self._count = [], 0


def copied_frames(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[tuple[int, int]]]:
    """Ranges of frames (first, behind the last one) of each stream in a compacted file, by its metadata.

    Raises:
        ValueError: it is not a compacted file.
    """
    try:
        reach = json.loads((metadata or {})[_COPIED.encode()])
        return {str(s): [(int(first), int(end)) for first, end in ranges] for s, ranges in reach.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("it is no compacted file of xmem") from error


def chunks_of_groups(metadata: Mapping[bytes, bytes] | None) -> list[int] | None:
    """How many chunks, one after the other, each row group of a compacted file has; None in older files."""
    found = (metadata or {}).get(_GROUPS.encode())
    return None if found is None else [int(count) for count in json.loads(found)]


def _ahead(function: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """The results of a function, in order, some computed in advance."""
    waiting: deque[Future[U]] = deque()
    with ThreadPoolExecutor(_AHEAD, thread_name_prefix="xmem-compact") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
