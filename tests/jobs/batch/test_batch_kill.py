"""Batches whose trackers (in every phase) and drivers are killed: no rows are lost or duplicated.

`make chaos` sets XMEM_CHAOS, the number of kills.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.ray_head import _session as processes_of
from support.videos import make_video

from pipeline.analytics.query import query
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.files.track import track
from xmem_core import MemoryConfig

pytestmark = pytest.mark.ray

TESTS = Path(__file__).parents[2]
KILLS = int(os.environ.get("XMEM_CHAOS", "5"))
PHASES = ["driver", "track", "between", "snapshot", "decode", "commit", "stored", "committed"]
VIDEOS, FRAMES, CHUNK = 8, 40, 3
DRIVER = """
import os, sys
os.environ["XMEM_KILLS_DRIVER"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-c", "from jobs.cli.app import main; main()", *sys.argv[1:]])
"""


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight videos of different lengths and codecs, each with its prompts beside it."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(VIDEOS):
        make_video(
            folder / f"v{i}.{'mp4' if i % 2 else 'mkv'}",
            FRAMES - i,
            width=96,
            height=64,
            b_frames=i % 3,
            gop=7,
        )
        objects: list[dict[str, Any]] = [
            {"frame": 0, "id": 1, "category": "a", "polygons": [[4, 8, 40, 8, 40, 40, 4, 40]]},
            {"frame": 2 * i + 1, "id": 5 + i, "box": [30, 20, 24, 24]},
        ]
        prompts = {"version": 1, "objects": objects, "remove": [{"frame": 25, "id": 1}]}
        (folder / f"v{i}.prompts.json").write_text(json.dumps(prompts))
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, videos: Path, model: str) -> dict[str, bytes]:
    """The files that a single process writes, one video at a time."""
    out = tmp_path_factory.mktemp("undisturbed")
    for i in range(VIDEOS):
        (video,) = videos.glob(f"v{i}.m*")
        prompts = PromptSet.from_record(json.loads((videos / f"v{i}.prompts.json").read_text()))
        track(
            video,
            out,
            prompts,
            model=model,
            threads=1,
            chunk_frames=CHUNK,
            memory=MemoryConfig(),
            dtype="auto",  # as the command's
        )
    return rows_of(out)


def rows_of(out: Path) -> dict[str, bytes]:
    folders = ("tracks", "events")
    return {str(p.relative_to(out)): p.read_bytes() for f in folders for p in (out / f).rglob("*.parquet")}


def run(videos: Path, out: Path, model: str, kills: Path | None) -> subprocess.CompletedProcess[str]:
    arguments = [str(videos), "--out", str(out), "--model", model, "--actors", "2", "--threads", "1"]
    arguments += ["--chunk-frames", str(CHUNK), "--max-tries", "1000"]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{TESTS / 'chaos_hook'}:{TESTS.parent}",
        "OMP_NUM_THREADS": "1",
    }
    if kills is not None:
        environment["XMEM_KILLS"] = str(kills)
    return subprocess.run(
        [sys.executable, "-c", DRIVER, "batch", *arguments],
        env=environment,
        cwd=videos,
        text=True,
        capture_output=True,
        timeout=3600,
    )


@pytest.mark.chaos
def test_killed_trackers_and_drivers_lose_and_double_nothing(
    tmp_path: Path, videos: Path, model: str, undisturbed: dict[str, bytes]
) -> None:
    kills = tmp_path / "kills"
    kills.mkdir()
    rng = random.Random(20)
    phases = [PHASES[i % len(PHASES)] for i in range(KILLS)]
    rng.shuffle(phases)
    for i, phase in enumerate(phases):
        (kills / f"{i:04d}.{phase}").touch()
    rounds = drivers = 0
    while any(kills.iterdir()):
        rounds += 1
        out = tmp_path / f"out-{rounds}"
        while True:
            before = len(list(kills.iterdir()))
            done = run(videos, out, model, kills)
            if done.returncode == 0:
                break
            assert done.returncode == -9, done.stderr[-3000:]  # by a kill of the driver, by nothing else
            drivers += 1
            assert len(list(kills.iterdir())) < before
        assert rows_of(out) == undisturbed, f"after round {rounds}"
        states = query(out, "select state, count(*) as n from streams group by all").to_pylist()
        assert states == [{"state": "finished", "n": VIDEOS}]
        twice = "select 1 from tracks group by stream_id, frame_index, object_id having count(*) > 1"
        assert query(out, twice).num_rows == 0
    assert drivers == phases.count("driver")


def test_a_killed_raylet_ends_the_command_and_the_same_command_goes_on(
    tmp_path: Path, videos: Path, model: str, undisturbed: dict[str, bytes]
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "-c", "from jobs.cli.app import main; main()", "batch"]
    command += [
        str(videos / "v[01].m*"),
        "--out",
        str(out),
        "--model",
        model,
        "--actors",
        "2",
        "--threads",
        "1",
    ]
    command += ["--chunk-frames", str(CHUNK)]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}

    def start() -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            return subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )

    def wait(what: Callable[[], Any]) -> None:
        end = time.monotonic() + 240
        while not what():
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.1)

    process = start()
    try:
        wait(lambda: rows_of(out))
        for pid in processes_of(process.pid):
            if Path(f"/proc/{pid}/comm").read_text() == "raylet\n":
                os.kill(pid, signal.SIGKILL)
        assert process.wait(240) == 1, log.read_text()[-3000:]
        assert log.read_text().splitlines()[-1] == (
            "xmem: error: Ray's raylet has died (exit code -9): run the command again"
        )
        wait(lambda: not processes_of(process.pid))
        process = start()
        assert process.wait(240) == 0, log.read_text()[-3000:]
    finally:
        process.kill()
        process.wait()
    two = {name: rows for name, rows in undisturbed.items() if "=v0-" in name or "=v1-" in name}
    assert two
    assert rows_of(out) == two
