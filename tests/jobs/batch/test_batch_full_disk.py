"""A disk that fills up during a batch: the batch stops, no video is blamed, and it can be resumed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny import tiny_weights
from support.videos import make_video

from jobs.batch.manifest import load_manifest
from jobs.batch.run import BatchOptions, run_batch
from jobs.cli.app import main
from pipeline.analytics.query import query
from pipeline.distributed.messages import WorkerSettings

pytestmark = pytest.mark.usefixtures("local_ray")

VIDEOS, FRAMES = 6, 40
PROMPTS = {"version": 1, "objects": [{"id": 1, "polygons": [[5, 5, 40, 5, 40, 40, 5, 40]]}]}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system of 512 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def parquet(out: Path) -> dict[str, tuple[int, int]]:
    """Frames and rows of each stream that has any."""
    ask = "select stream_id, max(frame_index) + 1 as frames, count(*) as n from tracks group by all"
    if not list(out.glob("tracks/*/*.parquet")):
        return {}
    return {r["stream_id"]: (r["frames"], r["n"]) for r in query(out, ask).to_pylist()}


def test_a_full_disk_stops_the_batch_and_it_goes_on_when_there_is_space(
    tmp_path: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for i in range(VIDEOS):
        make_video(videos / f"v{i}.mp4", FRAMES, width=64, height=48, start_pts=i)
    (tmp_path / "all.json").write_text(json.dumps(PROMPTS))
    jobs = load_manifest(videos, prompts=str(tmp_path / "all.json"))
    settings = WorkerSettings.of(
        str(disk), model=tiny_weights(tmp_path), chunk_frames=4, snapshot_chunks=1, threads=1
    )
    stopped = run_batch(jobs, settings, BatchOptions(actors=2))
    assert stopped.exit_code == 1
    assert stopped.stopped is not None
    said = "No space left on device; everything committed so far is kept: free some space and run again"
    assert stopped.stopped.message.endswith(said)
    totals = stopped.totals()
    assert totals["pending"] + totals["finished"] == VIDEOS  # none failed, none is quarantined
    assert totals["pending"] > 0
    assert not stopped.interrupted
    assert all(result.tries <= 1 for _, result in stopped.each())
    there = parquet(disk)
    assert there
    for _, result in stopped.each():
        assert (result.frames, result.rows) == there.get(result.stream_id, (0, 0))
    head = json.loads("".join(stopped.to_json()))
    assert head["stopped"] == {"kind": "OutputError", "message": stopped.stopped.message}

    arguments = ["batch", str(videos), "--out", str(disk), "--prompts", str(tmp_path / "all.json")]
    arguments += [
        "--model",
        settings.tracking.model.name,
        "--chunk",
        "4",
        "--actors",
        "2",
        "--threads",
        "1",
    ]
    (disk / "filler").write_bytes(b"")
    with pytest.raises(SystemExit) as ended:  # there may be room for a file or two by now, not for all
        main(arguments)
    assert ended.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("xmem: error: ")
    assert "No space left on device" in last

    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert parquet(disk) == {job.spec.stream_id: (FRAMES, FRAMES) for job in jobs}
