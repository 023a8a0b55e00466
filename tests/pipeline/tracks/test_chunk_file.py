"""Parquet files of chunks: equal rows give equal bytes, and the footer describes the content."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.chunks import NO_EVENTS, events, rows

from pipeline.base.errors import StoreError
from pipeline.base.records import EVENTS_SCHEMA, TRACKS_SCHEMA
from pipeline.tracks.chunk_file import check_chunk, events_bytes, read_footer, tracks_bytes

ROOT = Path(__file__).parents[3]


def whole(first: int, last: int, tracks: pa.Table, happened: pa.Table) -> bytes:
    tracks, happened = check_chunk(first, last, tracks, happened)
    return tracks_bytes("cam-1", first, last, tracks, happened)


def footer_of(data: bytes) -> Any:
    return read_footer(lambda count: data[-count:], "x.parquet")


def test_the_file_holds_the_rows_the_schema_and_the_range() -> None:
    data = whole(30, 39, rows(30, 39), events(30))
    table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    assert table.schema.equals(TRACKS_SCHEMA)
    assert table.to_pylist() == rows(30, 39).to_pylist()
    meta = pq.read_metadata(pa.BufferReader(data))
    assert {meta.row_group(0).column(i).compression for i in range(meta.num_columns)} == {"ZSTD"}
    assert meta.metadata[b"xmem.first"] == b"30"
    assert meta.metadata[b"xmem.last"] == b"39"
    assert meta.metadata[b"xmem.stream_id"] == b"cam-1"
    assert meta.metadata[b"xmem.format_version"] == b"1"


def test_the_footer_gives_back_the_events_exactly() -> None:
    footer = footer_of(whole(30, 39, rows(30, 39), events(30)))
    assert (footer.stream_id, footer.first, footer.last, footer.rows) == ("cam-1", 30, 39, 20)
    assert footer.events.schema.equals(EVENTS_SCHEMA)
    assert footer.events.to_pylist() == events(30).to_pylist()
    assert events_bytes("cam-1", 30, 39, footer.events) == events_bytes("cam-1", 30, 39, events(30))


def test_a_chunk_without_rows_is_a_file_with_a_range() -> None:
    data = whole(0, 99, rows(0, 9).slice(0, 0), NO_EVENTS)
    footer = footer_of(data)
    assert (footer.first, footer.last, footer.rows) == (0, 99, 0)
    assert pq.read_table(pa.BufferReader(data)).schema.equals(TRACKS_SCHEMA)


def test_equal_rows_give_equal_bytes_however_the_table_was_built() -> None:
    plain = whole(0, 9, rows(0, 9), events(0))
    pieces = pa.concat_tables([rows(0, 3), rows(4, 9)])
    longer = rows(0, 40).slice(0, 20)
    other_dictionary = rows(0, 9).set_column(
        4,
        TRACKS_SCHEMA.field("category"),
        pa.DictionaryArray.from_arrays(
            pa.array(
                [
                    1 if c == "person" else None if c is None else 2
                    for c in rows(0, 9)["category"].to_pylist()
                ],
                pa.int32(),
            ),
            pa.array(["unused", "person", "dog"]),
        ),
    )
    for table in (pieces, longer, other_dictionary):
        assert table.to_pylist() == rows(0, 9).to_pylist()
        assert whole(0, 9, table, events(0)) == plain
    assert whole(0, 9, rows(0, 9, salt=1), events(0)) != plain
    assert whole(0, 9, rows(0, 9), NO_EVENTS) != plain


def test_another_process_writes_the_same_bytes() -> None:
    code = (
        "import sys, hashlib; sys.path.insert(0, 'tests')\n"
        "from support.chunks import events, rows\n"
        "from pipeline.tracks.chunk_file import *\n"
        "t, e = check_chunk(0, 200, rows(0, 200), events(0))\n"
        "print(hashlib.sha256(tracks_bytes('cam-1', 0, 200, t, e) + events_bytes('cam-1', 0, 200, "
        "e)).hexdigest())"
    )
    environment = dict(os.environ, PYTHONHASHSEED="77", TZ="Asia/Tokyo", OMP_NUM_THREADS="1")
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    own = whole(0, 200, rows(0, 200), events(0)) + events_bytes("cam-1", 0, 200, events(0))
    assert other.stdout.strip() == hashlib.sha256(own).hexdigest(), other.stderr


def test_a_footer_longer_than_the_first_read_is_read_whole() -> None:
    many = pa.concat_tables([events(i) for i in range(1000)])
    data = whole(0, 999, rows(0, 9), many)
    reads = []

    def tail(count: int) -> bytes:
        reads.append(count)
        return data[-count:]

    assert read_footer(tail, "x").events.num_rows == 2000
    assert len(reads) == 2


@pytest.mark.parametrize("cut", [0, 3, 11, 100, -1, -8])
def test_a_damaged_file_is_told_from_a_whole_one(cut: int) -> None:
    data = whole(0, 9, rows(0, 9), NO_EVENTS)
    with pytest.raises(ValueError, match=r"end is missing|footer"):
        footer_of(data[:cut])


def test_another_parquet_file_is_not_a_tracks_file() -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(rows(0, 9), sink)
    with pytest.raises(ValueError, match="it was not written by xmem"):
        footer_of(bytes(sink.getvalue()))


def test_a_newer_format_says_so() -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(rows(0, 9).replace_schema_metadata({"xmem.format_version": "9"}), sink)
    with pytest.raises(StoreError, match=r"x\.parquet has format version 9.*upgrade"):
        footer_of(bytes(sink.getvalue()))


def test_what_is_no_chunk_is_refused() -> None:
    good = rows(0, 9)
    with pytest.raises(ValueError, match="first <= last"):
        check_chunk(5, 4, good, NO_EVENTS)
    with pytest.raises(ValueError, match=r"rows of frames 0\.\.9"):
        check_chunk(0, 8, good, NO_EVENTS)
    with pytest.raises(ValueError, match=r"rows of frames 0\.\.9"):
        check_chunk(1, 9, good, NO_EVENTS)
    with pytest.raises(ValueError, match="sorted"):
        check_chunk(0, 9, good.take(list(range(19, -1, -1))), NO_EVENTS)
    with pytest.raises(ValueError, match="sorted"):
        check_chunk(0, 9, pa.concat_tables([good.slice(0, 1), good]), NO_EVENTS)
    with pytest.raises(ValueError, match="TRACKS_SCHEMA"):
        check_chunk(0, 9, good.drop_columns(["score"]), NO_EVENTS)
    with pytest.raises(ValueError, match="EVENTS_SCHEMA"):
        check_chunk(0, 9, good, good)
    holes = pa.array([None] * 20, pa.float32())
    with pytest.raises(ValueError, match="20 nulls in score"):
        check_chunk(0, 9, good.set_column(14, TRACKS_SCHEMA.field("score"), holes), NO_EVENTS)
