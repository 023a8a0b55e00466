"""`publish` to Delta Lake and Iceberg: each row is there once, whatever is committed or killed."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.chunks import NO_EVENTS, fill, rows
from support.recorded import recorded

from pipeline.analytics.publishing.publish import Published, publish
from pipeline.analytics.publishing.table import PublishedTable
from pipeline.analytics.query import query
from pipeline.analytics.scan.dataset import ChunkDataset
from pipeline.base.errors import StoreError, UsageError
from pipeline.tracks.compaction import compact
from pipeline.tracks.layout import chunk_name
from pipeline.tracks.store import StreamStore

deltalake = pytest.importorskip("deltalake")

ROOT = Path(__file__).parents[4]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for stream_id in ("cam-1", "cam-2"):
        fill(tmp_path / "out", stream_id, 0, 4)
    return tmp_path / "out"


def in_delta(destination: str | Path, options: dict[str, str] | None = None) -> list[list[dict[str, Any]]]:
    """All rows of both tables, as deltalake reads them."""
    found = []
    for kind in ("tracks", "events"):
        table = deltalake.DeltaTable(f"{destination}/{kind}", storage_options=options).to_pyarrow_table()
        found.append(sorted(table.to_pylist(), key=repr))
    return found


def in_tables(to: str, destination: str | Path) -> list[list[dict[str, Any]]]:
    """All rows of both tables, as the format's own library reads them."""
    if to == "delta":
        return in_delta(destination)
    if to == "ducklake":
        return in_ducklake(Path(destination))
    from pyiceberg.catalog.sql import SqlCatalog

    catalog = SqlCatalog("xmem", uri=f"sqlite:///{destination}/catalog.db")
    tables = [catalog.load_table(("xmem", kind)).scan().to_arrow() for kind in ("tracks", "events")]
    return [sorted(table.to_pylist(), key=repr) for table in tables]


def in_ducklake(destination: Path) -> list[list[dict[str, Any]]]:
    """All rows of both tables, by the catalog; DuckDB's extension, which reads them, has to be downloaded."""
    found: list[list[dict[str, Any]]] = []
    with closing(sqlite3.connect(destination / "catalog.sqlite")) as catalog:
        for kind in ("tracks", "events"):
            files = catalog.execute(
                "SELECT f.path, f.record_count, f.file_size_bytes, f.footer_size FROM ducklake_data_file f "
                "JOIN ducklake_table t USING (table_id) WHERE t.table_name = ? AND f.end_snapshot IS NULL",
                (kind,),
            ).fetchall()
            rows = []
            for name, count, size, footer in files:
                data = (destination / kind / name).read_bytes()
                assert (len(data), int.from_bytes(data[-8:-4], "little")) == (size, footer)
                table = pq.read_table(pa.BufferReader(data))
                assert table.num_rows == count
                ids = [item.metadata[b"PARQUET:field_id"] for item in table.schema]
                assert ids == [str(number).encode() for number in range(1, len(ids) + 1)]
                rows += table.to_pylist()
            found.append(sorted(rows, key=repr))
            (total,) = catalog.execute(
                "SELECT record_count FROM ducklake_table_stats JOIN ducklake_table USING (table_id) "
                "WHERE table_name = ?",
                (kind,),
            ).fetchone()
            assert total == len(rows)
    return found


def needs_iceberg() -> None:
    pytest.importorskip("pyiceberg", reason="pyiceberg is not installed: pip install -e '.[iceberg]'")


@pytest.fixture(params=["delta", "iceberg", "ducklake"])
def to(request: pytest.FixtureRequest) -> str:
    if request.param == "iceberg":
        needs_iceberg()
    return str(request.param)


def in_views(root: str | Path, options: dict[str, Any] | None = None) -> list[list[dict[str, Any]]]:
    found = [query(root, f"FROM {kind}", options).to_pylist() for kind in ("tracks", "events")]
    return [sorted(kind, key=repr) for kind in found]


def counts(done: Published) -> tuple[int, int, int]:
    return done.rows, done.events, done.commits


