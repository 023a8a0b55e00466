"""Writers that are killed at any moment, and concurrent writers: commits are complete, unique and unmixed."""

from __future__ import annotations

import json
import os
import random
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.chunks import NO_EVENTS, events, rows

from pipeline.storage.opening import open_files
from pipeline.tracks.store import StreamStore

WORKER = Path(__file__).parents[2] / "support" / "store_worker.py"
KILLS = int(os.environ.get("XMEM_CHAOS", "5"))
CHUNK = 7


def start(root: str, end: int, salt: int = 0, options: dict[str, Any] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, str(WORKER), root, str(end), str(CHUNK), str(salt)]
    command += [json.dumps(options)] if options else []
    environment = dict(os.environ, PYTHONPATH=f"{WORKER.parents[2]}{os.pathsep}{WORKER.parents[1]}")
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == "ready\n", line + (process.stderr.read() if process.stderr else "")
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def content(root: str, *folders: str, options: dict[str, Any] | None = None) -> dict[str, bytes]:
    files = open_files(root, options)
    return {n: files.read(n) for folder in folders for n in files.names(folder, recursive=True)}


def check_whole(root: str, options: dict[str, Any] | None = None) -> int:
    """Every visible file is readable, tracks have no gap and their events; returns the next frame."""
    store = StreamStore(root, "cam-1", options)
    seen = content(root, "tracks", "events", "state", "streams", options=options)
    for name, data in seen.items():
        if name.endswith(".parquet"):
            pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        elif name.endswith(".json"):
            json.loads(data)
        else:
            frame = int(Path(name).stem)
            assert data == b"state %d" % frame * 50_000
    for name in seen:
        if name.startswith("tracks/"):
            assert name.replace("tracks/", "events/", 1) in seen
    return store.committed(check=True).next_frame


@pytest.mark.chaos
def test_killed_at_any_moment_and_resumed_it_is_the_undisturbed_run(tmp_path: Path) -> None:
    """SIGKILL at seeded random moments; the number of kills comes from XMEM_CHAOS."""
    root, calm = str(tmp_path / "killed"), str(tmp_path / "calm")
    rng = random.Random(20240506)
    end, kills, before = 10**9, 0, 0
    while kills < KILLS:
        writer = start(root, end)
        go(writer)
        # After so many chunks (none: perhaps in the first) and somewhere in the steps that follow.
        assert writer.stdout is not None
        for _ in range(rng.randrange(4)):
            assert int(writer.stdout.readline()) % CHUNK == 0
        time.sleep(rng.uniform(0.0, 0.04))
        writer.kill()
        writer.communicate()
        assert writer.returncode == -9
        kills += 1
        reached = check_whole(root)
        assert reached >= before
        before = reached
    assert before > 0
    end = before + 2 * CHUNK + 3
    last = start(root, end)
    go(last)
    _, errors = last.communicate()
    assert last.returncode == 0, errors
    store, frame = StreamStore(calm, "cam-1"), 0
    while frame < end:
        stop = min(frame + CHUNK, end) - 1
        store.commit(frame, stop, rows(frame, stop), events(frame) if frame % 3 else NO_EVENTS)
        frame = stop + 1
    assert content(root, "tracks", "events") == content(calm, "tracks", "events")
    assert list(Path(root, ".tmp").iterdir()) == []
    assert check_whole(root) == end


@pytest.mark.parametrize("where", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_of_two_racing_writers_each_name_has_one(
    where: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Two processes with different rows: each file is entirely from one of them.

    The loser reports it and stops.
    """
    options = None
    root = str(tmp_path / "out")
    if where == "s3":
        server = request.getfixturevalue("s3_server")
        root, options = server.uri(f"race-{secrets.token_hex(6)}"), server.options
    end = 10 * CHUNK
    writers = [start(root, end, salt, options) for salt in (0, 1)]
    for writer in writers:
        go(writer)
    outputs = [writer.communicate() for writer in writers]
    codes = [writer.returncode for writer in writers]
    assert sorted(codes) == [0, 3], outputs
    winner = codes.index(0)
    assert "already holds other rows" in outputs[1 - winner][0]
    assert check_whole(root, options) == end
    found = content(root, "tracks", "events", options=options)
    assert len(found) == 20
    for first in range(0, end, CHUNK):
        table, happened = (
            pq.read_table(pa.BufferReader(found[f"{kind}/stream_id=cam-1/frames-{first:012d}.parquet"]))
            for kind in ("tracks", "events")
        )
        owners = [s for s in (0, 1) if table.to_pylist() == rows(first, first + CHUNK - 1, s).to_pylist()]
        assert len(owners) == 1
        expected = events(first, owners[0]) if first % 3 else NO_EVENTS
        assert happened.to_pylist() == expected.to_pylist()
        # The one that lost a name stopped there, so all that follows is the winner's.
        if f"{first + CHUNK}\n" not in outputs[1 - winner][0]:
            assert owners == [winner]
