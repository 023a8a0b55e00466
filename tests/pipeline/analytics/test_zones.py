"""Views of zones over output folders: what they hold, and what is refused."""

from __future__ import annotations

import io
import json
import os
import secrets
import threading
from pathlib import Path
from typing import Any

import duckdb
import pytest
from support.recorded import recorded
from support.walks import Walk, random_walk, record, walked_folder

from pipeline.analytics import zones as zones_module
from pipeline.analytics.scan.chunk_files import open_chunk_file
from pipeline.analytics.scan.listing import Chunk
from pipeline.analytics.zones import SUMMARY, VIEWS, query_zones, zone_views
from pipeline.base.errors import StoreError, UsageError
from pipeline.base.records import Event
from pipeline.storage.local_files import LocalFiles
from pipeline.zones.config import parse_zones
from pipeline.zones.engine import ZoneEngine
from pipeline.zones.results import Crossing, Visit
from pipeline.zones.rows import Rows

DOCUMENT: dict[str, Any] = {
    "zones": [
        {"name": "square", "polygon": [[20, 20], [60, 20], [60, 60], [20, 60]]},
        {"name": "low", "polygon": [[0, 50], [100, 50], [100, 100], [0, 100]], "part": "mask"},
    ],
    "lines": [{"name": "line", "from": [50, 0], "to": [50, 100]}],
    "near": [{"name": "close", "distance": 20}],
}
ZONES = parse_zones(DOCUMENT)
Out = tuple[str, dict[str, Any]]
WALKS: dict[str, Walk] = {
    "gate-1": random_walk(1, with_mask=True),
    "gate-2": random_walk(2, wall=True, with_mask=True),
}


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> Out:
    options: dict[str, Any] = {}
    root = str(tmp_path / "out")
    if request.param == "memory":
        root = f"memory://{secrets.token_hex(6)}/out"
    elif request.param == "s3":
        server = request.getfixturevalue("s3_server")
        root, options = server.uri(f"z-{secrets.token_hex(6)}"), server.options
    for stream_id, walk in WALKS.items():
        walked_folder(root, stream_id, walk, options)
    return root, options


@pytest.fixture
def local(tmp_path: Path) -> str:
    for stream_id, walk in WALKS.items():
        walked_folder(str(tmp_path), stream_id, walk)
    return str(tmp_path)


def test_views_hold_what_the_engine_finds(out: Out) -> None:
    root, options = out
    views = zone_views(root, ZONES, storage_options=options)
    assert set(views) == set(VIEWS)
    for stream_id, walk in WALKS.items():
        engine = ZoneEngine(ZONES)
        found = engine.feed(Rows.from_records(walk.records), walk.removals)
        visits = [c.about for c in found if c.kind == "zone_left"] + engine.open_visits()
        got = [row for row in views["visits"].to_pylist() if row["stream_id"] == stream_id]
        names = ("zone", "object_id", "entered_frame", "state", "frames")
        assert sorted(tuple(row[name] for name in names) for row in got) == sorted(
            (v.zone, v.object_id, v.entered.frame_index, v.state, v.frames)
            for v in visits
            if isinstance(v, Visit)
        )
        crossings = [c.about for c in found if isinstance(c.about, Crossing)]
        assert [
            (row["object_id"], row["frame_index"], row["direction"], row["wall_time"])
            for row in views["crossings"].to_pylist()
            if row["stream_id"] == stream_id
        ] == [(c.object_id, c.moment.frame_index, c.direction, c.moment.wall_time) for c in crossings]
        flow = [row for row in views["flow"].to_pylist() if row["stream_id"] == stream_id]
        assert sum(row["left_to_right"] + row["right_to_left"] for row in flow) == len(crossings)
        assert len(crossings) > 0


def test_sql_over_zones_and_tracks_together(local: str) -> None:
    rows = query_zones(
        local,
        ZONES,
        "SELECT v.stream_id, v.object_id, count(*) AS n FROM visits v "
        "JOIN tracks t USING (stream_id, object_id) WHERE v.zone = 'square' AND t.area > 0 "
        "GROUP BY ALL ORDER BY ALL",
    ).to_pylist()
    assert {row["stream_id"] for row in rows} == {"gate-1", "gate-2"}
    inside = query_zones(local, ZONES, "SELECT count(*) AS n FROM INSIDE WHERE zone = 'square'").to_pylist()
    frames = query_zones(local, ZONES, "SELECT sum(frames) n FROM visits WHERE zone = 'square'").to_pylist()
    assert 0 < inside[0]["n"] == frames[0]["n"]
    summary = query_zones(local, ZONES, SUMMARY, streams=["gate-1"]).to_pylist()
    assert [(row["kind"], row["name"]) for row in summary] == [
        ("line", "line"),
        ("zone", "low"),
        ("zone", "square"),
    ]
    assert all(row["objects"] > 0 for row in summary)


def test_occupancy_of_files_covers_frames_without_objects(tmp_path: Path) -> None:
    """10 s of video at 10 frames/s with one object inside from 2 s to 4 s: a fifth of the time."""
    frames = {f: [record(f, 1, (40, 40))] for f in range(20, 40)}
    walk = Walk(frames, [Event(40, "object_removed", "test", pts_seconds=4.0, object_id=1)])
    walked_folder(str(tmp_path), "clip", walk, last=99, rate=10.0)
    zones = parse_zones({"zones": DOCUMENT["zones"][:1]})
    (row,) = query_zones(tmp_path, zones, "FROM occupancy").to_pylist()
    assert row["covered_seconds"] == pytest.approx(10.0)
    assert row["mean_objects"] == pytest.approx(0.2)
    assert (row["begin_seconds"], row["begin_time"], row["entered"], row["ended"]) == (0.0, None, 1, 1)


