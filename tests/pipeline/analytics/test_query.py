"""SQL over output folders on disk, memory:// and a real S3 server, and refused statements."""

from __future__ import annotations

import csv
import io
import json
import secrets
import shutil
import subprocess
import sys
import threading
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.chunks import NO_EVENTS, START, events, rows
from support.recorded import recorded

from pipeline.analytics.query import (
    STREAMS_SCHEMA,
    TrackReader,
    connect,
    format_result,
    query,
    records_by_frame,
)
from pipeline.base.errors import StoreError, UsageError
from pipeline.base.records import EVENTS_SCHEMA, TRACKS_SCHEMA
from pipeline.storage.opening import open_files
from pipeline.tracks.chunk_file import events_bytes
from pipeline.tracks.store import StreamStore

Out = tuple[str, dict[str, Any]]


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Out:
    """An output folder of two streams whose ids look like a date and a number."""
    options: dict[str, Any] = {}
    root = str(tmp_path / "out")
    if request.param == "memory":
        root = f"memory://{secrets.token_hex(6)}/out"
    elif request.param == "s3":
        server = request.getfixturevalue("s3_server")
        root, options = server.uri(f"q-{secrets.token_hex(6)}"), server.options
    fill(root, "2024-01-01", options)
    fill(root, "0042", options, salt=1)
    return root, options


@pytest.fixture
def local(tmp_path: Path) -> str:
    root = str(tmp_path / "out")
    fill(root, "cam-1")
    return root


def fill(root: str, stream_id: str, options: dict[str, Any] | None = None, salt: int = 0) -> None:
    """30 frames in three chunks, the last without rows; two events in the second."""
    store = StreamStore(root, stream_id, options)
    store.commit(0, 9, rows(0, 9, salt), NO_EVENTS)
    store.commit(10, 19, rows(10, 19, salt), events(10))
    store.commit(20, 29, rows(20, 29).slice(0, 0), NO_EVENTS)
    store.save_snapshot(30, b"x")
    store.write_record(
        {
            "source": f"file:///{stream_id}.mp4",
            "state": "done",
            "width": 64,
            "height": 48,
            "rate": 25.0,
            "model": "xmem-lite",
            "settings": {"mem_every": 5},
            "prompts": [{"frame": 0, "id": 1}],
            "next_frame": 3,
        }
    )


# The views


def test_the_rows_come_back_as_they_were_committed(out: Out) -> None:
    root, options = out
    table = query(
        root, "SELECT * FROM tracks WHERE stream_id = '0042' ORDER BY frame_index, object_id", options
    )
    assert table.schema.names == ["stream_id", *TRACKS_SCHEMA.names]
    assert table.drop_columns(["stream_id"]).to_pylist() == rows(0, 19, salt=1).to_pylist()
    assert table.schema.field("wall_time").type == pa.timestamp("us", tz="UTC")


def test_ids_stay_text(out: Out) -> None:
    root, options = out
    ids = query(root, "SELECT DISTINCT stream_id, typeof(stream_id) t FROM tracks ORDER BY 1", options)
    assert ids.to_pylist() == [
        {"stream_id": "0042", "t": "VARCHAR"},
        {"stream_id": "2024-01-01", "t": "VARCHAR"},
    ]
    assert query(root, "SELECT count(*) n FROM tracks WHERE stream_id = '42'", options)["n"].to_pylist() == [
        0
    ]


def test_files_from_before_a_column_have_null_there(local: str) -> None:
    (path, *_) = sorted(Path(local).glob("tracks/*/*.parquet"))
    before = pq.read_table(path, partitioning=None)
    pq.write_table(before.drop_columns(["presence"]), path)
    found = query(local, "SELECT score, presence FROM tracks WHERE frame_index < 10")
    assert found.num_rows == before.num_rows
    assert found["presence"].null_count == found.num_rows
    assert sorted(found["score"].to_pylist()) == sorted(before["score"].to_pylist())


def test_events_join_their_tracks(out: Out) -> None:
    root, options = out
    table = query(root, "SELECT * FROM events WHERE stream_id = '2024-01-01' ORDER BY frame_index", options)
    assert table.drop_columns(["stream_id"]).to_pylist() == events(10).to_pylist()
    sql = """SELECT e.detail->>'$.by' AS who, t.category FROM events e
             JOIN tracks t USING (stream_id, frame_index, object_id)
             WHERE kind = 'object_added' ORDER BY 1, 2"""
    assert query(root, sql, options).to_pylist() == [{"who": "prompt", "category": "dog"}] * 2


