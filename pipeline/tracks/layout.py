"""Layout of the output folder, and raw access to its files.

OUT/tracks/stream_id=<id>/frames-<first:012d>.parquet
OUT/events/stream_id=<id>/frames-<first:012d>.parquet
OUT/state/<id>/<next_frame:012d>.safetensors
OUT/streams/<id>.json
OUT/edits/<id>/<frame:012d>-<number:06d>.json          edits of the memory, see `pipeline.tracks.edit_log`
OUT/backward/<id>/<digest>/...                         rows of a backward pass, until they are merged
OUT/compacted/...                                      copies of rows, see `pipeline.tracks.copies`
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pipeline.base.errors import StoreError
from pipeline.base.stream_ids import is_stream_id
from pipeline.storage.files import Files
from pipeline.tracks.chunk_file import ChunkFooter, read_footer

RECORD_VERSION = 1
MEND = "restore it from a copy, or start this stream over with --restart"
_SNAPSHOT = re.compile(r"(\d{12,18})\.safetensors")
_CHUNK = re.compile(r"frames-(\d{12,18})\.parquet")


def chunk_folder(kind: str, stream_id: str) -> str:
    """The folder of a stream's files; `kind` is "tracks" or "events"."""
    return f"{kind}/stream_id={stream_id}"


def chunk_name(kind: str, stream_id: str, first: int) -> str:
    """The name of the file of the chunk that begins at frame `first`."""
    return f"{chunk_folder(kind, stream_id)}/frames-{first:012d}.parquet"


def chunk_first(name: str) -> int | None:
    """The first frame in a chunk's file name; None if it is not the name of a chunk."""
    match = _CHUNK.fullmatch(name.rpartition("/")[2])
    return int(match[1]) if match else None


def chunk_sizes(sizes: Mapping[str, int]) -> dict[str, dict[int, int]]:
    """Bytes of chunk files by stream and first frame, from what `Files.sizes` lists; without other files."""
    found: dict[str, dict[int, int]] = {}
    folder, chunks = "", None
    for name, size in sizes.items():
        above, _, leaf = name.rpartition("/")
        if above != folder:  # names of a folder mostly follow each other
            folder, chunks = above, None
            _, _, partition = above.partition("/")
            stream_id = partition.removeprefix("stream_id=")
            if stream_id != partition and is_stream_id(stream_id):
                chunks = found.setdefault(stream_id, {})
        match = _CHUNK.fullmatch(leaf)
        if chunks is not None and match is not None:
            chunks[int(match[1])] = size
    return {stream_id: of_stream for stream_id, of_stream in found.items() if of_stream}


def list_chunks(files: Files, stream_id: str, kind: str = "tracks") -> list[int]:
    """First frames of a stream's files, ascending."""
    firsts = [chunk_first(name) for name in files.names(chunk_folder(kind, stream_id))]
    return sorted(first for first in firsts if first is not None)


def chunk_footer(files: Files, stream_id: str, first: int) -> ChunkFooter:
    """The footer of a tracks file; StoreError if it is damaged or does not match the file name."""
    name = chunk_name("tracks", stream_id, first)
    uri = files.uri(name)
    try:
        footer = read_footer(lambda count: files.tail(name, count), uri)
    except FileNotFoundError:
        raise StoreError(f"{uri} has vanished while it was read: is another run restarting it?") from None
    except ValueError as error:
        raise StoreError(
            f"{uri} is damaged ({error}): restore it from a copy, or delete it and all later files beside "
            f"it to track those frames again"
        ) from error
    if (footer.stream_id, footer.first) != (stream_id, first) or footer.last < first:
        raise StoreError(
            f"{uri} holds frames {footer.first}..{footer.last} of stream {footer.stream_id!r}, not what its "
            f"name says: {MEND}"
        )
    return footer


def snapshot_name(stream_id: str, next_frame: int) -> str:
    """The name of the snapshot of a stream's state before frame `next_frame`."""
    return f"state/{stream_id}/{next_frame:012d}.safetensors"


def list_snapshots(files: Files, stream_id: str) -> list[int]:
    """The frames before which a stream has a snapshot, ascending."""
    names = files.names(f"state/{stream_id}")
    return sorted(int(m[1]) for name in names if (m := _SNAPSHOT.fullmatch(name.rpartition("/")[2])))


def backward_folder(stream_id: str) -> str:
    """The folder of a stream's backward passes, each an output folder of its own; readers do not see it."""
    return f"backward/{stream_id}"


def remove_folder(files: Files, folder: str) -> None:
    """Remove the files below a folder, and the folders that are empty then."""
    for name in reversed(files.names(folder, recursive=True)):
        files.remove(name)
    _remove_empty(files, folder)


def _remove_empty(files: Files, folder: str) -> None:
    for inner in files.folders(folder):
        _remove_empty(files, f"{folder}/{inner}")
    files.remove_empty_folder(folder)


def record_name(stream_id: str) -> str:
    """The name of a stream's record."""
    return f"streams/{stream_id}.json"


def load_record(files: Files, stream_id: str) -> dict[str, Any] | None:
    """A stream's record, None if there is none; StoreError if it is damaged, foreign or of a newer format."""
    name = record_name(stream_id)
    try:
        data = files.read(name)
    except FileNotFoundError:
        return None
    advice = f"{MEND} (the rows in tracks/ can still be queried)"
    try:
        record = json.loads(data)
    except ValueError as error:
        raise StoreError(f"stream record {files.uri(name)} is damaged: {advice}") from error
    if not isinstance(record, dict) or not isinstance(record.get("format_version"), int):
        raise StoreError(f"stream record {files.uri(name)} has no format_version: {advice}")
    if record["format_version"] > RECORD_VERSION:
        raise StoreError(
            f"stream record {files.uri(name)} has format version {record['format_version']}, and this xmem "
            f"reads up to {RECORD_VERSION}: upgrade it"
        )
    if record.get("stream_id") != stream_id:
        raise StoreError(
            f"stream record {files.uri(name)} is that of stream {record.get('stream_id')!r}: {advice}"
        )
    return record
