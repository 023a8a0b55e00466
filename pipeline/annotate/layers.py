"""Tracked rows as the page shows them: rows of the current recipe, and outdated rows of earlier ones."""

from __future__ import annotations

import hashlib
import threading
from contextlib import suppress
from dataclasses import dataclass

from pipeline.annotate.project import project_folder
from pipeline.annotate.recipe import Recipe, edits_of, memory_values
from pipeline.annotate.strips import Strips, joined, strips_of_chunk, strips_of_rows
from pipeline.base.errors import StoreError, UsageError
from pipeline.base.records import MaskRecord
from pipeline.storage.files import Files
from pipeline.tracking.files.carry_over import stream_identity
from pipeline.tracking.settings import TrackSettings
from pipeline.tracks.layout import list_chunks
from pipeline.tracks.reader import TrackReader


class Layer:
    """The rows of one stream in one output folder: committed ones, and those of the chunk under way.

    Thread-safe: the tracking thread adds, requests read.

    Args:
        files: the output folder.
        stream_id: its stream.
        recipe: what its rows come from.
    """

    def __init__(self, files: Files, stream_id: str, recipe: Recipe) -> None:
        self.files, self.recipe = files, recipe
        self._stream_id = stream_id
        self._lock = threading.Lock()
        self._pending: dict[int, tuple[MaskRecord, ...]] = {}
        self._reader: TrackReader | None = None
        self._chunk_strips: dict[int, Strips] = {}
        self.committed = 0
        self.reload()

    def reload(self) -> None:
        """Look again at what is committed."""
        try:
            reader = TrackReader(self.files.root, self._stream_id)
        except (UsageError, StoreError):
            reader = None  # nothing is committed yet
        with self._lock:
            self._reader = reader
            self.committed = 0 if reader is None else reader.next_frame
            self._pending = {f: r for f, r in self._pending.items() if f >= self.committed}

    def add(self, frame_index: int, records: tuple[MaskRecord, ...]) -> None:
        """Add the rows of a frame that is not committed yet."""
        with self._lock:
            if frame_index >= self.committed:
                self._pending[frame_index] = records

    @property
    def available(self) -> int:
        """Number of frames, from 0 on, that have rows."""
        with self._lock:
            frame = self.committed
            while frame in self._pending:
                frame += 1
            return frame

    def at(self, frame_index: int) -> list[MaskRecord] | None:
        """The rows of a frame; None if it is not tracked."""
        with self._lock:
            if frame_index in self._pending:
                return list(self._pending[frame_index])
            if self._reader is None or frame_index >= self.committed:
                return None
            return self._reader.at(frame_index)

    def strips(self, first: int, stop: int) -> Strips:
        """Where the objects are seen on the frames `first` up to, not including, `stop`."""
        with self._lock:
            committed, pending = self.committed, dict(self._pending)
        firsts = list_chunks(self.files, self._stream_id)
        parts = []
        for start, following in zip(firsts, [*firsts[1:], committed], strict=False):
            if start < min(stop, committed) and following > first:
                with suppress(FileNotFoundError):  # the stream is being replaced just now
                    if start not in self._chunk_strips:  # a chunk never changes
                        self._chunk_strips[start] = strips_of_chunk(self.files, self._stream_id, start)
                    parts.append(self._chunk_strips[start])
        parts.append(strips_of_rows(pending))
        return joined(parts, first, stop)


@dataclass(frozen=True)
class Found:
    """The rows of a frame.

    Args:
        records: one per object.
        stale: whether they come from prompts that have changed at this frame or before.
    """

    records: list[MaskRecord]
    stale: bool


def valid_frames(layer: Layer, recipe: Recipe) -> int:
    """Number of frames, from 0 on, whose rows are those of the given recipe."""
    change = layer.recipe.first_change(recipe)
    return layer.available if change is None else min(layer.available, change)


def find_rows(layers: list[Layer], recipe: Recipe, frame_index: int) -> Found | None:
    """The rows of a frame: valid ones if there are any, else those of the newest layer that has some."""
    stale = None
    for layer in layers:
        records = layer.at(frame_index)
        if records is None:
            continue
        change = layer.recipe.first_change(recipe)
        if change is None or frame_index < change:
            return Found(records, stale=False)
        stale = stale or Found(records, stale=True)
    return stale


def find_strips(layers: list[Layer], recipe: Recipe) -> Strips:
    """The strips of the frames that are tracked: those of `find_rows`."""
    if not layers:
        return {}
    best = max(layers, key=lambda layer: valid_frames(layer, recipe))
    valid = valid_frames(best, recipe)
    parts = [best.strips(0, valid)]
    longest = next((layer for layer in layers if layer.available > valid), None)
    if longest is not None:
        parts.append(longest.strips(valid, longest.available))
    return joined(parts, 0, max(layer.available for layer in layers))


def work_folder(stream_id: str, recipe: Recipe, usual: TrackSettings) -> str:
    """The folder, in the output folder, in which a stream is tracked with the given recipe.

    Args:
        usual: settings with which the project was begun.
    """
    text = recipe.digest_text(usual)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=10).hexdigest()
    return f"{project_folder(stream_id)}/work/{digest}"


def read_layer(files: Files, stream_id: str) -> Layer | None:
    """The layer of an output folder; None if it holds no usable stream."""
    try:
        identity = stream_identity(files, stream_id)
        edits = edits_of(files, stream_id)
    except (StoreError, UsageError):
        return None
    if identity is None:
        return None
    settings = identity.settings
    recipe = Recipe(identity.prompts, edits, memory_values(settings.memory), settings.direction)
    return Layer(files, stream_id, recipe)
