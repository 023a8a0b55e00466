"""Questions to a made-up archive: `xmem query`, with and without copies, against plain DuckDB and Polars.

Each answer comes from a process of its own and is compared with the others. Seconds are of the process (wall
and CPU), without its start; megabytes are what it read (from the page cache, too) and the most that it held.
Then the same on a SeaweedFS, with the number of requests.

A large archive is written beforehand, by `archive.py` with the same numbers; with `--results`, a run that was
stopped goes on behind its last answer.

    PYTHONPATH=.:tests python tests/benchmarks/query.py [FOLDER] [--streams 100] [--files 20] [--rows 1000]
        [--long-files 0] [--layout small|compacted|both] [--runs 2] [--results FILE] [--no-s3] [--no-disk]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs
from archive import LONG, Archive, Writer, into_folder
from support.faults import Happened, faulty
from support.servers import seaweedfs

from pipeline.analytics.query import query
from pipeline.tracks.compaction import compact

QUESTIONS = {
    "rows per category": "SELECT category, count(*) AS n FROM {tracks} GROUP BY 1 ORDER BY 1",
    "longest dwell": (
        "SELECT stream_id, object_id, max(frame_index) - min(frame_index) AS n FROM {tracks} "
        "WHERE area > 0 GROUP BY 1, 2 ORDER BY n DESC, 1, 2 LIMIT 10"
    ),
    "pattern of ids": (
        "SELECT count(*) AS n, sum(area)::BIGINT AS m FROM {tracks} WHERE stream_id LIKE '{site}-%'"
    ),
    "objects of a stream": (
        "SELECT object_id, count(*) AS n, max(area) AS m FROM {tracks} "
        "WHERE stream_id = '{stream}' AND area > 0 GROUP BY 1 ORDER BY 1"
    ),
    "a zone, five minutes": (
        "SELECT count(DISTINCT object_id) AS n FROM {tracks} WHERE stream_id = '{stream}' "
        "AND frame_index BETWEEN {first} AND {first} + 7500 AND centroid_x BETWEEN 400 AND 800 "
        "AND centroid_y BETWEEN 200 AND 500"
    ),
    "ten seconds of all": "SELECT count(*) AS n FROM {tracks} WHERE pts_seconds BETWEEN 100 AND 110",
}
OF_LONG = {
    "a zone, long stream": (
        "SELECT count(DISTINCT object_id) AS n FROM {tracks} WHERE stream_id = '{long}' "
        "AND frame_index BETWEEN {middle} AND {middle} + 7500 AND centroid_x BETWEEN 400 AND 800 "
        "AND centroid_y BETWEEN 200 AND 500"
    ),
    "times, long stream": (
        "SELECT count(*) AS n FROM {tracks} WHERE stream_id = '{long}' AND pts_seconds BETWEEN 100 AND 400"
    ),
}
OF_VIEWS = {
    "join with streams": (
        "SELECT count(*) AS n FROM tracks JOIN streams USING (stream_id) WHERE site = '{site}'"
    ),
    "view objects, a stream": (
        "SELECT count(*) AS n, sum(frames_visible)::BIGINT AS m FROM objects WHERE stream_id = '{stream}'"
    ),
}
"""Plain readers have no views `streams` and `objects`."""


LAYOUTS = ("small files", "compacted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="default: a temporary one")
    for name, default in (("streams", 100), ("files", 20), ("rows", 1000), ("long-files", 0), ("runs", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--layout", choices=("small", "compacted", "both"), default="both")
    parser.add_argument("--results", type=Path, help="file that answers are added to, and taken from")
    parser.add_argument("--no-s3", action="store_true")
    parser.add_argument("--no-disk", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return
    size = Archive(given.streams, given.files, given.rows, given.long_files)
    layouts = LAYOUTS if given.layout == "both" else [name for name in LAYOUTS if given.layout in name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary) / "archive"
        if not folder.exists() and not given.no_disk:
            Writer(into_folder(folder)).write(size)
        if not given.no_disk:
            on_disk(folder, size, layouts, Answers(given.results, given.runs))
    if not given.no_s3:
        on_s3(Archive(min(size.streams, 20), min(size.files, 5), size.rows))


def statements(size: Archive) -> dict[str, str]:
    """The questions, but for the name of the table."""
    stream = size.stream_id(size.streams // 2)
    known = {"stream": stream, "site": stream.partition("-")[0], "first": size.frames * (size.files // 2)}
    known |= {"long": LONG, "middle": size.long_frames * (size.long_files // 2), "tracks": "{tracks}"}
    asked = QUESTIONS | (OF_LONG if size.long_files else {}) | OF_VIEWS
    return {name: sql.format(**known) for name, sql in asked.items()}


class Answers:
    """Answers of processes of their own, which are asked once.

    Args:
        results: where they are kept; None: nowhere.
        runs: how often each is asked; the one of the least CPU time counts.
    """

    def __init__(self, results: Path | None, runs: int) -> None:
        self._results, self._runs = results, runs
        lines = results.read_text().splitlines() if results is not None and results.exists() else []
        self._known: dict[str, dict[str, Any]] = {one["key"]: one for one in map(json.loads, lines)}

    def get(self, layout: str, way: str, sql: str, source: str) -> dict[str, Any]:
        """An answer and what it cost."""
        key = f"{layout}|{way}|{sql}"
        if key not in self._known:
            command = [sys.executable, __file__, "--child", way, sql, source]
            found = [
                json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
                for _ in range(self._runs)
            ]
            self._known[key] = {"key": key, **min(found, key=lambda one: one["cpu"])}
            if self._results is not None:
                with self._results.open("a") as file:
                    file.write(json.dumps(self._known[key]) + "\n")
        return self._known[key]


def on_disk(folder: Path, size: Archive, layouts: Sequence[str], known: Answers) -> None:
    small = sum(path.stat().st_size for path in folder.glob("tracks/*/*.parquet"))
    row(
        f"{size.streams} streams, {size.streams * size.files} files of {size.rows} rows, "
        f"a stream of {size.long_files} files of {size.rows // 10} rows, {small / 1e6:.0f} MB"
    )
    answers: dict[str, Any] = {}
    ways: tuple[str, ...] = ("xmem", "duckdb")
    if importlib.util.find_spec("polars"):
        ways = (*ways, "polars")
    else:
        row("polars is not installed and left out")
    row(f"{'':24}{'':18}{'seconds':>9}{'CPU':>8}{'MB read':>9}{'MB held':>9}")
    for layout in layouts:
        if layout == "compacted":
            began = time.monotonic()
            done = compact(folder)
            copies = sum(path.stat().st_size for path in folder.glob("compacted/*/*.parquet"))
            row(f"compacted into {done.files} files, {copies / 1e6:.0f} MB, {time.monotonic() - began:.1f} s")
        for name, sql in statements(size).items():
            for way in ways:
                if way != "xmem" and "{tracks}" not in sql:
                    continue
                source = str(folder)
                if way != "xmem":
                    source += (
                        "/tracks/*/*.parquet" if layout == "small files" else "/compacted/tracks/*.parquet"
                    )
                found = known.get(layout, way, sql, source)
                assert answers.setdefault(name, found["answer"]) == found["answer"], (name, way)
                row(
                    f"{name:24}{way + ', ' + layout:18.18}{found['seconds']:9.2f}{found['cpu']:8.2f}"
                    f"{found['read'] / 1e6:9.1f}{found['held'] / 1e6:9.0f}"
                )


def child(way: str, sql: str, source: str) -> None:
    """Answers one question, and prints what it cost."""
    ask = {"xmem": by_xmem, "duckdb": by_duckdb, "polars": by_polars}[way](sql, source)
    read, began, cpu = read_bytes(), time.monotonic(), time.process_time()
    answer = ask()
    cost = {
        "answer": answer,
        "seconds": time.monotonic() - began,
        "cpu": time.process_time() - cpu,
        "read": read_bytes() - read,
        "held": most_held(),
    }
    row(json.dumps(cost, default=str))


def by_xmem(sql: str, source: str) -> Callable[[], Any]:
    return lambda: query(source, sql.format(tracks="tracks")).to_pylist()


def by_duckdb(sql: str, source: str) -> Callable[[], Any]:
    hive = ", hive_partitioning = true, hive_types = {'stream_id': VARCHAR}" if has_folders(source) else ""
    table = f"read_parquet('{source}'{hive})"

    def ask() -> Any:
        relation = duckdb.sql(sql.format(tracks=table))
        assert relation is not None
        return relation.to_arrow_table().to_pylist()

    return ask


def by_polars(sql: str, source: str) -> Callable[[], Any]:
    import polars

    def ask() -> Any:
        tracks = polars.scan_parquet(source, hive_partitioning=has_folders(source))
        return polars.SQLContext(tracks=tracks).execute(sql.format(tracks="tracks")).collect().to_dicts()

    return ask


def has_folders(source: str) -> bool:
    """Whether a glob's files lie in folders of streams."""
    return "/*/" in source


