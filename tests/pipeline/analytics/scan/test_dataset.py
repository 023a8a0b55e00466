"""Which files a statement opens, and that damaged, missing and foreign files are named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.chunks import NO_EVENTS, events, rows
from support.opened_chunks import opened_chunks
from support.recorded import recorded

from pipeline.analytics import query as module
from pipeline.analytics.query import query
from pipeline.analytics.scan import dataset as scan
from pipeline.analytics.scan import pruning
from pipeline.analytics.scan.dataset import ChunkDataset
from pipeline.analytics.scan.parquet_file import ParquetFile
from pipeline.base.errors import StoreError
from pipeline.base.records import EVENTS_SCHEMA, TRACKS_SCHEMA
from pipeline.storage.opening import open_files
from pipeline.tracks.layout import chunk_name
from pipeline.tracks.store import StreamStore

STREAMS, FILES, FRAMES = ("cam-1", "cam-2", "door-1"), 6, 5


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Three streams of six files of five frames with two rows each."""
    for stream_id in STREAMS:
        store = StreamStore(tmp_path / "out", stream_id)
        for first in range(0, FILES * FRAMES, FRAMES):
            last = first + FRAMES - 1
            store.commit(first, last, rows(first, last), events(first) if first == 10 else NO_EVENTS)
    return tmp_path / "out"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The names of the files that were opened since it was last asked."""
    return opened_chunks(monkeypatch)


def chunk(out: Path, stream_id: str, first: int) -> Path:
    return out / chunk_name("tracks", stream_id, first)


@pytest.mark.parametrize(
    ("where", "expected", "count"),
    [
        ("stream_id = 'cam-1' AND frame_index = 7", ["cam-1/5"], 2),
        ("frame_index BETWEEN 8 AND 11 AND stream_id < 'cam-2'", ["cam-1/10", "cam-1/5"], 8),
        ("frame_index >= 28", ["cam-1/25", "cam-2/25", "door-1/25"], 12),
        ("stream_id IN ('cam-2', 'none') AND frame_index < 3", ["cam-2/0"], 6),
        ("stream_id = 'none'", [], 0),
        ("stream_id = 'cam-1' AND (frame_index < 2 OR frame_index > 28)", ["cam-1/0", "cam-1/25"], 6),
        ("NOT (frame_index > 4) AND stream_id > 'cam-1'", ["cam-2/0", "door-1/0"], 20),
    ],
)  # fmt: skip
@pytest.mark.parametrize("together", [64, 2])
def test_only_the_files_of_the_frames_asked_for_are_opened(
    out: Path,
    opened: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    together: int,
    where: str,
    expected: list[str],
    count: int,
) -> None:
    monkeypatch.setattr(scan, "_COMPARED_TOGETHER", together)
    found = query(out, f"SELECT count(*) AS n FROM tracks WHERE {where}")
    assert found["n"].to_pylist() == [count]
    assert opened() == expected


@pytest.mark.parametrize(
    ("where", "most"),
    [
        ("frame_index = 7 AND stream_id = 'cam-1'", 3),  # streams, then pairs of files, then files
        ("pts_seconds BETWEEN 0.41 AND 0.5", 1),  # names of files tell nothing of times; what are its bounds?
        ("stream_id >= 'cam-2'", 3),
    ],
)
def test_files_are_not_compared_one_by_one(
    out: Path, monkeypatch: pytest.MonkeyPatch, where: str, most: int
) -> None:
    compared = [0]
    satisfying = pruning.satisfying

    def note(condition: Any, schema: pa.Schema, known: Any) -> list[str]:
        compared.append(len(known))
        return satisfying(condition, schema, known)

    for where_used in (scan, pruning):
        monkeypatch.setattr(where_used, "satisfying", note)
    monkeypatch.setattr(scan, "_COMPARED_TOGETHER", 2)
    query(out, f"SELECT count(*) FROM tracks WHERE {where}")
    assert max(compared) == most


@pytest.mark.parametrize(
    "where",
    [
        "pts_seconds BETWEEN 0.2 AND 0.5",
        "pts_seconds > 0.9 OR pts_seconds < 0.1",
        "wall_time < TIMESTAMPTZ '2024-05-06 07:08:10+00'",
        "area > 12 AND frame_index <> 3",
        "category = 'dog' AND stream_id = 'cam-1'",
        "stream_id LIKE '%-1'",
        "category IS NULL AND pts_seconds >= 0.5",
        "frame_index IN (1, 17)",
    ],
)
def test_conditions_choose_the_rows_that_they_choose_in_a_table(out: Path, where: str) -> None:
    with module.connect(out) as connection:
        connection.execute("CREATE TABLE plain AS FROM tracks")
        expected, found = (
            connection.sql(f"SELECT * FROM {name} WHERE {where} ORDER BY ALL").to_arrow_table().to_pylist()
            for name in ("plain", "tracks")
        )
    assert found == expected
    assert 0 < len(found) < 2 * len(STREAMS) * FILES * FRAMES


@pytest.mark.parametrize(
    ("where", "warned"),
    [
        ("stream_id = 'cam-3'", True),
        ("stream_id LIKE 'gate-%'", True),
        ("stream_id = 'cam-1' AND frame_index > 10000", False),
        ("frame_index > 10000", False),
        ("stream_id IN ('cam-1', 'cam-3')", False),
    ],
)
def test_ids_of_no_stream_are_mentioned(
    out: Path, caplog: pytest.LogCaptureFixture, where: str, warned: bool
) -> None:
    with caplog.at_level(logging.WARNING):
        query(out, f"SELECT count(*) FROM tracks WHERE {where}")
    message = f"no stream matches the conditions on stream_id: {out} has cam-1, cam-2, door-1"
    assert caplog.messages == [message] * warned


def test_a_stream_is_listed_by_itself(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = type(open_files(out))
    listed: list[str] = []
    sizes = files.sizes

    def note(self: Any, folder: str, recursive: bool = False) -> dict[str, int]:
        listed.append(folder)
        return sizes(self, folder, recursive)

    monkeypatch.setattr(files, "sizes", note)
    query(out, "SELECT count(*) FROM tracks WHERE stream_id = 'cam-2'")
    assert listed == ["tracks/stream_id=cam-2", "compacted"]


def test_joins_build_their_hash_tables_of_the_smaller_side(out: Path) -> None:
    plan = query(
        out, "EXPLAIN SELECT count(*) FROM tracks JOIN (SELECT 'cam-1' AS stream_id) USING (stream_id)"
    )
    text = plan["explain_value"][0].as_py()
    assert "3,000,000" in text or "3000000" in text, text


def test_a_missing_file_in_the_middle_is_named(out: Path) -> None:
    chunk(out, "cam-2", 10).unlink()
    message = r"cam-2/frames-000000000010\.parquet is missing, though files of later frames exist"
    with pytest.raises(StoreError, match=message):
        query(out, "SELECT count(*) FROM tracks")
    assert query(out, "SELECT count(*) n FROM tracks WHERE stream_id <> 'cam-2'")["n"].to_pylist() == [120]


def test_a_missing_first_file_is_named(out: Path) -> None:
    chunk(out, "cam-2", 0).unlink()
    with pytest.raises(StoreError, match=r"cam-2/frames-000000000000\.parquet is missing"):
        query(out, "SELECT count(*) FROM tracks")


@pytest.mark.parametrize("kind", ["tracks", "events"])
def test_a_column_whose_name_is_damaged_is_no_null(tmp_path: Path, kind: str) -> None:
    """A footer has no checksum; any of its names may have a wrong bit."""
    out = tmp_path / "out"
    StreamStore(out, "a").commit(0, 4, rows(0, 4), events(0))
    sql = f"FROM {kind} ORDER BY ALL"
    before = query(out, sql).to_pylist()
    path = out / chunk_name(kind, "a", 0)
    data = path.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    refused: list[str] = []
    for column in TRACKS_SCHEMA.names if kind == "tracks" else EVENTS_SCHEMA.names:
        at = data.index(column.encode(), footer)
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x08]) + data[at + 1 :])
        try:
            assert query(out, sql).to_pylist() == before
        except StoreError as error:
            refused.append(str(error))
    assert len(refused) >= 8
    assert all(path.name in message for message in refused)


def test_files_from_before_presence_are_read(out: Path) -> None:
    path = chunk(out, "cam-1", 5)
    table = pq.ParquetFile(path).read()
    pq.write_table(table.drop_columns(["presence"]), path)
    found = query(out, "SELECT count(*) n, count(presence) p FROM tracks WHERE stream_id = 'cam-1'")
    assert found.to_pylist() == [{"n": 60, "p": 0}]
    names = ["pretence" if name == "presence" else name for name in table.schema.names]
    renamed = table.rename_columns(names).replace_schema_metadata(table.schema.metadata)
    pq.write_table(renamed, path)
    with pytest.raises(StoreError, match=r"000000000005.*it has no column presence"):
        query(out, "SELECT count(area) FROM tracks")


def test_a_parquet_file_of_another_program_is_named(out: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("stream_id=cam-1/table.parquet", "stream_id=b@d/frames-000000000000.parquet"):
        (out / "tracks" / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"a": [1]}), out / "tracks" / name)
    (out / "tracks" / "stream_id=cam-1" / "notes.txt").write_text("mine")
    with caplog.at_level(logging.WARNING):
        assert query(out, "SELECT count(*) n FROM tracks")["n"].to_pylist() == [180]
    (message,) = caplog.messages
    assert (
        "stream_id=b@d/frames-000000000000.parquet and 1 more is not read: it is no file of xmem" in message
    )


def test_a_foreign_file_under_our_name_is_named(out: Path) -> None:
    pq.write_table(pa.table({"area": [1]}), chunk(out, "cam-1", 30))
    with pytest.raises(StoreError, match=r"frames-000000000030\.parquet is no tracks file of xmem"):
        query(out, "SELECT sum(area) FROM tracks")
    chunk(out, "cam-1", 30).rename(chunk(out, "cam-1", 90))  # a gap before it would not be the problem
    with pytest.raises(StoreError, match=r"frames-000000000090\.parquet is no tracks file of xmem"):
        query(out, "SELECT sum(area) FROM tracks")
    chunk(out, "cam-1", 90).unlink()
    chunk(out, "cam-1", 30).write_bytes(chunk(out, "cam-2", 25).read_bytes())
    with pytest.raises(
        StoreError, match=r"000030\.parquet holds frames 25\.\.29 of stream 'cam-2', not what"
    ):
        query(out, "SELECT sum(area) FROM tracks")


def test_a_flipped_byte_is_found_in_every_column_that_is_read(out: Path) -> None:
    path = chunk(out, "door-1", 15)
    data = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(7)
    assert column.path_in_schema == "area"
    data[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        StoreError, match=r"door-1/frames-000000000015\.parquet cannot be read .*CRC checksum"
    ):
        query(out, "SELECT sum(area) FROM tracks")
    assert query(out, "SELECT sum(frame_index) s FROM tracks WHERE stream_id = 'door-1'").num_rows == 1


def test_a_lost_events_file_is_read_from_its_tracks_file(out: Path) -> None:
    before = query(out, "FROM events WHERE stream_id = 'cam-1'").to_pylist()
    (out / chunk_name("events", "cam-1", 10)).unlink()
    assert query(out, "FROM events WHERE stream_id = 'cam-1'").to_pylist() == before
    assert len(before) == 2


def test_a_limit_ends_the_reading(out: Path) -> None:
    with module.connect(out) as connection:
        for _ in range(20):
            assert len(connection.sql("SELECT stream_id FROM tracks LIMIT 1").fetchall()) == 1


def test_row_groups_of_other_times_are_skipped(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "_WORTH_SKIPPING", 1)
    monkeypatch.setattr(ChunkDataset, "joins_files", False)
    read: list[Any] = []
    monkeypatch.setattr(ParquetFile, "read_row_group", recorded(ParquetFile.read_row_group, read, 1))
    sql = "SELECT count(*) AS n FROM tracks WHERE pts_seconds BETWEEN 0.41 AND 0.5"
    assert query(out, sql)["n"].to_pylist() == [2 * 2 * len(STREAMS)]
    assert len(read) == len(STREAMS), "of six files of each stream"


def test_all_streams_are_listed_at_once(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = type(open_files(out))
    listed: list[Any] = []
    monkeypatch.setattr(files, "sizes", recorded(files.sizes, listed, 1))
    assert query(out, "SELECT count(*) AS n FROM tracks")["n"].to_pylist() == [180]
    assert listed == ["tracks", "compacted"]