def test_streams_show_the_records_and_how_far_the_files_are(out: Out) -> None:
    root, options = out
    table = query(root, "SELECT * FROM streams ORDER BY stream_id", options)
    assert table.schema.names == STREAMS_SCHEMA.names
    first, second = table.to_pylist()
    assert (first["stream_id"], second["stream_id"]) == ("0042", "2024-01-01")
    assert (first["next_frame"], first["files"]) == (30, 3), "the files are the truth, the record a cache"
    assert (first["width"], first["height"], first["rate"], first["state"]) == (64, 48, 25.0, "done")
    assert (first["source"], first["model"]) == ("file:///0042.mp4", "xmem-lite")
    assert json.loads(first["settings"]) == {"mem_every": 5}
    assert json.loads(first["prompts"]) == [{"frame": 0, "id": 1}]
    assert json.loads(first["record"])["next_frame"] == 3
    names = query(root, "SELECT settings->>'$.mem_every' AS every FROM streams", options)
    assert names["every"].to_pylist() == ["5", "5"]


def test_aggregates_windows_and_pivots_work(local: str) -> None:
    areas = rows(0, 19)["area"].to_pylist()
    table = query(local, "SELECT sum(area) a, avg(score) s, min(wall_time) w FROM tracks WHERE area > 0")
    assert int(table["a"][0].as_py()) == sum(areas)
    assert table["w"][0].as_py() == START
    sql = (
        "SELECT frame_index - lag(frame_index) OVER (ORDER BY frame_index) d FROM tracks WHERE object_id = 1"
    )
    assert query(local, f"SELECT DISTINCT d FROM ({sql}) WHERE d IS NOT NULL")["d"].to_pylist() == [1]
    pivot = query(local, "PIVOT (SELECT object_id, area > 0 AS seen FROM tracks) ON object_id USING count(*)")
    assert pivot.num_rows == 2
    assert query(local, "DESCRIBE tracks").num_rows == 18
    assert query(local, "SELECT hour(wall_time) h FROM tracks LIMIT 1")["h"].to_pylist() == [START.hour]


def test_a_folder_with_a_record_only_has_empty_views_of_the_right_shape(tmp_path: Path) -> None:
    StreamStore(tmp_path, "new").write_record({"state": "running"})
    for view, schema in (("tracks", TRACKS_SCHEMA), ("events", EVENTS_SCHEMA)):
        table = query(tmp_path, f"SELECT * FROM {view}")
        assert (table.num_rows, table.schema.names) == (0, ["stream_id", *schema.names])
        assert table.schema.field("wall_time").type == pa.timestamp("us", tz="UTC")
    row = query(tmp_path, "SELECT * FROM streams").to_pylist()[0]
    assert (row["stream_id"], row["state"], row["next_frame"], row["source"]) == ("new", "running", 0, None)


def test_tracks_without_a_record_still_are_a_stream(local: str) -> None:
    Path(local, "streams/cam-1.json").unlink()
    row = query(local, "SELECT * FROM streams").to_pylist()[0]
    assert (row["stream_id"], row["next_frame"], row["state"]) == ("cam-1", 30, None)


@pytest.mark.parametrize("link", ["tracks/stream_id=b", "events/stream_id=b", "streams/b.json"])
def test_links_are_refused_instead_of_followed(local: str, tmp_path: Path, link: str) -> None:
    """Neither foreign rows nor silently missing rows."""
    fill(str(tmp_path / "elsewhere"), "b")
    if link.startswith("events"):
        fill(local, "b")
        shutil.rmtree(Path(local) / link)
    (Path(local) / link).symlink_to(tmp_path / "elsewhere" / link)
    for sql in (f"SELECT count(*) FROM {link.partition('/')[0]}", "SELECT * FROM streams"):
        if link.startswith("events") and "streams" in sql:
            continue  # it reads none
        with pytest.raises(
            StoreError, match=rf"{link} is a symbolic link, and links inside an output folder"
        ):
            query(local, sql)
    if link.startswith("tracks"):
        with pytest.raises(StoreError, match=rf"{link} is a symbolic link"):
            TrackReader(local, "b")