def read_bytes() -> int:
    """Bytes that this process has read from files."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def most_held() -> int:
    """The most memory that this process has held, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def on_s3(size: Archive) -> None:
    """The same questions on a store. DuckDB gets pyarrow's dataset: its own client must be downloaded."""
    with seaweedfs() as server, faulty(server.endpoint) as proxy:
        root = server.uri(f"archive-{secrets.token_hex(4)}")
        fs = fsspec.filesystem("s3", **server.options)
        Writer(lambda name, data: fs.pipe_file(f"{root}/{name}", data)).write(size)
        options = proxy.options(server.options)
        row(f"S3: {size.streams} streams, {size.streams * size.files} files of {size.rows} rows")
        row(f"{'':24}{'':18}{'seconds':>9}{'requests':>9}{'MB sent':>9}")
        answers: dict[str, Any] = {}
        ways = ("xmem", "duckdb", *(("polars",) if importlib.util.find_spec("polars") else ()))
        for layout in LAYOUTS:
            if layout == "compacted":
                compact(root, server.options)
            for name, sql in statements(size).items():
                for way in ways:
                    if way != "xmem" and "{tracks}" not in sql:
                        continue
                    proxy.happened = Happened()
                    began = time.monotonic()
                    answer = s3_answer(way, sql, root, layout, options)
                    seconds = time.monotonic() - began
                    assert answers.setdefault(name, answer) == answer, (name, way)
                    row(
                        f"{name:24}{way + ', ' + layout:18.18}{seconds:9.2f}"
                        f"{len(proxy.happened.requests):9d}{proxy.happened.sent / 1e6:9.2f}"
                    )


