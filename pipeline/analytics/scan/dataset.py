"""Pyarrow dataset of chunk files for DuckDB, which opens only the files that a statement needs.

pyarrow's own dataset opens every file with a scanner of its own, reads 64 KB for its footer, and keeps what
it read of it. This one knows the store's layout. The frames of a file follow from its name and that of the
next, so that conditions on `stream_id` and `frame_index` choose files before any is opened. Files are read in
parallel, each in one or two reads; the checksum of each page is verified; nothing of them is kept. A file
that is missing in the middle of a stream, that another program wrote or that is damaged is a StoreError.
Where a compacted file has the rows of chunk files as they are listed, it is read in their place.
"""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial, reduce
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs

from pipeline.analytics.scan.chunk_files import check_chunk_file, check_columns, open_chunk_file
from pipeline.analytics.scan.columns import column_of, emitted, encoded, stream_id_column
from pipeline.analytics.scan.copy_reader import CopyFile
from pipeline.analytics.scan.joined_chunks import BOUNDED, Bounds, ChunkJoiner
from pipeline.analytics.scan.listing import Chunk, Listing
from pipeline.analytics.scan.parquet_file import ParquetFile, open_parquet
from pipeline.analytics.scan.pruning import (
    PRUNING,
    bounds_of,
    known_frames,
    known_of,
    named_fields,
    prunable,
    satisfying,
)
from pipeline.base.errors import StoreError
from pipeline.storage.local_files import LocalFiles
from pipeline.tracks.compaction import chunks_of_groups, copied_frames
from pipeline.tracks.copies import FOLDER, Copy, copy_path
from pipeline.tracks.layout import MEND, chunk_footer, chunk_name

if TYPE_CHECKING:

    class _Source(ds.Dataset):  # type: ignore[misc]
        obj: Any

else:
    try:
        # DuckDB 2 asks its own wrapper of a dataset how many rows there may be. A dataset that is its own
        # wrapper can answer; without an answer DuckDB assumes one row, and builds joins' hash tables from it.
        from duckdb._sources.pyarrow import PyArrowDatasetSource

        class _Source(ds.Dataset, PyArrowDatasetSource):
            pass

    except ImportError:
        _Source = ds.Dataset

logger = logging.getLogger(__name__)

_COPY_TAIL_BYTES = 1 << 18
_FILES_PER_TASK = 256
_BYTES_PER_TASK = 1 << 24
_GROUPS_PER_TASK = 2
_WORTH_SKIPPING = 1 << 13
_COMPARED_TOGETHER = 64
"""So many consecutive files of a stream are first compared with a condition as one."""
_SPELT_OUT = 50
"""Up to so many streams are compared one by one, which pyarrow's row groups can be chosen by."""
_LOCAL_THREADS = min(8, (os.cpu_count() or 1) + 1)
_REMOTE_THREADS = 16
_TASKS_AHEAD = 2
"""Tasks per thread that are begun before their rows are asked for."""
_GUESSED_ROWS = 1_000_000
"""Rows of a stream, for the plans of joins. Too many does no harm: what is joined to tracks is smaller."""
_TIMES = {"pts_seconds", "wall_time"}