def test_columns_of_a_manifest_are_columns_of_streams(local: str) -> None:
    for name, extra in (
        ("one", {"site": "north", "lane": 3, "State": "mine", "share": 1, "ok": True, "huge": 2**70}),
        ("two", {"SITE": "south", "share": 0.5, "tags": ["a", "b"], "extra": "x", "lane": 2}),
    ):
        StreamStore(local, name).write_record({"state": "finished", "extra": extra})
    table = query(local, "FROM streams")
    assert table.schema.names[: len(STREAMS_SCHEMA)] == STREAMS_SCHEMA.names
    assert table.schema.names[len(STREAMS_SCHEMA) :] == [
        "site", "lane", "extra_state", "share", "ok", "huge", "tags", "extra_extra"
    ]  # fmt: skip
    found = {row["stream_id"]: row for row in table.to_pylist()}
    assert found["one"]["state"] == "finished"
    own = {n: found["one"][n] for n in ("site", "lane", "extra_state", "share", "ok", "huge", "tags")}
    assert own == {
        "site": "north", "lane": 3, "extra_state": "mine", "share": 1.0, "ok": True, "huge": str(2**70),
        "tags": None,
    }  # fmt: skip
    assert (found["two"]["site"], found["two"]["tags"], found["two"]["extra_extra"]) == (
        "south",
        '["a", "b"]',
        "x",
    )
    assert json.loads(found["two"]["extra"])["SITE"] == "south"
    assert (found["cam-1"]["site"], found["cam-1"]["extra"]) == (None, None)
    north = query(
        local, "SELECT count(*) AS n FROM tracks JOIN streams USING (stream_id) WHERE site = 'north'"
    )
    assert north.to_pylist() == [{"n": 0}]


def test_odd_records_hide_no_stream(local: str) -> None:
    StreamStore(local, "odd").write_record(
        {"state": 7, "width": "wide", "rate": "25", "model": {"a": 1}, "extra": []}
    )
    Path(local, "streams/torn.json").write_text('{"format_ver')
    Path(local, "streams/notes.txt").write_text("?")
    found = {r["stream_id"]: r for r in query(local, "FROM streams").to_pylist()}
    assert sorted(found) == ["cam-1", "odd", "torn"]
    assert found["torn"]["state"] == "unreadable"
    odd = found["odd"]
    assert (odd["state"], odd["width"], odd["rate"], odd["model"]) == ("7", None, None, '{"a": 1}')
    assert json.loads(odd["record"])["extra"] == []


def test_leftovers_are_no_rows(out: Out) -> None:
    """Events of a chunk that was never committed, temporary files, foreign files."""
    root, options = out
    before = query(root, "SELECT (SELECT count(*) FROM tracks) t, (SELECT count(*) FROM events) e", options)
    files = open_files(root, options)
    orphan = events_bytes("0042", 30, 39, events(30))
    files.create("events/stream_id=0042/frames-000000000030.parquet", orphan)
    files.create("events/stream_id=0042/frames-000000000010.parquet.part", orphan)
    files.create("tracks/stream_id=0042/part-0.parquet", b"not ours")
    files.create("tracks/stream_id=0042/sub/frames-000000000050.parquet", b"not ours")
    files.create("tracks/frames-000000000000.parquet", b"not ours")
    files.create(".tmp/tracks.parquet", b"half a fi")
    after = query(root, "SELECT (SELECT count(*) FROM tracks) t, (SELECT count(*) FROM events) e", options)
    assert after.to_pylist() == before.to_pylist() == [{"t": 80, "e": 4}]


