"""`publish`: the rows of an output folder as tables of Delta Lake, Iceberg or DuckLake.

    DEST/tracks                              the rows of `tracks`, `stream_id` first
    DEST/events                              the rows of `events`
    DEST/tracks/_xmem/<number>-<token>.json  how far each stream is published; readers ignore such folders
    DEST/catalog.db                          the catalog of Iceberg tables
    DEST/catalog.sqlite                      the catalog of DuckLake tables

The tables are derived: the output folder's own files stay the truth.

Progress is, for each stream, the first frame of its newest published chunk, and a fingerprint of all chunk
files published so far. If the files are others by now, the stream was started over: its rows are deleted
and published anew. Rows of streams that were removed are deleted.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipeline.analytics.publishing.delta import DeltaTable
from pipeline.analytics.publishing.ducklake import DuckLakeTable
from pipeline.analytics.publishing.iceberg import IcebergTable
from pipeline.analytics.publishing.table import ATTEMPTS, SCHEMAS, PublishedTable
from pipeline.analytics.scan.dataset import ChunkDataset
from pipeline.analytics.scan.listing import Chunk, Listing
from pipeline.base.errors import StoreError, UsageError
from pipeline.storage.opening import open_files
from pipeline.tracks.layout import chunk_name

logger = logging.getLogger(__name__)

COMMIT_BYTES = 64 << 20
FORMATS = ("delta", "iceberg", "ducklake")
_NEEDS = {"delta": "deltalake", "iceberg": "pyiceberg"}
_SORTED_BY = {
    "tracks": ("stream_id", "frame_index", "object_id"),
    "events": ("stream_id", "frame_index"),
}
_CHUNKS_PER_COMMIT = 4096
_LAST = (1 << 63) - 1
_THREADS = 16
_TAIL_BYTES = 1 << 13
_STREAMS_PER_DELETE = 500


@dataclass
class Published:
    """What `publish` did.

    Args:
        destination: folder of the tables.
        rows: new rows of `tracks`.
        events: new rows of `events`.
        commits: commits to both tables.
        replaced: streams whose rows were deleted, since they were started over or removed.
        skipped: why streams were left out, by stream.
    """

    destination: str
    rows: int = 0
    events: int = 0
    commits: int = 0
    replaced: set[str] = field(default_factory=set)
    skipped: dict[str, str] = field(default_factory=dict)


def publish(
    root: str | os.PathLike[str],
    destination: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    *,
    to: str = "delta",
    commit_bytes: int = COMMIT_BYTES,
) -> Published:
    """Append the rows that were committed since the last run to tables; create them in the first run.

    Compacted copies are read where there are any. May run beside writers and itself. Takes about ten times
    `commit_bytes` of memory.

    Args:
        root: the output folder.
        destination: folder of the tables: a path, or for Delta a URI of S3, GCS or Azure; default: a folder
            in `root`, named after the format.
        storage_options: fsspec's options for both.
        to: the tables' format, one of FORMATS.
        commit_bytes: about how many bytes of chunk files are published in a commit.

    Raises:
        UsageError: the folder is not an output folder, the format's library is not installed, or it cannot
            write to the destination.
        StoreError: the folder cannot be read or the tables cannot be written.
    """
    if to not in FORMATS:
        raise UsageError(f"{to!r} is not a table format that can be published to: {', '.join(FORMATS)}")
    if to in _NEEDS and find_spec(_NEEDS[to]) is None:
        raise UsageError(f"{_NEEDS[to]} is not installed: pip install 'xmem-pipeline[{to}]'")
    if commit_bytes < 1:
        raise UsageError(f"commit size of {commit_bytes} bytes is not allowed: at least 1")
    listing = Listing(open_files(root, storage_options))
    target = str(destination if destination is not None else listing.files.uri(to)).rstrip("/")
    done = Published(target)
    prints = _Fingerprints(listing)
    kinds: dict[str, Callable[..., PublishedTable]] = {
        "delta": DeltaTable,
        "iceberg": IcebergTable,
        "ducklake": DuckLakeTable,
    }
    for kind in SCHEMAS:
        _update(listing, kinds[to](f"{target}/{kind}", kind, storage_options), prints, commit_bytes, done)
    return done


class _Fingerprints:
    """Numbers that tell a stream's chunk files up to one of them from those of another run."""

    def __init__(self, listing: Listing) -> None:
        self._files, self._chunks = listing.files, listing.chunks()
        self._known: dict[tuple[str, int], int] = {}

    def upto(self, stream_id: str, newest: int) -> int | None:
        """The fingerprint of the files up to that of frame `newest`; None if there is no such file."""
        key = stream_id, newest
        if key not in self._known:
            chunks = [c for c in self._chunks.get(stream_id, []) if c.first <= newest]
            if not chunks or chunks[-1].first != newest:
                return None
            digest = hashlib.blake2b(digest_size=8)
            digest.update(repr([(c.first, c.size) for c in chunks]).encode())
            # The sizes of files without rows are equal, their footers have events with times.
            name, size = chunk_name("tracks", stream_id, newest), chunks[-1].size
            try:
                digest.update(self._files.part(name, max(0, size - _TAIL_BYTES), size))
            except FileNotFoundError:
                return None
            self._known[key] = int.from_bytes(digest.digest()) >> 1
        return self._known[key]