def test_a_run_appends_what_is_new(out: Path, to: str) -> None:
    assert counts(publish(out, to=to)) == (80, 8, 2)
    assert in_tables(to, out / to) == in_views(out)
    assert counts(publish(out, to=to)) == (0, 0, 0)
    fill(out, "cam-2", 20, 2)
    fill(out, "cam-3", 0, 1)
    assert counts(publish(out, to=to)) == (30, 2, 2)
    assert in_tables(to, out / to) == in_views(out)
    assert len(list((out / to / "tracks" / "_xmem").iterdir())) == 1


def test_types_of_delta(out: Path) -> None:
    publish(out)
    schema = deltalake.DeltaTable(str(out / "delta" / "tracks")).to_pyarrow_table().schema
    assert str(schema.field("stream_id").type) == "string"
    assert str(schema.field("wall_time").type) == "timestamp[us, tz=UTC]"


def test_small_commits_and_chunks_without_rows(out: Path, to: str) -> None:
    store = StreamStore(out, "empty")
    store.commit(0, 4, rows(0, 4).slice(0, 0), NO_EVENTS)
    assert publish(out, out.parent / "elsewhere", to=to, commit_bytes=1).commits == 18
    assert in_tables(to, out.parent / "elsewhere") == in_views(out)
    assert counts(publish(out, out.parent / "elsewhere", to=to)) == (0, 0, 0)


