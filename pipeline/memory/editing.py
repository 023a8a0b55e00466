"""Edits what a stream in an output folder remembers: the edit is durable, and made once by the next run."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from pipeline.base.errors import StoreError, UsageError
from pipeline.storage.opening import open_files
from pipeline.tracking.snapshots.memory_edit import MemoryEdit
from pipeline.tracking.snapshots.newest import remembered_state
from pipeline.tracking.snapshots.object_states import read_object
from pipeline.tracking.stream_record import FINISHED
from pipeline.tracks.lease import holder
from pipeline.tracks.reader import chosen_stream
from pipeline.tracks.store import StreamStore

_ATTEMPTS = 5


def edit_memory(
    out: str | os.PathLike[str],
    edit: Mapping[str, Any],
    stream_id: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> int | None:
    """Edit what a stream remembers. Durable when it returns.

    The next run of the same command goes on from the edited memory; rows that are committed stay. It reports
    the edit as an event `memory_edited` at the frame before which it takes effect.

    Args:
        out: output folder of tracking.
        edit: one of {"forget": [first, last]}, {"forget": [first, last], "object": id}, {"pin": frame},
            {"unpin": frame} and {"copy": {"object": id, "stream": id, "out": folder}, "object": id,
            "category": text}. Frames are those of the video, inclusive. A pinned frame stays in memory as a
            whole instead of being consolidated. With an object, only that object forgets. A copy starts an
            object from what another stream remembers of it, of the same folder by default; it gets the id
            "object", by default its own, and is sought from the next frame on.
        stream_id: its stream; may be left out if there is one only.

    Returns:
        the frame before which the edit takes effect; None if it changes nothing, then nothing is stored.

    Raises:
        UsageError: there is no such stream, it has no snapshot, is live, has reached the end of its video or
            is being tracked, or the edit cannot be made. StoreError: the folder cannot be read or written.
    """
    wanted = MemoryEdit.from_json(edit)
    files = open_files(out, storage_options)
    store = StreamStore(out, chosen_stream(out, stream_id, storage_options), storage_options)
    where = f"stream {store.stream_id!r} in {store.root}"
    for _ in range(_ATTEMPTS):
        owner = holder(files, store.stream_id)
        if owner is not None:
            raise UsageError(
                f"{where} is being tracked by batch {owner.batch_id} on {owner.host} (process {owner.pid}): "
                "edit its memory when the batch has ended, or stop it"
            )
        found = remembered_state(store)
        if found.live:
            raise UsageError(f"{where} is a live stream: edit its memory through its server")
        record = store.read_record() or {}
        if _at_its_end(record, found.committed):
            raise UsageError(
                f"{where} is tracked to the end of its video: no frame follows that an edit could change"
            )
        before = found.state.to_bytes()
        blob = b""
        try:
            if wanted.source is not None:
                chosen = wanted.object_id or wanted.source.object_id
                if (wanted.source, chosen) in [(edit.source, edit.object_id) for edit in found.edits]:
                    return None
                copy, category = read_object(
                    wanted.source, store, found.state.model_fingerprint, found.state.room_for_copies
                )
                blob = copy.to_bytes()
                wanted = wanted.with_copy(store.object_copies.key(blob), category, chosen)
                found.state.adopt(chosen, copy)
            else:
                wanted.apply(found.state, found.snapshot.next_frame - 1, store.object_copies)
        except ValueError as error:
            raise UsageError(f"{where}: {error}") from error
        if found.state.to_bytes() == before:
            return None
        at = found.committed
        number = sum(logged.frame == at for logged in store.edit_log.list())
        content = {
            "id": secrets.token_hex(8),
            "asked": datetime.now(UTC).isoformat(timespec="seconds"),
            "edit": wanted.to_json(),
        }
        if blob:
            store.object_copies.add(blob)
        logged = store.edit_log.add(at, number, content)
        if logged is None:
            continue  # another edit came first, and this one may no longer be possible
        if store.committed(newest_only=True).next_frame == at:
            return at
        # A run that does not know of the edit has committed its frame, see `pipeline.tracks.edit_log`.
        store.edit_log.remove(logged)
        raise UsageError(
            f"{where} is being tracked just now: stop that run, or wait for its end, and edit then"
        )
    raise StoreError(f"{where}: other edits came first {_ATTEMPTS} times: run again")


def _at_its_end(record: Mapping[str, Any], committed: int) -> bool:
    """Whether the record says that a file's stream ended with its video, not at a limit of frames."""
    if record.get("state") != FINISHED or record.get("frames") != committed:
        return False
    limit = (record.get("settings") or {}).get("max_frames")
    return limit is None or committed < limit
