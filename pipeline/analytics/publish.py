"""`publish`: the rows of an output folder as Delta Lake tables, for tools that read those.

    DEST/tracks                              the rows of `tracks`, `stream_id` first
    DEST/events                              the rows of `events`
    DEST/tracks/_xmem/<number>-<token>.json  how far each stream is published; Delta ignores such folders

The tables are derived: the output folder's own files stay the truth. A commit of a table holds, beside the
rows of some chunks, number and token of a progress file that was created before it, as application
transactions of the Delta protocol (`txn`). So rows and progress change together: a run that was killed has
published all rows of a commit or none, and the next one goes on from there. Delta refuses the commit of a run
that another one has overtaken; such a run plans anew.

Progress is, for each stream, the first frame of its newest published chunk, and a fingerprint of all chunk
files published so far. If the files are others by now, the stream was started over: its rows are deleted
and published anew. Rows of streams that were removed are deleted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipeline.analytics.listing import Chunk, Listing
from pipeline.analytics.scan import ChunkDataset
from pipeline.base.errors import StoreError, UsageError, bare_reason
from pipeline.base.records import EVENTS_SCHEMA, TRACKS_SCHEMA
from pipeline.storage.filesystems import connect, is_local, is_s3
from pipeline.storage.opening import open_files
from pipeline.tracks.layout import chunk_name

logger = logging.getLogger(__name__)

FOLDER = "delta"
COMMIT_BYTES = 64 << 20
_SCHEMAS = {"tracks": TRACKS_SCHEMA, "events": EVENTS_SCHEMA}
_SORTED_BY = {
    "tracks": ("stream_id", "frame_index", "object_id"),
    "events": ("stream_id", "frame_index"),
}
_STATISTICS = ("stream_id", "frame_index", "pts_seconds", "wall_time", "object_id")
_CHUNKS_PER_COMMIT = 4096
_ROWS_PER_GROUP = 1 << 17
_LAST = (1 << 63) - 1
_ATTEMPTS = 10
_THREADS = 16
_TAIL_BYTES = 1 << 13
_STREAMS_PER_DELETE = 500
_PROGRESS = "_xmem"
_OWNER = "publish"
_TRANSACTIONS = ("xmem", "xmem-progress")
"""Ids of the transactions with number and token of the progress file."""
_REMAKE = "remove that table's folder, and run `xmem publish` again"


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
    commit_bytes: int = COMMIT_BYTES,
) -> Published:
    """Append the rows that were committed since the last run to Delta tables; create them in the first run.

    Compacted copies are read where there are any. May run beside writers and itself. Takes about ten times
    `commit_bytes` of memory.

    Args:
        root: the output folder.
        destination: folder of the tables: a path, or a URI of S3, GCS or Azure; default: `delta` in `root`.
        storage_options: fsspec's options for both.
        commit_bytes: about how many bytes of chunk files are published in a commit.

    Raises:
        UsageError: the folder is not an output folder, deltalake is not installed, or it cannot write to
            the destination.
        StoreError: the folder cannot be read or the tables cannot be written.
    """
    try:
        import deltalake  # noqa: F401
    except ImportError as error:
        raise UsageError("deltalake is not installed: pip install 'xmem-pipeline[delta]'") from error
    if commit_bytes < 1:
        raise UsageError(f"commit size of {commit_bytes} bytes is not allowed: at least 1")
    listing = Listing(open_files(root, storage_options))
    target = str(destination if destination is not None else listing.files.uri(FOLDER)).rstrip("/")
    done = Published(target)
    prints = _Fingerprints(listing)
    for kind in _SCHEMAS:
        _update(listing, _Table(f"{target}/{kind}", kind, storage_options), prints, commit_bytes, done)
    return done


class _Table:
    """A Delta table at its newest version, and how far it is.

    Args:
        uri: its folder.
        kind: "tracks" or "events".
        storage_options: fsspec's options.

    Attributes:
        progress: first frame of the newest published chunk, and the fingerprint up to it, by stream.
        number: of the progress file; 0 before the first one.
        refusal: why Delta refused the last commit that it refused.
    """

    def __init__(self, uri: str, kind: str, storage_options: Mapping[str, Any] | None) -> None:
        self.uri, self.kind = uri, kind
        self._options = _delta_options(uri, storage_options)
        self._files = open_files(uri, storage_options)
        fields = [pa.field("stream_id", pa.string(), nullable=False)]
        for item in _SCHEMAS[kind]:
            # Delta has no dictionaries.
            plain = item.type.value_type if pa.types.is_dictionary(item.type) else item.type
            fields.append(pa.field(item.name, plain, item.nullable))
        self.schema = pa.schema(fields)
        self._delta: Any = None
        self.number, self.progress = 0, dict[str, tuple[int, int]]()
        self.refusal = ""
        self.reload()

    def reload(self) -> None:
        """Open the newest version; create the table if there is none."""
        for _ in range(_ATTEMPTS):
            self._delta = self._opened()
            number, token = (self._delta.transaction_version(name) or 0 for name in _TRANSACTIONS)
            try:
                self.progress = _parsed(self._files.read(_progress_name(number, token))) if number else {}
            except FileNotFoundError:
                continue  # another run has committed meanwhile, and removed that file
            except ValueError as error:
                raise StoreError(
                    f"{self._files.uri(_progress_name(number, token))} is damaged: {_REMAKE}"
                ) from error
            self.number = number
            return
        missing = self._files.uri(_progress_name(number, token))
        raise StoreError(f"{missing} is missing: {_REMAKE}")

    def append(self, rows: pa.Table, changes: Mapping[str, tuple[int, int]]) -> bool:
        """Append rows, and change the progress of their streams. False if another run was faster."""
        return self._commit(partial(self._write, rows), self.progress | dict(changes))

    def delete(self, stream_ids: Sequence[str]) -> bool:
        """Delete the rows and the progress of streams. False if another run was faster."""
        ids = ", ".join(f"'{stream_id}'" for stream_id in stream_ids)  # they have no quotes

        def act(properties: Any) -> None:
            before = self._delta.version()
            self._delta.delete(f"stream_id IN ({ids})", commit_properties=properties)
            if self._delta.version() == before:  # there are no such rows: Delta has committed nothing
                self._write(self.schema.empty_table(), properties)

        left = {name: value for name, value in self.progress.items() if name not in stream_ids}
        return self._commit(act, left)

    def _write(self, rows: pa.Table, properties: Any) -> None:
        from deltalake import WriterProperties, write_deltalake

        write_deltalake(
            self._delta,
            rows,
            mode="append",
            writer_properties=WriterProperties(compression="ZSTD", max_row_group_size=_ROWS_PER_GROUP),
            commit_properties=properties,
        )

    def _commit(self, act: Callable[[Any], object], progress: Mapping[str, tuple[int, int]]) -> bool:
        from deltalake import CommitProperties, Transaction
        from deltalake.exceptions import CommitFailedError, DeltaError

        versions = self.number + 1, secrets.randbits(63)
        name = _progress_name(*versions)
        self._files.create(name, json.dumps(progress, separators=(",", ":")).encode(), _OWNER)
        marks = [Transaction(*mark, None) for mark in zip(_TRANSACTIONS, versions, strict=True)]
        try:
            act(CommitProperties(app_transactions=marks))
        except CommitFailedError as error:
            self.refusal = bare_reason(error)
            self._files.remove(name)
            self.reload()
            return False
        except (DeltaError, OSError, ValueError) as error:
            # Its file stays: the commit may have succeeded.
            raise self._failure("written", error) from error
        self.reload()
        for other in self._files.names(_PROGRESS):
            known = other.rpartition("/")[2].partition("-")[0]
            if known.isdigit() and int(known) <= versions[0] <= self.number and other != name:
                self._files.remove(other)
        return self.number == versions[0]

    def _opened(self) -> Any:
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError, TableNotFoundError

        statistics = ",".join(name for name in _STATISTICS if name in self.schema.names)
        try:
            try:
                delta = DeltaTable(self.uri, storage_options=self._options)
            except TableNotFoundError:
                delta = DeltaTable.create(
                    self.uri,
                    self.schema,
                    mode="ignore",  # another run may be creating it
                    name=self.kind,
                    configuration={"delta.dataSkippingStatsColumns": statistics},
                    storage_options=self._options,
                )
        except (DeltaError, OSError, ValueError) as error:
            raise self._failure("opened", error) from error
        names = [item.name for item in delta.schema().fields]
        if names != self.schema.names:
            raise StoreError(
                f"the Delta table {self.uri} has the columns {', '.join(names)}, not those of {self.kind}: "
                "publish to another folder, or remove that table"
            )
        return delta

    def _failure(self, verb: str, error: Exception) -> StoreError:
        return StoreError(f"the Delta table {self.uri} cannot be {verb}: {bare_reason(error)}")


def _progress_name(number: int, token: int) -> str:
    return f"{_PROGRESS}/{number:09d}-{token:016x}.json"


def _parsed(data: bytes) -> dict[str, tuple[int, int]]:
    """A progress file. ValueError if it is damaged."""
    try:
        return {str(s): (int(newest), int(mark)) for s, (newest, mark) in json.loads(data).items()}
    except (TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error


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
    listing: Listing, table: _Table, prints: _Fingerprints, commit_bytes: int, done: Published
) -> None:
    """Bring a table up to date."""
    for _ in range(_ATTEMPTS):
        if _cleaned(listing, table, prints, done):
            fresh = _fresh(listing, table, done)
            if all(_published(listing, table, prints, b, done) for b in _batches(fresh, commit_bytes)):
                return
    raise StoreError(
        f"other writers keep committing to the Delta table {table.uri} ({table.refusal}): run it again later"
    )


def _cleaned(listing: Listing, table: _Table, prints: _Fingerprints, done: Published) -> bool:
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


def _fresh(listing: Listing, table: _Table, done: Published) -> list[Chunk]:
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
    listing: Listing, table: _Table, prints: _Fingerprints, batch: Sequence[Chunk], done: Published
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


def _rows(listing: Listing, table: _Table, batch: Sequence[Chunk]) -> pa.Table:
    """The rows of chunks, sorted."""
    dataset = _ChosenChunks(listing, table.kind, _SCHEMAS[table.kind], batch)
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


def _delta_options(target: str, storage_options: Mapping[str, Any] | None) -> dict[str, str]:
    """deltalake's storage options for a URI, from those of fsspec; the rest comes from the environment.

    Raises:
        UsageError: deltalake cannot write there.
    """
    try:
        fs, _ = connect(target, storage_options)
    except (ImportError, ValueError, TypeError) as error:
        raise UsageError(f"Delta tables cannot be written to {target!r}: {bare_reason(error)}") from error
    if is_local(fs):
        return {}
    scheme = target.partition("://")[0].lower()
    if scheme in ("gs", "az", "abfs", "abfss"):
        return {}
    if not is_s3(fs):
        raise UsageError(
            f"Delta tables cannot be written to {target!r}: give a local folder or a URI that begins with "
            "s3://, gs://, az:// or abfss://"
        )
    client = dict(fs.client_kwargs or {})
    endpoint = client.get("endpoint_url") or fs.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3")
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL")
    region = client.get("region_name") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    found = {
        "AWS_ACCESS_KEY_ID": fs.key,
        "AWS_SECRET_ACCESS_KEY": fs.secret,
        "AWS_SESSION_TOKEN": fs.token,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": region or ("us-east-1" if endpoint else None),
        "AWS_ALLOW_HTTP": "true" if str(endpoint).startswith("http://") else None,
        "AWS_SKIP_SIGNATURE": "true" if fs.anon else None,
        "AWS_CONDITIONAL_PUT": "etag",  # commits create files and overwrite none
    }
    return {name: str(value) for name, value in found.items() if value}
