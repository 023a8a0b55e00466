"""Opens chunk files for a scan, and checks that their contents agree with their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from pipeline.analytics.scan.listing import Chunk
from pipeline.analytics.scan.parquet_file import ParquetFile, open_parquet, parse_metadata
from pipeline.base.errors import StoreError
from pipeline.storage.files import Files
from pipeline.tracks.layout import MEND, chunk_name

_TAIL_BYTES = 1 << 13


def open_chunk_file(files: Files, kind: str, chunk: Chunk) -> ParquetFile:
    """A chunk's file, whose footer is read once, and of whose pages only those that are asked for.

    Raises:
        FileNotFoundError: there is none. StoreError, OSError, pyarrow.ArrowException: it cannot be read.
    """
    # An events file was not listed: it is small, and may be a link, which `read` refuses.
    size = chunk.size if kind == "tracks" else None
    return open_parquet(files, chunk_name(kind, chunk.stream_id, chunk.first), size, _TAIL_BYTES)


def check_columns(there: Sequence[str], schema: pa.Schema) -> None:
    """pyarrow.ArrowInvalid if a file lacks columns: damage to a footer, which has no checksum, hides them.

    Args:
        there: the columns of the file.
        schema: with the columns that it must have.
    """
    missing = [name for name in schema.names if name not in there and name != "stream_id"]
    if missing and (missing != ["presence"] or len(there) >= len(schema.names) - 1):  # older files have none
        raise pa.ArrowInvalid(f"it has no column {missing[0]}")


def check_chunk_file(metadata: Any, kind: str, chunk: Chunk, files: Files) -> None:
    """StoreError if a file is not what its name says, or if the next one is missing."""
    uri = files.uri(chunk_name(kind, chunk.stream_id, chunk.first))
    meta = metadata.metadata or {}
    try:
        stream_id = meta[b"xmem.stream_id"].decode()
        first, last = int(meta[b"xmem.first"]), int(meta[b"xmem.last"])
    except (KeyError, ValueError):
        raise StoreError(
            f"{uri} is no {kind} file of xmem, though it is named like one: move it out of the output folder"
        ) from None
    if (stream_id, first) != (chunk.stream_id, chunk.first) or last < first:
        raise StoreError(
            f"{uri} holds frames {first}..{last} of stream {stream_id!r}, not what its name says: {MEND}"
        )
    if chunk.following is None or last + 1 == chunk.following:
        return
    if last + 1 > chunk.following:
        following = files.uri(chunk_name("tracks", chunk.stream_id, chunk.following))
        raise StoreError(f"{following} begins before frame {last + 1}, where the file before it ends: {MEND}")
    _check_foreign(files, chunk.stream_id, chunk.following)
    missing = files.uri(chunk_name("tracks", chunk.stream_id, last + 1))
    raise StoreError(f"{missing} is missing, though files of later frames exist: {MEND}")


def _check_foreign(files: Files, stream_id: str, first: int) -> None:
    """StoreError if a file that seems to leave a gap before it is none of ours."""
    name = chunk_name("tracks", stream_id, first)
    try:
        found = parse_metadata(files.read(name), is_part=False).metadata or {}
    except (FileNotFoundError, StoreError, OSError, pa.ArrowException):
        return
    if b"xmem.stream_id" not in found:
        raise StoreError(
            f"{files.uri(name)} is no tracks file of xmem, though it is named like one: move it out of the "
            "output folder"
        )
