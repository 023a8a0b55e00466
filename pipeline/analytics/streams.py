"""The table behind the view `streams`: one row per stream, from its record and its newest file."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from pipeline.analytics.scan.chunk_files import check_chunk_file
from pipeline.analytics.scan.listing import Chunk, Listing
from pipeline.analytics.scan.parquet_file import read_metadata
from pipeline.base.errors import StoreError
from pipeline.storage.files import Files
from pipeline.storage.local_files import LocalFiles
from pipeline.tracks.layout import chunk_name, load_record

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
_THREADS = 16
_TAIL_BYTES = 1 << 13


def streams_table(listing: Listing, *, progress: bool = True) -> pa.Table:
    """One row per stream: what its record says, and how far its files are.

    Args:
        progress: read the ends of the newest files, which `next_frame` is from; else it is null.
    """
    files, sizes = listing.files, listing.sizes()
    newest = {s: chunks[-1] for s, chunks in listing.chunks().items()} if progress else {}

    def row(stream_id: str) -> dict[str, Any]:
        return _stream_row(files, stream_id, len(sizes.get(stream_id, ())), newest.get(stream_id))

    if isinstance(files, LocalFiles):  # small files of a disk are read in less time than threads take turns
        rows = [row(stream_id) for stream_id in listing.streams]
    else:
        with ThreadPoolExecutor(_THREADS) as pool:
            rows = list(pool.map(row, listing.streams))
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


def _stream_row(files: Files, stream_id: str, count: int, newest: Chunk | None) -> dict[str, Any]:
    """One row of `streams`. Damaged values and values of an unexpected type are null, so that one bad stream
    does not hide the others.
    """
    row: dict[str, Any] = {"stream_id": stream_id, "files": count, "next_frame": 0}
    if newest is not None:
        row["next_frame"] = _next_frame(files, newest)
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


def _next_frame(files: Files, newest: Chunk) -> int | None:
    """How far a stream is, by the end of its newest file; None if that cannot be read, which is a warning."""
    name = chunk_name("tracks", newest.stream_id, newest.first)
    try:
        metadata = read_metadata(files, name, newest.size, _TAIL_BYTES)
        check_chunk_file(metadata, "tracks", newest, files)
        return int(metadata.metadata[b"xmem.last"]) + 1
    except StoreError as error:
        logger.warning("%s", error)
    except (pa.ArrowException, OSError) as error:
        logger.warning("%s cannot be read (%s)", files.uri(name), " ".join(str(error).split()))
    return None


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)
