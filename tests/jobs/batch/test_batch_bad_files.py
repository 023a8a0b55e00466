"""Sixty files, 5 % of them not videos: the good ones finish, the bad ones are reported with causes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny import tiny_weights
from support.videos import damage_packets, make_video, truncate

from jobs.batch.manifest import load_manifest
from jobs.batch.run import BatchOptions, run_batch
from pipeline.analytics.query import query
from pipeline.distributed.messages import WorkerSettings

pytestmark = pytest.mark.usefixtures("local_ray")

FRAMES = 6


def test_five_percent_bad_files_among_sixty(tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for i in range(57):
        make_video(videos / f"good{i:02d}.mp4", FRAMES, width=64, height=48, start_pts=i)
    (videos / "empty.mp4").touch()
    (videos / "text.mkv").write_text("Dear editor,\nthe recording follows by post.\n")
    whole = make_video(tmp_path / "whole.mp4", FRAMES, width=64, height=48)
    truncate(whole, videos / "truncated.mp4", 0.6)  # the index stands at the end: nothing can be read
    # Damage that leaves something to decode is no reason to give a video up: it is counted.
    damage_packets(make_video(tmp_path / "b.mkv", 30, width=64, height=48), videos / "good56.mkv", [15])
    (videos / "good56.mp4").unlink()
    prompts = tmp_path / "all.json"
    objects = [{"id": 1, "polygons": [[5, 5, 40, 5, 40, 40, 5, 40]]}]
    prompts.write_text(json.dumps({"version": 1, "objects": objects}))

    out = tmp_path / "out"
    jobs = load_manifest(str(videos), prompts=str(prompts))
    assert len(jobs) == 60
    settings = WorkerSettings.of(str(out), model=tiny_weights(tmp_path), threads=1, chunk_frames=4)
    report = run_batch(jobs, settings, BatchOptions(actors=2, max_tries=2))

    assert report.exit_code == 1
    assert (report.totals()["finished"], report.totals()["failed"]) == (57, 3)
    causes = {Path(job.spec.uri).name: result.cause.message for job, result in report.bad() if result.cause}
    assert sorted(causes) == ["empty.mp4", "text.mkv", "truncated.mp4"]
    for name, cause in causes.items():
        assert name in cause
    assert "empty" in causes["empty.mp4"]
    assert {result.tries for _, result in report.bad()} == {1}  # trying again cannot help

    frames = query(out, "select stream_id, count(*) as n from tracks group by all").to_pylist()
    counts = {row["stream_id"].rpartition("-")[0]: row["n"] for row in frames}
    assert len(counts) == 57
    assert {n for name, n in counts.items() if name != "good56"} == {FRAMES}
    (damaged,) = [result for _, result in report.each() if result.stream_id.startswith("good56")]
    assert damaged.state == "finished"
    assert damaged.losses >= 1
    assert damaged.frames + damaged.losses >= 25

    again = run_batch(jobs, settings, BatchOptions(actors=2, max_tries=1))
    assert (again.totals()["finished"], again.totals()["failed"]) == (57, 3)
    assert again.frames == 0  # what is finished is not tracked again
