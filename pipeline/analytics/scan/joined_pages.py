"""Pages of one column out of many files, decoded as one column.

pyarrow has zstd make a new context of 95 KB for each page, which takes far longer than a page of a thousand
rows. Here the checksum of each page is verified, all pages are decompressed as one stream, and a Parquet file
without compression is put together in memory, which pyarrow decodes in one call. Files with the same
dictionary share a row group, and so do files without one.

What is not as expected is a ValueError: the caller reads these files one by one.

Page headers and footers are Thrift structs in the compact protocol, laid out by parquet.thrift. A field is a
byte, with the distance from the field before in its upper half and the type in its lower half, and a value.
Integers are zigzag varints; binaries have their length before them.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.analytics.scan.parquet_file import VARINT, ParquetFile, parse_metadata, unsigned

MAGIC = b"PAR1"

_HEAD = rb"\x15(%b)\x15(%b)\x15(%b)" % ((VARINT,) * 3)
_DATA = re.compile(rb"\x15\x00" + _HEAD + rb"\x1c\x15(" + VARINT + rb")\x15([\x00\x04\x10])\x15\x06\x15\x06")
"""PageHeader 1 type: a data page; 2 and 3 its sizes, uncompressed and compressed; 4 crc; 5 data_page_header:
1 num_values; 2 encoding: plain or of a dictionary; 3 and 4 encodings of levels: RLE. Statistics follow."""
_DICTIONARY = re.compile(
    rb"\x15\x04" + _HEAD + rb"\x3c\x15(" + VARINT + rb")\x15[\x00\x04](?:[\x11\x12])?\x00\x00"
)
"""PageHeader 1 type: a dictionary; 2 to 4 as above; 7 dictionary_page_header: 1 num_values; 2 encoding:
plain; 3 is_sorted."""
_FRAME = b"\x28\xb5\x2f\xfd"
"""What a zstd frame begins with."""
_TYPES = {"INT32": 1, "INT64": 2, "FLOAT": 4, "DOUBLE": 5, "BYTE_ARRAY": 6}


class ColumnPages:
    """The pages of one column, of one file after the other.

    Args:
        column: which.
    """

    def __init__(self, column: PlainColumn) -> None:
        self._column = column
        self.frames: list[bytes] = []
        """Compressed pages, whose checksums are right."""
        self.size = 0
        """Bytes of all of them without compression."""
        self._pages: list[tuple[int, int, int]] = []
        """Size without compression, number of values, and encoding; -1 for a dictionary."""

    def add(self, part: bytes, data: int, rows: int) -> None:
        """The bytes of a column of a file.

        Args:
            part: its dictionary, if it has one, and its one data page.
            data: where in `part` the data page begins; 0: there is no dictionary.
            rows: of the file.

        Raises:
            ValueError: it is damaged, or not written as by this project.
        """
        if data:
            self._add_page(part, _DICTIONARY.match(part), data, -1)
        found = _DATA.match(part, data)
        if found is None or number(found[4]) != rows or (found[5] == b"\x00") != (not data):
            raise ValueError("there is not one data page of all rows")
        self._add_page(part, found, len(part), found[5][0])

    def _add_page(self, part: bytes, header: re.Match[bytes] | None, end: int, encoding: int) -> None:
        if header is None:
            raise ValueError("the header of a page is not as expected")
        start = end - number(header[2])
        if start < header.end() or (encoding < 0 and start != header.end()):
            raise ValueError("a page is not of the size that its header says")
        frame = part[start:end]
        size = number(header[1])
        if zlib.crc32(frame) != _checksum(header[3]):
            raise ValueError("the checksum of a page is wrong")
        if _content_size(frame) != size:
            raise ValueError("a page has another size than its header says")
        self.frames.append(frame)
        self.size += size
        self._pages.append((size, number(header[4]), encoding))

    def decode(self, data: memoryview) -> pa.ChunkedArray:
        """The values, of the pages without compression one after the other."""
        pieces: list[Any] = [MAGIC]
        groups: list[bytes] = []
        at = begin = len(MAGIC)  # where the file is written, and where the row group under way begins
        position = rows = total = behind = 0  # `behind`: of its dictionary
        dictionary: tuple[int, bytes] | None = None
        started = False
        for size, values, encoding in self._pages:
            page = data[position : position + size]
            position += size
            if encoding < 0:
                if dictionary == (values, of_page := bytes(page)):
                    continue
                if started:
                    groups.append(self._column.row_group(rows, begin, behind, at - begin))
                    total, rows = total + rows, 0
                dictionary, begin = (values, of_page), at
                header = _dictionary_header(size, values)
                behind = len(header) + size
            else:
                rows += values
                header = _data_header(size, values, encoding)
            started = True
            pieces += (header, page)
            at += len(header) + size
        groups.append(self._column.row_group(rows, begin, behind, at - begin))
        footer = self._column.footer(total + rows, groups)
        pieces += (footer, footer_end(footer))
        return ParquetFile(pa.BufferReader(b"".join(pieces))).read([self._column.name])[0]


class PlainColumn:
    """Writes the footers of Parquet files of one column without compression.

    Args:
        field: the column.
    """

    def __init__(self, field: pa.Field) -> None:
        self.name: str = field.name
        footer, metadata = written(pa.schema([field]).empty_table())
        at = footer.find(b"\x16\x00\x19")  # 3 num_rows: none
        keys = footer.find(b"\x18\x0cARROW:schema") - 2  # 5 key_value_metadata, a list of one struct
        if at < 0 or keys < 0:
            raise ValueError("pyarrow writes other footers")
        self._before, self._behind = footer[:at], footer[keys:]
        kind = _TYPES[metadata.schema.column(0).physical_type]
        # RowGroup 1 columns: a list of one struct. ColumnChunk 2 file_offset; 3 meta_data: 1 type;
        # 2 encodings; 3 path_in_schema; 4 codec: none. Readers ignore offset and encodings.
        self._begin = (
            b"\x19\x1c\x26\x00\x1c\x15" + _zigzag(kind) + b"\x19\x15\x00" + path(self.name) + b"\x15\x00"
        )

    def row_group(self, rows: int, at: int, dictionary: int, size: int) -> bytes:
        """A RowGroup of `size` bytes from `at` on, of which the first `dictionary` are a dictionary page."""
        total = _zigzag(size)
        # 5 num_values; 6 and 7 sizes; 9 data_page_offset; 11 dictionary_page_offset.
        offsets = b"\x26" + _zigzag(at + dictionary) + (b"\x26" + _zigzag(at) if dictionary else b"")
        counted = b"\x16" + _zigzag(rows)
        column = self._begin + counted + b"\x16" + total + b"\x16" + total + offsets + b"\x00\x00"
        # RowGroup 2 total_byte_size; 3 num_rows.
        return column + b"\x16" + total + counted + b"\x00"

    def footer(self, rows: int, groups: Sequence[bytes]) -> bytes:
        """The footer of a file of some row groups."""
        row_groups = b"\x19" + _list_of(len(groups)) + b"".join(groups)
        return self._before + b"\x16" + _zigzag(rows) + row_groups + self._behind


def decode(columns: Sequence[ColumnPages]) -> list[pa.ChunkedArray]:
    """The values of some columns. ValueError or a pyarrow.ArrowException if a page is damaged."""
    size = sum(column.size for column in columns)
    frames = b"".join([frame for column in columns for frame in column.frames])
    with pa.CompressedInputStream(pa.BufferReader(frames), "zstd") as stream:
        data = memoryview(stream.read(size + 1))
    if len(data) != size:
        raise ValueError("pages have other sizes than their headers say")
    found, at = [], 0
    for column in columns:
        found.append(column.decode(data[at : at + column.size]))
        at += column.size
    return found


def written(table: pa.Table) -> tuple[bytes, Any]:
    """The footer of a table, and its metadata."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, version="2.6", use_dictionary=False, store_schema=True)
    data = sink.getvalue().to_pybytes()
    return data[-8 - int.from_bytes(data[-8:-4], "little") : -8], parse_metadata(data, is_part=False)


