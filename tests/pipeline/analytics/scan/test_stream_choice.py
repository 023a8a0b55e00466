"""Patterns on `stream_id` and joins with `streams` choose which files are opened, and change no result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pytest
from support.chunks import events, rows
from support.recorded import recorded

from pipeline import Archive, open_archive
from pipeline.analytics.query import connect, query
from pipeline.analytics.scan.dataset import ChunkDataset
from pipeline.analytics.scan.parquet_file import read_metadata
from pipeline.analytics.scan.stream_choice import needed_streams, statement_tree, streams_use
from pipeline.tracks.store import StreamStore

STREAMS = {"cam-1": "north", "cam-2": "south", "door-1": "north", "Door-2": "south"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four streams of one file each, with a manifest's column `site`."""
    root = tmp_path_factory.mktemp("choice") / "out"
    for stream_id, site in STREAMS.items():
        store = StreamStore(root, stream_id)
        store.commit(0, 4, rows(0, 4), events(0))
        store.write_record({"state": "finished", "width": 64, "extra": {"site": site}})
    StreamStore(root, "planned").write_record({"state": "queued", "extra": {"site": "north"}})
    return root


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    names: set[str] = set()
    read = ChunkDataset._read_all

    def note(self: ChunkDataset, chunks: Any, *arguments: Any) -> Any:
        names.update(f"{self._kind}/{chunk.stream_id}" for chunk in chunks)
        return read(self, chunks, *arguments)

    monkeypatch.setattr(ChunkDataset, "_read_all", note)
    return names


def tables(out: Path, sql: str) -> list[dict[str, Any]]:
    """The result over tables that hold the views' rows, where nothing is left out."""
    with connect(out) as connection:
        for view in ("tracks", "events", "streams", "objects", "masks"):
            connection.execute(f"CREATE TEMP TABLE {view}_rows AS FROM {view}")
        for view in ("tracks", "events", "streams", "objects", "masks"):
            connection.execute(f"CREATE OR REPLACE TEMP VIEW {view} AS FROM {view}_rows")
        found: list[dict[str, Any]] = connection.sql(sql).to_arrow_table().to_pylist()
        return found


CHOOSING = [
    ("FROM tracks WHERE stream_id LIKE 'cam-%' AND area > 0", "cam-1 cam-2"),
    ("FROM tracks WHERE stream_id NOT LIKE '%-1' AND stream_id ILIKE 'door%'", "Door-2"),
    (
        "FROM tracks t WHERE lower(t.stream_id) LIKE 'door%' OR t.stream_id = 'cam-2'",
        "cam-2 door-1 Door-2",
    ),
    ("FROM tracks WHERE regexp_matches(stream_id, '^cam-[2-9]$')", "cam-2"),
    ("FROM tracks WHERE stream_id GLOB 'cam*' AND NOT starts_with(stream_id, 'cam-2')", "cam-1"),
    ("FROM masks WHERE stream_id LIKE 'door%'", "door-1"),
    ("FROM objects WHERE split_part(stream_id, '-', 2) = '2'", "cam-2 Door-2"),
    (
        "WITH few AS (FROM tracks WHERE stream_id LIKE 'cam-1') "
        "FROM few a JOIN few b USING (frame_index)",
        "cam-1",
    ),
    (
        "SELECT t.*, site FROM tracks t JOIN streams s USING (stream_id) WHERE s.site = 'north'",
        "cam-1 door-1",
    ),
    (
        "SELECT t.* FROM tracks t JOIN streams ON streams.stream_id = t.stream_id "
        "WHERE site LIKE 'so%' AND t.stream_id LIKE 'cam%' AND width = 64",
        "cam-2",
    ),
    ("FROM streams s JOIN tracks t USING (stream_id) WHERE site IS NULL OR site = 'x'", ""),
    ("FROM tracks WHERE stream_id LIKE 'nothing%'", ""),
]  # fmt: skip


@pytest.mark.parametrize(("sql", "streams"), CHOOSING)
def test_only_the_files_of_the_streams_that_can_match_are_opened(
    out: Path, opened: set[str], sql: str, streams: str
) -> None:
    found = query(out, f"SELECT * FROM ({sql}) ORDER BY ALL").to_pylist()
    assert opened == {f"tracks/{stream_id}" for stream_id in streams.split()}
    assert found == tables(out, f"SELECT * FROM ({sql}) ORDER BY ALL")
    assert bool(found) == bool(streams)


@pytest.mark.parametrize(("sql", "streams"), CHOOSING)
def test_relations_open_only_these_files(out: Path, opened: set[str], sql: str, streams: str) -> None:
    with open_archive(out) as archive:
        relation = archive.sql(sql)
        other = archive.sql("SELECT count(DISTINCT stream_id) AS n FROM events WHERE stream_id LIKE '%'")
        found = relation.query("given", "SELECT * FROM given ORDER BY ALL").to_arrow_table().to_pylist()
        assert relation.columns == query(out, sql).column_names
        assert opened == {f"tracks/{stream_id}" for stream_id in streams.split()}
        assert found == tables(out, f"SELECT * FROM ({sql}) ORDER BY ALL")
        assert other.fetchall() == [(4,)]