def test_what_is_refused(local: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"zone 'a': streams='door' matches no stream: there are gate-1"):
        zone_views(local, parse_zones({"zones": [{**DOCUMENT["zones"][0], "name": "a", "streams": "door"}]}))
    with pytest.raises(UsageError, match="stream 'x' matches no stream in"):
        zone_views(local, ZONES, streams=["x"])
    with pytest.raises(UsageError, match="is no output folder"):
        zone_views(tmp_path / "empty", ZONES)
    with pytest.raises(UsageError, match=r"views: .*files, masks, visits, crossings"):
        query_zones(local, ZONES, "FROM visitz")
    with pytest.raises(UsageError, match="is not allowed, an output folder is only read"):
        query_zones(local, ZONES, "COPY visits TO 'x.csv'")
    with pytest.raises(UsageError, match="period of 0 s is not allowed"):
        zone_views(local, ZONES, period_seconds=0)


def test_each_file_is_opened_once(local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    for name in ("read", "tail", "part"):
        monkeypatch.setattr(LocalFiles, name, recorded(getattr(LocalFiles, name), opened, 1))
    monkeypatch.setattr(zones_module, "open_chunk_file", recorded(open_chunk_file, opened, 2))
    zone_views(local, ZONES)
    chunks = [chunk for chunk in opened if isinstance(chunk, Chunk)]
    assert len(chunks) == len({(c.stream_id, c.first) for c in chunks}) > 1
    assert all(name.startswith("streams/") for name in opened if isinstance(name, str))


def test_a_statement_is_parsed_by_the_duckdb_that_runs_it(
    local: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(duckdb, "connect", recorded(duckdb.connect, opened, 0))
    listed: list[Any] = []
    monkeypatch.setattr(LocalFiles, "folders", recorded(LocalFiles.folders, listed, 1))
    with pytest.raises(UsageError, match="zone 'squar' is not in the zones file, which has square, low"):
        query_zones(local, ZONES, "SELECT * FROM visits WHERE zone = 'squar'")
    assert query_zones(
        local, ZONES, "SELECT count(*) AS n FROM visits JOIN streams USING (stream_id)"
    ).num_rows
    assert len(opened) == 2
    assert listed.count("tracks") == 2


def test_missing_and_damaged_files_are_named(local: str) -> None:
    files = sorted(Path(local, "tracks", "stream_id=gate-1").iterdir())
    data = files[1].read_bytes()
    files[1].unlink()
    with pytest.raises(StoreError, match=rf"{files[1].name} is missing, though files of later frames exist"):
        zone_views(local, ZONES)
    at = data.find(b"PAR1", 4)
    files[1].write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:at] + data[at:])
    with pytest.raises(StoreError, match=files[1].name):
        zone_views(local, ZONES)


def call(*arguments: object) -> int:
    from jobs.cli.app import main

    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    return int(ended.value.code or 0)


def test_the_command(local: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "zones.json"
    path.write_text(json.dumps(DOCUMENT))
    assert call("zones", local, path) == 0
    assert "mean_dwell_seconds" in capsys.readouterr().out
    assert call("zones", local, path, "SELECT * FROM flow", "--period", 1, "--format", "json") == 0
    flow = json.loads(capsys.readouterr().out)
    assert {row["stream_id"] for row in flow} == {"gate-1", "gate-2"}
    assert all(row["covered_seconds"] <= 1.000001 for row in flow)
    assert call("zones", local, path, "FROM visits", "--format", "xml") == 2
    assert call("zones", local, tmp_path / "none.json") == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert call("schema", "zones") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "xmem zones"
    assert call("schema", "zone") == 2


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("FROM visits WHERE zone = 'squre'", "zone 'squre' is not in the zones file, which has square, low"),
        ("FROM occupancy o WHERE 'high' <> o.zone AND mean_objects > 1", "zone 'high' is not"),
        ("FROM inside WHERE zone IN ('square', 'Low')", "zone 'Low' is not"),
        (
            "FROM flow WHERE line NOT IN ('line', 'square')",
            "line 'square' is not in the zones file, which has line",
        ),
        (
            "FROM (SELECT * FROM encounters WHERE rule = 'far')",
            "rule 'far' is not in the zones file, which has close",
        ),
    ],
)
def test_a_name_that_no_zone_has_is_an_error(local: str, where: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        query_zones(local, ZONES, f"SELECT count(*) {where}")


def test_other_comparisons_with_zones_are_no_error(local: str) -> None:
    sql = (
        "SELECT zone FROM visits WHERE zone LIKE 'squ%' AND zone = 'square' AND state <> 'squre' "
        "AND zone IN (SELECT zone FROM occupancy) AND zone <> concat('lo', 'w')"
    )
    assert {row["zone"] for row in query_zones(local, ZONES, sql).to_pylist()} == {"square"}


def test_zones_of_a_pipe_and_of_stdin(
    tmp_path: Path, local: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = json.dumps(DOCUMENT)
    path, pipe = tmp_path / "zones.json", tmp_path / "pipe"
    path.write_text(text)
    assert call("zones", local, path) == 0
    expected = capsys.readouterr().out
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_text, args=(text,)).start()
    assert call("zones", local, pipe) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert call("zones", local, "-") == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert call("zones", local, "-") == 2
    assert "stdin is no zones file: it is not text in UTF-8" in capsys.readouterr().err
