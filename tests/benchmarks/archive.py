"""A made-up archive: an output folder with the files that the store writes, of any size.

Masks are noisy ellipses of 20 to 120 pixels in height on a 1280x720 picture; area, box and centroid are those
of the mask, and no two masks of a file are equal. One row in 20 is out of sight (`area = 0`), one frame in 8
has no object. The bytes are those of `pipeline.tracks.chunk_file`, as `StreamStore` commits them, but
written without a sync for each file. Run again after it was stopped, it goes on behind the last whole stream.

With `--originals N`, only the first N streams (and the long one) are made up; others have their bytes, but
for the stream id in the metadata (not in the copy of it that pyarrow keeps as ARROW:schema, which nobody here
reads): 100 million rows in minutes.

    PYTHONPATH=.:tests python tests/benchmarks/archive.py FOLDER [--streams 200] [--files 10] [--rows 1000]
        [--long-files 0] [--originals N]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.base.records import EVENTS_SCHEMA, TRACKS_SCHEMA, Frame, tracks_table
from pipeline.tracks.chunk_file import events_bytes, tracks_bytes
from pipeline.tracks.layout import chunk_name, record_name
from pipeline.tracks.masks import records_from_label_map

WIDTH, HEIGHT, RATE = 1280, 720, 25.0
CATEGORIES = ("person", "car", "bicycle", "dog")
OBJECTS = 4
"""Rows per frame that has objects."""
LONG = "long-cam00"
"""A stream of many files, which a camera leaves that commits often."""
_START = datetime(2024, 5, 6, tzinfo=UTC).timestamp() * 1e6
_MASKS = 6000
_HIDDEN = 20
_EMPTY = 8


@dataclass(frozen=True)
class Archive:
    """How large an archive is.

    Args:
        streams: streams, all of the same length.
        files: tracks files of a stream; there are as many events files.
        rows: rows of a file, about.
        long_files: tracks files of one more stream, `LONG`, with a tenth of the rows each; 0: there is none.
    """

    streams: int = 200
    files: int = 10
    rows: int = 1000
    long_files: int = 0

    @property
    def frames(self) -> int:
        """Frames of a file."""
        return _frames(self.rows)

    @property
    def long_frames(self) -> int:
        """Frames of a file of `LONG`."""
        return _frames(self.rows // 10)

    @property
    def all_files(self) -> int:
        """Tracks files of all streams."""
        return self.streams * self.files + self.long_files

    def stream_id(self, number: int) -> str:
        """The id of a stream: sites of 20 streams."""
        return f"site{number // 20:03d}-cam{number % 20:02d}"


class Clones:
    """Puts the files of some streams, and the same again for others.

    Args:
        put: takes a file's name below the output folder, and its bytes.
        originals: how many streams `write` makes up, at least 1.
    """

    def __init__(self, put: Callable[[str, bytes], object], originals: int) -> None:
        self._put = put
        self._originals = originals

    def write(self, archive: Archive, there: Callable[[str], bool]) -> int:
        """Writes what is missing of an archive; returns the rows written."""
        total = 0
        files: dict[str, bytes] = {}
        writer = Writer(files.__setitem__)
        for number in range(min(self._originals, archive.streams)):
            own = archive.stream_id(number)
            files.clear()
            rows = writer.stream(own, archive.files, archive.frames)
            for other in range(number, archive.streams, self._originals):
                stream_id = archive.stream_id(other)
                if there(record_name(stream_id)):
                    continue
                for name, data in files.items():
                    self._put(name.replace(own, stream_id), _renamed(data, own, stream_id))
                total += rows
        if archive.long_files:
            total += Writer(self._put, there=there).stream(LONG, archive.long_files, archive.long_frames)
        return total


def _renamed(data: bytes, old: str, new: str) -> bytes:
    """The bytes of a stream's file as those of another stream's."""
    if len(old) != len(new):
        raise ValueError(f"{old} and {new} are of different lengths")
    if data.startswith(b"{"):
        return data.replace(old.encode(), new.encode()).replace(old[:7].encode(), new[:7].encode())
    value = b"xmem.stream_id\x18" + bytes([len(old)])
    return data.replace(value + old.encode(), value + new.encode())


class Writer:
    """Writes archives; equal arguments give equal bytes.

    Args:
        put: takes a file's name below the output folder, and its bytes.
        there: whether a file exists; streams whose record does are left out.
    """

    def __init__(
        self,
        put: Callable[[str, bytes], object],
        seed: int = 0,
        there: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._put = put
        self._there = there
        self._seed = seed
        self._bank = _bank(np.random.default_rng(seed))

    def write(self, archive: Archive) -> int:
        """Writes what is missing of an archive; returns the rows written."""
        total = 0
        for number in range(archive.streams):
            total += self.stream(archive.stream_id(number), archive.files, archive.frames)
        if archive.long_files:
            total += self.stream(LONG, archive.long_files, archive.long_frames)
        return total

    def stream(self, stream_id: str, files: int, frames: int) -> int:
        """Writes one stream of `files` files of `frames` frames; returns its rows."""
        if self._there(record_name(stream_id)):
            return 0
        self._random = np.random.default_rng([self._seed, *stream_id.encode()])
        total = 0
        for index in range(files):
            first, last = index * frames, (index + 1) * frames - 1
            tracks, events = self._tracks(first, last), self._events(first)
            self._put(chunk_name("events", stream_id, first), events_bytes(stream_id, first, last, events))
            self._put(
                chunk_name("tracks", stream_id, first), tracks_bytes(stream_id, first, last, tracks, events)
            )
            total += tracks.num_rows
        record = {"format_version": 1, "stream_id": stream_id, "state": "finished", "model": "xmem-lite"}
        record |= {"source": f"file:///{stream_id}.mp4", "width": WIDTH, "height": HEIGHT, "rate": RATE}
        record["extra"] = {"site": stream_id.partition("-")[0]}
        self._put(record_name(stream_id), json.dumps(record).encode())
        return total

    def _tracks(self, first: int, last: int) -> pa.Table:
        frames = np.arange(first, last + 1, dtype=np.int64)
        frames = np.repeat(frames[frames % _EMPTY != 0], OBJECTS)
        count = len(frames)
        ids = np.tile(np.arange(OBJECTS, dtype=np.int32), count // OBJECTS) + 1
        ids += (frames // 500 * OBJECTS).astype(np.int32)  # others come every 20 seconds
        picked = (np.arange(count) + self._random.integers(_MASKS)) % _MASKS
        hidden = self._random.integers(_HIDDEN, size=count) == 0
        # take() with a null index gives null.
        known = self._bank.take(pa.array(picked, mask=hidden))
        columns = {name: known[name] for name in known.schema.names}
        columns["area"] = columns["area"].fill_null(0)
        columns["score"] = pa.array(np.where(hidden, 0, self._random.uniform(0.6, 1, count)), pa.float32())
        columns["presence"] = pa.array(np.where(hidden, 0, self._random.uniform(0.5, 1, count)), pa.float32())
        columns["frame_index"] = pa.array(frames)
        columns["pts_seconds"] = pa.array(frames / RATE)
        columns["wall_time"] = pa.nulls(count, pa.timestamp("us", "UTC"))
        columns["object_id"] = pa.array(ids)
        columns["category"] = pa.array(
            np.take(np.array(CATEGORIES), ids % len(CATEGORIES))
        ).dictionary_encode()
        columns["frame_height"] = pa.array(np.full(count, HEIGHT, np.int32))
        columns["frame_width"] = pa.array(np.full(count, WIDTH, np.int32))
        arrays = [columns[field.name] for field in TRACKS_SCHEMA]
        arrays = [a.combine_chunks() if isinstance(a, pa.ChunkedArray) else a for a in arrays]
        return pa.table(arrays, schema=TRACKS_SCHEMA)

    def _events(self, first: int) -> pa.Table:
        row = {"frame_index": first, "pts_seconds": first / RATE, "kind": "object_added", "count": 1}
        return pa.Table.from_pylist([row | {"object_id": 1 + first // 500 * OBJECTS}], schema=EVENTS_SCHEMA)


def _frames(rows: int) -> int:
    """Frames with about so many rows."""
    return max(1, round(rows / OBJECTS * _EMPTY / (_EMPTY - 1)))


def _bank(random: np.random.Generator) -> pa.Table:
    """Distinct masks with their measures, from which rows are drawn."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    records = []
    labels = np.zeros((HEIGHT, WIDTH), np.int32)
    for index in range(_MASKS):
        region = _ellipse(random)
        height, width = region.shape
        top, left = int(random.integers(HEIGHT - height)), int(random.integers(WIDTH - width))
        labels[top : top + height, left : left + width] = region
        records += records_from_label_map(labels, {1: 1.0}, [1], Frame(image, index, None))
        labels[top : top + height, left : left + width] = 0
    names = ["area", *(f"bbox_{n}" for n in "xywh"), "centroid_x", "centroid_y", "mask_rle"]
    return tracks_table(records).select(names).combine_chunks()


