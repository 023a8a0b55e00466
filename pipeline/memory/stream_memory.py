"""Lists what a stream's newest snapshot remembers: of files and cameras, without the model or the video."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import cv2

from pipeline.base.errors import StoreError, UsageError
from pipeline.base.picture_size import MAX_PIXELS
from pipeline.draw.frames import frames_with_tracks, records_of
from pipeline.draw.output_file import finished_file
from pipeline.draw.overlay import overlay
from pipeline.draw.pictures import THUMBNAIL_SIDE, within
from pipeline.storage.opening import open_files
from pipeline.tracking.snapshots.newest import remembered_state
from pipeline.tracks.layout import load_record
from pipeline.tracks.reader import TrackReader, chosen_stream
from pipeline.tracks.store import StreamStore
from pipeline.video.sources import open_source
from xmem_core.contents import Kind, MemoryEntry, contents
from xmem_core.state import TrackerState


@dataclass(frozen=True)
class RememberedFrame:
    """One frame in one region of the memory, see `xmem_core.contents.MemoryEntry`.

    Args:
        frame_index: None on live streams, which do not track every frame that they number, and of elements
            that were copied from another stream.
        age: tracked frames since then; 0: the last frame of the snapshot. None of copied elements.
        kind: working, permanent, long_term or copied.
        elements: number of elements that are remembered of it.
        objects: ids of the objects that may read them.
        given: ids of the objects that were prompted on the frame.
        pinned: whether the frame is kept as a whole, see `xmem_core.TrackerState.pin`.
        use: mean use of the elements in a frame that read them.
    """

    frame_index: int | None
    age: int | None
    kind: Kind
    elements: int
    objects: tuple[int, ...]
    given: tuple[int, ...]
    pinned: bool
    use: float


@dataclass(frozen=True)
class StreamMemory:
    """The memory of a stream in its newest usable snapshot.

    Args:
        stream_id: id of the stream.
        next_frame: the snapshot is of the frames before this one.
        live: whether it is a camera's.
        objects: category by id of the living objects.
        frames: what is remembered, the oldest first, after the edits.
        edits: edits that the next run makes before its first new frame, as `edit_memory` takes them.
    """

    stream_id: str
    next_frame: int
    live: bool
    objects: Mapping[int, str | None]
    frames: tuple[RememberedFrame, ...]
    edits: tuple[Mapping[str, Any], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self) | {"objects": [{"id": i, "category": c} for i, c in self.objects.items()]}


def stream_memory(
    out: str | os.PathLike[str],
    stream_id: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> StreamMemory:
    """What a stream remembers, from its newest usable snapshot.

    Args:
        out: output folder of tracking.
        stream_id: its stream; may be left out if there is one only.

    Raises:
        UsageError: there is no such stream, or it has no snapshot. StoreError: the folder cannot be read.
    """
    store = StreamStore(out, chosen_stream(out, stream_id, storage_options), storage_options)
    found = remembered_state(store)
    snapshot, state = found.snapshot, found.state
    last = snapshot.next_frame - 1
    categories = dict(snapshot.categories)
    categories.update({e.object_id: e.category for e in found.edits if e.source and e.object_id is not None})
    frames = []
    for entry in contents(state.memory):
        age = _age(entry, state)
        index = None if found.live or age is None else last - age
        facts = (entry.kind, entry.elements, entry.objects, entry.given, entry.pinned, round(entry.use, 6))
        frames.append(RememberedFrame(index, age, *facts))
    objects = {i: categories.get(i) for i in state.object_ids}
    edits = tuple(edit.to_json() for edit in found.edits)
    return StreamMemory(store.stream_id, snapshot.next_frame, found.live, objects, tuple(frames), edits)


def memory_listing(state: TrackerState, objects: Mapping[int, str | None], frame: int) -> dict[str, Any]:
    """What a state remembers after frame `frame`, as JSON-ready values.

    Frames have their `time`, which edits of a live stream name: the number of frames tracked since the first
    prompt.
    """
    frames = [
        asdict(entry) | {"age": _age(entry, state), "use": round(entry.use, 6)}
        for entry in contents(state.memory)
    ]
    return {
        "frame_index": frame,
        "time": state.time,
        "objects": [{"id": i, "category": c} for i, c in objects.items()],
        "frames": frames,
    }


def write_thumbnails(
    memory: StreamMemory,
    out: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    video: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    out_storage_options: Mapping[str, Any] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[str]:
    """Write a PNG of each remembered frame with its committed masks, and return their URIs.

    Args:
        folder: where `frame-<index>.png` are written.
        video: the tracked video; default: the source in the stream's record.
        storage_options, out_storage_options: for the file systems of the video and of `out`.

    Raises:
        UsageError: the stream is live, or it is another video. SourceError: the video cannot be read.
    """
    if memory.live:
        raise UsageError(f"{memory.stream_id!r} is a live stream, whose frames are not kept: no thumbnails")
    if video is None:
        video = (load_record(open_files(out, out_storage_options), memory.stream_id) or {}).get("source")
        if not isinstance(video, str):
            raise StoreError(f"the record of stream {memory.stream_id!r} names no video: give it (--video)")
    wanted = sorted({frame.frame_index for frame in memory.frames if frame.frame_index is not None})
    tracks = TrackReader(out, memory.stream_id, out_storage_options).at
    written: list[str] = []
    if not wanted:
        return written
    with open_source(video, storage_options=storage_options, max_pixels=max_pixels) as source:
        for frame in frames_with_tracks(source, tracks, wanted[0], wanted[-1]):
            if frame.frame_index not in wanted:
                continue
            image = overlay(frame.image, records_of(tracks, frame))
            small = within(image, THUMBNAIL_SIDE)
            _, data = cv2.imencode(".png", cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
            uri = f"{os.fspath(folder).rstrip('/')}/frame-{frame.frame_index:012d}.png"
            with finished_file(uri, storage_options) as path:
                path.write_bytes(data.tobytes())
            written.append(uri)
    if len(written) < len(wanted):
        raise UsageError(f"{video} has fewer frames than are remembered: give the tracked video")
    return written


def _age(entry: MemoryEntry, state: TrackerState) -> int | None:
    return None if entry.kind == "copied" else state.time - entry.time