def path(name: str) -> bytes:
    """ColumnMetaData 3 path_in_schema: a list of one binary."""
    return b"\x19\x18" + bytes([len(name)]) + name.encode()


def footer_end(footer: bytes) -> bytes:
    """What follows a footer."""
    return len(footer).to_bytes(4, "little") + MAGIC


@lru_cache(maxsize=1 << 14)
def number(varint: bytes) -> int:
    """The number of at least 0 of a zigzag varint. Most occur in many files."""
    return unsigned(varint) >> 1


def _checksum(varint: bytes) -> int:
    """The checksum that a header holds as signed number."""
    value = unsigned(varint)
    return ((value >> 1) ^ -(value & 1)) & 0xFFFFFFFF


def _content_size(frame: bytes) -> int:
    """Bytes of a zstd frame without compression, by its header (RFC 8878), which its checksum covers."""
    if frame[:4] != _FRAME:
        raise ValueError("a page is not compressed by zstd")
    descriptor = frame[4]
    kind, is_single = descriptor >> 6, descriptor & 0x20
    if descriptor & 0x03 or not (kind or is_single):  # it needs a dictionary, or says no size
        raise ValueError("a page is compressed in another way")
    at = 5 if is_single else 6
    if kind == 0:
        return frame[at]
    if kind == 1:
        return int.from_bytes(frame[at : at + 2], "little") + 256
    return int.from_bytes(frame[at : at + (4 if kind == 2 else 8)], "little")


def _data_header(size: int, values: int, encoding: int) -> bytes:
    sizes = b"\x15" + _zigzag(size)
    return (
        b"\x15\x00"
        + sizes
        + sizes
        + b"\x2c\x15"
        + _zigzag(values)
        + b"\x15%c\x15\x06\x15\x06\x00\x00" % encoding
    )


def _dictionary_header(size: int, values: int) -> bytes:
    sizes = b"\x15" + _zigzag(size)
    return b"\x15\x04" + sizes + sizes + b"\x4c\x15" + _zigzag(values) + b"\x15\x00\x00\x00"


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