def _ellipse(random: np.random.Generator) -> NDArray[np.int32]:
    """An upright ellipse with a ragged edge."""
    height = int(random.integers(20, 121))
    width = max(8, int(height * random.uniform(0.3, 0.6)))
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    ragged = 1 + 0.15 * random.standard_normal(width)[None, :]
    inside: NDArray[np.int32] = (x**2 + y**2 < ragged).astype(np.int32)
    inside[height // 2, width // 2] = 1
    return inside


def into_folder(folder: Path) -> Callable[[str, bytes], None]:
    """Writes files below a folder."""

    def put(name: str, data: bytes) -> None:
        path = folder / name
        try:
            path.write_bytes(data)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    return put


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, default in vars(Archive()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--originals", type=int, default=0, help="streams that are made up; 0: all")
    options = parser.parse_args()
    size = Archive(options.streams, options.files, options.rows, options.long_files)
    folder: Path = options.folder

    def there(name: str) -> bool:
        return (folder / name).exists()

    if options.originals:
        rows = Clones(into_folder(folder), options.originals).write(size, there)
    else:
        rows = Writer(into_folder(folder), there=there).write(size)
    megabytes = sum(path.stat().st_size for path in folder.rglob("*.parquet")) / 1e6
    sys.stdout.write(f"{rows} rows written, {megabytes:.0f} MB in {folder}\n")


if __name__ == "__main__":
    main()
