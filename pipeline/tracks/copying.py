"""Copying of a stream's files between output folders, byte by byte, in the order that readers rely on."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.base.errors import AnotherWriterError, StoreError
from pipeline.storage.files import Files
from pipeline.tracks.chunk_file import check_chunk, events_bytes, tracks_bytes
from pipeline.tracks.edit_log import EditLog
from pipeline.tracks.layout import (
    chunk_footer,
    chunk_name,
    list_chunks,
    list_snapshots,
    record_name,
    snapshot_name,
)
from pipeline.tracks.store import RESTARTING


def copy_chunks(source: Files, target: Files, stream_id: str, before: int) -> tuple[int, int]:
    """Copy the committed chunks that end before frame `before`.

    Returns:
        the frame after the last copied one, and the number of their rows.

    Raises:
        StoreError: a file cannot be copied, or the target holds another one of its name.
    """
    next_frame = rows = 0
    for first in list_chunks(source, stream_id):
        footer = chunk_footer(source, stream_id, first)
        if first != next_frame or footer.last >= before:
            break
        for kind in ("events", "tracks"):
            name = chunk_name(kind, stream_id, first)
            data = source.read(name)
            if not target.create(name, data, stream_id) and target.read(name) != data:
                raise StoreError(f"{target.uri(name)} exists with other content")
        next_frame, rows = footer.last + 1, rows + footer.rows
    return next_frame, rows


def replace_stream(
    source: Files, target: Files, stream_id: str, snapshots: int = 2, *, chunk_frames: int | None = None
) -> int:
    """Make a stream of `target` equal to that of `source`.

    Chunks at the beginning that are the same stay. Then the others are removed from the last one on, and the
    new ones are created from the first one on. So readers see at any moment a part, from frame 0 on, of the
    old or of the new rows, never rows of both that differ. The record is written last; until then its state
    is "restarting": a writer that is at work on the stream stops, and the next one starts over.

    Args:
        snapshots: number of snapshots to copy, the newest ones.
        chunk_frames: chunks that were cut between two multiples of it are joined again: the files are those
            of a single pass.

    Returns:
        the number of chunks that were written.

    Raises:
        StoreError: a file cannot be read or written; calling it again completes it.
    """
    record = source.read(record_name(stream_id))
    cut, old = list_chunks(source, stream_id), list_chunks(target, stream_id)
    parts = [list(p) for _, p in groupby(cut, lambda first: first // chunk_frames if chunk_frames else first)]
    firsts = [part[0] for part in parts]
    same = 0
    while (
        same < min(len(firsts), len(old))
        and firsts[same] == old[same]
        and _holds(target, stream_id, old[same], _content(source, stream_id, parts[same]))
    ):
        same += 1
    changed = same < len(firsts) or same < len(old)
    if changed:
        state: dict[str, Any] = {**json.loads(record), "state": RESTARTING}
        target.replace(record_name(stream_id), json.dumps(state).encode(), stream_id)
    for first in reversed(old[same:]):
        for kind in ("tracks", "events"):
            target.remove(chunk_name(kind, stream_id, first))
    for first, part in zip(firsts[same:], parts[same:], strict=True):
        content = _content(source, stream_id, part)
        # As in `StreamStore.commit`: an events file without its tracks file is what a killed writer left.
        target.replace(chunk_name("events", stream_id, first), content["events"], stream_id)
        name = chunk_name("tracks", stream_id, first)
        if not target.create(name, content["tracks"], stream_id):
            raise AnotherWriterError(f"{target.uri(name)} exists: another run writes stream {stream_id}")
    _replace_edits(source, target, stream_id)
    wanted = list_snapshots(source, stream_id)[-snapshots:]
    for frame in list_snapshots(target, stream_id):
        if changed or frame not in wanted:
            target.remove(snapshot_name(stream_id, frame))
    for frame in wanted:
        name = snapshot_name(stream_id, frame)
        target.replace(name, source.read(name), stream_id)
    target.replace(record_name(stream_id), record, stream_id)
    return len(firsts) - same


def _replace_edits(source: Files, target: Files, stream_id: str) -> None:
    """Make the edits of the memory in `target` those of `source`."""
    wanted = {edit.name: source.read(edit.name) for edit in EditLog(source, stream_id).list()}
    for edit in EditLog(target, stream_id).list():
        if edit.name not in wanted:
            target.remove(edit.name)
    for name, data in wanted.items():
        target.replace(name, data, stream_id)


def _content(source: Files, stream_id: str, firsts: list[int]) -> dict[str, bytes]:
    """The tracks and events files of neighbouring chunks as one chunk."""
    if len(firsts) == 1:
        return {kind: source.read(chunk_name(kind, stream_id, firsts[0])) for kind in ("tracks", "events")}
    footers = [chunk_footer(source, stream_id, first) for first in firsts]
    rows = [
        pq.read_table(pa.BufferReader(source.read(chunk_name("tracks", stream_id, first))))
        for first in firsts
    ]
    first, last = firsts[0], footers[-1].last
    try:
        tracks, events = check_chunk(
            first, last, pa.concat_tables(rows), pa.concat_tables(footer.events for footer in footers)
        )
    except ValueError as error:
        raise StoreError(f"{source.root}: stream {stream_id}: {error}") from error
    return {
        "tracks": tracks_bytes(stream_id, first, last, tracks, events),
        "events": events_bytes(stream_id, first, last, events),
    }


def _holds(target: Files, stream_id: str, first: int, content: dict[str, bytes]) -> bool:
    try:
        return all(target.read(chunk_name(kind, stream_id, first)) == data for kind, data in content.items())
    except FileNotFoundError:
        return False