def test_a_folder_that_is_written_to_is_seen_whole_chunk_by_chunk(tmp_path: Path) -> None:
    store = StreamStore(tmp_path, "cam-1")
    store.commit(0, 4, rows(0, 4), events(0))
    done = threading.Event()

    def write() -> None:
        for first in range(5, 500, 5):
            store.commit(first, first + 4, rows(first, first + 4), events(first))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen, last = [], False
    while not last:
        last = done.is_set()
        sql = "SELECT count(*) n, max(frame_index) m, (SELECT count(*) FROM events) e FROM tracks"
        seen.append(query(tmp_path, sql).to_pylist()[0])
    writer.join()
    assert all(r["n"] % 10 == 0 and r["m"] == r["n"] // 2 - 1 and r["e"] == r["n"] // 5 for r in seen)
    assert seen[-1]["n"] == 1000


def test_a_connection_shows_what_was_committed_when_it_was_made(local: str) -> None:
    with connect(local) as connection:
        StreamStore(local, "cam-1").commit(30, 34, rows(30, 34), NO_EVENTS)
        assert connection.sql("SELECT count(*) FROM tracks").fetchall() == [(40,)]
        assert connection.sql("SELECT max(next_frame) FROM streams").fetchall() == [(30,)]
    with connect(local) as connection:
        assert connection.sql("SELECT count(*) FROM tracks").fetchall() == [(50,)]


# What is refused


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT * FORM tracks", "Parser Error: syntax error at or near"),
        ("SELECT foo FROM tracks", 'Referenced column "foo" not found.*Candidate bindings'),
        ("SELECT * FROM track", 'Table with name track does not exist.*Did you mean "tracks"'),
        ("SELECT CAST(category AS INT) FROM tracks", "Could not convert string"),
        ("", "one SQL statement is needed, not 0"),
        ("SELECT 1; SELECT 2", "one SQL statement is needed, not 2"),
        ("DROP VIEW tracks", "DROP is not allowed.*use SELECT"),
        ("CREATE TABLE x AS SELECT 1", "CREATE is not allowed"),
        ("COPY tracks TO '/tmp/xmem-never.csv'", "COPY is not allowed"),
        ("SET enable_external_access = true", "SET is not allowed"),
        ("ATTACH '/tmp/xmem-never.db'", "ATTACH is not allowed"),
        ("SELECT * FROM '/etc/passwd'", "Table with name /etc/passwd does not exist"),
        ("SELECT * FROM read_csv('/etc/passwd')", "file system operations are disabled"),
        ("SELECT * FROM read_text('/etc/hostname')", "file system operations are disabled"),
        ("SELECT * FROM table_in_python", "Table with name table_in_python does not exist"),
    ],
)
def test_a_bad_statement_is_one_useful_line(local: str, sql: str, message: str) -> None:
    table_in_python = pa.table({"a": [1]})
    with pytest.raises(UsageError, match=message) as caught:
        query(local, sql)
    assert "\n" not in str(caught.value)
    assert not Path("/tmp/xmem-never.csv").exists()
    assert table_in_python.num_rows == 1


@pytest.mark.parametrize(
    "sql",
    [
        "COPY tracks TO 'xmem-never.csv'",
        "EXPORT DATABASE 'xmem-never'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "ATTACH 'xmem-never.db'",
        "SET enable_external_access = true",
        "SELECT * FROM read_parquet('tracks/*/*.parquet')",
    ],
)
def test_a_connection_reaches_nothing_but_the_views(
    local: str, sql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(local)
    before = sorted(Path(local).rglob("*"))
    with connect(local) as connection, pytest.raises(duckdb.Error, match=r"disabled|locked"):
        connection.execute(sql)
    assert sorted(Path(local).rglob("*")) == before


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_is_no_output(tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "videos"
    if there:
        folder.mkdir()
        (folder / "a.mp4").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"/videos is no output folder of xmem"):
        query(folder, "SELECT 1")
    assert folder.exists() == there


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_file_is_a_store_error_and_not_rows(local: str, damage: str) -> None:
    path = Path(local, "tracks/stream_id=cam-1/frames-000000000010.parquet")
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-30:]
    else:
        data[200] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(
        StoreError, match=r"frames-000000000010\.parquet cannot be read \(.*restore that file from a copy"
    ) as caught:
        query(local, "SELECT * FROM tracks")
    assert "\n" not in str(caught.value)
    assert query(local, "SELECT count(*) n FROM events")["n"].to_pylist() == [2]


# Formats


RESULT = pa.table(
    {
        "n": pa.array([2**63 - 1, None], pa.int64()),
        "big": pa.array([Decimal(2**100), None], pa.decimal128(38, 0)),
        "x": [1.5, float("nan")],
        "ok": [True, None],
        "when": pa.array([datetime(2024, 1, 2, 3, 4, 5, 6, tzinfo=UTC), None], pa.timestamp("us", "UTC")),
        "day": [date(2024, 1, 2), None],
        "took": pa.array([timedelta(seconds=1.5), None]),
        "who": pa.array(['a,"b"\n', None]).dictionary_encode(),
        "list": [[1, 2], None],
        "blob": [b"\xff", None],
    }
)


