"""Pages of a column of many files that are decoded together: the same values, and no damage unnoticed."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.analytics.scan.joined_pages import ColumnPages, PlainColumn, decode
from pipeline.analytics.scan.parquet_file import unsigned

TEXTS = pa.field("text", pa.dictionary(pa.int32(), pa.string()))
NUMBERS = pa.field("number", pa.int64(), nullable=False)


def written(field: pa.Field, values: list[Any], **options: Any) -> tuple[bytes, int, int]:
    """A column as `ColumnPages.add` takes it, of a file as the store writes it."""
    sink = pa.BufferOutputStream()
    table = pa.table([pa.array(values, field.type)], schema=pa.schema([field]))
    given = {"compression": "zstd", "write_page_checksum": True, "use_dictionary": field is TEXTS}
    pq.write_table(table, sink, **given | options)
    data = sink.getvalue().to_pybytes()
    column = pq.read_metadata(pa.BufferReader(data)).row_group(0).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    return data[start : start + column.total_compressed_size], column.data_page_offset - start, len(values)


def added(field: pa.Field, *files: tuple[bytes, int, int]) -> ColumnPages:
    pages = ColumnPages(PlainColumn(field))
    for file in files:
        pages.add(*file)
    return pages


def test_columns_come_back_in_the_order_of_the_files() -> None:
    texts: list[list[Any]] = [
        ["a", None, "b"],
        ["a", "b", None, "a"],
        ["b", "a"],
        [None],
        ["long " * 900] * 3,
        ["a"],
    ]
    numbers: list[list[Any]] = [[1, -2, 3], list(range(5000)), [7], [2**62], [0] * 40, [9]]
    columns = [
        added(TEXTS, *(written(TEXTS, values) for values in texts)),
        added(NUMBERS, *(written(NUMBERS, values) for values in numbers)),
    ]
    found = decode(columns)
    assert found[0].to_pylist() == [*chain(*texts)]
    assert found[0].type == TEXTS.type
    assert found[1].to_pylist() == [*chain(*numbers)]


def test_files_with_one_dictionary_share_a_row_group() -> None:
    same = [written(TEXTS, ["a", "b", "a"]), written(TEXTS, ["a", None, "b"])]
    other = written(TEXTS, ["b", "a"])
    assert decode([added(TEXTS, *same * 20)])[0].num_chunks == 1
    assert decode([added(TEXTS, *same * 20, other)])[0].num_chunks == 2
    assert decode([added(NUMBERS, *[written(NUMBERS, [1])] * 40)])[0].num_chunks == 1


@pytest.mark.parametrize(
    "options",
    [
        {"write_page_checksum": False},
        {"compression": "snappy"},
        {"data_page_size": 16, "write_batch_size": 2},  # several pages
        {"data_page_version": "2.0"},
    ],
)
def test_what_the_store_does_not_write_is_left_to_pyarrow(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="page"):
        added(NUMBERS, written(NUMBERS, list(range(50)), **options))


def test_a_file_of_another_number_of_rows_is_an_error() -> None:
    part, data, rows = written(NUMBERS, [1, 2, 3])
    with pytest.raises(ValueError, match="rows"):
        added(NUMBERS, (part, data, rows + 1))


@pytest.mark.parametrize("field", [TEXTS, NUMBERS])
def test_a_flipped_bit_is_an_error_or_changes_nothing(field: pa.Field) -> None:
    values: list[Any] = ["a", "bc", None, "a"] if field is TEXTS else [5, 6, 7, 8]
    part, data, rows = written(field, values)
    good, refused = written(field, values), 0
    for bit in range(8 * len(part)):
        damaged = bytearray(part)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found = decode([added(field, good, (bytes(damaged), data, rows), good)])[0].to_pylist()
        except (ValueError, OSError, pa.ArrowException):
            refused += 1
        else:
            assert found == values * 3, bit
    assert refused > 4 * len(part)


def test_varints() -> None:
    def varint(value: int) -> bytes:
        found = bytearray()
        while value >= 0x80:
            found.append(value & 0x7F | 0x80)
            value >>= 7
        return bytes([*found, value])

    for bits in range(64):
        for value in (1 << bits, (1 << bits) - 1, 0x5A5A5A5A5A5A5A5A >> (63 - bits)):
            assert unsigned(varint(value)) == value
