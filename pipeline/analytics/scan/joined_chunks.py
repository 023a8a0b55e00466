"""Many small chunk files read at once.

Of a file of a thousand rows, parsing its footer (17 columns with statistics, and the schema twice) and
preparing a reader take five times as long as its rows. All chunk files begin their footers with the same
schema, which is parsed once here. Of each footer only the places of the columns that are asked for are looked
up, and their pages of all files are decoded together (`pipeline.analytics.scan.joined_pages`).

Whatever is not as expected (another schema, several row groups; a file that is damaged, foreign or missing)
is no error here: the caller reads these files one by one, and says what is wrong with which.

Footers are Thrift structs in the compact protocol; see `pipeline.analytics.scan.joined_pages`.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pyarrow as pa

from pipeline.analytics.scan.joined_pages import (
    MAGIC,
    ColumnPages,
    PlainColumn,
    decode,
    footer_end,
    number,
    path,
    written,
)
from pipeline.analytics.scan.listing import Chunk
from pipeline.analytics.scan.parquet_file import VARINT, WHOLE_BYTES, parse_metadata
from pipeline.base.errors import StoreError
from pipeline.storage.files import Files
from pipeline.storage.local_files import LocalFiles
from pipeline.storage.local_places import NO_LINK
from pipeline.tracks.layout import chunk_name

Bounds = Mapping[str, tuple[float, float]]
"""For some of the columns in `BOUNDED`, values outside of which no row is asked for."""

BOUNDED = {"pts_seconds": "<dd", "wall_time": "<qq"}
"""Columns of which statistics are looked at, and how these are packed (wall_time: microseconds)."""

_TAIL_BYTES = 1 << 13
_AFTER_SCHEMA = re.compile(rb"\x16(" + VARINT + rb")\x19\x1c\x19")
"""FileMetaData 3 num_rows; 4 row_groups: a list of one struct; RowGroup 1 columns: a list."""
_STREAM_KEY = b"\x18\x0exmem.stream_id\x18"
_CHUNK = re.compile(
    re.escape(_STREAM_KEY) + rb".([A-Za-z0-9._-]+)\x00"
    rb"\x18\x0axmem\.first\x18.(\d+)\x00\x18\x09xmem\.last\x18.(\d+)\x00",
    re.DOTALL,
)
"""Three KeyValues of a chunk. JSON escapes control characters: nothing in its events looks like them."""
_ERRORS = (OSError, StoreError, pa.ArrowException, ValueError, LookupError, struct.error)

Read = Callable[[int, int], bytes]
"""Reads so many bytes of a file from a position."""


@dataclass(frozen=True, slots=True)
class JoinedRows:
    """Rows of some chunk files.

    Args:
        table: the columns that were asked for; None if none was.
        counts: how many rows of each file there are; 0 for those outside of the bounds.
    """

    table: pa.Table | None
    counts: list[int]


class _Place(NamedTuple):
    """Where a column of a file is.

    Args:
        start, size: its bytes in the file.
        data: position of its first data page behind `start`: the size of its dictionary.
    """

    start: int
    size: int
    data: int


class ChunkJoiner:
    """Reads columns of small chunk files of one kind, many at once.

    Args:
        files: the output folder.
        kind: "tracks" or "events".
        schema: of the rows, without `stream_id`.
    """

    def __init__(self, files: Files, kind: str, schema: pa.Schema) -> None:
        self._files = files
        self._kind = kind
        self._schema = schema
        self._heads: tuple[bytes, ...] = ()
        """How footers of these files begin, up to the number of rows."""
        self._layouts: dict[object, _Layout] = {}
        self._local = isinstance(files, LocalFiles) and kind == "tracks" and hasattr(os, "pread")

    def suits(self, chunk: Chunk) -> bool:
        """Whether a chunk's file is so small that it pays to join it with others."""
        return self._kind == "events" or chunk.size <= WHOLE_BYTES

    def read(self, chunks: Sequence[Chunk], names: Sequence[str], bounds: Bounds) -> JoinedRows | None:
        """Some columns of all rows of some chunks; None if these files must be read one by one.

        Args:
            names: the columns, without `stream_id`.
            bounds: files of which all rows are outside of it are left out.
        """
        try:
            layout = self._layout(names, bounds)
            columns = [ColumnPages(column) for column in layout.columns]
            counts = [self._add(chunk, layout, columns) for chunk in chunks]
            if not names:
                return JoinedRows(None, counts)
            if not sum(counts):
                return JoinedRows(layout.schema.empty_table(), counts)
            table = pa.Table.from_arrays(decode(columns), schema=layout.schema)
        except _ERRORS:
            return None
        return JoinedRows(table, counts) if table.num_rows == sum(counts) else None

    def _layout(self, names: Sequence[str], bounds: Bounds) -> _Layout:
        key = (*names, *bounds.items())
        if key not in self._layouts:
            self._layouts[key] = _Layout(self._schema, names, bounds)
        return self._layouts[key]

    def _add(self, chunk: Chunk, layout: _Layout, columns: Sequence[ColumnPages]) -> int:
        """Add the columns of a file to those of others; the number of rows that it has."""
        name = chunk_name(self._kind, chunk.stream_id, chunk.first)
        if self._local:
            assert isinstance(self._files, LocalFiles)
            descriptor = os.open(self._files.path(name), os.O_RDONLY | NO_LINK)
            try:
                return self._add_parts(chunk, chunk.size, partial(os.pread, descriptor), layout, columns)
            finally:
                os.close(descriptor)
        # An events file was not listed, and may be a link, which `read` refuses.
        is_listed = self._kind == "tracks"
        whole = self._files.part(name, 0, chunk.size) if is_listed else self._files.read(name)
        return self._add_parts(chunk, len(whole), lambda count, at: whole[at : at + count], layout, columns)

    def _add_parts(
        self, chunk: Chunk, size: int, read: Read, layout: _Layout, columns: Sequence[ColumnPages]
    ) -> int:
        footer = _footer(size, read)
        _check_chunk(chunk, footer)
        if not footer.startswith(self._heads):
            self._heads = (*self._heads, _head(footer, self._schema))
        head = next(head for head in self._heads if footer.startswith(head))
        rows, places = layout.found(footer, len(head))
        for column, place in zip(columns, places, strict=False):  # without rows, there are no places
            column.add(read(place.size, place.start), place.data, rows)
        return rows


