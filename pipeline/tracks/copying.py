"""Copying of a stream's files between output folders, byte by byte, in the order that readers rely on."""

from __future__ import annotations

import json
from typing import Any

from pipeline.base.errors import AnotherWriterError, StoreError
from pipeline.storage.files import Files
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


def replace_stream(source: Files, target: Files, stream_id: str, snapshots: int = 2) -> int:
    """Make a stream of `target` equal to that of `source`.

    Chunks at the beginning that are the same stay. Then the others are removed from the last one on, and the
    new ones are created from the first one on. So readers see at any moment a part, from frame 0 on, of the
    old or of the new rows, never rows of both that differ. The record is written last; until then its state
    is "restarting": a writer that is at work on the stream stops, and the next one starts over.

    Args:
        snapshots: number of snapshots to copy, the newest ones.

    Returns:
        the number of chunks that were written.

    Raises:
        StoreError: a file cannot be read or written; calling it again completes it.
    """
    record = source.read(record_name(stream_id))
    firsts, old = list_chunks(source, stream_id), list_chunks(target, stream_id)
    same = 0
    while same < min(len(firsts), len(old)) and _equal(source, target, stream_id, firsts[same], old[same]):
        same += 1
    changed = same < len(firsts) or same < len(old)
    if changed:
        state: dict[str, Any] = {**json.loads(record), "state": RESTARTING}
        target.replace(record_name(stream_id), json.dumps(state).encode(), stream_id)
    for first in reversed(old[same:]):
        for kind in ("tracks", "events"):
            target.remove(chunk_name(kind, stream_id, first))
    for first in firsts[same:]:
        # As in `StreamStore.commit`: an events file without its tracks file is what a killed writer left.
        name = chunk_name("events", stream_id, first)
        target.replace(name, source.read(name), stream_id)
        name = chunk_name("tracks", stream_id, first)
        if not target.create(name, source.read(name), stream_id):
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


def _equal(source: Files, target: Files, stream_id: str, first: int, other: int) -> bool:
    if first != other:
        return False
    names = [chunk_name(kind, stream_id, first) for kind in ("tracks", "events")]
    try:
        return all(source.read(name) == target.read(name) for name in names)
    except FileNotFoundError:
        return False
