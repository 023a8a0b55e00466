"""`xmem batch`: options, output, exit codes; one real run, interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.tiny import tiny_weights
from support.videos import make_video

import jobs.batch.run
import jobs.batch.submit
from jobs.batch.report import BatchReport
from jobs.batch.run import BatchOptions
from jobs.cli.app import main
from jobs.scheduling.actions import VideoResult
from jobs.scheduling.video_job import VideoJob
from pipeline.analytics.query import query
from pipeline.base.errors import StoreError
from pipeline.base.stream_ids import generate_stream_id
from pipeline.distributed.messages import WorkerSettings
from pipeline.storage.failures import Failure
from pipeline.storage.opening import open_files
from pipeline.tracks.lease import lease
from pipeline.tracks.store import StreamStore
from xmem_core import MemoryConfig

BOX = {"version": 1, "objects": [{"frame": 0, "id": 1, "box": [10, 10, 30, 30]}]}
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_text("x")
        (tmp_path / f"{name}.prompts.json").write_text(json.dumps(BOX))
    return tmp_path


def call(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    assert isinstance(caught.value.code, int)
    return caught.value.code


class Batch:
    """A fake `run_batch` that records its arguments and ends all videos as specified."""

    def __init__(self) -> None:
        self.jobs: list[VideoJob] = []
        self.settings = WorkerSettings("")
        self.options = BatchOptions()
        self.states: list[Any] = []
        self.interrupted = False
        self.request: Sequence[str] = ()
        self.stopped: Failure | None = None

    def __call__(
        self, jobs: Sequence[VideoJob], settings: WorkerSettings, options: BatchOptions, **calls: Any
    ) -> BatchReport:
        self.jobs, self.settings, self.options = list(jobs), settings, options
        self.request = calls["request"]
        states = self.states or ["finished"] * len(jobs)
        cause = Failure("SourceError", "ftp://me:secret@host/x.mp4 [red]is[/red] cut off", False)
        results = [
            VideoResult(job.spec.stream_id, state, 10, 20, 0, 3, 1.0, None if state == "finished" else cause)
            for job, state in zip(jobs, states, strict=True)
        ]
        return BatchReport(
            jobs, {r.stream_id: r for r in results}, settings.out, START, START + timedelta(seconds=4),
            self.interrupted, self.stopped, frames=100, workers=1, request=self.request, batch_id="the-id",
        )  # fmt: skip


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch) -> Batch:
    stand_in = Batch()
    monkeypatch.setattr(jobs.batch.run, "run_batch", stand_in)
    return stand_in


@pytest.mark.parametrize("form", [("batch", "run"), ("batch",)])
@pytest.mark.parametrize("videos_first", [True, False])
def test_the_first_argument_that_is_no_command_is_the_videos(
    folder: Path, batch: Batch, form: tuple[str, ...], videos_first: bool
) -> None:
    arguments = ("*.mp4", "--out", "out") if videos_first else ("--out", "out", "*.mp4")
    assert call(*form, *arguments) == 0
    assert [Path(j.spec.uri).name for j in batch.jobs] == ["a.mp4", "b.mp4"]
    assert batch.settings == WorkerSettings("out")
    assert batch.options == BatchOptions()


def test_a_folder_named_like_a_command_is_named_by_its_path(folder: Path, batch: Batch) -> None:
    (folder / "status").mkdir()
    (folder / "a.mp4").rename(folder / "status" / "a.mp4")
    assert call("batch", "./status", "--out", "out", "--detect", "motion") == 0
    assert len(batch.jobs) == 1


def test_options(folder: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "all.json").write_text(json.dumps(BOX))
    (folder / "b.prompts.json").unlink()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    code = call(
        "batch", ".", "--out", "s3://bucket/out", "--prompts", "all.json", "--detect", "motion", "--restart",
        "--max-frames", "70", "--chunk-frames", "50", "--box-segmenter", "ellipse", "--address", "head:6379",
        "--actors", "3", "--gpu-fraction", "0.25", "--priority", "2.5", "--max-tries", "7", "--model", "xmem",
        "--size", "0", "--device", "cuda", "--dtype", "bfloat16", "--threads", "2", "--mem-every", "3",
        "--deep-update-every", "6", "--top-k", "20", "--min-mid-term-frames", "4", "--max-mid-term-frames",
        "9", "--num-prototypes", "64", "--max-long-term-elements", "500", "--max-permanent-frames", "2",
        "--no-long-term", "--search-window", "160",
    )  # fmt: skip
    assert code == 0
    memory = MemoryConfig(
        mem_every=3, deep_update_every=6, top_k=20, min_mid_term_frames=4, max_mid_term_frames=9,
        num_prototypes=64, max_long_term_elements=500, max_permanent_frames=2, enable_long_term=False,
        search_window=160,
    )  # fmt: skip
    assert batch.settings == WorkerSettings.of(
        "s3://bucket/out", model="xmem", memory=memory, size=0, device="cuda", threads=2,
        dtype="bfloat16", chunk_frames=50, max_frames=70, box_segmenter="ellipse", detector="motion",
    )  # fmt: skip
    assert batch.options == BatchOptions("head:6379", 3, 0.25, 7)
    first, second = batch.jobs
    assert (first.priority, first.spec.restart) == (2.5, True)
    assert first.spec.prompts_uri == f"{folder}/a.prompts.json"
    assert second.spec.prompts_uri is None  # on a cluster, what all.json holds travels
    assert second.spec.prompts is not None
    assert second.spec.prompts["objects"][0]["box"] == [10, 10, 30, 30]


def test_the_end_is_told_on_stderr_and_the_report_on_stdout(
    folder: Path, batch: Batch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch.states = ["finished", "quarantined"]
    assert call("batch", ".", "--out", "ftp://me:secret@host/out", "--report", "-") == 1
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert [v["state"] for v in report["videos"]] == ["finished", "quarantined"]
    assert captured.err.splitlines() == [
        f"quarantined after 3 tries: {folder}/b.mp4: ftp://host/x.mp4 [red]is[/red] cut off",
        "1 of 2 videos finished, 1 quarantined; 40 rows in ftp://host/out",
        "100 frames tracked in 4 s (25.0 frames/s)",
        "report: ftp://host/out/batches/the-id.json",
    ]
    assert "secret" not in captured.out


def test_what_stopped_the_batch_is_the_last_line(
    folder: Path, batch: Batch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch.states = ["finished", "pending"]
    batch.stopped = Failure("OutputError", "cannot write out/x: No space left on device", False, output=True)
    assert call("batch", ".", "--out", "out", "--restart") == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "xmem: error: the batch was stopped: cannot write out/x: No space left on device; the same command "
        "without --restart goes on from the last committed chunks"
    )


def test_no_more_bad_videos_are_listed_than_people_read(
    tmp_path: Path, batch: Batch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"uri": f"{i}.mp4", "prompts": BOX}) for i in range(50)]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    batch.states = ["failed"] * 50
    assert call("batch", tmp_path / "m.jsonl", "--out", "out", "--report", tmp_path / "report.json") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("failed: ") == 20
    assert "... and 30 more, see the report" in captured.err
    assert json.loads((tmp_path / "report.json").read_text())["totals"]["failed"] == 50


def test_interrupted_it_says_how_to_go_on(
    folder: Path, batch: Batch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch.interrupted = True
    batch.states = ["finished", "pending"]
    assert call("batch", ".", "--out", "out", "--restart") == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "xmem: error: interrupted; the same command without --restart goes on from the last committed chunk"
    )


def test_credentials_go_to_the_workers_and_nowhere_else(
    folder: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        "--storage-options",
        "secret=hush",
        "--storage-options",
        '{"anon": false}',
        "--env",
        "TOKEN=hush",
    ]
    assert call("batch", "*.mp4", "--out", "s3://b/out", *given, "--report", "-") == 0
    assert batch.settings.storage_options == {"secret": "hush", "anon": False}
    assert batch.settings.out_storage_options == batch.settings.storage_options
    assert batch.options.env == {"TOKEN": "hush"}
    assert "hush" not in "".join(capsys.readouterr()) + repr(batch.settings) + repr(batch.options)
    assert "hush" not in "".join(batch.request)
    assert call("batch", "*.mp4", "--out", "out", *given, "--out-storage-options", "key=other") == 0
    assert batch.settings.out_storage_options == {"key": "other"}


def test_retry_takes_the_failed_videos_of_a_report_with_its_settings(
    folder: Path, batch: Batch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch.states = ["finished", "quarantined"]
    first = ["*.mp4", "--out", "out", "--mem-every", "3", "--no-long-term", "--restart", "--priority", "2"]
    assert call("batch", *first, "--report", "first.json") == 1
    settings = batch.settings
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    batch.states = ["finished"]
    assert call("batch", "retry", folder / "first.json", "--max-tries", "9") == 0
    assert [Path(job.spec.uri).name for job in batch.jobs] == ["b.mp4"]
    assert (batch.jobs[0].priority, batch.jobs[0].spec.restart) == (2.0, False)
    assert batch.settings == replace(settings, out=str(folder / "out"))
    assert batch.options == BatchOptions(max_tries=9)
    batch.states = []
    assert call("batch", folder / "*.mp4", "--out", "out", "--report", "second.json") == 0
    capsys.readouterr()
    assert call("batch", "retry", "second.json") == 0
    assert "no video failed, nothing to do" in capsys.readouterr().err
    (folder / "no.json").write_text("{}")
    assert call("batch", "retry", folder / "no.json") == 2
    assert "no.json is no report of a batch" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_done_and_all_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c"):
        make_video(tmp_path / f"{name}.mp4", 12, width=64, height=48)
        (tmp_path / f"{name}.prompts.json").write_text(json.dumps(BOX))
    (tmp_path / "notes.txt").write_text("x")
    done, begun = (generate_stream_id(str(tmp_path / f"{n}.mp4")) for n in ("a", "b"))
    StreamStore("out", done).write_record({"state": "finished", "frames": 12})
    StreamStore("out", begun).write_record({"state": "running", "frames": 5})
    (tmp_path / "out" / "batches").mkdir()
    earlier = {"frames_tracked": 100, "seconds": 10.0}
    (tmp_path / "out" / "batches" / "1.json").write_text(json.dumps(earlier))
    before = sorted(tmp_path.rglob("*"))
    assert call("batch", "*", "--out", "out", "--max-frames", "10", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[:4] == [
        "3 videos: 2 to track (1 begun before), 1 finished",
        "prompts: 2 in files",
        "frames: about 15 to track",
        f"time: about 2 s at 10.0 frames/s, as in {tmp_path}/out/batches/1.json",
    ]
    assert sorted(tmp_path.rglob("*")) == before
    lines = [{"uri": 1}, {"uri": "a.mp4"}, "x", {"uri": "gone.mp4", "prompts": BOX}]
    lines += [{"uri": "c.mp4", "prompts": "gone.json"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert call("batch", "m.jsonl", "--out", "new", "--dry-run") == 2
    wrong = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wrong: ")]
    expected = ("line 1", "line 3", "gone.mp4", "gone.json")
    assert [next(w for w in expected if w in line) for line in wrong] == list(expected)
    assert not (tmp_path / "new").exists()


def test_the_batches_of_an_output_folder_are_listed(
    folder: Path, batch: Batch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = open_files("out")
    batch.states = ["finished", "failed"]
    assert call("batch", ".", "--out", "out", "--report", "report.json") == 1
    files.create("batches/the-id.json", (folder / "report.json").read_bytes())
    capsys.readouterr()
    with lease(files, "the-next", ["a"]):
        assert call("batch", "list", "--out", "out") == 0
    running, ended = capsys.readouterr().out.splitlines()
    assert running.startswith("the-next  running  ")
    assert running.endswith(f"process {os.getpid()}")
    assert ended == (
        "the-id  ended  2026-01-02T03:04:05.000+00:00  2 videos: 1 finished, 1 failed; "
        f"{folder}/out/batches/the-id.json"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none", "--out", "o"], "none: no such file or folder"),
        (["*.avi", "--out", "o"], "*.avi matches no video"),
        ([".", "--out", "o", "--prompts", "none.json"], "none.json cannot be read"),
        ([".", "--out", "o", "--actors", "0"], "actors 0 is not allowed"),
        ([".", "--out", "o", "--actors", "x"], "--actors"),
        ([".", "--out", "o", "--gpu-fraction", "1.5"], "gpu_fraction 1.5 is not allowed"),
        ([".", "--out", "o", "--priority", "0"], "priority 0.0 is not allowed"),
        ([".", "--out", "o", "--max-tries", "0"], "max_tries 0 is not allowed"),
        ([".", "--out", "o", "--mem-every", "0"], "mem_every=0"),
        ([".", "--out", "o", "--model", "xmem-huge"], "no model 'xmem-huge'"),
        ([".", "--out", "o", "--nonsense"], "--nonsense"),
        ([".", "--out", "o", "extra"], "extra"),
        (["."], "--out"),
        (["submit", ".", "--out", "o", "--nonsense"], "--nonsense"),
        (["submit", ".", "--out", "o", "--actors", "x"], "--actors"),
        (["submit", ".", "--out", "o", "--env", "NAME"], "--env 'NAME' is not allowed: give NAME=VALUE"),
        (["submit", ".", "--out", "ftp://me:secret@host/o"], "credentials would show on the dashboard"),
        (["status"], "job"),
    ],
)
def test_wrong_requests(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(jobs.batch.submit.Jobs, "__init__", lambda self, address: None)
    assert call("batch", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert "secret" not in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not (folder / "o").exists()


def test_a_failure_of_the_whole_batch_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any, **named: Any) -> None:
        raise StoreError("cannot write s3://key:secret@host/out")

    monkeypatch.setattr(jobs.batch.run, "run_batch", fails)
    assert call("batch", ".", "--out", "out") == 1
    assert capsys.readouterr().err == "xmem: error: cannot write s3://host/out\n"


def test_help_names_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("batch", "--help") == 0
    shown = capsys.readouterr().out
    assert all(f" {name} " in shown for name in ("run", "submit", "status", "logs", "cancel"))


def test_interrupted_like_by_a_terminal_it_commits_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real run with its own Ray: SIGINT to all processes of the group, as Ctrl-C sends it."""
    model = tiny_weights(tmp_path)
    for name, frames in (("a", 300), ("b", 12)):  # long enough to be interrupted on a busy machine
        make_video(tmp_path / f"{name}.mp4", frames, width=64, height=48)
        (tmp_path / f"{name}.prompts.json").write_text(json.dumps(BOX))
    command = [sys.executable, "-m", "jobs.cli", "batch", ".", "--out", "out", "--chunk", "3"]
    command += ["--model", model, "--actors", "1", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("out/running/*.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    # In this process, since another one may take longer to start than the batch takes.
    monkeypatch.chdir(tmp_path)
    assert call(*command[3:]) == 2
    twice = capsys.readouterr().err
    assert f"(process {process.pid}, since 20" in twice
    assert f"is tracking 2 of these 2 videos into {tmp_path / 'out'}" in twice
    while len(list(tmp_path.glob("out/tracks/*/*.parquet"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert out == ""
    lines = err.splitlines()
    assert "xmem: stopping; what is being tracked is committed first (again: at once)" in lines
    assert lines[-1] == "xmem: error: interrupted; the same command goes on from the last committed chunk"
    assert "Traceback" not in err
    (report,) = (json.loads(p.read_text()) for p in (tmp_path / "out" / "batches").iterdir())
    assert report["interrupted"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 videos finished; 312 rows" in done.stderr
    counted = query(str(tmp_path / "out"), "select count(*) as n, count(distinct (stream_id, frame_index)) "
                    "as d from tracks").to_pylist()  # fmt: skip
    assert counted == [{"n": 312, "d": 312}]