def _update(
    listing: Listing, table: PublishedTable, prints: _Fingerprints, commit_bytes: int, done: Published
) -> None:
    """Bring a table up to date."""
    for _ in range(ATTEMPTS):
        if _cleaned(listing, table, prints, done):
            fresh = _fresh(listing, table, done)
            if all(_published(listing, table, prints, b, done) for b in _batches(fresh, commit_bytes)):
                return
    raise StoreError(
        f"other writers keep committing to the {table.format} table {table.uri} ({table.refusal}): run it "
        "again later"
    )


def _cleaned(listing: Listing, table: PublishedTable, prints: _Fingerprints, done: Published) -> bool:
    """Delete the rows of streams that were started over or removed. False if another run was faster."""
    with ThreadPoolExecutor(_THREADS) as pool:
        marks = pool.map(lambda item: prints.upto(item[0], item[1][0]), table.progress.items())
        gone = [s for (s, (_, mark)), now in zip(table.progress.items(), marks, strict=True) if now != mark]
    for start in range(0, len(gone), _STREAMS_PER_DELETE):
        some = gone[start : start + _STREAMS_PER_DELETE]
        if not table.delete(some):
            return False
        done.commits += 1
        done.replaced.update(some)
    return True


def _fresh(listing: Listing, table: PublishedTable, done: Published) -> list[Chunk]:
    """The chunks that are not published, by stream."""
    found = []
    for stream_id, chunks in listing.chunks().items():
        if stream_id not in done.skipped:
            newest, _ = table.progress.get(stream_id, (-1, 0))
            found += [chunk for chunk in chunks if chunk.first > newest]
    return found


def _batches(chunks: Sequence[Chunk], commit_bytes: int) -> Iterator[list[Chunk]]:
    batch: list[Chunk] = []
    size = 0
    for chunk in chunks:
        if batch and (size >= commit_bytes or len(batch) >= _CHUNKS_PER_COMMIT):
            yield batch
            batch, size = [], 0
        batch.append(chunk)
        size += chunk.size
    if batch:
        yield batch


def _published(
    listing: Listing, table: PublishedTable, prints: _Fingerprints, batch: Sequence[Chunk], done: Published
) -> bool:
    """Publish chunks in one commit; streams that cannot be read are left out. False if overtaken."""
    batch = [chunk for chunk in batch if chunk.stream_id not in done.skipped]
    newest = {chunk.stream_id: chunk.first for chunk in batch}
    if not batch:
        return True
    try:
        rows = _rows(listing, table, batch)
        changes = {}
        for stream_id, first in newest.items():
            mark = prints.upto(stream_id, first)
            if mark is None:
                raise StoreError(f"stream {stream_id} was started over meanwhile: run `xmem publish` again")
            changes[stream_id] = (first, mark)
    except StoreError as error:
        if len(newest) > 1:
            parts = ([chunk for chunk in batch if chunk.stream_id == s] for s in newest)
            return all(_published(listing, table, prints, part, done) for part in parts)
        (stream_id,) = newest
        logger.warning("stream %s is not published: %s", stream_id, error)
        done.skipped[stream_id] = str(error)
        return True
    if not table.append(rows, changes):
        return False
    done.commits += 1
    if table.kind == "tracks":
        done.rows += rows.num_rows
    else:
        done.events += rows.num_rows
    return True


class _ChosenChunks(ChunkDataset):
    """The rows of given chunks; of those in compacted copies rows of others may come with them."""

    def __init__(self, listing: Listing, kind: str, schema: pa.Schema, chunks: Sequence[Chunk]) -> None:
        super().__init__(listing, kind, schema)
        self._chunks = chunks

    def _needed(self, condition: pc.Expression | None) -> Iterator[tuple[Chunk, bool]]:
        for stream_id in {chunk.stream_id: None for chunk in self._chunks}:
            self._listing.check_begins(self._listing.chunks([stream_id])[stream_id])
        yield from ((chunk, True) for chunk in self._chunks)


def _rows(listing: Listing, table: PublishedTable, batch: Sequence[Chunk]) -> pa.Table:
    """The rows of chunks, sorted."""
    dataset = _ChosenChunks(listing, table.kind, SCHEMAS[table.kind], batch)
    first: dict[str, int] = {}
    end: dict[str, int] = {}
    for chunk in batch:  # those of a stream follow each other
        first.setdefault(chunk.stream_id, chunk.first)
        end[chunk.stream_id] = _LAST if chunk.following is None else chunk.following
    frames = ds.field("frame_index")
    condition = (frames >= min(first.values())) & (frames < max(end.values()))
    tables = []
    for found in dataset.batches(table.schema.names, condition):
        ids = found["stream_id"]
        names, index = ids.dictionary.to_pylist(), ids.indices.to_numpy()
        frame = found["frame_index"].to_numpy()
        keep = np.isin(index, [i for i, name in enumerate(names) if name in first])
        if len(frame):
            keep &= frame >= np.array([first.get(name, 0) for name in names])[index]
            keep &= frame < np.array([end.get(name, 0) for name in names])[index]
        if not keep.all():
            found = found.filter(pa.array(keep))
        if found.num_rows:
            tables.append(pa.Table.from_batches([found]).cast(table.schema))
    if not tables:
        return table.schema.empty_table()
    return pa.concat_tables(tables).sort_by([(name, "ascending") for name in _SORTED_BY[table.kind]])
