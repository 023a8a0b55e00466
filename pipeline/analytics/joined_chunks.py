"""Many small chunk files read at once: as the row groups of one Parquet file, put together in memory.

Of a file of a thousand rows, parsing its footer (17 columns with statistics, and the schema twice) and
preparing a reader take five times as long as its rows. All chunk files begin their footers with the same
schema, which is parsed once here. Of each footer only the places of the columns that are asked for are looked
up. Their pages are copied behind each other, unchanged, and one footer that names only them is written for
all. pyarrow reads the result in one call and verifies the checksum of each page, as it would in the files.

Whatever is not as expected (another schema, several row groups; a file that is damaged, foreign or missing)
is no error here: the caller reads these files one by one, and says what is wrong with which.

Footers are Thrift structs in the compact protocol, laid out by parquet.thrift. A field is a byte, with the
distance from the field before in its upper half and the type in its lower half, and a value. Integers are
zigzag varints; binaries have their length before them.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.analytics.listing import Chunk
from pipeline.analytics.parquet_file import VARINT, WHOLE_BYTES, ParquetFile, parse_metadata, unsigned
from pipeline.base.errors import StoreError
from pipeline.storage.files import Files
from pipeline.storage.local_files import LocalFiles
from pipeline.storage.local_places import NO_LINK
from pipeline.tracks.layout import chunk_name

Bounds = Mapping[str, tuple[float, float]]
"""For some of the columns in `BOUNDED`, values outside of which no row is asked for."""

BOUNDED = {"pts_seconds": "<dd", "wall_time": "<qq"}
"""Columns of which statistics are looked at, and how these are packed (wall_time: microseconds)."""

_MAGIC = b"PAR1"
_TAIL_BYTES = 1 << 13
_AFTER_SCHEMA = re.compile(rb"\x16(" + VARINT + rb")\x19\x1c\x19")
"""FileMetaData 3 num_rows; 4 row_groups: a list of one struct; RowGroup 1 columns: a list."""
_CHUNK = re.compile(
    rb"\x18\x0exmem\.stream_id\x18.([A-Za-z0-9._-]+)\x00"
    rb"\x18\x0axmem\.first\x18.(\d+)\x00\x18\x09xmem\.last\x18.(\d+)\x00",
    re.DOTALL,
)
"""Three KeyValues of a chunk. JSON escapes control characters: nothing in its events looks like them."""
_DATA_PAGE = re.compile(rb"\x15\x00\x15%b\x15%b\x15%b\x1c\x15(%b)" % ((VARINT,) * 4))
"""PageHeader 1 type: a data page; 2 and 3 its sizes; 4 crc; 5 data_page_header: 1 num_values."""
_TYPES = {"INT32": 1, "INT64": 2, "FLOAT": 4, "DOUBLE": 5, "BYTE_ARRAY": 6}
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


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a column of a file is.

    Args:
        fields: fields 3 to 7 of its ColumnMetaData, from path_in_schema to total_compressed_size.
        start, size: its bytes in the file.
        data: position of its first data page behind `start`: the size of its dictionary.
    """

    fields: bytes
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
            pieces, groups, counts, at = [_MAGIC], [], [], len(_MAGIC)
            for chunk in chunks:
                rows, places, parts = self._parts(chunk, layout)
                counts.append(rows)
                if rows and parts:
                    groups.append(layout.row_group(rows, places, at))
                    pieces += parts
                    at += sum(map(len, parts))
            if not names:
                return JoinedRows(None, counts)
            footer = layout.footer(sum(counts), groups)
            pieces += [footer, _end(footer)]
            table = ParquetFile(pa.BufferReader(b"".join(pieces))).read(layout.names)
        except _ERRORS:
            return None
        return JoinedRows(table, counts) if table.num_rows == sum(counts) else None

    def _layout(self, names: Sequence[str], bounds: Bounds) -> _Layout:
        key = (*names, *bounds.items())
        if key not in self._layouts:
            self._layouts[key] = _Layout(self._schema, names, bounds)
        return self._layouts[key]

    def _parts(self, chunk: Chunk, layout: _Layout) -> tuple[int, list[_Place], list[bytes]]:
        """The number of rows of a file, and the places and bytes of its columns."""
        name = chunk_name(self._kind, chunk.stream_id, chunk.first)
        if self._local:
            assert isinstance(self._files, LocalFiles)
            descriptor = os.open(self._files.path(name), os.O_RDONLY | NO_LINK)
            try:
                return self._parts_of(chunk, chunk.size, partial(os.pread, descriptor), layout)
            finally:
                os.close(descriptor)
        # An events file was not listed, and may be a link, which `read` refuses.
        is_listed = self._kind == "tracks"
        whole = self._files.part(name, 0, chunk.size) if is_listed else self._files.read(name)
        return self._parts_of(chunk, len(whole), lambda count, at: whole[at : at + count], layout)

    def _parts_of(
        self, chunk: Chunk, size: int, read: Read, layout: _Layout
    ) -> tuple[int, list[_Place], list[bytes]]:
        footer = _footer(size, read)
        _check_chunk(chunk, footer)
        if not footer.startswith(self._heads):
            self._heads = (*self._heads, _head(footer, self._schema))
        head = next(head for head in self._heads if footer.startswith(head))
        rows, places = layout.found(footer, len(head))
        if not rows:
            return 0, [], []
        parts = [read(place.size, place.start) for place in places]
        for place, part in zip(places, parts, strict=True):
            # A checksum is of a page without its header. All else in that is noticed when the page is read.
            page = _DATA_PAGE.match(part, place.data)
            if page is None or _number(page[1]) != rows:
                raise ValueError("there is not one data page of all rows")
        return rows, places, parts


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
        self._keys = [_path(name) for name in self._looked_up]
        self._pattern = re.compile(rb".*?".join(map(_place_pattern, self._looked_up)), re.DOTALL)
        empty = pa.schema([schema.field(name) for name in self.names]).empty_table()
        footer, metadata = _written(empty)
        at = footer.find(b"\x16\x00\x19")  # 3 num_rows: none
        keys = footer.find(b"\x18\x0cARROW:schema") - 2  # 5 key_value_metadata, a list of one struct
        if at < 0 or keys < 0:
            raise ValueError("pyarrow writes other footers")
        self._before, self._behind = footer[:at], footer[keys:]
        kinds = [_TYPES[metadata.schema.column(i).physical_type] for i in range(len(self.names))]
        # ColumnChunk 2 file_offset; 3 meta_data: 1 type; 2 encodings. Readers ignore offset and encodings.
        self._begins = [b"\x26\x00\x1c\x15" + _zigzag(kind) + b"\x19\x15\x00" for kind in kinds]

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
        rows = _number(after[1])
        if not self._keys or not rows:
            return rows, []
        found = self._pattern.search(footer, after.end())
        # A name may also occur in the statistics of `category`.
        if found is None or any(footer.count(key) != 1 for key in self._keys):
            raise ValueError("a column is not found")
        groups, places = found.groups(), []
        for index, name in enumerate(self._looked_up):
            fields, values, size, data, dictionary, high, low = groups[7 * index : 7 * index + 7]
            if values != after[1]:
                raise ValueError("columns are of different lengths")
            if name in self._bounds and low and self._is_outside(name, low + high):
                return 0, []
            start = _number(data if dictionary is None else dictionary)
            if name in self.names:
                places.append(_Place(fields, start, _number(size), _number(data) - start))
        return rows, places

    def _is_outside(self, name: str, packed: bytes) -> bool:
        """Whether no row is within the bounds, by a column's least and greatest value."""
        least, greatest = struct.unpack(BOUNDED[name], packed)
        low, high = self._bounds[name]
        return bool(greatest < low or least > high)

    def row_group(self, rows: int, places: Sequence[_Place], at: int) -> bytes:
        """A RowGroup of columns whose bytes begin at a position and follow each other."""
        columns = []
        for begin, place in zip(self._begins, places, strict=True):
            # ColumnMetaData 9 data_page_offset; 11 dictionary_page_offset.
            offsets = b"\x26" + _zigzag(at + place.data) + (b"\x26" + _zigzag(at) if place.data else b"")
            columns += [begin, place.fields, offsets, b"\x00\x00"]
            at += place.size
        # RowGroup 1 columns; 2 total_byte_size, which readers ignore; 3 num_rows.
        return b"\x19" + _list_of(len(places)) + b"".join(columns) + b"\x16\x00\x16" + _zigzag(rows) + b"\x00"

    def footer(self, rows: int, groups: Sequence[bytes]) -> bytes:
        """The footer of a file of some row groups."""
        row_groups = b"\x19" + _list_of(len(groups)) + b"".join(groups)
        return self._before + b"\x16" + _zigzag(rows) + row_groups + self._behind