class ChunkDataset(_Source):
    """The rows of all chunks as a dataset of pyarrow, for DuckDB.

    Args:
        listing: the output folder.
        kind: "tracks" or "events".
        schema: of the rows, without `stream_id`, which comes first.
    """

    reads_copies = True
    """Whether compacted files are read in place of chunk files."""
    joins_files = True
    """Whether small files are read together; else each with `_read`."""

    def __init__(self, listing: Listing, kind: str, schema: pa.Schema) -> None:
        # Neither base's __init__ is run: pyarrow's refuses to be, DuckDB's keeps the object that it wraps.
        self.obj = self
        self._declared: Any = None
        self._listing = listing
        self._files = listing.files
        self._kind = kind
        self._schema = pa.schema([pa.field("stream_id", pa.string()), *schema])
        self._strict = True
        self._joiner = ChunkJoiner(self._files, kind, schema)
        self.failure: StoreError | None = None
        self.only: frozenset[str] | None = None
        """Streams that the statement can need; None: all."""
        self.read_elsewhere: Mapping[str, CopyFile] = {}
        """Compacted files by name whose rows DuckDB reads itself: they and their chunks are left out."""
        self.small_files = 0
        """Chunk files that statements have needed, each counted every time; compacted files are not."""

    @property
    def schema(self) -> pa.Schema:
        return self._schema

    def __arrow_c_schema__(self) -> object:
        """What DuckDB sees: stream ids as dictionaries, which are read and grouped in half the time."""
        return emitted(self._schema).__arrow_c_schema__()

    def rows(self) -> int:
        """About how many rows there are, without listing them."""
        return _GUESSED_ROWS * max(1, len(self._listing.tracked))

    def accepts(self, predicate: Any) -> bool:
        """Whether DuckDB leaves a condition to this dataset: what chooses files. It is faster at the rest."""
        named = set(re.findall(r'"(\w+)"|(\w+)', predicate.fragment()))
        if not any(name in PRUNING for pair in named for name in pair):
            return False
        from duckdb._sources.nodes import Untranslatable
        from duckdb._sources.to_arrow import to_arrow

        try:
            to_arrow(predicate, self._schema)
        except Untranslatable:
            return False
        return True

    def stream(self, columns: Sequence[int] | None, filters: Sequence[Any]) -> tuple[object, bool]:
        """DuckDB's entry: a stream of the rows that fulfil all of its filters."""
        found: tuple[object, bool] = super().stream(columns, [prunable(node) for node in filters])
        return found

    def scanner(
        self, columns: Sequence[str] | None = None, filter: pc.Expression | None = None, **_: Any
    ) -> Scan:
        """A scan of some columns of the rows that fulfil `filter`."""
        names = self._schema.names if columns is None else list(columns)
        return Scan(self, names, filter)

    def batches(self, names: Sequence[str], condition: pc.Expression | None) -> Iterator[pa.RecordBatch]:
        """The rows, by stream and frame. An error is kept in `failure`: DuckDB passes on only its text."""
        schema = emitted(pa.schema([self._schema.field(name) for name in names]))
        try:
            for batch in self._batches(names, condition):
                yield encoded(batch, schema)
        except StoreError as error:
            self.failure = error
            raise

    def _batches(self, names: Sequence[str], condition: pc.Expression | None) -> Iterator[pa.RecordBatch]:
        local = isinstance(self._files, LocalFiles)
        threads = _LOCAL_THREADS if local else _REMOTE_THREADS
        waiting: deque[Future[list[pa.RecordBatch]]] = deque()
        pool = ThreadPoolExecutor(threads)
        try:
            for task in self._tasks(names, condition, _FILES_PER_TASK if local else 1):
                waiting.append(pool.submit(task))
                if len(waiting) > threads * _TASKS_AHEAD:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _tasks(
        self, names: Sequence[str], condition: pc.Expression | None, most: int
    ) -> Iterator[Callable[[], list[pa.RecordBatch]]]:
        """What to read, each at once: some chunk files, or some row groups of a compacted file."""
        copied: dict[str, tuple[Copy, list[tuple[Chunk, bool]]]] = {}
        bounds: Bounds = {}
        if condition is not None and self.joins_files:
            timed = named_fields(condition, self._schema) & {*BOUNDED}
            bounds = {name: bounds_of(condition, self._schema, name) for name in sorted(timed)}

        def own() -> Iterator[tuple[Chunk, bool]]:
            stream_id, copies = None, {}
            for chunk, exact in self._needed(condition):
                if self.reads_copies and chunk.stream_id != stream_id:
                    stream_id, copies = chunk.stream_id, self._listing.copies(chunk.stream_id)
                copy = copies.get(chunk.first)
                if copy is None:
                    yield chunk, exact
                else:
                    copied.setdefault(copy.name, (copy, []))[1].append((chunk, exact))

        yield from self._chunk_tasks(own(), names, condition, bounds, most)
        for copy, chosen in copied.values():
            if copy.name in self.read_elsewhere:
                self._check_elsewhere(copy, {chunk.stream_id for chunk, _ in chosen})
                continue
            try:
                tasks = self._copy_tasks(copy, chosen, names, condition)
            except FileNotFoundError:  # a stream in it is started over just now
                yield from self._chunk_tasks(iter(chosen), names, condition, bounds, most)
            else:
                yield from tasks

    def _chunk_tasks(
        self,
        chosen: Iterator[tuple[Chunk, bool]],
        names: Sequence[str],
        condition: pc.Expression | None,
        bounds: Bounds,
        most: int,
    ) -> Iterator[Callable[[], list[pa.RecordBatch]]]:
        """Chunks to read together: those of which all rows fulfil the condition, or those to filter."""
        task: list[Chunk] = []
        size, last = 0, (True, True)
        for chunk, exact in chosen:
            alike = exact, self._joiner.suits(chunk)
            if task and (len(task) >= most or size >= _BYTES_PER_TASK or alike != last):
                yield self._chunk_task(task, names, None if last[0] else condition, bounds)
                task, size = [], 0
            task.append(chunk)
            size += chunk.size
            self.small_files += 1
            last = alike
        if task:
            yield self._chunk_task(task, names, None if last[0] else condition, bounds)

    def _chunk_task(
        self, task: Sequence[Chunk], names: Sequence[str], condition: pc.Expression | None, bounds: Bounds
    ) -> Callable[[], list[pa.RecordBatch]]:
        return partial(self._read_all, task, names, condition, {} if condition is None else bounds)

    def _copy_tasks(
        self,
        copy: Copy,
        chosen: Sequence[tuple[Chunk, bool]],
        names: Sequence[str],
        condition: pc.Expression | None,
    ) -> list[Callable[[], list[pa.RecordBatch]]]:
        """Row groups of a compacted file to read together. FileNotFoundError if it is gone."""
        with self._reporting_copy(copy):
            # Open until the last task is done: the rows stay there if the file is removed meanwhile.
            source = None
            if isinstance(self._files, LocalFiles):
                source = pa.OSFile(self._files.path(copy_path(self._kind, copy.name)))
            metadata = self._open_copy(copy, source).metadata
            self._check_copy(copy, metadata, {chunk.stream_id for chunk, _ in chosen})
            check_columns(metadata.schema.names, self._schema)
            wanted = sorted({chunk.stream_id for chunk, _ in chosen})
            parts = [] if condition is None else [condition]
            if len(wanted) < len(copy.chunks):  # others may have been started over, or are not asked for
                stream = ds.field("stream_id")
                alike = [stream == s for s in wanted]
                some = reduce(lambda a, b: a | b, alike) if len(alike) <= _SPELT_OUT else stream.isin(wanted)
                parts.append(some)
            if len(chosen) == sum(map(len, copy.chunks.values())) and all(exact for _, exact in chosen):
                parts = []
            filtered: pc.Expression | None = None
            groups = [str(i) for i in range(metadata.num_row_groups)]
            if not parts:
                some_groups, whole = groups, {*groups}
            else:
                filtered = reduce(lambda a, b: a & b, parts)
                known = {group: known_of(metadata.row_group(int(group))) for group in groups}
                some_groups, whole = self._chosen(filtered, named_fields(filtered, self._schema), known)
        tasks: list[Callable[[], list[pa.RecordBatch]]] = []
        for exact in (True, False):
            of_kind = [int(group) for group in some_groups if (group in whole) == exact]
            left = None if exact else filtered
            for start in range(0, len(of_kind), _GROUPS_PER_TASK):
                some_of = of_kind[start : start + _GROUPS_PER_TASK]
                tasks.append(partial(self._read_copy, copy, source, metadata, some_of, wanted, names, left))
        return tasks

    def _read_copy(
        self,
        copy: Copy,
        source: pa.NativeFile | None,
        metadata: Any,
        groups: Sequence[int],
        stream_ids: Sequence[str],
        names: Sequence[str],
        condition: pc.Expression | None,
    ) -> list[pa.RecordBatch]:
        schema = self._with_needed(names, condition)
        batches = []
        try:
            with self._reporting_copy(copy):
                as_is = "stream_id" in names and "stream_id" not in named_fields(condition, self._schema)
                file = self._open_copy(copy, source, metadata, ["stream_id"] if as_is else None)
                schema = emitted(schema) if as_is else schema
                there = [name for name in schema.names if name in file.names]
                for group in groups:
                    rows = metadata.row_group(group).num_rows
                    table = file.read_row_group(group, there) if there else None
                    columns = [column_of(field, table, rows) for field in schema]
                    batches.append(pa.RecordBatch.from_arrays(columns, schema=schema))
        except FileNotFoundError:  # it was merged with others since it was opened
            chunks = self._chunks_of(copy, metadata, groups, {*stream_ids})
            return self._read_all(chunks, names, condition)
        return _filtered(batches, schema, names, condition)

    def _chunks_of(
        self, copy: Copy, metadata: Any, groups: Sequence[int], stream_ids: Set[str]
    ) -> list[Chunk]:
        """The chunks of some streams of which the row groups of a compacted file are made."""
        counts = chunks_of_groups(metadata.metadata)
        if counts is None:
            uri = self._files.uri(copy_path(self._kind, copy.name))
            raise StoreError(f"{uri} was replaced while it was read: ask again")
        ends = [0, *accumulate(counts)]
        named = [(stream_id, first) for stream_id, chunks in copy.chunks.items() for first in chunks]
        picked = [key for group in groups for key in named[ends[group] : ends[group + 1]]]
        known = {
            (chunk.stream_id, chunk.first): chunk
            for chunks in self._listing.chunks({s for s, _ in picked} & stream_ids).values()
            for chunk in chunks
        }
        return [known[key] for key in picked if key in known]

    def _open_copy(
        self,
        copy: Copy,
        source: pa.NativeFile | None = None,
        metadata: Any = None,
        dictionaries: Sequence[str] | None = None,
    ) -> ParquetFile:
        assert copy.bytes is not None
        size = copy.bytes[0 if self._kind == "tracks" else 1]
        name = copy_path(self._kind, copy.name)
        return open_parquet(self._files, name, size, _COPY_TAIL_BYTES, metadata, dictionaries, source)

    def _check_copy(self, copy: Copy, metadata: Any, stream_ids: Set[str]) -> None:
        """StoreError if a compacted file lacks a stream, or if the file after it is missing."""
        reach = copied_frames(metadata.metadata)
        for stream_id in sorted(stream_ids):
            sizes = self._listing.sizes([stream_id])[stream_id]
            newest = max(sizes)
            for _, end in reach[stream_id]:
                if end not in sizes and end <= newest:
                    missing = self._files.uri(chunk_name("tracks", stream_id, end))
                    raise StoreError(f"{missing} is missing, though files of later frames exist: {MEND}")

    def _check_elsewhere(self, copy: Copy, stream_ids: Set[str]) -> None:
        """`_check_copy` for a compacted file that is read elsewhere."""
        with self._reporting_copy(copy):
            self._check_copy(copy, self.read_elsewhere[copy.name].metadata, stream_ids)

    def _left(self, stream_ids: Sequence[str]) -> list[str]:
        """The streams that have rows which are not read elsewhere. The others are checked."""
        sizes, left = self._listing.sizes(stream_ids), []
        elsewhere: dict[str, tuple[Copy, set[str]]] = {}
        for stream_id in stream_ids:
            copies = [c for c in self._listing.copies_of(stream_id) if c.name in self.read_elsewhere]
            of_stream = sizes.get(stream_id, {})
            if sum(len(copy.chunks[stream_id]) for copy in copies) < len(of_stream) or 0 not in of_stream:
                left.append(stream_id)
                continue
            for copy in copies:
                elsewhere.setdefault(copy.name, (copy, set()))[1].add(stream_id)
        for copy, of_copy in elsewhere.values():
            self._check_elsewhere(copy, of_copy)
        return left

    @contextmanager
    def _reporting_copy(self, copy: Copy) -> Iterator[None]:
        """Failures to read a compacted file as a StoreError that names it."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise StoreError(
                f"{self._files.uri(copy_path(self._kind, copy.name))} cannot be read "
                f"({' '.join(str(error).split())}): remove the folder {FOLDER}/, which holds only copies, "
                "and run `xmem compact` again"
            ) from error

    def _needed(self, condition: pc.Expression | None) -> Iterator[tuple[Chunk, bool]]:
        ids = [s for s in self._listing.tracked if self.only is None or s in self.only]
        fields = named_fields(condition, self._schema)
        exact: set[str] = set()
        if condition is not None and "stream_id" in fields:
            ids, exact = self._chosen(condition, fields, {s: ds.field("stream_id") == s for s in ids})
        if not ids and self._listing.tracked and (self.only is not None or "stream_id" in fields):
            logger.warning("%s", self._listing.none_chosen())
        if self.read_elsewhere:
            ids = self._left(ids)
        everything = len(ids) == len(self._listing.tracked)
        for stream_id, chunks in self._listing.chunks(None if everything else ids).items():
            if self._strict:
                self._listing.check_begins(chunks)
            if condition is None or "frame_index" not in fields:
                yield from ((chunk, condition is None or stream_id in exact) for chunk in chunks)
            else:
                yield from self._of_frames(condition, fields, chunks)

    def _of_frames(
        self, condition: pc.Expression, fields: set[str], chunks: Sequence[Chunk]
    ) -> Iterator[tuple[Chunk, bool]]:
        """The chunks of a stream that may have rows that fulfil the condition; many are compared at once."""
        size = _COMPARED_TOGETHER if len(chunks) > _COMPARED_TOGETHER else 1
        parts = [chunks[start : start + size] for start in range(0, len(chunks), size)]
        known = {str(i): known_frames(part[0], part[-1]) for i, part in enumerate(parts)}
        some, whole = self._chosen(condition, fields, known)
        for i in some:
            if size == 1 or i in whole:
                yield from ((chunk, i in whole) for chunk in parts[int(i)])
            else:
                yield from self._of_frames(condition, fields, parts[int(i)])

    def _chosen(
        self, condition: pc.Expression, fields: set[str], known: Mapping[str, pc.Expression]
    ) -> tuple[list[str], set[str]]:
        """What may have rows that fulfil the condition, and of what all rows do for certain."""
        some = satisfying(condition, self._schema, known)
        if not fields <= {"stream_id", "frame_index"}:  # the others may be null, which no negation finds
            return some, set()
        return some, {*some} - {*satisfying(~condition, self._schema, {key: known[key] for key in some})}

    def _read_all(
        self,
        chunks: Sequence[Chunk],
        names: Sequence[str],
        condition: pc.Expression | None,
        bounds: Bounds | None = None,
    ) -> list[pa.RecordBatch]:
        schema, fields = self._with_needed(names, condition), named_fields(condition, self._schema)
        batches = self._read_joined(chunks, schema, fields, bounds or {})
        if batches is None:  # one of them is not as expected: each by itself, which names it
            batches = [batch for chunk in chunks for batch in self._read(chunk, schema, condition, fields)]
        return _filtered(batches, schema, names, condition)

    def _read_joined(
        self, chunks: Sequence[Chunk], schema: pa.Schema, fields: Set[str], bounds: Bounds
    ) -> list[pa.RecordBatch] | None:
        """The rows of small files, read together; None if they must be read one by one."""
        if not self.joins_files or not schema.names or not all(map(self._joiner.suits, chunks)):
            return None
        joined = self._joiner.read(chunks, [name for name in schema.names if name != "stream_id"], bounds)
        if joined is None:
            return None
        if "stream_id" not in fields:
            schema = emitted(schema)
        try:
            columns = [
                stream_id_column(field, chunks, joined.counts)
                if field.name == "stream_id"
                else column_of(field, joined.table, 0)
                for field in schema
            ]
        except pa.ArrowException:
            return None
        return [pa.RecordBatch.from_arrays(columns, schema=schema)]

    def _with_needed(self, names: Sequence[str], condition: pc.Expression | None) -> pa.Schema:
        """The columns to read: those asked for, and those of the condition."""
        needed = [*names, *sorted(named_fields(condition, self._schema) - {*names})]
        return pa.schema([self._schema.field(name) for name in needed])

    def _read(
        self, chunk: Chunk, schema: pa.Schema, condition: pc.Expression | None, fields: Set[str]
    ) -> Iterator[pa.RecordBatch]:
        """A chunk's rows, of which `condition` may leave some out; it names `fields`."""
        if "stream_id" not in fields:
            schema = emitted(schema)
        timed = not _TIMES.isdisjoint(fields)
        with self._reporting(chunk):
            try:
                file = open_chunk_file(self._files, self._kind, chunk)
            except FileNotFoundError:
                if self._kind != "events":
                    raise
                # The events file is a copy, which can be lost.
                events = chunk_footer(self._files, chunk.stream_id, chunk.first).events
                columns = [column_of(field, events, events.num_rows, chunk.stream_id) for field in schema]
                yield pa.RecordBatch.from_arrays(columns, schema=schema)
                return
            check_chunk_file(file.metadata, self._kind, chunk, self._files)
            check_columns(file.names, self._schema)
            there = [name for name in schema.names if name in file.names and name != "stream_id"]
            groups = file.metadata.num_row_groups
            for group in range(groups):
                rows = (file.metadata.row_group(group) if groups > 1 else file.metadata).num_rows
                # Few rows are filtered in less time than their statistics are compared.
                skippable = timed and rows >= _WORTH_SKIPPING
                if skippable and not self._may_hold(condition, file.metadata.row_group(group), chunk):
                    continue
                if there:
                    table = file.read_row_group(group, there)
                    if table.num_rows != rows:
                        raise pa.ArrowInvalid(f"{table.num_rows} rows instead of {rows}")
                else:
                    table = None
                columns = [column_of(field, table, rows, chunk.stream_id) for field in schema]
                yield pa.RecordBatch.from_arrays(columns, schema=schema)

    @contextmanager
    def _reporting(self, chunk: Chunk) -> Iterator[None]:
        """Failures to read a chunk's file as a StoreError that names it."""
        uri = self._files.uri(chunk_name(self._kind, chunk.stream_id, chunk.first))
        try:
            yield
        except FileNotFoundError:
            raise StoreError(
                f"{uri} cannot be read, it has vanished: if no run is starting this stream over just now, "
                "restore that file from a copy"
            ) from None
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise StoreError(
                f"{uri} cannot be read ({' '.join(str(error).split())}): restore that file from a copy, or "
                f"leave the stream out (WHERE stream_id <> '{chunk.stream_id}')"
            ) from error

    def _may_hold(self, condition: Any, group: Any, chunk: Chunk) -> bool:
        """Whether a row group may have rows that fulfil a condition on times, by its statistics."""
        known = known_frames(chunk, chunk) & known_of(group, _TIMES)
        return bool(satisfying(condition, self._schema, {"0": known}))


