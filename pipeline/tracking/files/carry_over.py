"""Reuse of rows and states before the first changed prompt when a stream is tracked again."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

from pipeline.base.errors import StoreError
from pipeline.prompts.files import PromptSet
from pipeline.storage.files import Files
from pipeline.tracking.files.backward import first_changed_frame
from pipeline.tracking.settings import TrackSettings
from pipeline.tracking.snapshots.stream import Snapshot
from pipeline.tracking.stream_record import RUNNING, StreamIdentity, checked, prompts_of
from pipeline.tracks.copying import copy_chunks
from pipeline.tracks.layout import list_snapshots, load_record, record_name, snapshot_name

logger = logging.getLogger(__name__)


def stream_identity(files: Files, stream_id: str) -> StreamIdentity | None:
    """The identity that a stream's record holds; None without a record. StoreError if it is damaged."""
    record = load_record(files, stream_id)
    if record is None:
        return None
    record = checked(record, files.root)
    settings = TrackSettings.from_dict(record["settings"])
    source, fingerprint = str(record.get("source")), str(record.get("source_fingerprint"))
    return StreamIdentity(source, fingerprint, settings, prompts_of(record, files.root))


def carry_over(
    source: Files, target: Files, stream_id: str, prompts: PromptSet, changed: int | None = None
) -> int:
    """Begin a stream in `target` with what `source` has of it before the first frame whose prompts differ.

    Tracking with the new prompts then goes on from there, and the rows are those of a run from frame 0 with
    the new prompts: a chunk depends on no prompt after it, and a state on no prompt of its frame or later.
    The same is true of edits of the memory; these are not carried over, the caller writes the new ones.

    Args:
        source: output folder that holds the stream with other prompts.
        target: output folder that does not hold it yet.
        changed: first frame with other edits of the memory; None: they are the same.

    Returns:
        the number of frames whose rows were carried over.

    Raises:
        StoreError: one of the folders cannot be read or written.
    """
    old = stream_identity(source, stream_id)
    record = load_record(source, stream_id)
    if old is None or record is None:
        raise StoreError(f"{source.root} holds no stream {stream_id}")
    change = first_changed_frame(old.prompts, prompts, old.settings.direction)
    before = min(frame for frame in (change, changed, 2**62) if frame is not None)
    new = replace(old, prompts=prompts)
    resolved = record.get("resolved_prompts")
    resolved = resolved if isinstance(resolved, dict) else {}
    begun = {
        **record,
        "state": RUNNING,
        "prompts": prompts.to_record(),
        "resolved_prompts": {f: masks for f, masks in resolved.items() if int(f) < before},
        "frames": 0,
        "rows": 0,
        "losses": 0,
    }
    begun.pop("cause", None)
    target.replace(record_name(stream_id), (json.dumps(begun, indent=2) + "\n").encode(), stream_id)
    next_frame, _ = copy_chunks(source, target, stream_id, before)
    runs = old.digests(record)
    for frame in list_snapshots(source, stream_id):
        if frame > min(before, next_frame):
            break
        try:
            snapshot = Snapshot.from_bytes(source.read(snapshot_name(stream_id, frame)))
        except (ValueError, FileNotFoundError) as error:
            logger.info("stream %s: snapshot of frame %d is left out: %s", stream_id, frame, error)
            continue
        if snapshot.run in runs:
            data = replace(snapshot, run=new.digest()).to_bytes()
            target.replace(snapshot_name(stream_id, frame), data, stream_id)
    return next_frame