def _path(name: str) -> bytes:
    """ColumnMetaData 3 path_in_schema: a list of one binary."""
    return b"\x19\x18" + bytes([len(name)]) + name.encode()


def _place_pattern(name: str) -> bytes:
    """Finds a column's fields 3 to 7, 5 num_values, 7 total_compressed_size, 9 data_page_offset,
    11 dictionary_page_offset, and of its statistics 5 max_value and 6 min_value, if 3 null_count is 0."""
    fields = rb"(" + re.escape(_path(name)) + rb"\x15.\x16(%b)\x16%b\x16(%b))" % ((VARINT,) * 3)
    offsets = rb"\x26(%b)(?:\x26(%b))?" % (VARINT, VARINT)
    if name not in BOUNDED:
        return fields + offsets + rb"()()"
    return fields + offsets + rb"(?:<(?:\x18\x08.{8}\x18\x08.{8})?\x16\x00\(\x08(.{8})\x18\x08(.{8}))?"


def _footer(size: int, read: Read) -> bytes:
    """A file's FileMetaData. ValueError if its end is missing."""
    tail = read(min(size, _TAIL_BYTES), max(0, size - _TAIL_BYTES))
    length = int.from_bytes(tail[-8:-4], "little")
    if tail[-4:] != _MAGIC or length + 8 > size:
        raise ValueError("its end is missing")
    if length + 8 > len(tail):
        return read(length, size - 8 - length)
    return tail[-8 - length : -8]