@pytest.mark.parametrize(
    "sql",
    [
        # the table is there twice
        "FROM tracks a JOIN tracks b USING (frame_index, object_id) WHERE a.stream_id LIKE 'cam-1'",
        "SELECT * FROM tracks WHERE stream_id LIKE 'cam-1' UNION ALL FROM tracks",
        "SELECT stream_id, (SELECT count(*) FROM objects) FROM tracks WHERE stream_id LIKE 'cam-1'",
        # not a condition that each row must fulfil
        "FROM tracks WHERE stream_id LIKE 'cam-1' OR area = 14",
        "SELECT stream_id LIKE 'cam-1' AS is_it, count(*) AS n FROM tracks GROUP BY 1",
        # something else of that name
        "WITH tracks AS (SELECT 'cam-1x' AS stream_id FROM streams) "
        "FROM tracks WHERE stream_id LIKE 'cam-1%'",
        "FROM (SELECT 'x' || stream_id AS stream_id FROM tracks) WHERE stream_id LIKE 'xcam%'",
        "FROM tracks t(a, b, c, stream_id) WHERE t.stream_id IS NULL OR t.stream_id::VARCHAR LIKE '2024%'",
        # a null fulfils it, and an outer join makes nulls
        "SELECT s.stream_id, t.area FROM streams s LEFT JOIN tracks t ON s.stream_id = t.stream_id "
        "WHERE coalesce(t.stream_id, 'cam-1') LIKE 'cam-1'",
        "SELECT s.stream_id, t.area FROM streams s LEFT JOIN tracks t ON s.stream_id = t.stream_id "
        "WHERE t.stream_id IS NULL OR t.stream_id LIKE 'cam-1'",
        "SELECT s.stream_id, t.area FROM streams s LEFT JOIN tracks t USING (stream_id) WHERE site LIKE 'n%'",
        # conditions on other columns that only look like it
        "FROM tracks t JOIN events e USING (frame_index) WHERE e.stream_id LIKE 'cam-1'",
        "SELECT t.* FROM tracks t JOIN streams s ON t.stream_id >= s.stream_id WHERE s.site LIKE 'n%'",
    ],
)
def test_where_it_would_change_the_result_nothing_is_left_out(out: Path, sql: str) -> None:
    found = query(out, f"SELECT * FROM ({sql}) ORDER BY ALL").to_pylist()
    assert found == tables(out, f"SELECT * FROM ({sql}) ORDER BY ALL")
    assert found
    with open_archive(out) as archive:
        assert archive.sql(f"SELECT * FROM ({sql}) ORDER BY ALL").to_arrow_table().to_pylist() == found


def test_a_volatile_condition_leaves_nothing_out(out: Path, opened: set[str]) -> None:
    query(out, "SELECT count(*) FROM tracks WHERE stream_id LIKE 'cam-%' OR random() > 2 OR stream_id < 'a'")
    assert len(opened) == len(STREAMS)


def test_a_choice_ends_with_its_statement(out: Path, opened: set[str]) -> None:
    with open_archive(out) as archive:
        archive.arrow("SELECT count(*) FROM tracks WHERE stream_id LIKE 'cam-%'")
        assert archive.arrow("SELECT count(DISTINCT stream_id) n FROM tracks")["n"].to_pylist() == [4]


@pytest.mark.parametrize(
    ("sql", "needed"),
    [
        ("SELECT 1 FROM tracks", None),
        ("SELECT stream_id, files, rate FROM streams", False),
        ("SELECT count(*) FROM tracks JOIN streams USING (stream_id) WHERE state = 'finished'", False),
        ("SELECT max(s.next_frame) FROM streams s", True),
        ("SELECT stream_id FROM streams WHERE Next_Frame > 3", True),
        ("FROM streams", True),
        ("SELECT s.* FROM streams s", True),
        ("SELECT s FROM streams s", True),
        ("SELECT streams FROM streams", True),
        ("SELECT max(COLUMNS('next.*')) FROM streams", True),
        ("WITH x AS (SELECT * FROM streams) SELECT next_frame FROM x", True),
        ("DESCRIBE streams", True),
        ("SELECT 'streams' AS a FROM tracks", None),
    ],
)
def test_whether_a_statement_asks_how_far_streams_are(sql: str, needed: bool | None) -> None:
    with duckdb.connect() as connection:
        assert streams_use(sql, lambda statement: statement_tree(connection, statement)) is needed


def test_ends_of_files_are_read_for_next_frame_alone(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[object] = []
    monkeypatch.setattr("pipeline.analytics.streams.read_metadata", recorded(read_metadata, read, 1))
    with Archive(out) as archive:
        archive.arrow("SELECT stream_id, state FROM streams")
        assert read == []
        assert None not in archive.arrow("SELECT next_frame FROM streams")["next_frame"].to_pylist()
        count = len(read)
        assert count > 0
        archive.arrow("SELECT next_frame FROM streams")
        assert len(read) == count, "they are read once"


def test_streams_of_several_uses_are_those_of_all(out: Path) -> None:
    with Archive(out) as archive:

        def needed(sql: str, *, compared: bool = True) -> set[str] | None:
            chosen = needed_streams(
                archive.connection, sql, archive.listing, archive._columns, compared=compared
            )
            return {*chosen["tracks"]} if "tracks" in chosen else None

        first, second = archive.streams[:2]
        one = f"SELECT 1 FROM tracks WHERE stream_id = '{first}'"
        assert needed(one) == {first}
        assert needed(one, compared=False) is None
        assert needed(f"{one} UNION ALL SELECT 1 FROM objects WHERE stream_id IN ('{second}')") == {
            first,
            second,
        }
        assert needed(f"{one} UNION ALL SELECT 1 FROM masks") is None