class _Layout:
    """Some columns of chunk files: how they are found in a footer, and written into one for all of them.

    Args:
        schema: of the rows, without `stream_id`.
        names: columns to read.
        bounds: of columns of which statistics are looked up.
    """

    def __init__(self, schema: pa.Schema, names: Sequence[str], bounds: Bounds) -> None:
        self.names = [name for name in schema.names if name in names]
        if len(self.names) < len(names):
            raise KeyError(names)
        self._bounds = bounds
        self._looked_up = [name for name in schema.names if name in names or name in bounds]
        self._keys = [path(name) for name in self._looked_up]
        self._pattern = re.compile(rb".*?".join(map(_place_pattern, self._looked_up)), re.DOTALL)
        self.schema = pa.schema([schema.field(name) for name in self.names])
        self.columns = [PlainColumn(field) for field in self.schema]

    def found(self, footer: bytes, at: int) -> tuple[int, list[_Place]]:
        """How many rows of a file may be asked for, and where its columns are.

        Args:
            at: position in the footer behind the schema.

        Raises:
            ValueError: the footer is not as expected.
        """
        after = _AFTER_SCHEMA.match(footer, at)
        if after is None:
            raise ValueError("there is not one row group")
        rows = number(after[1])
        if not self._keys or not rows:
            return rows, []
        found = self._pattern.search(footer, after.end())
        # A name may also occur in the statistics of `category`.
        if found is None or any(footer.count(key) != 1 for key in self._keys):
            raise ValueError("a column is not found")
        groups, places = found.groups(), []
        for index, name in enumerate(self._looked_up):
            values, size, data, dictionary, high, low = groups[6 * index : 6 * index + 6]
            if values != after[1]:
                raise ValueError("columns are of different lengths")
            if name in self._bounds and low and self._is_outside(name, low + high):
                return 0, []
            start = number(data if dictionary is None else dictionary)
            if name in self.names:
                places.append(_Place(start, number(size), number(data) - start))
        return rows, places

    def _is_outside(self, name: str, packed: bytes) -> bool:
        """Whether no row is within the bounds, by a column's least and greatest value."""
        least, greatest = struct.unpack(BOUNDED[name], packed)
        low, high = self._bounds[name]
        return bool(greatest < low or least > high)


def _place_pattern(name: str) -> bytes:
    """Finds a column's fields 3 to 7 (4: zstd), 5 num_values, 7 total_compressed_size, 9 data_page_offset,
    11 dictionary_page_offset, and of its statistics 5 max_value and 6 min_value, if 3 null_count is 0."""
    fields = re.escape(path(name)) + rb"\x15\x0c\x16(%b)\x16%b\x16(%b)" % ((VARINT,) * 3)
    offsets = rb"\x26(%b)(?:\x26(%b))?" % (VARINT, VARINT)
    if name not in BOUNDED:
        return fields + offsets + rb"()()"
    return fields + offsets + rb"(?:<(?:\x18\x08.{8}\x18\x08.{8})?\x16\x00\(\x08(.{8})\x18\x08(.{8}))?"


def _footer(size: int, read: Read) -> bytes:
    """A file's FileMetaData. ValueError if its end is missing."""
    tail = read(min(size, _TAIL_BYTES), max(0, size - _TAIL_BYTES))
    length = int.from_bytes(tail[-8:-4], "little")
    if tail[-4:] != MAGIC or length + 8 > size:
        raise ValueError("its end is missing")
    if length + 8 > len(tail):
        return read(length, size - 8 - length)
    return tail[-8 - length : -8]


def _check_chunk(chunk: Chunk, footer: bytes) -> None:
    """ValueError if a file is not that of a chunk, or if the next one is missing."""
    at = footer.find(_STREAM_KEY)
    found = _CHUNK.match(footer, at) if at >= 0 else None
    if found is None or footer.find(_STREAM_KEY, at + 1) >= 0:
        raise ValueError("no file of xmem")
    first, last = int(found[2]), int(found[3])
    if found[1] != chunk.stream_id.encode() or first != chunk.first or last < first:
        raise ValueError("another chunk")
    if chunk.following not in (None, last + 1):
        raise ValueError("the next file is missing")


def _head(footer: bytes, schema: pa.Schema) -> bytes:
    """How a footer with our schema begins, up to the number of rows. ValueError if it has another schema."""
    metadata = parse_metadata(footer + footer_end(footer), is_part=False)
    if not metadata.schema.equals(written(schema.empty_table())[1].schema):
        raise ValueError("another schema")
    found = _AFTER_SCHEMA.search(footer, footer.find(schema.names[-1].encode()))
    if found is None or number(found[1]) != metadata.num_rows:
        raise ValueError("there is not one row group")
    return footer[: found.start()]
