"""SQL over an output folder, by DuckDB in this process.

The views `tracks`, `events` and `streams` are pyarrow datasets over the files that were committed when the
connection was made; rows committed later are seen by the next connection. DuckDB itself opens no file and no
socket: its access to both is switched off and the configuration locked, so a query can only read these views.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs

from pipeline.analytics.formats import format_result
from pipeline.base.errors import StoreError, UsageError
from pipeline.base.records import EVENTS_SCHEMA, TRACKS_SCHEMA
from pipeline.base.stream_ids import is_stream_id
from pipeline.storage.files import Files
from pipeline.storage.opening import open_files
from pipeline.tracks.layout import chunk_first, chunk_footer, load_record
from pipeline.tracks.reader import TrackReader, records_by_frame

__all__ = ["STREAMS_SCHEMA", "TrackReader", "connect", "format_result", "query", "records_by_frame"]

logger = logging.getLogger(__name__)

STREAMS_SCHEMA = pa.schema(
    [
        pa.field("stream_id", pa.string(), nullable=False),
        pa.field("source", pa.string()),
        pa.field("state", pa.string()),
        pa.field("next_frame", pa.int64()),
        pa.field("files", pa.int64(), nullable=False),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("rate", pa.float64()),
        pa.field("model", pa.string()),
        pa.field("settings", pa.string()),
        pa.field("prompts", pa.string()),
        pa.field("record", pa.string()),
        pa.field("extra", pa.string()),
        pa.field("cause", pa.string()),
    ]
)
_SETTINGS = (
    "autoinstall_known_extensions=false",
    "autoload_known_extensions=false",
    "python_enable_replacements=false",
    "TimeZone='UTC'",
    "enable_external_access=false",
    "lock_configuration=true",
)
_THREADS = 16


def connect(
    root: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with the views `tracks`, `events` and `streams` over an output folder.

    `tracks` and `events` have the columns of `TRACKS_SCHEMA` and `EVENTS_SCHEMA` after `stream_id` (text,
    always); `streams` those of `STREAMS_SCHEMA`: `next_frame` counts the committed frames, `settings`,
    `prompts`, `record` and `extra` are JSON, `cause` says why a stream's `state` is "failed". `extra` holds
    what a manifest says in columns of its own; each has a column in `streams` too, named `extra_<name>` where
    `streams` has that column. Times are UTC.

    Raises:
        UsageError: the folder is not an output folder.
        StoreError: it cannot be read.
    """
    return _connect(open_files(root, storage_options), with_streams=True)


def query(
    root: str | os.PathLike[str],
    sql: str,
    storage_options: Mapping[str, Any] | None = None,
    *,
    tables: Mapping[str, pa.Table] | None = None,
) -> pa.Table:
    """The result of one SQL statement over the views of `connect`.

    Args:
        tables: further views by name, such as those of `pipeline.analytics.zones.zone_views`.

    Raises:
        UsageError: the folder is not an output folder, or DuckDB rejects the statement; includes its message.
        StoreError: the folder or a file in it cannot be read.
    """
    allowed = (
        duckdb.StatementType.SELECT,
        duckdb.StatementType.EXPLAIN,
        duckdb.StatementType.PRAGMA,
        duckdb.StatementType.CALL,
        duckdb.StatementType.MULTI,  # PIVOT
    )
    files = open_files(root, storage_options)
    try:
        statements = duckdb.extract_statements(sql)
    except duckdb.Error as error:
        raise UsageError(f"query: {_first_lines(error)}") from error
    if len(statements) != 1:
        raise UsageError(f"query: one SQL statement is needed, not {len(statements)}")
    if statements[0].type not in allowed:
        raise UsageError(
            f"query: {statements[0].type.name} is not allowed, an output folder is only read: use SELECT"
        )
    # A record and a footer per stream are read for it, so only where it can be meant.
    with _connect(files, with_streams="stream" in sql.lower().replace("stream_id", "")) as connection:
        for name, table in (tables or {}).items():
            connection.register(name, table)
        views = ", ".join(("tracks", "events", "streams", *(tables or {})))
        try:
            return connection.sql(statements[0]).to_arrow_table()
        except duckdb.Error as error:
            if _is_file_failure(error):
                raise StoreError(
                    f"a file of {files.root} cannot be read ({_first_lines(error)}): if no run is starting "
                    f"over just now, restore that file from a copy"
                ) from error
            raise UsageError(f"query: {_first_lines(error)} (views: {views})") from error


def _connect(files: Files, with_streams: bool) -> duckdb.DuckDBPyConnection:
    # Tracks before events: an events file is written first, so each listed tracks file has its own then.
    tracks = _by_stream(files, "tracks")
    records = [n.rpartition("/")[2] for n in files.names("streams")]
    ids = {n.removesuffix(".json") for n in records if n.endswith(".json")}
    ids = {name for name in ids if is_stream_id(name)}
    if not tracks and not ids:
        raise UsageError(f"{files.root} is no output folder of xmem: nothing in it under tracks/ or streams/")
    events = {
        stream_id: {first: name for first, name in found.items() if first in tracks.get(stream_id, {})}
        for stream_id, found in _by_stream(files, "events").items()
    }
    connection = duckdb.connect(":memory:")
    for setting in _SETTINGS:
        connection.execute(f"SET {setting}")
    connection.register("tracks", _dataset(files, tracks, TRACKS_SCHEMA))
    connection.register("events", _dataset(files, events, EVENTS_SCHEMA))
    if with_streams:
        connection.register("streams", _streams(files, ids, tracks))
    return connection


