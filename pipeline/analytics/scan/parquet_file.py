"""Parquet files of an output folder, opened at little cost: one read for the end, one for what is asked for.

`pyarrow.parquet.ParquetFile` reads 64 KB for a footer and prepares for nested columns and for writing. Of a
file of a thousand rows, this takes longer than its rows. Here are its reader and metadata alone. The checksum
of each page that is read is verified.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.files import Files
from pipeline.storage.local_files import LocalFiles

try:
    from pyarrow._parquet import ParquetReader
except ImportError:  # another version of pyarrow: its public classes take about twice the time
    ParquetReader = None

VARINT = rb"[\x80-\xff]*[\x00-\x7f]"
"""Matches a number in footers and page headers, which are Thrift structs in the compact protocol."""
_SMALL_BYTES = 1 << 15
WHOLE_BYTES = 1 << 20
"""A file on a store that is no larger is fetched in one request."""


class ParquetFile:
    """A file that is open for reading.

    Args:
        source: where its bytes are.
        metadata: of its footer, if that was read.
        dictionaries: columns to read as dictionaries.
        pre_buffer: whether ranges that lie beside each other become one read.

    Raises:
        OSError, pyarrow.ArrowException: it cannot be read.
    """

    def __init__(
        self,
        source: pa.NativeFile,
        metadata: Any = None,
        dictionaries: Sequence[str] | None = None,
        pre_buffer: bool = False,
    ) -> None:
        options: dict[str, Any] = {"metadata": metadata, "read_dictionary": dictionaries}
        options |= {"pre_buffer": pre_buffer, "page_checksum_verification": True}
        if ParquetReader is None:
            self._reader = pq.ParquetFile(source, **options).reader
        else:
            self._reader = ParquetReader()
            self._reader.open(source, use_memory_map=False, **options)
        self.metadata: Any = metadata or self._reader.metadata
        self.names: list[str] = self.metadata.schema.names
        """Its columns."""

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Some columns of all rows. ValueError if it lacks one."""
        return self._reader.read_all(column_indices=self._indices(columns), use_threads=False)

    def read_row_group(self, index: int, columns: Sequence[str]) -> pa.Table:
        """Some columns of a row group. ValueError if it lacks one."""
        return self._reader.read_row_group(index, column_indices=self._indices(columns), use_threads=False)

    def _indices(self, columns: Sequence[str]) -> list[int]:
        return [self.names.index(name) for name in columns]


def open_parquet(
    files: Files,
    name: str,
    size: int | None,
    tail_bytes: int,
    metadata: Any = None,
    dictionaries: Sequence[str] | None = None,
    source: pa.NativeFile | None = None,
) -> ParquetFile:
    """A Parquet file whose footer is within its last `tail_bytes`, as a rule.

    Args:
        size: its bytes; None if they are not known: it is read as a whole.
        metadata: of its footer, if that was read.
        dictionaries: columns to read as dictionaries.
        source: the file if it is open.

    Raises:
        FileNotFoundError: there is none. StoreError, OSError, pyarrow.ArrowException: it cannot be read.
    """
    whole: bytes | None = None
    tail = b""
    if isinstance(files, LocalFiles) and size is not None:
        source = source or pa.OSFile(files.path(name))
        size = source.size()
        if size <= _SMALL_BYTES:  # costs less than its end, and then parts of it
            whole = source.read_at(size, 0)
        elif metadata is None:
            tail = source.read_at(tail_bytes, max(0, size - tail_bytes))
    elif size is None or size <= WHOLE_BYTES:
        whole = files.read(name) if size is None else files.part(name, 0, size)
    else:
        source = pa.PythonFile(_Ranges(files, name, size), mode="r")
        if metadata is None:
            tail = files.part(name, max(0, size - tail_bytes), size)
    if whole is not None:
        source = pa.BufferReader(whole)
        tail = whole
    if metadata is None:
        metadata = parse_metadata(tail, whole is None)
    # On a disk, joined ranges would only be copied.
    return ParquetFile(source, metadata, dictionaries, pre_buffer=isinstance(source, pa.PythonFile))


def read_metadata(files: Files, name: str, size: int, tail_bytes: int) -> Any:
    """The metadata of a Parquet file of `size` bytes; as a rule, they are within its last `tail_bytes`.

    Raises:
        FileNotFoundError: there is none. StoreError, OSError, pyarrow.ArrowException: it cannot be read.
    """
    tail = files.part(name, max(0, size - tail_bytes), size)
    found = parse_metadata(tail, len(tail) < size)
    if found is not None:
        return found
    whole = int.from_bytes(tail[-8:-4], "little") + 8  # its footer is longer
    return parse_metadata(files.part(name, max(0, size - whole), size), False)


def parse_metadata(tail: bytes, is_part: bool) -> Any:
    """The metadata in the end of a file; None if they begin before it.

    Args:
        is_part: whether the file has more than this end.

    Raises:
        OSError, pyarrow.ArrowException: they are damaged.
    """
    if len(tail) < 12 or tail[-4:] != b"PAR1":
        raise pa.ArrowInvalid("its end is missing")
    if len(tail) - 8 < int.from_bytes(tail[-8:-4], "little"):
        if is_part:
            return None
        raise pa.ArrowInvalid("its footer is larger than the file")
    try:
        return pq.read_metadata(pa.BufferReader(tail))
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid("the name of a column is damaged") from error


class _Ranges:
    """A file on a store of which parts are read, one request each."""

    closed = False

    def __init__(self, files: Files, name: str, size: int) -> None:
        self._files, self._name, self._size, self._at = files, name, size, 0

    def size(self) -> int:
        return self._size

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, count: int = -1) -> bytes:
        end = self._size if count < 0 else min(self._size, self._at + count)
        data = self._files.part(self._name, self._at, end) if end > self._at else b""
        self._at = max(self._at, end)
        return data

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True


def unsigned(varint: bytes) -> int:
    """The number that a varint holds."""
    value = int.from_bytes(varint, "little")
    if value < 0x80:
        return value
    if len(varint) <= 5:  # seven bits of each byte, moved together
        return (
            value & 0x7F
            | value >> 1 & 0x3F80
            | value >> 2 & 0x1FC000
            | value >> 3 & 0xFE00000
            | value >> 4 & 0x7F0000000
        )
    value = 0
    for byte in reversed(varint):
        value = value << 7 | byte & 0x7F
    return value