def test_json_is_one_array_of_objects() -> None:
    out = io.StringIO()
    format_result(RESULT, "json", out)
    first, second = json.loads(out.getvalue())
    assert first == {
        "n": 2**63 - 1,
        "big": 2**100,
        "x": 1.5,
        "ok": True,
        "when": "2024-01-02T03:04:05.000006Z",
        "day": "2024-01-02",
        "took": 1.5,
        "who": 'a,"b"\n',
        "list": [1, 2],
        "blob": "/w==",
    }
    assert list(first) == RESULT.schema.names
    assert set(second.values()) == {None}
    out = io.StringIO()
    format_result(RESULT.slice(0, 0), "json", out)
    assert json.loads(out.getvalue()) == []


def test_csv_reads_back() -> None:
    out = io.StringIO()
    format_result(RESULT, "csv", out)
    header, first, second = csv.reader(io.StringIO(out.getvalue()))
    assert header == RESULT.schema.names
    assert first[:5] == [str(2**63 - 1), str(2**100), "1.5", "true", "2024-01-02T03:04:05.000006Z"]
    assert first[7:] == ['a,"b"\n', "[1, 2]", "/w=="]
    assert set(second) == {""}


def test_parquet_reads_back() -> None:
    out = io.BytesIO()
    format_result(RESULT.drop_columns(["x"]), "parquet", out)
    assert pq.read_table(io.BytesIO(out.getvalue())).to_pylist() == RESULT.drop_columns(["x"]).to_pylist()


def test_the_table_is_for_people() -> None:
    out = io.StringIO()
    many = pa.table({"id": list(range(300)), "text": ["[bold]y" * 20] * 300})
    format_result(many, "table", out)
    lines = out.getvalue().splitlines()
    assert "id" in lines[0]
    assert "[bold]y[bold]y" in lines[2], "shown as it is, not as markup"
    assert lines[2].rstrip().endswith("...")
    assert "199" in out.getvalue()
    assert "100 of 300 rows left out" in lines[-1]


def test_a_table_in_a_pipe_has_a_line_per_row_of_plain_characters() -> None:
    out = io.StringIO()
    wide = pa.table({f"a_long_column_name_{i}": [i, 10**12 + i] for i in range(9)} | {"who": ["x" * 50, "y"]})
    format_result(wide, "table", out)
    header, rule, first, second = out.getvalue().splitlines()
    assert header.split() == "|".join(wide.schema.names).replace("|", " | ").split()
    assert [cell.strip() for cell in first.split("|")] == [*map(str, range(9)), "x" * 50]
    assert [cell.strip() for cell in second.split("|")][8] == str(10**12 + 8)
    assert set(rule) == {"-", "+"}
    assert len(header) == len(rule) == len(first) > 200


