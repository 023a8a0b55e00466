"""SQL over an output folder, by DuckDB in this process; see `pipeline.analytics.archive`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.analytics.archive import Archive
from pipeline.analytics.formats import format_result
from pipeline.analytics.streams import STREAMS_SCHEMA
from pipeline.tracks.reader import TrackReader, records_by_frame

__all__ = ["STREAMS_SCHEMA", "TrackReader", "connect", "format_result", "query", "records_by_frame"]


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
    return Archive(root, storage_options).connection


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
        memory_limit: see `Archive`.

    Raises:
        UsageError, StoreError: as for `Archive` and `Archive.arrow`.
    """
    with Archive(root, storage_options, memory_limit=memory_limit, tables=tables) as archive:
        return archive.arrow(sql)