def s3_answer(way: str, sql: str, root: str, layout: str, options: Mapping[str, Any]) -> Any:
    if way == "xmem":
        return query(root, sql.format(tracks="tracks"), options).to_pylist()
    folder = "tracks" if layout == "small files" else "compacted/tracks"
    endpoint = options["client_kwargs"]["endpoint_url"]
    if way == "duckdb":
        keys = {"access_key": options["key"], "secret_key": options["secret"], "region": "us-east-1"}
        store = pyarrow.fs.S3FileSystem(**keys, endpoint_override=endpoint)
        partitions = ds.partitioning(pa.schema([("stream_id", pa.string())]), flavor="hive")
        path = f"{root.removeprefix('s3://')}/{folder}"
        tracks = ds.dataset(path, filesystem=store, partitioning=partitions if folder == "tracks" else None)
        with duckdb.connect() as connection:
            connection.register("tracks", tracks)
            return connection.sql(sql.format(tracks="tracks")).to_arrow_table().to_pylist()
    import polars

    polars_options = {
        "aws_endpoint_url": endpoint,
        "aws_access_key_id": options["key"],
        "aws_secret_access_key": options["secret"],
        "aws_region": "us-east-1",
        "aws_allow_http": "true",
    }
    pattern = "*/*.parquet" if folder == "tracks" else "*.parquet"
    scanned = polars.scan_parquet(
        f"{root}/{folder}/{pattern}", storage_options=polars_options, hive_partitioning=folder == "tracks"
    )
    return polars.SQLContext(tracks=scanned).execute(sql.format(tracks="tracks")).collect().to_dicts()


def row(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