def _by_stream(files: Files, kind: str) -> dict[str, dict[int, str]]:
    """Names of the chunk files by stream and first frame; what is named otherwise is not ours."""
    found: dict[str, dict[int, str]] = {}
    for name in files.names(kind, recursive=True):
        _, partition, *rest = name.split("/")
        stream_id, first = partition.removeprefix("stream_id="), chunk_first(name)
        if len(rest) == 1 and partition != stream_id and is_stream_id(stream_id) and first is not None:
            found.setdefault(stream_id, {})[first] = name
    return {stream_id: dict(sorted(chunks.items())) for stream_id, chunks in sorted(found.items())}


def _dataset(files: Files, names: Mapping[str, Mapping[int, str]], schema: pa.Schema) -> ds.Dataset:
    schema = pa.schema([pa.field("stream_id", pa.string()), *schema])
    filesystem, _ = files.arrow("")
    if not isinstance(filesystem, pyarrow.fs.FileSystem):
        filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))
    checked = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    pairs = [(stream_id, name) for stream_id, chunks in names.items() for name in chunks.values()]
    return ds.FileSystemDataset.from_paths(
        [files.arrow(name)[1] for _, name in pairs],
        schema=schema,
        format=ds.ParquetFileFormat(default_fragment_scan_options=checked),
        filesystem=filesystem,
        partitions=[ds.field("stream_id") == stream_id for stream_id, _ in pairs],
    )


def _streams(files: Files, ids: set[str], tracks: Mapping[str, Mapping[int, str]]) -> pa.Table:
    every = sorted(ids | set(tracks))
    with ThreadPoolExecutor(_THREADS) as pool:
        rows = list(
            pool.map(lambda stream_id: _stream_row(files, stream_id, list(tracks.get(stream_id, {}))), every)
        )
    extras = [row.pop("extras", {}) for row in rows]
    table = pa.Table.from_pylist(rows, schema=STREAMS_SCHEMA)
    for name, values in _extra_columns(extras).items():
        table = table.append_column(name, values)
    return table


def _extra_columns(extras: Sequence[Mapping[str, Any]]) -> dict[str, pa.Array]:
    """The user-defined columns: numeric or Boolean if all values are, else text."""
    taken = {name.lower() for name in STREAMS_SCHEMA.names}
    columns: dict[str, pa.Array] = {}
    spelt: dict[str, str] = {}  # SQL takes names that differ only in their case for one
    for extra in extras:
        for name in extra:
            spelt.setdefault(name.lower(), name)
    for low, name in spelt.items():
        values = [next((v for key, v in extra.items() if key.lower() == low), None) for extra in extras]
        kinds = {type(value) for value in values if value is not None}
        if kinds == {bool} or kinds == {int} or kinds <= {int, float}:
            kind = pa.bool_() if kinds == {bool} else pa.int64() if kinds == {int} else pa.float64()
            try:
                array = pa.array(values, kind)
            except (pa.ArrowInvalid, OverflowError):  # larger than 64 bits
                array = pa.array([_text(value) for value in values], pa.string())
        else:
            array = pa.array([_text(value) for value in values], pa.string())
        while low in taken:
            low = name = f"extra_{low}"
        taken.add(low)
        columns[name] = array
    return columns


def _stream_row(files: Files, stream_id: str, firsts: list[int]) -> dict[str, Any]:
    """One row of `streams`. Damaged values and values of an unexpected type are null, so that one bad stream
    does not hide the others.
    """
    row: dict[str, Any] = {"stream_id": stream_id, "files": len(firsts), "next_frame": 0}
    if firsts:
        try:
            row["next_frame"] = chunk_footer(files, stream_id, firsts[-1]).last + 1
        except StoreError as error:
            logger.warning("%s", error)
            row["next_frame"] = None
    try:
        record = load_record(files, stream_id) or {}
    except StoreError as error:
        logger.warning("%s", error)
        return row | {"state": "unreadable"}
    for name in ("source", "state", "model"):
        row[name] = _text(record.get(name))
    for name in ("width", "height"):
        value = record.get(name)
        row[name] = value if type(value) is int and abs(value) < 2**31 else None
    cause = record.get("cause")
    row["cause"] = _text(cause.get("message") if isinstance(cause, dict) else cause)
    rate = record.get("rate")
    row["rate"] = float(rate) if isinstance(rate, (int, float)) else None
    for name in ("settings", "prompts"):
        row[name] = json.dumps(record[name]) if name in record else None
    row["record"] = json.dumps(record) if record else None
    extra = record.get("extra")
    if isinstance(extra, dict) and extra:
        row["extra"], row["extras"] = json.dumps(extra), extra
    return row


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _first_lines(error: BaseException) -> str:
    """DuckDB's message without its excerpt of the statement, on one line."""
    text = str(error).split("\n\nLINE ")[0]
    return " ".join(text.split()) or type(error).__name__


def _is_file_failure(error: duckdb.Error) -> bool:
    # DuckDB passes on errors that pyarrow raised while reading a view's files.
    return isinstance(error, duckdb.IOException) or "registered as" in str(error)
