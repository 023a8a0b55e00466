"""SQL over an output folder, by DuckDB in this process.

The views are pyarrow datasets (`pipeline.analytics.scan`) over the files that were committed when the
connection was made; rows committed later are seen by the next connection. DuckDB itself opens no file and no
socket: its access to both is switched off and the configuration locked, so a query can only read these views.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.analytics.formats import format_result
from pipeline.analytics.listing import Listing
from pipeline.analytics.scan import ChunkDataset
from pipeline.analytics.streams import STREAMS_SCHEMA, streams_table
from pipeline.analytics.views import GAPS_SQL, OBJECTS_SQL, FileDataset, FrameDataset
from pipeline.base.errors import UsageError
from pipeline.base.records import EVENTS_SCHEMA, TRACKS_SCHEMA
from pipeline.storage.opening import open_files
from pipeline.tracks.reader import TrackReader, records_by_frame

__all__ = ["STREAMS_SCHEMA", "TrackReader", "connect", "format_result", "query", "records_by_frame"]

VIEWS = "tracks, events, streams, objects, frames, gaps, files"
_SETTINGS = (
    "autoinstall_known_extensions=false",
    "autoload_known_extensions=false",
    "python_enable_replacements=false",
    "TimeZone='UTC'",
    "enable_external_access=false",
    "lock_configuration=true",
)


def connect(
    root: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with views over an output folder (docs/query.md).

    `tracks` and `events` have the columns of `TRACKS_SCHEMA` and `EVENTS_SCHEMA` after `stream_id` (text,
    always); `streams` those of `STREAMS_SCHEMA`: `next_frame` counts the committed frames, `settings`,
    `prompts`, `record` and `extra` are JSON, `cause` says why a stream's `state` is "failed". `extra` holds
    what a manifest says in columns of its own; each has a column in `streams` too, named `extra_<name>` where
    `streams` has that column. Times are UTC.

    Raises:
        UsageError: the folder is not an output folder.
        StoreError: it cannot be read.
    """
    listing = Listing(open_files(root, storage_options))
    listing.chunks()  # what is committed from now on is not seen
    return _connect(listing, with_streams=True)[0]


def query(
    root: str | os.PathLike[str],
    sql: str,
    storage_options: Mapping[str, Any] | None = None,
    *,
    tables: Mapping[str, pa.Table] | None = None,
    memory_limit: str | None = None,
) -> pa.Table:
    """The result of one SQL statement over the views of `connect`.

    Args:
        tables: further views by name, such as those of `pipeline.analytics.zones.zone_views`.
        memory_limit: how much memory DuckDB may take for sorting, joining and grouping, such as "2GB"; none:
            80 % of the machine's. What is read at a time and the result come on top of it.

    Raises:
        UsageError: the folder is not an output folder, DuckDB rejects the statement (its message is
            included), or the memory limit is not a size or too small for the statement.
        StoreError: the folder or a file in it cannot be read.
    """
    limit = _checked_limit(memory_limit)
    allowed = (
        duckdb.StatementType.SELECT,
        duckdb.StatementType.EXPLAIN,
        duckdb.StatementType.PRAGMA,
        duckdb.StatementType.CALL,
        duckdb.StatementType.MULTI,  # PIVOT
    )
    listing = Listing(open_files(root, storage_options))
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
    # It costs two reads for each stream.
    connection, datasets = _connect(listing, _names_streams(sql), limit)
    with connection:
        for name, table in (tables or {}).items():
            connection.register(name, table)
        views = ", ".join((VIEWS, *(tables or {})))
        try:
            return connection.sql(statements[0]).to_arrow_table()
        except duckdb.Error as error:
            failure = next((dataset.failure for dataset in datasets if dataset.failure), None)
            if failure is not None:
                raise failure from error
            if isinstance(error, duckdb.OutOfMemoryException):
                given = "of this machine" if limit is None else f"limit of {limit}"
                raise UsageError(
                    f"query: the statement needs more memory than the {given}: read fewer streams or frames "
                    "in one statement, or give a higher --memory-limit"
                ) from error
            raise UsageError(f"query: {_first_lines(error)} (views: {views})") from error


def _checked_limit(memory_limit: str | None) -> str | None:
    if memory_limit is not None and not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]i?B", memory_limit, re.IGNORECASE):
        raise UsageError(
            f"memory limit {memory_limit!r} is not a size: give a number with a unit, such as 500MB or 2GB"
        )
    return memory_limit


def _connect(
    listing: Listing, with_streams: bool, memory_limit: str | None = None
) -> tuple[duckdb.DuckDBPyConnection, list[ChunkDataset]]:
    connection = duckdb.connect(":memory:")
    if memory_limit is not None:
        connection.execute(f"SET memory_limit = '{memory_limit}'")
    for setting in _SETTINGS:
        connection.execute(f"SET {setting}")
    datasets = {
        "tracks": ChunkDataset(listing, "tracks", TRACKS_SCHEMA),
        "events": ChunkDataset(listing, "events", EVENTS_SCHEMA),
        "frames": FrameDataset(listing),
        "files": FileDataset(listing),
    }
    for name, dataset in datasets.items():
        connection.register(name, dataset)
    connection.execute(OBJECTS_SQL)
    connection.execute(GAPS_SQL)
    if with_streams:
        connection.register("streams", streams_table(listing))
    return connection, list(datasets.values())


def _names_streams(sql: str) -> bool:
    """Whether a statement may read the view `streams`."""
    if not re.search(r"\bstreams\b", sql, re.IGNORECASE):
        return False
    with duckdb.connect(":memory:") as connection:
        try:
            return "streams" in {name.lower() for name in connection.get_table_names(sql)}
        except duckdb.Error:  # it looks for the columns of some joins
            return True


def _first_lines(error: BaseException) -> str:
    """DuckDB's message without its excerpt of the statement, on one line."""
    text = str(error).split("\n\nLINE ")[0]
    return " ".join(text.split()) or type(error).__name__
