"""Reads committed mask records frame by frame, one chunk file at a time."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.base.errors import StoreError, UsageError
from pipeline.base.records import MaskRecord
from pipeline.base.stream_ids import generate_stream_id, validate_stream_id
from pipeline.storage.files import Files
from pipeline.storage.opening import open_files
from pipeline.tracks.layout import MEND, chunk_footer, chunk_name, list_chunks, load_record

_CHUNKS_KEPT = 2
_IDS_NAMED = 5


class TrackReader:
    """The mask records of one stream, as committed when it was opened.

    Keeps the rows of at most two chunks in memory, so that videos of any length can be read.

    Args:
        root: the output folder.
        stream_id: id of a stream in it; UsageError if it does not exist.

    Raises:
        StoreError: a file is missing, damaged or foreign; of those behind the first one, when it is needed.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        stream_id: str,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.stream_id = validate_stream_id(stream_id)
        self._files = open_files(root, storage_options)
        self._firsts = list_chunks(self._files, stream_id)
        self._kept: OrderedDict[int, dict[int, list[MaskRecord]]] = OrderedDict()
        if not self._firsts:
            raise UsageError(self._absent())
        if self._firsts[0] != 0:
            raise self._missing(0)
        self.next_frame = chunk_footer(self._files, stream_id, self._firsts[-1]).last + 1

    def at(self, frame_index: int) -> list[MaskRecord]:
        """The records of one frame, sorted by object_id, including objects that are not visible."""
        position = bisect_right(self._firsts, frame_index) - 1
        if position < 0 or frame_index >= self.next_frame:
            return []
        return self._chunk(self._firsts[position]).get(frame_index, [])

    def frames(
        self, first: int | None = None, last: int | None = None
    ) -> Iterator[tuple[int, list[MaskRecord]]]:
        """(frame_index, records) of the frames `first`..`last` that have records, ascending."""
        low, high = first or 0, self.next_frame - 1 if last is None else last
        for i, start in enumerate(self._firsts):
            end = self._firsts[i + 1] if i + 1 < len(self._firsts) else self.next_frame
            if start <= high and low < end:
                yield from ((f, r) for f, r in self._chunk(start).items() if low <= f <= high)

    def recorded_size(self) -> tuple[int, int] | None:
        """Width and height in pixels of the video, as the stream's record has them; None: it has none."""
        record = load_record(self._files, self.stream_id) or {}
        width, height = record.get("width"), record.get("height")
        return (width, height) if isinstance(width, int) and isinstance(height, int) else None

    def _chunk(self, first: int) -> dict[int, list[MaskRecord]]:
        if first in self._kept:
            self._kept.move_to_end(first)
            return self._kept[first]
        name = chunk_name("tracks", self.stream_id, first)
        try:
            data = self._files.read(name)
            table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        except FileNotFoundError:
            raise StoreError(f"{self._files.uri(name)} has vanished: is another run starting over?") from None
        except (pa.ArrowException, OSError) as error:
            raise StoreError(f"{self._files.uri(name)} is damaged: {MEND}") from error
        self._check_next(first, table)
        self._kept[first] = rows = _records(table)
        while len(self._kept) > _CHUNKS_KEPT:
            self._kept.popitem(last=False)
        return rows

    def _check_next(self, first: int, table: pa.Table) -> None:
        """StoreError if a chunk is no chunk of ours, or if the one behind it is missing."""
        try:
            end = int((table.schema.metadata or {})[b"xmem.last"]) + 1
        except (KeyError, ValueError):
            name = chunk_name("tracks", self.stream_id, first)
            raise StoreError(
                f"{self._files.uri(name)} is no tracks file of xmem, though it is named like one: move it "
                "out of the output folder"
            ) from None
        position = bisect_right(self._firsts, first)
        if position < len(self._firsts) and self._firsts[position] != end:
            raise self._missing(end)

    def _missing(self, first: int) -> StoreError:
        uri = self._files.uri(chunk_name("tracks", self.stream_id, first))
        return StoreError(f"{uri} is missing, though files of later frames exist: {MEND}")

    def _absent(self) -> str:
        ids = stream_ids(self._files)
        there = f"it has {_some(ids)}" if ids else "it has no tracks"
        return f"no tracks of stream {self.stream_id!r} in {self._files.root}: {there}"


def open_tracks(
    video: str,
    root: str | os.PathLike[str],
    stream_id: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    *,
    option: str = "--stream-id",
) -> TrackReader:
    """The tracks of a video in an output folder.

    The stream is `stream_id` if given, else the one with the id that `track` gives this video, else the only
    stream of the folder: the video may have been moved since.

    Args:
        option: how the stream is chosen, for the message.

    Raises:
        UsageError: there are no tracks, or the choice is ambiguous.
    """
    if stream_id is not None:
        return TrackReader(root, stream_id, storage_options)
    files = open_files(root, storage_options)
    own = generate_stream_id(video)
    if not list_chunks(files, own):
        tracked = stream_ids(files)
        if len(tracked) != 1:
            if not tracked:
                raise UsageError(f"{files.root} is no output folder of xmem: nothing in it under tracks/")
            raise UsageError(
                f"no tracks of {video} in {files.root}; it has tracks of {_some(tracked)}: choose one with "
                f"{option}"
            )
        own = tracked[0]
    return TrackReader(root, own, storage_options)


def stream_ids(files: Files) -> list[str]:
    """The streams that have tracks, sorted."""
    names = {name.split("/")[1] for name in files.names("tracks", recursive=True)}
    return sorted(name.removeprefix("stream_id=") for name in names)


def chosen_stream(
    root: str | os.PathLike[str],
    stream_id: str | None,
    storage_options: Mapping[str, Any] | None = None,
    *,
    option: str = "--stream-id",
) -> str:
    """The stream that is asked for; by default the only one of the folder. UsageError if there is none.

    Args:
        option: how the stream is chosen, for the message.
    """
    files = open_files(root, storage_options)
    ids = stream_ids(files)
    if not ids:
        raise UsageError(f"{files.root} is no output folder of xmem: nothing in it under tracks/")
    if stream_id is None:
        if len(ids) > 1:
            raise UsageError(f"{files.root} has {len(ids)} streams: choose one with {option}: {_some(ids)}")
        return ids[0]
    if stream_id not in ids:
        raise UsageError(f"no tracks of stream {stream_id!r} in {files.root}: it has {_some(ids)}")
    return stream_id


def records_by_frame(
    root: str | os.PathLike[str],
    stream_id: str,
    first: int | None = None,
    last: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> dict[int, list[MaskRecord]]:
    """All records of frames `first`..`last` at once; for long videos, walk a `TrackReader` instead."""
    return dict(TrackReader(root, stream_id, storage_options).frames(first, last))


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_IDS_NAMED]) + (", ..." if len(ids) > _IDS_NAMED else "")


def _records(table: pa.Table) -> dict[int, list[MaskRecord]]:
    rows: dict[int, list[MaskRecord]] = {}
    for row in table.to_pylist():
        box = tuple(row.pop(f"bbox_{n}") for n in "xywh")
        centroid = tuple(row.pop(f"centroid_{n}") for n in "xy")
        record = MaskRecord(
            **row,
            bbox=None if None in box else box,
            centroid=None if None in centroid else centroid,
        )
        rows.setdefault(record.frame_index, []).append(record)
    return rows
