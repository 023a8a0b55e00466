"""Compacted files that DuckDB reads itself: verified, only these, never written, and never rows twice."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from support.chunks import NO_EVENTS, rows

from pipeline import Archive, open_archive
from pipeline.analytics import compacted_tracks
from pipeline.analytics.query import query
from pipeline.analytics.scan.copy_reader import CopyFile, CopyFiles, verify_pages
from pipeline.analytics.scan.dataset import ChunkDataset
from pipeline.analytics.scan.listing import Listing
from pipeline.base.errors import StoreError, UsageError
from pipeline.storage.opening import open_files
from pipeline.tracks import compaction
from pipeline.tracks.compaction import compact
from pipeline.tracks.copies import withdraw
from pipeline.tracks.store import StreamStore

STREAMS = ("a", "b", "c")
SUMS = "SELECT stream_id, sum(area)::BIGINT AS m, count(*) AS n FROM tracks GROUP BY 1 ORDER BY 1"


def fill(out: Path, stream_id: str, salt: int = 0, start: int = 0) -> None:
    store = StreamStore(out, stream_id)
    for first in range(start, start + 20, 5):
        store.commit(first, first + 4, rows(first, first + 4, salt), NO_EVENTS)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for salt, stream_id in enumerate(STREAMS):
        fill(tmp_path / "out", stream_id, salt)
    return tmp_path / "out"


def copy_of(out: Path) -> Path:
    (path,) = (out / "compacted" / "tracks").iterdir()
    return path


def no_pyarrow(*_: Any, **__: Any) -> Any:
    raise AssertionError("rows were read by pyarrow")


def test_duckdb_reads_them_itself(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = "FROM tracks ORDER BY ALL"
    before = [query(out, sql).to_pylist() for sql in (everything, SUMS)]
    compact(out)
    monkeypatch.setattr(ChunkDataset, "_read_copy", no_pyarrow)
    monkeypatch.setattr(ChunkDataset, "_read_all", no_pyarrow)
    assert [query(out, sql).to_pylist() for sql in (everything, SUMS)] == before


def test_a_flipped_bit_is_found_wherever_it_is_in_a_page(out: Path) -> None:
    compact(out)
    data = copy_of(out).read_bytes()
    group = pq.read_metadata(copy_of(out)).row_group(0)
    for index in (0, 1, 6):  # dictionary and integers
        column = group.column(index)
        start = column.dictionary_page_offset or column.data_page_offset
        end = start + column.total_compressed_size
        verify_pages(data, start, end, group.num_rows)
        with pytest.raises(ValueError, match=f"{group.num_rows} values in {group.num_rows + 1} rows"):
            verify_pages(data, start, end, group.num_rows + 1)
        with pytest.raises(ValueError, match=r"longer than its column|header of a page"):
            verify_pages(data, start, end - 1, group.num_rows)
        body = data.rindex(b"\x28\xb5\x2f\xfd", start, end)  # of zstd, in its last page
        for at in range(body, end):
            damaged = bytearray(data)
            damaged[at] ^= 1
            with pytest.raises(ValueError, match="checksum of a page is wrong"):
                verify_pages(bytes(damaged), start, end, group.num_rows)


def test_footers_of_any_length_and_files_of_many_row_groups(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        fill(out, f"other-{number:02d}")
    before = [query(out, sql).to_pylist() for sql in (SUMS, "SELECT max(length(mask_rle)) AS n FROM tracks")]
    monkeypatch.setattr(compaction, "_ROWS_PER_GROUP", 10)
    compact(out)
    assert int.from_bytes(copy_of(out).read_bytes()[-8:-4], "little") > 1 << 16, (
        "more than DuckDB reads first"
    )
    monkeypatch.setattr(ChunkDataset, "_read_copy", no_pyarrow)
    after = [query(out, sql).to_pylist() for sql in (SUMS, "SELECT max(length(mask_rle)) AS n FROM tracks")]
    assert after == before


def test_a_flip_in_a_file_is_an_error_or_makes_no_difference(out: Path) -> None:
    compact(out)
    path, right = copy_of(out), query(out, SUMS).to_pylist()
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    found = 0
    for at in range(4, footer, 37):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        try:
            answer = query(out, SUMS).to_pylist()
        except StoreError as error:
            found += "000001-0000.parquet cannot be read" in str(error)
        else:
            assert answer == right, at
    assert found > 5


def test_sql_finds_no_other_file_and_writes_none(out: Path) -> None:
    compact(out)
    with open_archive(out) as archive:
        connection = archive.connection
        ((allowed,),) = connection.sql("SELECT current_setting('allowed_directories')").fetchall()
        (prefix,) = (name for name in allowed if name.startswith("xmem"))
        for name in (f"{out}/tracks", "/etc/passwd", str(copy_of(out))):
            with pytest.raises(UsageError, match="file system operations are disabled"):
                archive.arrow(f"SELECT * FROM read_text('{name}')")
            if name != str(copy_of(out)):
                inside = f"SELECT count(*) AS n FROM read_text('{prefix}{name}')"
                assert archive.arrow(inside)["n"].to_pylist() == [0]
        with pytest.raises(UsageError, match="COPY is not allowed"):
            archive.arrow(f"COPY tracks TO '{prefix}x.parquet'")
        for target in (f"{prefix}x.parquet", f"{prefix}{copy_of(out).name}", f"{out}/x.parquet"):
            with pytest.raises(duckdb.Error, match=r"cannot be written|are disabled by configuration"):
                connection.sql("SELECT 1").write_parquet(target)
    assert sorted(path.name for path in (out / "compacted" / "tracks").iterdir()) == ["000001-0000.parquet"]


def test_relations_see_all_streams_whatever_is_asked_between(out: Path) -> None:
    expected = [tuple(row.values()) for row in query(out, SUMS).to_pylist()]
    compact(out, file_bytes=1)
    with open_archive(out) as archive:
        relation = archive.sql(SUMS)
        assert archive.arrow("SELECT count(*) AS n FROM tracks WHERE stream_id = 'b'")["n"].to_pylist() == [
            40
        ]
        assert relation.fetchall() == expected
        assert archive.connection.sql(SUMS).fetchall() == expected


@pytest.mark.parametrize("kept", [False, True])
def test_a_stream_that_is_started_over_once_its_copy_is_open(
    out: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    compact(out)
    hold = CopyFiles.hold
    happened: list[int] = []

    def late(self: CopyFiles, copies: Any) -> Any:
        held = hold(self, copies)
        if not happened:
            happened.append(1)
            withdraw(open_files(out), copies[0].name)
            for kind in ("tracks", "events"):
                shutil.rmtree(out / kind / "stream_id=b")
            fill(out, "b", salt=7)
        return held

    monkeypatch.setattr(CopyFiles, "hold", late)
    with open_archive(out) as archive:
        if kept:
            found = archive.connection.sql(SUMS).to_arrow_table().to_pylist()
        else:
            found = archive.arrow(SUMS).to_pylist()
    assert happened
    monkeypatch.undo()
    assert found == query(out, SUMS).to_pylist()
    assert [row["n"] for row in found] == [40, 40, 40]


def test_files_that_are_merged_meanwhile_keep_their_rows(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = query(out, SUMS).to_pylist()
    compact(out, file_bytes=1)
    check = CopyFiles._check
    merged: list[int] = []

    def late(self: CopyFiles, file: CopyFile) -> None:
        check(self, file)
        if not merged:
            monkeypatch.setattr(compaction, "_MERGED", 2)
            merged.append(compact(out).merged)

    monkeypatch.setattr(CopyFiles, "_check", late)
    assert query(out, SUMS).to_pylist() == expected
    assert merged[0] > 1


def test_a_version_of_duckdb_that_cannot_read_them_leaves_them_to_pyarrow(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = query(out, SUMS).to_pylist()
    compact(out)

    def broken(self: CopyFile, start: int, count: int) -> bytes:
        return bytes(count)

    monkeypatch.setattr(CopyFile, "read", broken)
    assert query(out, SUMS).to_pylist() == expected
    monkeypatch.setattr(compacted_tracks, "TRIES", 1)
    with pytest.raises((StoreError, UsageError)):
        Archive(out).arrow("SELECT nothing FROM tracks")


def test_a_gap_behind_a_copy_and_what_is_committed_later(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    compact(out)
    fill(out, "b", start=20)
    assert [row["n"] for row in query(out, SUMS).to_pylist()] == [40, 80, 40]
    next(iter(sorted((out / "tracks" / "stream_id=b").iterdir())[4:5])).unlink()
    with pytest.raises(StoreError, match=r"stream_id=b/frames-000000000020\.parquet is missing"):
        query(out, SUMS)
    count = "SELECT count(*) AS n FROM tracks WHERE stream_id = 'a'"
    assert query(out, count)["n"].to_pylist() == [40]
    with caplog.at_level(logging.WARNING):
        assert query(out, count.replace("'a'", "'nobody'"))["n"].to_pylist() == [0]
    assert "no stream matches the conditions on stream_id" in caplog.text


def test_the_file_system_has_nothing_else(out: Path) -> None:
    compact(out)
    listing = Listing(open_files(out))
    files = CopyFiles(listing)
    (copy,) = files.hold(listing.all_copies())
    try:
        assert files.exists(files.uri(copy))
        assert files.info(files.uri(copy))["size"] == copy_of(out).stat().st_size
        for other in ("x://../../etc/passwd", str(copy_of(out).parent / "000002-0000.parquet")):
            assert not files.exists(other)
            assert files.glob(other) == []
            with pytest.raises(FileNotFoundError):
                files.open(other)
        with pytest.raises(PermissionError, match="an output folder is only read"):
            files.open(files.uri(copy), "wb")
    finally:
        files.close()
