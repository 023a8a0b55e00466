"""Compacted copies: no row is lost or there twice, whoever writes, restarts or is killed meanwhile."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from support.chunks import FRAMES, fill, rows
from support.opened_chunks import opened_chunks
from support.recorded import recorded

from pipeline.analytics.query import query
from pipeline.analytics.scan.copy_reader import CopyFile, CopyFiles
from pipeline.analytics.scan.dataset import ChunkDataset
from pipeline.base.errors import StoreError, UsageError
from pipeline.storage.opening import open_files
from pipeline.tracks import compaction
from pipeline.tracks.compaction import compact
from pipeline.tracks.copies import copy_path, is_withdrawn, load_copies, plan_name
from pipeline.tracks.layout import chunk_name
from pipeline.tracks.store import StreamStore

STREAMS, CHUNKS = ("cam-1", "cam-2", "door-1"), 6
TESTS = Path(__file__).parents[2]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for stream_id in STREAMS:
        fill(tmp_path / "out", stream_id)
    return tmp_path / "out"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The chunk files that were read by themselves since it was last asked."""
    return opened_chunks(monkeypatch)


WHERE = "SELECT * FROM tracks WHERE stream_id = 'cam-2' AND frame_index BETWEEN 3 AND 21 ORDER BY ALL"


def answer(out: str | Path, options: dict[str, Any] | None = None) -> list[list[dict[str, Any]]]:
    """All rows of both views."""
    return [query(out, f"FROM {kind} ORDER BY ALL", options).to_pylist() for kind in ("tracks", "events")]


def plain(out: Path, kind: str = "tracks") -> list[tuple[Any, ...]]:
    """What DuckDB finds by itself in the compacted folder: stream, rows, sum of frame numbers."""
    sql = "SELECT stream_id, count(*), sum(frame_index)::BIGINT FROM read_parquet(?) GROUP BY 1 ORDER BY 1"
    found = list((out / "compacted" / kind).glob("*.parquet"))
    return duckdb.execute(sql, [str(out / "compacted" / kind / "*.parquet")]).fetchall() if found else []


def expected(out: Path, kind: str = "tracks") -> list[tuple[Any, ...]]:
    sql = f"SELECT stream_id, count(*) n, sum(frame_index)::BIGINT s FROM {kind} GROUP BY 1 ORDER BY 1"
    return [tuple(row.values()) for row in query(out, sql).to_pylist()]


def test_the_rows_are_read_from_few_files_and_are_the_same(
    out: Path, opened: Callable[[], list[str]]
) -> None:
    before = answer(out)
    assert len(opened()) == 2 * len(STREAMS) * CHUNKS
    own = {path: path.read_bytes() for path in out.rglob("frames-*.parquet")}
    done = compact(out, file_bytes=12_000)
    assert (done.chunks, done.rows, done.skipped) == (18, 180, {})
    assert 1 < done.files < 18
    assert len(list((out / "compacted" / "tracks").iterdir())) == done.files
    assert answer(out) == before
    assert opened() == []
    assert {path: path.read_bytes() for path in out.rglob("frames-*.parquet")} == own
    again = compact(out)
    assert (again.files, again.chunks) == (0, 0)