class Scan:
    """A scan of a `ChunkDataset`; what DuckDB needs of pyarrow's Scanner."""

    def __init__(self, dataset: ChunkDataset, names: Sequence[str], condition: pc.Expression | None) -> None:
        self.dataset = dataset
        self.projected_schema = emitted(pa.schema([dataset.schema.field(name) for name in names]))
        self._condition = condition

    def to_reader(self) -> pa.RecordBatchReader:
        """The rows, read as they are asked for."""
        batches = self.dataset.batches(self.projected_schema.names, self._condition)
        return pa.RecordBatchReader.from_batches(self.projected_schema, batches)


def _filtered(
    batches: Sequence[pa.RecordBatch],
    schema: pa.Schema,
    names: Sequence[str],
    condition: pc.Expression | None,
) -> list[pa.RecordBatch]:
    if condition is None:
        return list(batches)
    if batches:
        schema = batches[0].schema
    table = pa.Table.from_batches(batches, schema).filter(condition).select(list(names))
    return [batch for batch in table.to_batches() if batch.num_rows]


def chunk_fragments(listing: Listing, kind: str, schema: pa.Schema) -> ds.Dataset:
    """All files as a dataset of pyarrow's own; of "events" those that are beside their tracks files.

    Args:
        schema: of the rows, with `stream_id`.
    """
    chunks = [chunk for of_stream in listing.chunks().values() for chunk in of_stream]
    if kind != "tracks":
        there = {*listing.files.names(kind, recursive=True)}
        chunks = [c for c in chunks if chunk_name(kind, c.stream_id, c.first) in there]
    filesystem, _ = listing.files.arrow(kind)
    if not isinstance(filesystem, pyarrow.fs.FileSystem):
        filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))
    checked = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    return ds.FileSystemDataset.from_paths(
        [listing.files.arrow(chunk_name(kind, c.stream_id, c.first))[1] for c in chunks],
        schema=schema,
        format=ds.ParquetFileFormat(default_fragment_scan_options=checked),
        filesystem=filesystem,
        partitions=[known_frames(chunk, chunk) for chunk in chunks],
    )
