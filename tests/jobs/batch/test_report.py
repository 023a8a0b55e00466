"""The report of a batch: its content, and that it is written atomically."""

from __future__ import annotations

import json
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobs.batch.listing import Skipped
from jobs.batch.report import BatchReport
from jobs.scheduling.actions import VideoResult
from jobs.scheduling.video_job import VideoJob
from pipeline.base.errors import StoreError, XmemError
from pipeline.distributed.messages import StreamSpec
from pipeline.storage.failures import Failure

START = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
RESULTS = [
    VideoResult("a", "finished", 120, 240, 3, 1, 4.5678, None),
    VideoResult("b", "failed", 0, 0, 0, 1, 0.0, Failure("SourceError", "b.mp4: no video", True)),
    VideoResult("c", "quarantined", 30, 60, 0, 4, 9.0, Failure("OSError", "s3://k:pw@h/c.mp4 broke", False)),
    VideoResult("d", "pending", 10, 20, 1, 1, 1.0, None),
]


def report(tmp_path: Path, results: list[VideoResult] = RESULTS, ids: str = "abcde", **options: Any) -> Any:
    jobs = [VideoJob(StreamSpec(i, f"s3://key:secret@host/{i}.mp4")) for i in ids]
    ended = START + timedelta(seconds=8.5)
    given = {r.stream_id: r for r in results}
    return BatchReport(jobs, given, str(tmp_path / "out"), START, ended, frames=130, workers=2, **options)


def test_it_says_what_became_of_each_video(tmp_path: Path) -> None:
    text = "".join(report(tmp_path).to_json())
    assert "secret" not in text
    assert "pw" not in text
    document = json.loads(text)
    videos = document.pop("videos")
    assert document.pop("batch_id").startswith("20260304T050607Z-")
    assert document.pop("skipped") == {"files": 0, "first": []}
    assert document == {
        "format_version": 1,
        "out": str(tmp_path / "out"),
        "started": "2026-03-04T05:06:07.000+00:00",
        "ended": "2026-03-04T05:06:15.500+00:00",
        "seconds": 8.5,
        "interrupted": False,
        "stopped": None,
        "frames_tracked": 130,
        "workers": 2,
        "request": [],
        "totals": {
            "videos": 5, "finished": 1, "failed": 1, "quarantined": 1, "cancelled": 0, "pending": 2,
            "frames": 160, "rows": 320, "losses": 4, "ellipses": 0,
        },
    }  # fmt: skip
    assert [v["stream_id"] for v in videos] == list("abcde")
    assert videos[0] == {
        "stream_id": "a", "uri": "s3://host/a.mp4", "state": "finished", "frames": 120, "rows": 240,
        "losses": 3, "ellipses": 0, "tries": 1, "seconds": 4.568, "cause": None,
    }  # fmt: skip
    assert videos[1]["cause"] == {"kind": "SourceError", "message": "b.mp4: no video"}
    assert videos[2]["cause"]["message"] == "s3://h/c.mp4 broke"
    assert videos[4]["state"] == "pending"


def test_it_names_the_files_that_were_skipped(tmp_path: Path) -> None:
    skipped = Skipped()
    skipped.add("s3://key:secret@host/notes.txt", "not a video suffix")
    document = json.loads("".join(report(tmp_path, skipped=skipped).to_json()))
    first = [{"uri": "s3://host/notes.txt", "reason": "not a video suffix"}]
    assert document["skipped"] == {"files": 1, "first": first}


def test_an_empty_batch_is_valid_json(tmp_path: Path) -> None:
    assert json.loads("".join(report(tmp_path, [], "").to_json()))["videos"] == []


@pytest.mark.parametrize(
    ("ids", "interrupted", "code"),
    [
        ("a", False, 0),
        ("ab", False, 1),
        ("ac", False, 1),
        ("ad", False, 1),
        ("ad", True, 130),
        ("", False, 0),
    ],
)
def test_the_exit_code(tmp_path: Path, ids: str, interrupted: bool, code: int) -> None:
    assert report(tmp_path, ids=ids, interrupted=interrupted).exit_code == code


def test_the_bad_ones_are_listed_in_order(tmp_path: Path) -> None:
    assert [r.stream_id for _, r in report(tmp_path, ids="edcba").bad()] == ["c", "b"]


def test_it_is_kept_in_the_output_folder_and_never_overwritten(tmp_path: Path) -> None:
    first, second = report(tmp_path), report(tmp_path)
    for made in (first, second):
        made.check()
        made.save()
    names = sorted(p.name for p in (tmp_path / "out" / "batches").iterdir())
    assert names == sorted(f"{r.batch_id}.json" for r in (first, second))
    for made in (first, second):
        assert json.loads(Path(made.location).read_text())["batch_id"] == made.batch_id


def test_an_output_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StoreError, match="out"):
        report(tmp_path).check()
    with pytest.raises(StoreError, match="out"):
        report(tmp_path).save()


def test_it_replaces_a_file_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.json"
    target.write_text("older")
    broken = report(tmp_path)
    monkeypatch.setattr("jobs.batch.report._line", lambda job, result: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        broken.write(str(target))
    assert target.read_text() == "older"
    monkeypatch.undo()
    before = os.umask(0o022)
    try:
        report(tmp_path).write(str(target))
    finally:
        os.umask(before)
    assert json.loads(target.read_text())["totals"]["videos"] == 5
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_to_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(tmp_path).write("-")
    assert json.loads(capsys.readouterr().out)["totals"]["finished"] == 1


def test_a_file_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(XmemError, match=r"the report cannot be written to .*none/report.json: No such file"):
        report(tmp_path).write(str(tmp_path / "none" / "report.json"))