@pytest.mark.parametrize(
    "where",
    [
        "stream_id = 'cam-2'",
        "stream_id = 'cam-1' AND frame_index = 7",
        "frame_index BETWEEN 8 AND 11",
        "stream_id LIKE 'cam%' AND area > 12",
        "pts_seconds > 0.9 OR stream_id = 'none'",
        "wall_time < TIMESTAMPTZ '2024-05-06 07:08:10+00'",
        "stream_id IN ('door-1', 'cam-1') AND category IS NULL",
    ],
)
def test_conditions_choose_the_rows_that_they_choose_without(
    out: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sql = f"SELECT * FROM tracks WHERE {where} ORDER BY ALL"
    before = query(out, sql).to_pylist()
    compact(out, file_bytes=12_000)
    assert query(out, sql).to_pylist() == before
    assert before
    without_duckdbs_reader(monkeypatch)
    assert query(out, sql).to_pylist() == before


def test_other_readers_find_each_row_once(out: Path) -> None:
    compact(out, file_bytes=12_000)
    fill(out, "cam-1", CHUNKS * FRAMES, 2)
    compact(out)
    assert plain(out) == expected(out)
    assert plain(out, "events") == expected(out, "events")
    table = ds.dataset(out / "compacted" / "tracks").to_table()
    assert table.num_rows == sum(count for _, count, _ in expected(out))
    assert table.schema.names[:2] == ["stream_id", "frame_index"]
    for path in (out / "compacted" / "tracks").iterdir():
        found = pq.read_table(path, columns=["stream_id", "frame_index", "object_id"]).to_pylist()
        assert [*map(tuple, map(dict.values, found))] == sorted(map(tuple, map(dict.values, found)))


def test_what_is_committed_later_is_read_beside_the_copies(
    out: Path, opened: Callable[[], list[str]]
) -> None:
    compact(out)
    fill(out, "cam-2", CHUNKS * FRAMES, 2)
    fill(out, "new", 0, 1)
    found = {row[0]: row[1] for row in expected(out)}
    assert found == {"cam-1": 60, "cam-2": 80, "door-1": 60, "new": 10}
    assert opened() == ["cam-2/30", "cam-2/35", "new/0"]
    assert compact(out).chunks == 3
    assert plain(out) == expected(out)


def without_duckdbs_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a version of DuckDB that takes no file systems."""

    def none(*_: Any) -> None:
        raise duckdb.Error("no file systems")

    monkeypatch.setattr(CopyFiles, "__init__", none)


def test_only_row_groups_of_the_streams_asked_for_are_read_by_duckdb(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "_ROWS_PER_GROUP", 30)
    compact(out)
    (copy,) = (out / "compacted" / "tracks").iterdir()
    metadata, size = pq.read_metadata(copy), copy.stat().st_size
    starts = [metadata.row_group(i).column(0).dictionary_page_offset for i in range(6)]
    reads: list[int] = []
    read = CopyFile.read

    def note(self: CopyFile, start: int, count: int) -> bytes:
        if start + count < size:  # else it is the footer
            reads.append(bisect_right(starts, start) - 1)
        return read(self, start, count)

    monkeypatch.setattr(CopyFile, "read", note)
    sql = "SELECT count(*) n, sum(area)::BIGINT m FROM tracks WHERE stream_id = 'cam-2'"
    expected = query(out, sql).to_pylist()

    def groups() -> set[int]:
        found = {*reads}
        reads.clear()
        return found

    assert groups() == {2, 3}
    assert [row["n"] for row in expected] == [60]
    query(out, sql + " AND frame_index < 3")
    assert groups() == {2}


def test_only_row_groups_of_the_streams_asked_for_are_read(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_duckdbs_reader(monkeypatch)
    monkeypatch.setattr(compaction, "_ROWS_PER_GROUP", 30)
    compact(out)
    groups: list[Any] = []
    monkeypatch.setattr(ChunkDataset, "_read_copy", recorded(ChunkDataset._read_copy, groups, 4))
    sql = "SELECT count(*) n FROM tracks WHERE stream_id = 'cam-2'"
    assert query(out, sql)["n"].to_pylist() == [60]
    assert sum(map(len, groups)) == 2, "of six"
    groups.clear()
    assert query(out, sql + " AND frame_index < 3")["n"].to_pylist() == [6]
    assert sum(map(len, groups)) == 1


def test_a_stream_that_is_started_over_leaves_no_copies(out: Path) -> None:
    compact(out)
    StreamStore(out, "cam-1").restart()
    assert plain(out) == [], "the one file had its rows"
    fill(out, "cam-1", 0, CHUNKS, salt=3)
    areas = "SELECT area FROM tracks WHERE stream_id = 'cam-1' AND object_id = 1 ORDER BY frame_index"
    new = rows(0, CHUNKS * FRAMES - 1, 3).to_pylist()
    assert query(out, areas)["area"].to_pylist() == [row["area"] for row in new if row["object_id"] == 1]
    compact(out)
    assert plain(out) == expected(out)
    assert query(out, areas)["area"].to_pylist() == [row["area"] for row in new if row["object_id"] == 1]


@pytest.mark.parametrize("when", ["planned", "read", "written"])
def test_a_stream_that_is_started_over_while_it_is_compacted(
    out: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    content = compaction._content
    seen: list[str] = []

    def meanwhile(*arguments: Any) -> Any:
        found = None if when == "planned" else content(*arguments)
        if not seen:
            seen.append(when)
            StreamStore(out, "cam-1").restart()
            fill(out, "cam-1", 0, CHUNKS, salt=3)  # files of the same names, with other rows
        return content(*arguments) if found is None else found

    if when == "written":

        def after(*arguments: Any) -> bool:
            if not seen:
                seen.append(when)
                StreamStore(out, "cam-1").restart()
                fill(out, "cam-1", 0, CHUNKS, salt=3)
            return is_withdrawn(*arguments)

        monkeypatch.setattr(compaction, "is_withdrawn", after)
    else:
        monkeypatch.setattr(compaction, "_content", meanwhile)
    compact(out)
    compact(out)
    assert seen == [when]
    new = rows(0, CHUNKS * FRAMES - 1, 3)["mask_rle"].to_pylist()
    sql = "SELECT mask_rle FROM {} WHERE stream_id = 'cam-1' ORDER BY frame_index, object_id"
    assert query(out, sql.format("tracks"))["mask_rle"].to_pylist() == new
    copied = duckdb.execute(
        sql.format("read_parquet(?)"), [str(out / "compacted/tracks/*.parquet")]
    ).fetchall()
    assert [mask for (mask,) in copied] == new
    assert plain(out) == expected(out)


def test_a_stream_that_was_removed_by_hand(out: Path) -> None:
    compact(out)
    for kind in ("tracks", "events"):
        shutil.rmtree(out / kind / "stream_id=cam-2")
    assert [row[0] for row in expected(out)] == ["cam-1", "door-1"]
    compact(out)
    assert plain(out) == expected(out)


def test_a_missing_file_is_named_and_other_streams_are_compacted(
    out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (out / chunk_name("tracks", "cam-2", 10)).unlink()
    with caplog.at_level(logging.WARNING):
        done = compact(out)
    assert [*done.skipped] == ["cam-2"]
    assert done.chunks == 12
    assert "cam-2/frames-000000000010.parquet is missing" in caplog.text
    assert [row[0] for row in plain(out)] == ["cam-1", "door-1"]
    with pytest.raises(StoreError, match=r"cam-2/frames-000000000010\.parquet is missing"):
        expected(out)


def test_a_file_that_is_missing_behind_the_copies_is_named(out: Path) -> None:
    compact(out)
    fill(out, "cam-2", CHUNKS * FRAMES, 2)
    (out / chunk_name("tracks", "cam-2", CHUNKS * FRAMES)).unlink()
    with pytest.raises(StoreError, match=r"cam-2/frames-000000000030\.parquet is missing"):
        expected(out)


def test_a_damaged_copy_is_named_and_can_be_removed(out: Path) -> None:
    before = answer(out)
    compact(out)
    (path,) = (out / "compacted" / "tracks").iterdir()
    data = bytearray(path.read_bytes())
    data[200] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(
        StoreError,
        match=r"000001-0000\.parquet cannot be read .*: remove the folder compacted/, which holds only",
    ):
        answer(out)
    path.unlink()
    assert answer(out) == before
    compact(out)
    assert (answer(out), plain(out)) == (before, expected(out))
    shutil.rmtree(out / "compacted")
    assert answer(out) == before


def test_a_damaged_plan_is_named_and_its_files_are_not_read(
    out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = answer(out)
    compact(out)
    (out / plan_name(1)).write_text('{"format_ver')
    with caplog.at_level(logging.WARNING):
        assert answer(out) == before
    assert "plans/000001.json is damaged: remove the folder compacted/" in caplog.text
    with pytest.raises(StoreError, match=r"000001\.json is damaged"):
        compact(out)
    (out / plan_name(1)).write_text(json.dumps({"format_version": 9, "files": []}))
    with pytest.raises(StoreError, match=r"has format version 9, and this xmem reads 1: upgrade it"):
        compact(out)


def test_links_in_the_folder_are_refused(out: Path, tmp_path: Path) -> None:
    compact(out)
    os.rename(out / "compacted", tmp_path / "elsewhere")
    (out / "compacted").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="compacted is a symbolic link"):
        answer(out)


def test_a_folder_without_tracks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no output folder of xmem"):
        compact(tmp_path)
    with pytest.raises(UsageError, match="file size of 0 bytes is not allowed"):
        compact(tmp_path, file_bytes=0)


KILLED = """
import os, signal, sys
from pipeline.storage.local_files import LocalFiles
from pipeline.tracks.compaction import compact
create, left = LocalFiles.create, [int(sys.argv[2])]
def killed(self, *arguments):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return create(self, *arguments)
LocalFiles.create = killed
compact(sys.argv[1], file_bytes=12_000)
"""


@pytest.mark.process
@pytest.mark.parametrize("creations", [1, 2, 4])
def test_a_compaction_that_was_killed_is_finished_by_the_next(out: Path, creations: int) -> None:
    """Killed with a plan, with events without their tracks, and between two files."""
    before = answer(out)
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(out), str(creations)], env=environment, timeout=120
    )
    assert done.returncode == -signal.SIGKILL
    assert len(load_copies(open_files(out)).files) > 1, "planned"
    assert answer(out) == before
    there = {(stream, count) for stream, count, _ in plain(out)}
    assert all(count <= 60 for _, count in there)
    fill(out, "cam-1", CHUNKS * FRAMES, 2)
    compact(out, file_bytes=12_000)
    assert plain(out) == expected(out)
    assert plain(out, "events") == expected(out, "events")
    assert not list((out / ".tmp").iterdir())


def test_compactions_beside_a_writer_and_a_reader(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(out, "a", 0, 2)
    failures: list[BaseException] = []
    stop = threading.Event()

    def repeat(act: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                act()
        except BaseException as error:
            failures.append(error)

    def read() -> None:
        found = query(
            out, "SELECT count(*) n, count(DISTINCT (frame_index, object_id)) d FROM tracks"
        ).to_pylist()[0]
        assert found["n"] == found["d"], found

    threads = [
        threading.Thread(target=repeat, args=(act,))
        for act in (lambda: compact(out, file_bytes=5000), lambda: compact(out, file_bytes=9000), read)
    ]
    for thread in threads:
        thread.start()
    fill(out, "a", 2 * FRAMES, 40)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    fill(out, "a", 42 * FRAMES, 2)
    compact(out)
    assert plain(out) == expected(out) == [("a", 440, sum(2 * f for f in range(44 * FRAMES)))]


def hourly(out: Path | str, runs: int, options: dict[str, Any] | None = None, *, first: int = 0) -> list[int]:
    """Two chunks and a compaction at a time; the number of merged files of each run."""
    merged = []
    for run in range(first, first + runs):
        fill(out, "cam-1", run * FRAMES, 1, options=options)
        fill(out, "cam-2", run * FRAMES, 1, options=options)
        merged.append(compact(out, options).merged)
    return merged


def test_small_files_of_many_runs_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert hourly(out, 8) == [0] * 7 + [8]
    monkeypatch.setattr(compaction, "_MERGED", 3)
    merged = [8, *hourly(out, 12, first=8)]
    assert max(merged) >= 6, "three, and then three of three"
    live = len(list((out / "compacted" / "tracks").iterdir()))
    assert live <= 5, "of 20"
    there = [path.relative_to(out).parts[1] for path in (out / "compacted").rglob("*.json")]
    assert there.count("plans") == live
    # Each merge takes several files and leaves one; of each plan that is gone there is one file.
    assert there.count("void") == sum(merged)
    assert plain(out) == expected(out)
    assert plain(out, "events") == expected(out, "events")


def test_large_files_are_not_merged(out: Path) -> None:
    size = max(path.stat().st_size for path in out.rglob("frames-*.parquet"))
    first = compact(out, file_bytes=size)
    assert first.files >= 9
    assert first.merged == compact(out, file_bytes=size).merged == 0


def test_files_stay_as_they_are_if_a_chunk_cannot_be_read(
    out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = answer(out)
    monkeypatch.setattr(compaction, "_MERGED", 99)
    compact(out, file_bytes=1)
    monkeypatch.setattr(compaction, "_MERGED", 8)
    path = out / chunk_name("tracks", "cam-2", 10)
    data = bytearray(path.read_bytes())
    data[100] ^= 0xFF
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        done = compact(out)
    assert [*done.skipped] == ["cam-2"]
    assert "cam-2/frames-000000000010.parquet cannot be read" in caplog.text
    assert done.merged == 12, "those of the other streams"
    assert answer(out) == before, "from the copy"


@pytest.mark.process
@pytest.mark.parametrize("creations", [3, 18, 20])
def test_a_merge_that_was_killed_is_finished_by_the_next(
    out: Path, monkeypatch: pytest.MonkeyPatch, creations: int
) -> None:
    """Killed between the markers of 18 files, before the plan, and between events and tracks."""
    before = answer(out)
    monkeypatch.setattr(compaction, "_MERGED", 99)
    compact(out, file_bytes=1)
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, "-c", KILLED.replace("12_000", "10**9"), str(out), str(creations)]
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL
    assert answer(out) == before
    copied = query(out, "SELECT count(*) n FROM tracks")["n"].to_pylist()[0]
    assert sum(count for _, count, _ in plain(out)) <= copied, "nothing is there twice"
    monkeypatch.setattr(compaction, "_MERGED", 8)
    compact(out)
    assert answer(out) == before
    assert plain(out) == expected(out)
    assert plain(out, "events") == expected(out, "events")
    assert len(list((out / "compacted" / "tracks").iterdir())) < 8


@pytest.mark.parametrize("store", ["disk", "memory"])
def test_a_file_that_is_merged_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    root = str(tmp_path / "out") if store == "disk" else f"memory://{secrets.token_hex(6)}/out"
    without_duckdbs_reader(monkeypatch)
    monkeypatch.setattr(compaction, "_ROWS_PER_GROUP", 30)
    hourly(root, 7)
    monkeypatch.setattr("pipeline.analytics.scan.parquet_file.WHOLE_BYTES", 0)
    monkeypatch.setattr("pipeline.analytics.scan.parquet_file._SMALL_BYTES", 0)
    before = [answer(root), query(root, WHERE).to_pylist()]
    read = ChunkDataset._read_copy
    merged: list[int] = []

    def late(self: ChunkDataset, *arguments: Any) -> Any:
        if not merged:
            monkeypatch.setattr(compaction, "_MERGED", 2)
            merged.append(compact(root).merged)
            assert merged[0] >= 7
        return read(self, *arguments)

    monkeypatch.setattr(ChunkDataset, "_read_copy", late)
    monkeypatch.setattr("pipeline.analytics.scan.dataset._REMOTE_THREADS", 1)
    monkeypatch.setattr("pipeline.analytics.scan.dataset._LOCAL_THREADS", 1)
    after = [answer(root), query(root, WHERE).to_pylist()]
    assert merged
    assert after == before


@pytest.mark.parametrize("store", ["memory", pytest.param("s3", marks=pytest.mark.s3)])
def test_on_a_store(request: pytest.FixtureRequest, store: str) -> None:
    options: dict[str, Any] = {}
    root = f"memory://{secrets.token_hex(6)}/out"
    if store == "s3":
        server = request.getfixturevalue("s3_server")
        root, options = server.uri(f"c-{secrets.token_hex(6)}"), server.options
    for stream_id in ("a", "b"):
        fill(root, stream_id, 0, 3, options=options)
    before = answer(root, options)
    assert compact(root, options).chunks == 6
    assert answer(root, options) == before
    files = open_files(root, options)
    table = pq.read_table(pa.BufferReader(files.read(copy_path("tracks", "000001-0000"))))
    assert table.num_rows == len(before[0])
    StreamStore(root, "a", options).restart()
    assert [
        row["stream_id"] for row in query(root, "SELECT DISTINCT stream_id FROM tracks", options).to_pylist()
    ] == ["b"]
    assert files.names("compacted/tracks") == []