class Terminal(io.StringIO):
    """A terminal, whose width `COLUMNS` says."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name, value in {"COLUMNS": "60", "LINES": "20", "TERM": "dumb", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def test_a_terminal_is_told_how_many_rows_there_are(terminal: Terminal) -> None:
    format_result(pa.table({"id": [1, 2, 3]}), "table", terminal)
    assert terminal.getvalue().splitlines()[-1].split() == ["3", "rows"]


def test_what_is_wider_than_the_terminal_is_written_vertically(terminal: Terminal) -> None:
    wide = pa.table({f"a_long_column_name_{i}": [i] * 500 for i in range(9)} | {"who": ["x" * 90] * 500})
    format_result(wide, "table", terminal)
    lines = terminal.getvalue().splitlines()
    assert lines[0].startswith("row 1-")
    assert lines[1].split() == ["a_long_column_name_0", "0"]
    assert lines[10].split() == ["who", "x" * 90]
    assert " ".join(lines[-1].split()) == "410 of 500 rows left out: add LIMIT, or use --format csv"
    assert len(lines) == 90 * 11 + 1


def test_two_columns_of_one_name_get_two_names(local: str) -> None:
    sql = (
        "SELECT a.frame_index, b.frame_index FROM tracks a JOIN tracks b ON b.frame_index = a.frame_index + 1"
    )
    table = query(local, sql + " LIMIT 1")
    for fmt in ("json", "csv"):
        out = io.StringIO()
        format_result(table, fmt, out)
        text = out.getvalue()
        assert "frame_index_1" in text or text.count("frame_index") == 2
    out = io.StringIO()
    format_result(table, "json", out)
    assert len(json.loads(out.getvalue())[0]) == 2


def test_an_unknown_format_says_which_there_are() -> None:
    with pytest.raises(
        UsageError, match="format 'xml' is not known: use table, vertical, csv, json, parquet"
    ):
        format_result(RESULT, "xml", io.StringIO())


# Records for rendering


def test_records_come_back_frame_by_frame(out: Out) -> None:
    root, options = out
    reader = TrackReader(root, "2024-01-01", options)
    assert reader.next_frame == 30
    first, second = reader.at(4)
    assert (first.object_id, first.category, first.bbox, first.centroid) == (
        1,
        "person",
        (1, 2, 3, 4),
        (2.5, 3.5),
    )
    assert (first.area, first.mask_rle, first.wall_time) == (
        14,
        "4-0-0000",
        START + timedelta(milliseconds=160),
    )
    assert (second.object_id, second.category, second.mask_rle) == (7, "dog", "9")
    hidden = reader.at(3)[1]
    assert (hidden.area, hidden.bbox, hidden.centroid, hidden.mask_rle) == (0, None, None, None)
    assert reader.at(25) == reader.at(30) == reader.at(-1) == []
    assert [f for f, _ in reader.frames(8, 12)] == [8, 9, 10, 11, 12]
    assert [f for f, _ in reader.frames()] == list(range(20))
    assert records_by_frame(root, "2024-01-01", 3, 4, options) == {3: reader.at(3), 4: reader.at(4)}


def test_walking_through_a_long_video_keeps_two_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = StreamStore(tmp_path, "cam-1")
    for first in range(0, 100, 5):
        store.commit(first, first + 4, rows(first, first + 4), NO_EVENTS)
    reader = TrackReader(tmp_path, "cam-1")
    reads: list[str] = []
    read = reader._files.read
    monkeypatch.setattr(reader._files, "read", recorded(read, reads, 0))
    for frame in range(100):
        assert [r.frame_index for r in reader.at(frame)] == [frame, frame]
        assert len(reader._kept) <= 2
    assert len(reads) == 20


def test_an_unknown_stream_names_those_there_are(local: str) -> None:
    with pytest.raises(UsageError, match=r"no tracks of stream 'cam-9' in .*: it has cam-1"):
        TrackReader(local, "cam-9")


def test_a_damaged_chunk_is_named(local: str) -> None:
    path = Path(local, "tracks/stream_id=cam-1/frames-000000000010.parquet")
    data = bytearray(path.read_bytes())
    data[200] ^= 0xFF
    path.write_bytes(data)
    reader = TrackReader(local, "cam-1")
    assert len(reader.at(3)) == 2
    with pytest.raises(StoreError, match=r"frames-000000000010\.parquet is damaged"):
        reader.at(10)


def test_a_walk_over_a_gap_is_an_error(tmp_path: Path) -> None:
    store = StreamStore(tmp_path, "cam")
    for first in (0, 5, 10):
        store.commit(first, first + 4, rows(first, first + 4), NO_EVENTS)
    folder = tmp_path / "tracks" / "stream_id=cam"
    (folder / "frames-000000000005.parquet").unlink()
    walk = TrackReader(tmp_path, "cam").frames()
    with pytest.raises(StoreError, match=r"frames-000000000005\.parquet is missing, though files of later"):
        list(walk)
    assert len(list(TrackReader(tmp_path, "cam").frames(10, 14))) == 5
    (folder / "frames-000000000000.parquet").unlink()
    with pytest.raises(StoreError, match=r"frames-000000000000\.parquet is missing"):
        TrackReader(tmp_path, "cam")
    pq.write_table(pa.table({"a": [1]}), folder / "frames-000000000000.parquet")
    with pytest.raises(StoreError, match=r"000000000000\.parquet is no tracks file of xmem"):
        TrackReader(tmp_path, "cam").at(0)


def test_duckdb_alone_reads_the_folder_as_the_layout_promises(local: str) -> None:
    """Readers without xmem: hive partitions and zstd Parquet."""
    code = (
        "import duckdb, sys\n"
        "sql = 'SELECT stream_id, count(*), min(mask_rle) FROM read_parquet(?, hive_partitioning=true) '\n"
        "sql += 'GROUP BY 1'\n"
        "print(duckdb.execute(sql, [sys.argv[1] + '/tracks/*/*.parquet']).fetchall())"
    )
    done = subprocess.run([sys.executable, "-c", code, local], capture_output=True, text=True)
    assert done.stdout.strip() == "[('cam-1', 40, '0-0-')]", done.stderr
