"""Small files that are read together: the same rows, nothing wrong from damage, and only what is needed."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from support.chunks import NO_EVENTS, events, rows
from support.recorded import recorded

from pipeline.analytics.query import query
from pipeline.analytics.scan.dataset import ChunkDataset
from pipeline.analytics.scan.joined_chunks import ChunkJoiner
from pipeline.analytics.scan.listing import Chunk, Listing
from pipeline.analytics.scan.pruning import bounds_of
from pipeline.base.errors import StoreError
from pipeline.base.records import TRACKS_SCHEMA
from pipeline.storage.local_files import LocalFiles
from pipeline.storage.opening import open_files
from pipeline.tracks.layout import chunk_name
from pipeline.tracks.store import StreamStore

STREAMS, FILES, FRAMES = ("cam-1", "cam-2"), 20, 6
ALL = "SELECT * FROM {} ORDER BY stream_id, frame_index, object_id"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Two streams of 20 files (more than Thrift's short lists have), of which every fourth has no rows."""
    for stream_id in STREAMS:
        store = StreamStore(tmp_path / "out", stream_id)
        for index, first in enumerate(range(0, FILES * FRAMES, FRAMES)):
            table = rows(first, first + FRAMES - 1)
            if index % 4 == 1:
                table = table.slice(0, 0)
            store.commit(first, first + FRAMES - 1, table, events(first) if index % 3 else NO_EVENTS)
    return tmp_path / "out"


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading files one by one fails."""

    def refused(*_: Any) -> None:
        raise AssertionError("read by itself")

    monkeypatch.setattr(ChunkDataset, "_read", refused)


def one_by_one(out: Path, sql: str) -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChunkDataset, "joins_files", False)
        found: list[dict[str, Any]] = query(out, sql).to_pylist()
        return found


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("way", ["pread", "store"])
@pytest.mark.parametrize(
    "sql",
    [
        ALL.format("tracks"),
        ALL.format("events"),
        "SELECT stream_id, category, count(*) AS n FROM tracks GROUP BY ALL ORDER BY ALL",
        "SELECT stream_id, count(*) AS n FROM tracks GROUP BY ALL ORDER BY ALL",
        "SELECT count(*) AS n FROM tracks",
        "SELECT mask_rle, area FROM tracks WHERE stream_id = 'cam-2' AND frame_index > 40 ORDER BY ALL",
        "SELECT frame_index FROM tracks WHERE pts_seconds BETWEEN 1.5 AND 1.7 ORDER BY ALL",
    ],
)
def test_rows_are_those_of_files_that_are_read_one_by_one(
    out: Path, monkeypatch: pytest.MonkeyPatch, way: str, sql: str
) -> None:
    if way == "store":
        monkeypatch.delattr(os, "pread")
    found = query(out, sql).to_pylist()
    monkeypatch.undo()
    assert found == one_by_one(out, sql)
    assert found


def test_a_category_that_looks_like_a_footer_misleads_nobody(out: Path) -> None:
    table = rows(120, 125)
    for name in (
        b"\x19\x18\x04area\x15\x0c\x16\x02\x16\x04\x16\x04&\x08",
        b"\x18\x0exmem.stream_id\x18\x05cam-2\x00",
    ):
        at = table.schema.get_field_index("category")
        odd = pa.array([name.decode()] * len(table)).dictionary_encode()
        first = FILES * FRAMES + FRAMES * (name[0] == 0x18)
        frames = pa.array([first + i // 2 for i in range(len(table))])
        changed = table.set_column(at, TRACKS_SCHEMA.field("category"), odd).set_column(
            0, TRACKS_SCHEMA.field("frame_index"), frames
        )
        StreamStore(out, "cam-1").commit(first, first + FRAMES - 1, changed, NO_EVENTS)
    found = query(out, ALL.format("tracks")).to_pylist()
    assert found == one_by_one(out, ALL.format("tracks"))
    assert sum(row["area"] for row in found) > 0


@pytest.mark.parametrize("column", ["category", "object_id", "area", "presence"])
def test_a_flipped_bit_is_an_error_or_changes_nothing(out: Path, column: str) -> None:
    """Pages have checksums, neither their headers nor footers do."""
    path = out / chunk_name("tracks", "cam-1", 2 * FRAMES)
    sql = f"SELECT frame_index, {column} FROM tracks WHERE stream_id = 'cam-1' ORDER BY ALL"
    data, good = path.read_bytes(), query(out, sql).to_pylist()
    chosen, refused = random.Random(column), 0
    place = pq.read_metadata(path).row_group(0).column(TRACKS_SCHEMA.get_field_index(column))
    start = place.dictionary_page_offset or place.data_page_offset
    footer = range(len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data))
    for at in [
        *range(start, start + 24),
        *chosen.sample(range(start + 24, footer.start), 10),
        *chosen.sample(footer, 30),
    ]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << chosen.randrange(8)
        path.write_bytes(damaged)
        try:
            found = query(out, sql).to_pylist()
        except StoreError as error:
            refused += str(path) in str(error) or "is missing" in str(error)
        else:
            assert found == good, at
    assert 10 < refused < 60


@pytest.mark.usefixtures("together")
def test_only_files_of_the_time_asked_for_are_read(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    monkeypatch.setattr(os, "pread", recorded(os.pread, read))
    sql = "SELECT count(*) AS n FROM tracks WHERE {}"
    whole = f"pts_seconds BETWEEN {14 * FRAMES / 25} AND {(15 * FRAMES - 1) / 25}"
    assert query(out, sql.format(whole))["n"].to_pylist() == [2 * 2 * FRAMES]
    footers = len(STREAMS) * FILES
    assert len(read) - footers == len(STREAMS), "one column of one file of each stream"
    read.clear()
    early = "wall_time < TIMESTAMPTZ '2024-05-06 07:08:09.2+00'"
    assert query(out, sql.format(early))["n"].to_pylist() == [2 * 2 * 2]
    assert len(read) - footers <= 2 * len(STREAMS), "bounds of times are as near as a second"


@pytest.mark.parametrize(
    ("condition", "low", "high"),
    [
        ((ds.field("pts_seconds") >= 2.5) & (ds.field("pts_seconds") < 7), 2.5, 7),
        (~(ds.field("pts_seconds") <= -3) & (ds.field("area") > 5), -3, float("inf")),
        ((ds.field("pts_seconds") < 1) | (ds.field("pts_seconds") == 8), float("-inf"), 8),
        (ds.field("pts_seconds").is_null() | (ds.field("pts_seconds") > 0), 0, float("inf")),  # of values
        ((ds.field("pts_seconds") > 1) | (ds.field("area") > 5), float("-inf"), float("inf")),
    ],
)
def test_bounds_of_a_condition(condition: Any, low: float, high: float) -> None:
    found = bounds_of(condition, TRACKS_SCHEMA, "pts_seconds")
    assert found == pytest.approx((low, high), rel=1e-8)
    assert found[0] <= low
    assert found[1] >= high


def test_what_is_not_as_expected_is_left_to_others(out: Path) -> None:
    listing = Listing(open_files(out))
    chunks = listing.chunks()["cam-1"]
    joiner = ChunkJoiner(listing.files, "tracks", TRACKS_SCHEMA)
    found = joiner.read(chunks, ["area"], {})
    assert found is not None
    assert sum(found.counts) == 2 * FRAMES * FILES * 3 // 4
    assert joiner.read(chunks, ["weight"], {}) is None
    assert joiner.read([*chunks, Chunk("cam-1", 500, None, 100)], ["area"], {}) is None
    assert joiner.read([chunks[0], chunks[0]], ["area"], {}) is not None
    wrong = Chunk("cam-1", chunks[0].first, 7, chunks[0].size)  # the next file begins a frame later
    assert joiner.read([wrong], ["area"], {}) is None
    assert isinstance(listing.files, LocalFiles)