def test_compacted_copies_are_read_in_place_of_chunks(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(out, "cam-3", 0, 1)
    publish(out)
    fill(out, "cam-2", 20, 2)
    fill(out, "cam-3", 5, 3)
    compact(out)
    fill(out, "cam-1", 20, 1)
    opened: list[Any] = []
    monkeypatch.setattr(ChunkDataset, "_read_all", recorded(ChunkDataset._read_all, opened, 1))
    assert publish(out).rows == 60
    assert {(chunk.stream_id, chunk.first) for chunks in opened for chunk in chunks} == {("cam-1", 20)}
    assert in_delta(out / "delta") == in_views(out)


def test_streams_that_were_started_over_or_removed(out: Path, to: str) -> None:
    StreamStore(out, "empty").commit(0, 4, rows(0, 4).slice(0, 0), NO_EVENTS)
    publish(out, to=to)
    StreamStore(out, "cam-1").restart()
    StreamStore(out, "empty").restart()
    # The first chunks are those of before: only a later one tells.
    fill(out, "cam-1", 0, 3)
    fill(out, "cam-1", 15, 2, salt=3)
    shutil.rmtree(out / "tracks" / "stream_id=cam-2")
    shutil.rmtree(out / "events" / "stream_id=cam-2")
    done = publish(out, to=to)
    assert done.replaced == {"cam-1", "cam-2", "empty"}
    assert in_tables(to, out / to) == in_views(out)
    assert counts(publish(out, to=to)) == (0, 0, 0)


def test_a_stream_without_rows_that_was_started_over(tmp_path: Path, to: str) -> None:
    out = tmp_path / "out"
    StreamStore(out, "a").commit(0, 4, rows(0, 4).slice(0, 0), NO_EVENTS)
    publish(out, to=to)
    StreamStore(out, "a").restart()
    fill(out, "a", 0, 1)
    assert counts(publish(out, to=to))[:2] == (10, 0)
    assert in_tables(to, out / to) == in_views(out)


def test_a_damaged_stream_is_named_and_the_others_are_published(out: Path) -> None:
    (out / chunk_name("tracks", "cam-1", 10)).unlink()
    done = publish(out)
    assert "cam-1/frames-000000000010.parquet is missing" in done.skipped["cam-1"]
    assert done.rows == 40
    assert {row["stream_id"] for row in in_delta(out / "delta")[0]} == {"cam-2"}


def test_a_run_that_another_overtakes_publishes_nothing_twice(
    out: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = PublishedTable.append
    overtaken: list[int] = []

    def late(self: Any, *arguments: Any) -> bool:
        if not overtaken:
            overtaken.append(1)
            overtaken.append(publish(out, to=to).rows)
            fill(out, "cam-1", 20, 1)  # not listed by the first run
        return append(self, *arguments)

    monkeypatch.setattr(PublishedTable, "append", late)
    assert publish(out, to=to).rows == 0
    assert overtaken == [1, 80]
    assert publish(out, to=to).rows == 10
    assert in_tables(to, out / to) == in_views(out)


KILLED = """
import os, signal, sys
from pipeline.analytics.publishing import publish as publishing
left, when, to = [int(sys.argv[2])], sys.argv[3], sys.argv[4]
tables = {"delta": publishing.DeltaTable, "iceberg": publishing.IcebergTable}
table = tables.get(to, publishing.DuckLakeTable)
write = table._write
def killed(self, *arguments):
    left[0] -= 1
    if left[0] < 0 and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, *arguments)
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
table._write = killed
publishing.publish(sys.argv[1], commit_bytes=4000, to=to)
"""


@pytest.mark.process
@pytest.mark.parametrize(("commits", "when"), [(0, "after"), (2, "before"), (3, "after")])
def test_a_run_that_was_killed_is_continued_by_the_next(out: Path, to: str, commits: int, when: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(out), str(commits), when, to]
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL
    publish(out, to=to)
    assert in_tables(to, out / to) == in_views(out)
    assert len(list((out / to / "tracks" / "_xmem").iterdir())) == 1


def test_where_iceberg_cannot_be_published_to(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_iceberg()
    with pytest.raises(UsageError, match=r"cannot be written to 's3://x/tracks': their catalog is an SQLite"):
        publish(out, "s3://x", to="iceberg")
    with pytest.raises(UsageError, match="'hudi' is not a table format that can be published to: delta, ice"):
        publish(out, to="hudi")
    publish(out, to="iceberg")
    from pyiceberg.catalog.sql import SqlCatalog

    catalog = SqlCatalog("xmem", uri=f"sqlite:///{out}/iceberg/catalog.db")
    with catalog.load_table("xmem.tracks").transaction() as transaction:
        transaction.set_properties({"commit.retry.num-retries": "4"})
    with pytest.raises(StoreError, match=r"lacks the property commit\.retry\.num-retries = 0"):
        publish(out, to="iceberg")
    monkeypatch.setattr("pipeline.analytics.publishing.publish.find_spec", lambda _: None)
    with pytest.raises(
        UsageError, match=r"pyiceberg is not installed: pip install 'xmem-pipeline\[iceberg\]'"
    ):
        publish(out, to="iceberg")


def test_what_cannot_be_published_to(out: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"cannot be written to 'memory://x/tracks': give a local folder or a"
    ):
        publish(out, "memory://x")
    with pytest.raises(UsageError, match="commit size of 0 bytes is not allowed"):
        publish(out, commit_bytes=0)
    deltalake.write_deltalake(str(tmp_path / "other" / "tracks"), query(out, "SELECT 1 AS x"))
    with pytest.raises(StoreError, match=r"other/tracks has the columns x, not those of tracks"):
        publish(out, tmp_path / "other")
    publish(out)
    (progress,) = (out / "delta" / "tracks" / "_xmem").iterdir()
    progress.write_text("{")
    with pytest.raises(StoreError, match=r"\.json is damaged: remove that table's folder, and run"):
        publish(out)
    progress.unlink()
    with pytest.raises(StoreError, match=r"\.json is missing: remove that table's folder"):
        publish(out)
    shutil.rmtree(out / "delta")
    publish(out)
    assert in_delta(out / "delta") == in_views(out)


@pytest.mark.s3
def test_on_s3(request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue("s3_server")
    root, options = server.uri(f"delta-{secrets.token_hex(6)}"), server.options
    fill(root, "a", 0, 3, options=options)
    assert publish(root, None, options).rows == 30
    fill(root, "a", 15, 1, options=options)
    fill(root, "b", 0, 2, options=options)
    assert publish(root, None, options).rows == 30
    assert publish(root, None, options).commits == 0
    reading = {**server.environment, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
    assert in_delta(f"{root}/delta", reading) == in_views(root, options)


def test_the_command(out: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    code, printed, said = call("publish", out, "--to", "delta")
    assert (code, printed) == (0, "")
    assert f"80 rows and 8 events added to {out}/delta in 2 commits" in said
    code, _, said = call("publish", out, "--to", "ducklake")
    assert code == 0
    assert f"80 rows and 8 events added to {out}/ducklake in 2 commits" in said
    code, _, said = call("publish", out, "--to", "ducklake", "-o", "s3://lake/x")
    assert code == 2
    assert "DuckLake tables cannot be written to" in said
    assert (
        "--to 'csv' is not a table format: delta, iceberg, ducklake" in call("publish", out, "--to", "csv")[2]
    )
    (out / chunk_name("tracks", "cam-1", 0)).unlink()
    code, _, said = call("publish", out, "-o", out.parent / "new")
    assert code == 1
    assert "not published, since files are missing or damaged: cam-1" in said


def test_what_the_catalog_of_ducklake_says(out: Path) -> None:
    """Names, types and least and greatest values, by which readers choose files."""
    publish(out, to="ducklake")
    with closing(sqlite3.connect(out / "ducklake" / "catalog.sqlite")) as catalog:
        columns = catalog.execute(
            "SELECT column_name, column_type, nulls_allowed FROM ducklake_column WHERE table_id = 1 "
            "ORDER BY column_order"
        ).fetchall()
        assert columns[:4] == [
            ("stream_id", "varchar", 0),
            ("frame_index", "int64", 0),
            ("pts_seconds", "float64", 1),
            ("wall_time", "timestamptz", 1),
        ]
        stats = catalog.execute(
            "SELECT value_count, null_count, min_value, max_value, contains_nan "
            "FROM ducklake_file_column_stats WHERE table_id = 1 AND column_id IN (1, 2, 3) "
            "ORDER BY data_file_id, column_id"
        ).fetchall()
        assert stats[:2] == [(80, 0, "cam-1", "cam-2", None), (80, 0, "0", "19", None)]
        assert stats[2][4] == 0
        fill(out, "cam-0", 0, 40)
        publish(out, to="ducklake")
        of_all = catalog.execute(
            "SELECT contains_null, min_value, max_value FROM ducklake_table_column_stats "
            "WHERE table_id = 1 AND column_id IN (1, 2) ORDER BY column_id"
        ).fetchall()
        assert of_all == [(0, "cam-0", "cam-2"), (0, "0", "199")]
        changes = catalog.execute("SELECT changes_made FROM ducklake_snapshot_changes ORDER BY snapshot_id")
        assert [made for (made,) in changes] == [
            'created_schema:"main"',
            'created_table:"main"."tracks"',
            "inserted_into_table:1",
            'created_table:"main"."events"',
            "inserted_into_table:2",
            "inserted_into_table:1",
            "inserted_into_table:2",
        ]
        catalog.execute("UPDATE ducklake_metadata SET value = '9.0' WHERE key = 'version'")
        catalog.commit()
    with pytest.raises(StoreError, match=r"has version '9\.0', and this xmem writes 1\.0"):
        publish(out, to="ducklake")


def test_rows_that_others_deleted_from_ducklake_are_not_brought_back(out: Path) -> None:
    publish(out, to="ducklake")
    with closing(sqlite3.connect(out / "ducklake" / "catalog.sqlite")) as catalog:
        catalog.execute("INSERT INTO ducklake_delete_file (delete_file_id, table_id) VALUES (9, 1)")
        catalog.commit()
    shutil.rmtree(out / "tracks" / "stream_id=cam-1")
    with pytest.raises(StoreError, match="another program has deleted or changed rows"):
        publish(out, to="ducklake")


def test_the_command_with_iceberg(out: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    needs_iceberg()
    code, _, said = call("publish", out, "--to", "iceberg")
    assert code == 0
    assert f"80 rows and 8 events added to {out}/iceberg in 2 commits" in said