def _check_chunk(chunk: Chunk, footer: bytes) -> None:
    """ValueError if a file is not that of a chunk, or if the next one is missing."""
    found = _CHUNK.search(footer)
    if found is None or footer.count(b"\x18\x0exmem.stream_id\x18") != 1:
        raise ValueError("no file of xmem")
    first, last = int(found[2]), int(found[3])
    if found[1] != chunk.stream_id.encode() or first != chunk.first or last < first:
        raise ValueError("another chunk")
    if chunk.following not in (None, last + 1):
        raise ValueError("the next file is missing")


def _head(footer: bytes, schema: pa.Schema) -> bytes:
    """How a footer with our schema begins, up to the number of rows. ValueError if it has another schema."""
    metadata = parse_metadata(footer + _end(footer), is_part=False)
    if not metadata.schema.equals(_written(schema.empty_table())[1].schema):
        raise ValueError("another schema")
    found = _AFTER_SCHEMA.search(footer, footer.find(schema.names[-1].encode()))
    if found is None or _number(found[1]) != metadata.num_rows:
        raise ValueError("there is not one row group")
    return footer[: found.start()]


def _written(table: pa.Table) -> tuple[bytes, Any]:
    """The footer of a table, and its metadata."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, version="2.6", use_dictionary=False, store_schema=True)
    data = sink.getvalue().to_pybytes()
    return _footer(len(data), lambda count, at: data[at : at + count]), parse_metadata(data, is_part=False)


def _end(footer: bytes) -> bytes:
    """What follows a footer."""
    return len(footer).to_bytes(4, "little") + _MAGIC


def _list_of(count: int) -> bytes:
    """The head of a list of structs."""
    return bytes([count << 4 | 0xC]) if count < 15 else b"\xfc" + _varint(count)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _zigzag(value: int) -> bytes:
    """A number of at least 0 as zigzag varint."""
    return _varint(value << 1)


def _number(varint: bytes) -> int:
    """The number of at least 0 of a zigzag varint."""
    return unsigned(varint) >> 1
