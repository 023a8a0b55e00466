"""Batches on a real local Ray: good videos give the same rows as alone, bad ones are reported."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pytest
from support.servers import S3Server
from support.shared_ray import CPUS
from support.tiny import tiny_weights
from support.videos import make_images, make_video, truncate

from jobs.batch.dry_run import forecast
from jobs.batch.manifest import load_manifest
from jobs.batch.report import BatchReport
from jobs.batch.run import BatchOptions, Plan, budget, plan, run_batch
from jobs.cluster.connection import Resources
from jobs.scheduling.actions import Progress, Running
from jobs.scheduling.video_job import VideoJob
from pipeline.analytics.query import query
from pipeline.base.errors import SettingsConflictError, StoreError, UsageError
from pipeline.distributed.messages import StreamSpec, WorkerSettings
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.files.track import track
from pipeline.tracking.settings import ModelSettings

pytestmark = pytest.mark.usefixtures("local_ray")

BOX: dict[str, Any] = {
    "version": 1,
    "objects": [{"frame": 0, "id": 1, "box": [10, 10, 30, 30], "category": "shape"}],
}
CHUNK = 8
ONE = BatchOptions(actors=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, frames in (("a", 20), ("b", 9), ("c", 16)):
        make_video(folder / f"{name}.mp4", frames, width=64, height=48)
        (folder / f"{name}.prompts.json").write_text(json.dumps(BOX))
    return folder


def settings(out: Path, weights: str, **options: Any) -> WorkerSettings:
    given = {"model": weights, "chunk_frames": CHUNK, "snapshot_chunks": 1, "threads": 1, **options}
    return WorkerSettings.of(str(out), **given)


def states(report: BatchReport) -> dict[str, str]:
    return {Path(job.spec.uri).name: result.state for job, result in report.each()}


def rows(out: Path, stream_id: str) -> list[dict[str, Any]]:
    folder = out / "tracks" / f"stream_id={stream_id}"
    table = ds.dataset(sorted(map(str, folder.iterdir())), format="parquet").to_table()
    found: list[dict[str, Any]] = table.to_pylist()
    return found


def written(out: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in (out / "tracks").rglob("*.parquet")}


def test_every_good_video_is_tracked_as_by_itself_and_every_bad_one_or_given_up_is_named(
    videos: Path, weights: str, tmp_path: Path
) -> None:
    (videos / "empty.mp4").write_bytes(b"")
    (videos / "text.mp4").write_text("this is no video")
    truncate(videos / "a.mp4", videos / "cut.mp4", 0.5)
    make_video(videos / "nothing.mp4", 8, width=64, height=48)
    for name in ("empty", "text", "cut"):
        (videos / f"{name}.prompts.json").write_text(json.dumps(BOX))
    make_video(videos / "wrong.mp4", 8, width=64, height=48)
    (videos / "wrong.prompts.json").write_text("{")
    make_video(videos / "late.mp4", 20, width=64, height=48)
    outside = {"frame": 10, "id": 2, "box": [500, 500, 9, 9]}  # of the picture
    (videos / "late.prompts.json").write_text(json.dumps({**BOX, "objects": [*BOX["objects"], outside]}))
    seen: list[tuple[Progress, Sequence[Running]]] = []
    out = tmp_path / "out"
    report = run_batch(
        load_manifest(videos),
        settings(out, weights),
        BatchOptions(max_tries=2),
        on_progress=lambda standing, running: seen.append((standing, list(running))),
    )
    assert report.exit_code == 1
    assert states(report) == {
        "a.mp4": "finished", "b.mp4": "finished", "c.mp4": "finished", "cut.mp4": "failed",
        "empty.mp4": "failed", "late.mp4": "failed", "nothing.mp4": "failed", "text.mp4": "failed",
        "wrong.mp4": "failed",
    }  # fmt: skip
    causes = {Path(j.spec.uri).name: r.cause.message for j, r in report.bad() if r.cause is not None}
    assert "nothing to track" in causes["nothing.mp4"]
    assert "wrong.prompts.json is not JSON" in causes["wrong.mp4"]
    for name in ("cut.mp4", "empty.mp4", "text.mp4"):
        assert str(videos / name) in causes[name]
    for name, frames in (("a", 20), ("b", 9), ("c", 16)):
        alone = tmp_path / "alone"
        summary = track(
            videos / f"{name}.mp4", alone, PromptSet.from_record(BOX), model=weights, threads=1,
            chunk_frames=CHUNK,
        )  # fmt: skip
        assert summary.frames == frames
        assert rows(out, summary.stream_id) == rows(alone, summary.stream_id)
        assert [r["frame_index"] for r in rows(out, summary.stream_id)] == list(range(frames))
    assert report.frames == 45 + 10  # two of the given up one's second chunk, which is not committed
    assert 1 <= report.workers <= CPUS
    assert seen[-1][0].finished == 3
    assert seen[-1][1] == []
    assert {len(running) <= 8 for _, running in seen} == {True}
    saved = json.loads(Path(report.location).read_text())
    assert saved["totals"]["finished"] == 3
    assert saved["totals"]["rows"] == 45 + 8
    assert [v["state"] for v in saved["videos"]] == [r.state for _, r in report.each()]
    # The one given up in the middle keeps what it has committed, and says so.
    ((job, result),) = ((j, r) for j, r in report.bad() if Path(j.spec.uri).name == "late.mp4")
    assert (result.state, result.frames, result.rows) == ("failed", 8, 8)
    ask = "select stream_id, state, cause, next_frame from streams order by all"
    found = {row.pop("stream_id"): row for row in query(out, ask).to_pylist()}
    assert result.cause is not None
    failed = {"state": "failed", "cause": result.cause.message, "next_frame": 8}
    assert found[job.spec.stream_id] == failed
    finished = {j.spec.stream_id for j, r in report.each() if r.state == "finished"}
    assert {name for name, row in found.items() if row["state"] == "finished"} == finished
    assert {row["state"] for row in found.values()} == {"finished", "failed"}


def test_run_again_only_what_is_unfinished_is_tracked_with_other_settings_nothing_and_with_restart_all(
    videos: Path, weights: str, tmp_path: Path
) -> None:
    good = (videos / "b.mp4").read_bytes()
    (videos / "b.mp4").write_bytes(b"broken")
    out = tmp_path / "out"
    first = run_batch(load_manifest(videos), settings(out, weights), BatchOptions(actors=1, max_tries=1))
    assert states(first) == {"a.mp4": "finished", "b.mp4": "failed", "c.mp4": "finished"}
    before = written(out)
    (videos / "b.mp4").write_bytes(good)
    second = run_batch(load_manifest(videos), settings(out, weights), ONE)
    assert second.exit_code == 0
    assert second.frames == 9
    assert second.totals()["frames"] == 45
    after = written(out)
    assert {name: after[name] for name in before} == before
    assert len(list((out / "batches").iterdir())) == 2
    # With other settings it is one error before anything is tracked.
    kept = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    make_video(videos / "new.mp4", 9, width=64, height=48)
    (videos / "new.prompts.json").write_text(json.dumps(BOX))
    with pytest.raises(SettingsConflictError) as caught:
        run_batch(load_manifest(videos), settings(out, weights, chunk_frames=5), ONE)
    assert str(caught.value).startswith(
        f"3 of 3 streams in {out} were tracked with other settings, such as a-"
    )
    assert f"chunk_frames was {CHUNK}, now 5; use the same" in str(caught.value)
    assert caught.value.exit_code == 2
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == kept
    (videos / "new.mp4").unlink()
    anew = run_batch(load_manifest(videos, restart=True), settings(out, weights, chunk_frames=5), ONE)
    assert (anew.exit_code, anew.frames) == (0, 45)


def test_single_videos_of_a_manifest_are_tracked_backward_too(
    videos: Path, weights: str, tmp_path: Path
) -> None:
    late: dict[str, Any] = {"version": 1, "objects": [{"frame": 12, "id": 1, "box": [10, 10, 30, 30]}]}
    lines = [
        {"uri": str(videos / "a.mp4"), "stream_id": "a", "prompts": late, "direction": "both"},
        {"uri": str(videos / "c.mp4"), "stream_id": "c", "prompts": late, "direction": "backward"},
        {"uri": str(videos / "b.mp4"), "stream_id": "b", "prompts": BOX},
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    out, alone = tmp_path / "out", tmp_path / "alone"
    expected = forecast(load_manifest(manifest), settings(out, weights))
    assert expected.frames == 20 + 13 + 13 + 13 + 9
    report = run_batch(load_manifest(manifest), settings(out, weights), ONE)
    assert report.exit_code == 0
    assert {j.spec.stream_id: r.frames for j, r in report.each()} == {"a": 20, "b": 9, "c": 13}
    assert report.frames == expected.frames
    for name, direction in (("a", "both"), ("c", "backward")):
        track(
            videos / f"{name}.mp4", alone, PromptSet.from_record(late), model=weights, threads=1,
            chunk_frames=CHUNK, stream_id=name, direction=direction,
        )  # fmt: skip
        assert rows(out, name) == rows(alone, name)
        assert rows(out, name)[0]["frame_index"] == 0
    assert run_batch(load_manifest(manifest), settings(out, weights), ONE).frames == 0
    with pytest.raises(SettingsConflictError, match="direction was 'forward', now 'both'"):
        run_batch(load_manifest(manifest), settings(out, weights, direction="both"), ONE)


def test_with_a_larger_max_frames_it_goes_on_and_with_a_smaller_one_nothing_is_left_to_do(
    videos: Path, weights: str, tmp_path: Path
) -> None:
    out, jobs = tmp_path / "out", load_manifest(videos)
    first = run_batch(jobs, settings(out, weights, max_frames=11), ONE)
    assert (first.exit_code, first.frames) == (0, 11 + 9 + 11)
    smaller = run_batch(jobs, settings(out, weights, max_frames=5), ONE)
    assert (smaller.exit_code, smaller.frames) == (0, 0)
    rest = run_batch(jobs, settings(out, weights), ONE)
    assert (rest.exit_code, rest.frames) == (0, 9 + 5)
    assert rest.totals()["rows"] == 45
    for job in jobs:
        whole = track(
            job.spec.uri, tmp_path / "whole", PromptSet.from_record(BOX), model=weights, threads=1,
            chunk_frames=CHUNK, stream_id=job.spec.stream_id,
        )  # fmt: skip
        assert rows(out, whole.stream_id) == rows(tmp_path / "whole", whole.stream_id)


def test_stopped_in_the_middle_it_commits_what_is_under_way_and_goes_on_later(
    weights: str, tmp_path: Path
) -> None:
    video = make_video(tmp_path / "long.mp4", 60, width=64, height=48)
    jobs = [VideoJob(StreamSpec(f"s{i}", str(video), prompts=BOX)) for i in range(3)]
    stop = threading.Event()
    told: list[str] = []

    def news(standing: Progress, running: Sequence[Running]) -> None:
        if standing.chunks:
            stop.set()

    out = tmp_path / "out"
    options = ONE
    report = run_batch(
        jobs, settings(out, weights, chunk_frames=2), options, on_progress=news,
        on_stop=lambda: told.append("stop"), stop=stop,
    )  # fmt: skip
    assert told == ["stop"]
    assert report.interrupted
    assert report.exit_code == 130
    assert report.totals()["pending"] >= 1
    assert 0 < report.frames < 180
    again = run_batch(jobs, settings(out, weights, chunk_frames=2), options)
    assert again.exit_code == 0
    for i in range(3):
        assert [r["frame_index"] for r in rows(out, f"s{i}")] == list(range(60))
    assert report.frames + again.frames >= 180


def test_names_hold_in_processes_with_other_working_folders(
    videos: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "frames", 6, width=64, height=48)
    (videos / "b.prompts.json").unlink()
    Path("model.safetensors").symlink_to(weights)
    shared = Path("all.json")
    shared.write_text(json.dumps({**BOX, "objects": [{**BOX["objects"][0], "category": "shared"}]}))
    lines = [
        {"uri": "frames", "stream_id": "pictures", "prompts": BOX},
        {"uri": "videos/a.mp4", "stream_id": "sidecar", "priority": 3},
        {"uri": "videos/b.mp4", "stream_id": "neither"},
    ]
    Path("m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    jobs = load_manifest("m.jsonl", prompts="all.json", inline_prompts=True)
    shared.unlink()  # on a cluster, nobody else could read it
    report = run_batch(jobs, settings(Path("out"), "model.safetensors"), ONE)
    assert report.exit_code == 0, states(report)
    found = {
        i: {r["category"] for r in rows(tmp_path / "out", i)} for i in ("pictures", "sidecar", "neither")
    }
    assert found == {"pictures": {"shape"}, "sidecar": {"shape"}, "neither": {"shared"}}


def test_from_a_bucket_into_a_bucket(videos: Path, weights: str, s3_server: S3Server) -> None:
    import s3fs

    fs = s3fs.S3FileSystem(**s3_server.options, use_listings_cache=False)
    root = s3_server.uri("batch")
    for path in videos.iterdir():
        fs.put_file(str(path), f"{root}/in/deep/{path.name}")
    fs.pipe(f"{root}/in/broken.mp4", b"no video")
    fs.pipe(f"{root}/in/broken.prompts.json", json.dumps(BOX).encode())
    jobs = load_manifest(f"{root}/in/**/*.mp4", storage_options=s3_server.options)
    options: dict[str, Any] = {"storage_options": s3_server.options, "out_storage_options": s3_server.options}
    given = WorkerSettings.of(f"{root}/out", model=weights, threads=1, chunk_frames=CHUNK, **options)
    once = BatchOptions(actors=1, max_tries=1)
    first = run_batch(jobs, given, once)
    assert states(first) == {
        "a.mp4": "finished", "b.mp4": "finished", "broken.mp4": "failed", "c.mp4": "finished"
    }  # fmt: skip
    text = fs.cat_file(first.location).decode()
    assert json.loads(text)["totals"]["rows"] == 45
    assert not any(secret in text for secret in (s3_server.options["secret"], s3_server.options["key"]))
    before = {p: i["LastModified"] for p, i in fs.find(f"{root}/out/tracks", detail=True).items()}
    assert len(before) == 3 + 2 + 2
    fs.put_file(str(videos / "b.mp4"), f"{root}/in/broken.mp4")
    second = run_batch(jobs, given, once)
    assert (second.exit_code, second.frames) == (0, 9)
    after = {p: i["LastModified"] for p, i in fs.find(f"{root}/out/tracks", detail=True).items()}
    assert {p: after[p] for p in before} == before


def test_a_model_that_is_none_is_a_usage_error(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no model 'xmem-huge'"):
        run_batch(load_manifest(videos), settings(tmp_path / "out", "xmem-huge"), ONE)


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("chunk_frames", 0, "chunk_frames=0"),
        ("size", 3, "size=3"),
        ("dtype", "int8", "dtype='int8'"),
        ("max_frames", 0, "max_frames=0"),
        ("detector", "nobody", "no detector 'nobody'; available: motion"),
        ("box_segmenter", "nobody", "nobody"),
        ("device", "tpu", "device 'tpu' is not allowed"),
        ("device", "cuda:1", "device 'cuda:1' is not allowed"),
    ],
)
def test_settings_are_checked_before_anything_runs(
    videos: Path, weights: str, tmp_path: Path, option: str, value: Any, complaint: str
) -> None:
    with pytest.raises(UsageError, match=complaint):
        run_batch(load_manifest(videos), settings(tmp_path / "out", weights, **{option: value}))
    assert not list(tmp_path.glob("out/tracks/*"))


def test_an_output_folder_that_cannot_be_written_is_found_out_first(
    videos: Path, weights: str, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StoreError, match="out"):
        run_batch(load_manifest(videos), settings(tmp_path / "out", weights))


# --- what runs where -----------------------------------------------------------------------------


def planned(
    videos: int, resources: Resources, device: str, threads: int | None = None, **options: Any
) -> Plan:
    return plan(videos, resources, ModelSettings(device=device, threads=threads), BatchOptions(**options))


@pytest.mark.parametrize(
    ("videos", "cpus", "options", "expected"),
    [
        (1, (2,), {}, Plan(1, 2)),
        (2, (2,), {}, Plan(2, 1)),
        (5, (2,), {}, Plan(2, 1)),
        (3, (8,), {}, Plan(3, 2)),
        (1, (8, 8), {}, Plan(1, 8)),
        (3, (8, 4), {}, Plan(3, 4)),
        (100, (8, 4), {}, Plan(12, 1)),
        (100, (8,), {"threads": 3}, Plan(2, 3)),
        (100, (8,), {"actors": 3}, Plan(3, 1)),
        (1, (0,), {}, Plan(1, 1)),
        (0, (4,), {}, Plan(1, 4)),
    ],
)
def test_actors_and_threads_on_cpus(
    videos: int, cpus: tuple[int, ...], options: dict[str, Any], expected: Plan
) -> None:
    assert planned(videos, Resources(cpus), "cpu", **options) == expected


@pytest.mark.parametrize(
    ("videos", "gpus", "options", "expected"),
    [
        (100, 4.0, {}, Plan(4, 1, 1.0)),
        (2, 4.0, {}, Plan(2, 1, 1.0)),
        (100, 2.0, {"gpu_fraction": 0.3}, Plan(6, 1, 0.3)),
        (100, 1.0, {"gpu_fraction": 1 / 3}, Plan(3, 1, 1 / 3)),
        (100, 4.0, {"gpu_fraction": 2}, Plan(2, 1, 2)),
        (100, 4.0, {"actors": 9, "threads": 2}, Plan(9, 2, 1.0)),
    ],
)
def test_actors_on_gpus(videos: int, gpus: float, options: dict[str, Any], expected: Plan) -> None:
    assert planned(videos, Resources((16,), gpus), "cuda", **options) == expected


def test_what_cannot_run_anywhere_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="Ray sees 0 GPUs"):
        planned(3, Resources((4,)), "cuda")
    with pytest.raises(UsageError, match="threads 5 is not allowed: the largest machine has 4 CPUs"):
        planned(3, Resources((4, 2)), "cpu", threads=5)


@pytest.mark.parametrize(
    "options",
    [{"actors": 0}, {"max_tries": 0}, {"gpu_fraction": 0}, {"gpu_fraction": 1.5}],
)
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(UsageError, match=name):
        BatchOptions(**options)


def test_the_memory_for_states() -> None:
    facts = {"device_bytes": 1000, "weights_bytes": 100}
    assert budget(facts, 1.0) == 750
    assert budget(facts, 0.5) == 325
    assert budget(facts, 0.1) == 0
