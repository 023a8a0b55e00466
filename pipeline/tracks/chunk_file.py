"""Parquet files of one committed chunk: equal tables give equal bytes in any process.

The bytes hold no time, token or host name, so an existing file can be compared with the one to be written.
They do depend on the versions of pyarrow and zstd, which constraints.txt pins.

The footer of a tracks file says which frames it covers (it may have no rows) and carries the chunk's events
as JSON: the one file then holds the whole commit, and the events file of the same name is a copy for readers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.base.errors import StoreError
from pipeline.base.records import EVENTS_SCHEMA, TRACKS_SCHEMA

FORMAT_VERSION = 1
_ROWS_PER_GROUP = 65536
_TAIL_BYTES = 65536
_META = "xmem."
_STATISTICS = [
    name for name in (*TRACKS_SCHEMA.names, *EVENTS_SCHEMA.names) if name not in ("mask_rle", "detail")
]


@dataclass(frozen=True, slots=True)
class ChunkFooter:
    """Footer of a tracks file: stream id, frames `first`..`last` (inclusive), and events."""

    stream_id: str
    first: int
    last: int
    rows: int
    events: pa.Table


def tracks_bytes(stream_id: str, first: int, last: int, tracks: pa.Table, events: pa.Table) -> bytes:
    """The tracks file of frames `first`..`last`; the tables must come from `check_chunk`."""
    meta = {"events": json.dumps(events.to_pylist(), default=_plain, sort_keys=True, separators=(",", ":"))}
    return _write(tracks, stream_id, first, last, meta)


def events_bytes(stream_id: str, first: int, last: int, events: pa.Table) -> bytes:
    """The events file of frames `first`..`last`."""
    return _write(events, stream_id, first, last, {})


def check_chunk(first: int, last: int, tracks: pa.Table, events: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The two tables in canonical form; ValueError if they are not a valid chunk `first`..`last`."""
    if not 0 <= first <= last:
        raise ValueError(f"chunk {first}..{last}: need 0 <= first <= last")
    tracks, events = _canonical("tracks", tracks, TRACKS_SCHEMA), _canonical("events", events, EVENTS_SCHEMA)
    order = list(zip(tracks["frame_index"].to_pylist(), tracks["object_id"].to_pylist(), strict=True))
    if any(b <= a for a, b in pairwise(order)):
        raise ValueError(
            f"chunk {first}..{last}: rows must be sorted by frame_index, object_id, each pair once"
        )
    if order and not (first <= order[0][0] and order[-1][0] <= last):
        raise ValueError(f"chunk {first}..{last}: has rows of frames {order[0][0]}..{order[-1][0]}")
    return tracks, events


def read_footer(tail: Callable[[int], bytes], uri: str) -> ChunkFooter:
    """Reads a tracks file's footer from its end, without its rows.

    Args:
        tail: returns the last n bytes of the file.
        uri: the file's name, for messages.

    Raises:
        ValueError: the bytes are not a complete tracks file; the message says why.
        StoreError: the file is of a newer format.
    """
    data = tail(_TAIL_BYTES)
    if len(data) < 12 or data[-4:] != b"PAR1":
        raise ValueError("its end is missing")
    size = int.from_bytes(data[-8:-4], "little") + 8
    if size > len(data):
        data = tail(size)
    try:
        metadata = pq.read_metadata(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise ValueError("its footer cannot be read") from error
    return parse_footer(metadata, uri)


def parse_footer(metadata: pq.FileMetaData, uri: str) -> ChunkFooter:
    """A tracks file's footer, of its Parquet metadata. Raises as `read_footer`."""
    try:
        meta = {key.decode(): value.decode() for key, value in (metadata.metadata or {}).items()}
        version = int(meta[_META + "format_version"])
    except KeyError as error:
        raise ValueError("it was not written by xmem") from error
    except ValueError as error:
        raise ValueError("its footer cannot be read") from error
    if version > FORMAT_VERSION:
        raise StoreError(
            f"{uri} has format version {version}, and this xmem reads up to {FORMAT_VERSION}: upgrade it"
        )
    try:
        stream_id, first, last = (
            meta[_META + "stream_id"],
            int(meta[_META + "first"]),
            int(meta[_META + "last"]),
        )
        events = _events_of(json.loads(meta[_META + "events"]))
    except (KeyError, ValueError, TypeError, pa.ArrowException) as error:
        raise ValueError("its footer is not that of a tracks file") from error
    return ChunkFooter(stream_id, first, last, int(metadata.num_rows), events)


def _canonical(what: str, table: pa.Table, schema: pa.Schema) -> pa.Table:
    if not table.schema.equals(schema):
        raise ValueError(
            f"{what} must have the schema pipeline.base.records.{what.upper()}_SCHEMA, not {table.schema}"
        )
    columns = []
    for field, column in zip(schema, table.columns, strict=True):
        if not field.nullable and column.null_count:
            raise ValueError(
                f"{what} has {column.null_count} nulls in {field.name}, which must always be known"
            )
        if pa.types.is_dictionary(field.type):
            # Equal rows may have different dictionaries; re-encoding makes their bytes equal.
            column = pa.chunked_array([column.cast(pa.string()).combine_chunks().dictionary_encode()])
            column = column.cast(field.type)
        columns.append(column.combine_chunks())
    return pa.table(columns, schema=schema)


def _write(table: pa.Table, stream_id: str, first: int, last: int, more: Mapping[str, str]) -> bytes:
    meta = {
        "format_version": str(FORMAT_VERSION),
        "stream_id": stream_id,
        "first": str(first),
        "last": str(last),
    }
    table = table.replace_schema_metadata({_META + key: value for key, value in (meta | dict(more)).items()})
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=_ROWS_PER_GROUP,
        version="2.6",
        data_page_version="1.0",
        compression="zstd",
        compression_level=3,
        use_dictionary=["category", "object_id", "frame_height", "frame_width", "kind", "reason"],
        write_statistics=[name for name in table.schema.names if name in _STATISTICS],
        write_page_checksum=True,
        store_schema=True,
    )
    return bytes(sink.getvalue())


def _plain(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} in an event")


def _events_of(rows: list[dict[str, Any]]) -> pa.Table:
    for row in rows:
        if row["wall_time"] is not None:
            row["wall_time"] = datetime.fromisoformat(row["wall_time"])
    return pa.Table.from_pylist(rows, schema=EVENTS_SCHEMA)
