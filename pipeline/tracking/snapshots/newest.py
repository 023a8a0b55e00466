"""The newest state of a stream in an output folder, of files and cameras, without its model or video."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from pipeline.base.errors import UsageError
from pipeline.tracking.snapshots.live import LiveSnapshot
from pipeline.tracking.snapshots.memory_edit import MemoryEdit, planned_edits
from pipeline.tracking.snapshots.stream import Snapshot
from pipeline.tracks.store import StreamStore
from xmem_core.state import TrackerState


@dataclass(frozen=True)
class RememberedState:
    """The newest usable snapshot of a stream.

    Args:
        committed: number of committed frames.
        live: whether the stream is a camera's.
        state: its state, with the edits that can be made in it.
        edits: those that take effect before the first frame without rows.
    """

    committed: int
    snapshot: Snapshot
    live: bool
    state: TrackerState
    edits: tuple[MemoryEdit, ...]


def remembered_state(store: StreamStore) -> RememberedState:
    """The state in the newest usable snapshot of a stream, with the edits made since.

    Raises:
        UsageError: the stream has no snapshot. StoreError: the folder cannot be read.
    """
    committed = store.committed(newest_only=True).next_frame
    found = store.load_snapshot(committed, _restored)
    if found is None:
        raise UsageError(
            f"stream {store.stream_id!r} in {store.root} has no usable snapshot: a run saves one every "
            "--snapshot-chunks commits and at its end (--keep-state)"
        )
    _, (snapshot, live, state) = found
    edits = [] if live else planned_edits(store, snapshot.next_frame, committed)
    for planned in edits:
        with suppress(ValueError):  # made when its frame comes, or reported then
            planned.edit.apply(state, snapshot.next_frame - 1, store.object_copies)
    waiting = tuple(planned.edit for planned in edits if planned.frame >= committed)
    return RememberedState(committed, snapshot, live, state, waiting)


def _restored(blob: bytes) -> tuple[Snapshot, bool, TrackerState]:
    """A snapshot of either kind, whether it is of a live stream, and its state. ValueError for others."""
    try:
        snapshot, live = Snapshot.from_bytes(blob), False
    except ValueError:
        snapshot, live = LiveSnapshot.from_bytes(blob).stream, True
    return snapshot, live, TrackerState.from_bytes(snapshot.tracker)
