"""Leases on the streams of an output folder; leases of dead runs do not block others."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from support.servers import S3Server

import pipeline.tracks.lease
from pipeline.storage.files import Files
from pipeline.storage.opening import open_files
from pipeline.tracks.lease import EXPIRY_SECONDS, AnotherRunError, Owner, lease, running

HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pipeline.tracks.lease import lease
from pipeline.storage.opening import open_files
with lease(open_files(sys.argv[2]), "first", ["a", "b", "c"]):
    print("held", flush=True)
    time.sleep(1000)
"""


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.s3)])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Files]:
    if request.param == "disk":
        yield open_files(tmp_path / "out")
    else:
        server: S3Server = request.getfixturevalue("s3_server")
        yield open_files(server.uri(f"lease-{tmp_path.name}"), server.options)


def elsewhere(**changes: Any) -> Owner:
    """A run on another machine."""
    return replace(Owner.here("other"), host="far", boot="another", state="running", **changes)


def put(files: Files, owner: Owner, *ids: str) -> None:
    files.create(f"running/{owner.batch_id}.streams", b"".join(pipeline.tracks.lease._digest(i) for i in ids))
    files.replace(f"running/{owner.batch_id}.json", json.dumps(asdict(owner)).encode())


def test_a_second_run_of_the_same_streams_is_refused_and_others_are_not(files: Files) -> None:
    with lease(files, "first", ["a", "b", "c"]):
        assert [owner.batch_id for owner in running(files)] == ["first"]
        with (
            pytest.raises(AnotherRunError, match=r"batch first on .* is tracking 2 of these 3 videos into"),
            lease(files, "second", ["b", "c", "d"]),
        ):
            pass
        with lease(files, "third", ["d", "e"]):
            assert len(running(files)) == 2
        assert [owner.batch_id for owner in running(files)] == ["first"]
    assert files.names("running") == []
    with lease(files, "second", ["b"]):
        pass


def test_a_run_elsewhere_counts_as_dead_after_a_while(files: Files) -> None:
    put(files, elsewhere(alive=time.time() - EXPIRY_SECONDS / 2), "a")
    with pytest.raises(AnotherRunError, match="batch other on far"), lease(files, "mine", ["a"]):
        pass
    with lease(files, "mine", ["a"], take_over=True):
        assert [owner.batch_id for owner in running(files)] == ["mine"]
    put(files, elsewhere(alive=time.time() - EXPIRY_SECONDS - 1), "a")
    with lease(files, "mine", ["a"]):
        assert files.names("running") == ["running/mine.json", "running/mine.streams"]


def test_a_killed_run_on_this_machine_holds_nobody_up(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(root), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "held\n"
        files = open_files(tmp_path)
        said = (
            rf"batch first on .* \(process {process.pid}, since 2\d\d\d-.*\) is tracking 1 of these 1 videos"
        )
        with pytest.raises(AnotherRunError, match=said), lease(files, "second", ["a"]):
            pass
        process.kill()
        process.wait()
        with lease(files, "second", ["a"]):
            assert [owner.batch_id for owner in running(files)] == ["second"]
    assert not (tmp_path / "running").exists()


def test_the_heartbeat_goes_on_and_stops_when_the_lease_was_taken(
    files: Files, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline.tracks.lease, "HEARTBEAT_SECONDS", 0.05)
    with lease(files, "mine", ["a"]):
        first = running(files)[0].alive
        while running(files)[0].alive == first:
            time.sleep(0.02)
        with lease(files, "theirs", ["a"], take_over=True):
            while "taken over the lease" not in caplog.text:
                time.sleep(0.02)
            assert [owner.batch_id for owner in running(files)] == ["theirs"]


def test_a_heartbeat_during_a_take_over_does_not_renew_the_lease(
    files: Files, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline.tracks.lease, "HEARTBEAT_SECONDS", 0.05)
    with lease(files, "mine", ["a"]):
        # The other run removed both files, but a heartbeat under way wrote the first one again.
        files.remove("running/mine.streams")
        deadline = time.monotonic() + 60
        while "taken over the lease" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert running(files) == []


def test_of_many_that_start_at_the_same_moment_one_goes_on(files: Files) -> None:
    ready, over = threading.Barrier(4), threading.Event()
    won: list[str] = []
    refused: list[str] = []

    def run(name: str) -> None:
        ready.wait()
        try:
            with lease(files, name, ["a"]):
                won.append(name)
                over.wait()
        except AnotherRunError:
            refused.append(name)

    threads = [threading.Thread(target=run, args=(f"run-{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    while len(refused) < 3:
        assert len(won) <= 1
        time.sleep(0.02)
    while not won:
        time.sleep(0.02)
    over.set()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 3)


def test_a_damaged_lease_is_not_heeded(files: Files) -> None:
    files.replace("running/broken.json", b"{")
    with lease(files, "mine", ["a"]):
        pass
    assert files.names("running") == ["running/broken.json"]
