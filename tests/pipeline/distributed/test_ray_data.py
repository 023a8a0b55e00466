"""TrackVideos: one output row per video, called directly and in a real Ray Data pipeline."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.tiny import SHORT_MEMORY
from support.videos import make_video

from pipeline.analytics.query import query
from pipeline.base.errors import PromptError, StoreError, UsageError, XmemError
from pipeline.base.stream_ids import generate_stream_id
from pipeline.distributed.ray_data import RESULT_COLUMNS, TrackVideos
from pipeline.distributed.worker import Worker
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.files.track import track
from pipeline.tracks.store import StreamStore

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[3]
FRAMES = 12
SQUARE = [[2, 28, 34, 28, 34, 55, 2, 55]]
PROMPTS: dict[str, Any] = {"version": 1, "objects": [{"id": 1, "category": "square", "polygons": SQUARE}]}
OTHERS: dict[str, Any] = {"version": 1, "objects": [{"id": 5, "box": [40, 30, 30, 20]}], "remove": []}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.mp4 and b.mkv, of different lengths, and broken.mp4, which is not a video."""
    folder = tmp_path_factory.mktemp("videos")
    make_video(folder / "a.mp4", FRAMES, width=80, height=60)
    make_video(folder / "b.mkv", FRAMES + 5, width=64, height=48)
    (folder / "broken.mp4").write_bytes(b"\0" * 5000)
    (folder / "others.json").write_text(json.dumps(OTHERS))
    return folder


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Recorded waiting times."""
    waited: list[float] = []
    monkeypatch.setattr("pipeline.distributed.ray_data.time.sleep", waited.append)
    return waited


def stage(out: Path, model: str, **more: Any) -> TrackVideos:
    return TrackVideos(
        str(out), model=model, memory=SHORT_MEMORY, chunk_frames=5, **{"prompts": PROMPTS, **more}
    )


def lines(batch: dict[str, Any]) -> list[dict[str, Any]]:
    count = len(batch["uri"])
    assert {len(column) for column in batch.values()} == {count}
    return [{name: column[i] for name, column in batch.items()} for i in range(count)]


def rows(out: Path, stream_id: str) -> list[Any]:
    where = f"where stream_id = '{stream_id}' order by frame_index, object_id"
    found: list[Any] = query(out, f"select * exclude stream_id from tracks {where}").to_pylist()
    return found


# --- what it gives -------------------------------------------------------------------------------


def test_a_line_per_video_and_the_rows_of_track(tmp_path: Path, videos: Path, model: str) -> None:
    a, b = str(videos / "a.mp4"), str(videos / "b.mkv")
    result = stage(tmp_path / "out", model)({"uri": np.array([a, b], object)})
    assert tuple(result) == RESULT_COLUMNS
    first, second = lines(result)
    assert first["seconds"] > 0
    expected = [generate_stream_id(a), a, "finished", FRAMES, FRAMES, 0, first["seconds"], ""]
    assert first == dict(zip(RESULT_COLUMNS, expected, strict=True))
    assert (second["stream_id"], second["frames"]) == (generate_stream_id(b), FRAMES + 5)
    prompts = PromptSet.from_record(PROMPTS)
    alone = track(a, tmp_path / "alone", prompts, model=model, memory=SHORT_MEMORY, threads=1, chunk_frames=5)
    assert rows(tmp_path / "out", alone.stream_id) == rows(tmp_path / "alone", alone.stream_id)
    assert {name: result[name].dtype.kind for name in RESULT_COLUMNS} == {
        **dict.fromkeys(("stream_id", "uri", "state", "cause"), "O"),
        **dict.fromkeys(("frames", "rows", "losses"), "i"),
        "seconds": "f",
    }


def test_columns_of_ones_own_are_passed_on(tmp_path: Path, videos: Path, model: str) -> None:
    batch = {"label": np.array(["x"]), "uri": np.array([str(videos / "a.mp4")]), "stream_id": ["cam-1"]}
    result = stage(tmp_path, model)(batch)
    assert tuple(result) == ("label", *RESULT_COLUMNS)
    assert lines(result)[0]["label"] == "x"
    assert lines(result)[0]["stream_id"] == "cam-1"


def test_again_it_only_looks(tmp_path: Path, videos: Path, model: str, monkeypatch: Any) -> None:
    batch = {"uri": [str(videos / "a.mp4")], "stream_id": ["cam"]}
    before = lines(stage(tmp_path, model)(batch))[0]

    def never(*_: Any) -> None:
        raise AssertionError("tracked again")

    monkeypatch.setattr(Worker, "track", never)
    after = lines(stage(tmp_path, model)(batch))[0]
    assert {**before, "seconds": 0} == {**after, "seconds": 0}


def test_a_video_that_was_begun_goes_on(tmp_path: Path, videos: Path, model: str, monkeypatch: Any) -> None:
    """As after the death of the process: with the first chunk committed."""
    batch = {"uri": [str(videos / "a.mp4")], "stream_id": ["cam"]}
    stage(tmp_path / "calm", model)(batch)
    worker_track = Worker.track

    def dying(self: Any, ref: Any) -> Any:
        if ref.first == 5:
            self.close_all()
            raise KeyboardInterrupt
        return worker_track(self, ref)

    monkeypatch.setattr(Worker, "track", dying)
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "out", model)(batch)
    monkeypatch.undo()
    assert StreamStore(tmp_path / "out", "cam").committed().next_frame == 5
    result = stage(tmp_path / "out", model)(batch)
    assert lines(result)[0]["frames"] == FRAMES
    assert rows(tmp_path / "out", "cam") == rows(tmp_path / "calm", "cam")


# --- prompts -------------------------------------------------------------------------------------


def test_prompts_come_in_every_form(tmp_path: Path, videos: Path, model: str) -> None:
    """The dict as Arrow returns it: every field that any row has, lists as arrays."""
    objects = [{"id": 7, "box": None, "polygons": np.array([np.array(SQUARE[0])], object), "category": None}]
    through_arrow = {"version": 1, "objects": np.array(objects, object), "remove": None}
    given = [str(videos / "others.json"), json.dumps(OTHERS), through_arrow, None, "", float("nan")]
    names = [f"cam-{i}" for i in range(len(given))]
    prompts = np.empty(len(given), object)
    prompts[:] = given
    uris = [str(videos / "a.mp4")] * len(given)
    result = stage(tmp_path, model, max_frames=3)({"uri": uris, "stream_id": names, "prompts": prompts})
    assert [line["cause"] for line in lines(result)] == [""] * len(given)
    found = [{r["object_id"] for r in rows(tmp_path, name)} for name in names]
    assert found == [{5}, {5}, {7}, {1}, {1}, {1}]


def test_a_struct_column_of_arrow_is_understood(tmp_path: Path, videos: Path, model: str) -> None:
    column = pa.array([PROMPTS, OTHERS])  # one type for both
    batch = {
        "uri": [str(videos / "a.mp4")] * 2,
        "stream_id": ["p", "o"],
        "prompts": np.array([*column.to_pylist()], object),
    }
    assert [line["cause"] for line in lines(stage(tmp_path, model, max_frames=2)(batch))] == ["", ""]
    assert [{r["object_id"] for r in rows(tmp_path, name)} for name in ("p", "o")] == [{1}, {5}]


@pytest.mark.parametrize(
    ("prompts", "cause"),
    [
        ('{"version": 1', "are not JSON"),
        ('{"version": 3, "objects": []}', "version"),
        (["a"], "prompts of type list: give a URI, JSON text or a dict"),
        ("/nowhere/p.json", "/nowhere/p.json"),
    ],
)
def test_wrong_prompts_are_the_videos_cause(
    tmp_path: Path, videos: Path, model: str, waits: list[float], prompts: Any, cause: str
) -> None:
    column = np.empty(1, object)
    column[0] = prompts
    batch = {"uri": [str(videos / "a.mp4")], "stream_id": ["cam"], "prompts": column}
    (line,) = lines(stage(tmp_path, model)(batch))
    assert (line["state"], line["stream_id"]) == ("failed", "cam")
    assert cause in line["cause"]
    assert waits == []  # asked for wrongly: not tried again


def test_wrong_prompts_for_all_are_an_error_at_once(tmp_path: Path, model: str) -> None:
    with pytest.raises(PromptError):
        stage(tmp_path, model, prompts={"version": 1, "objects": [{"id": 0}]})


# --- failures ------------------------------------------------------------------------------------


def test_bad_videos_are_named_and_the_others_finish(
    tmp_path: Path, videos: Path, model: str, waits: list[float]
) -> None:
    uris = [str(videos / n) for n in ("broken.mp4", "missing.mp4", "a.mp4")] + [None, str(videos / "b.mkv")]
    ids = [None, "", "good", None, "not/allowed"]
    result = stage(tmp_path, model)({"uri": np.array(uris, object), "stream_id": np.array(ids, object)})
    broken, missing, good, none, wrong_id = lines(result)
    assert [line["state"] for line in lines(result)] == ["failed", "failed", "finished", "failed", "failed"]
    assert "broken.mp4" in broken["cause"]
    assert broken["stream_id"] == generate_stream_id(uris[0] or "")
    assert "no such file" in missing["cause"]
    assert good["frames"] == FRAMES
    assert none["cause"].startswith("a row has no uri")
    assert "not/allowed" in wrong_id["cause"]
    assert all("\n" not in line["cause"] for line in lines(result))
    assert len(waits) == 2  # of the missing one, tried three times; what is no video is not tried again


def test_what_may_pass_is_tried_again(
    tmp_path: Path, videos: Path, model: str, waits: list[float], monkeypatch: Any
) -> None:
    commit, failures = StreamStore.commit, iter([5, 5])

    def failing(self: StreamStore, first: int, *rest: Any) -> bool:
        if first == 5 and next(failures, None):
            raise StoreError("the bucket does not answer")
        return commit(self, first, *rest)

    monkeypatch.setattr(StreamStore, "commit", failing)
    batch = {"uri": [str(videos / "a.mp4")], "stream_id": ["cam"]}
    (line,) = lines(stage(tmp_path, model)(batch))
    assert (line["state"], line["frames"], line["rows"]) == ("finished", FRAMES, FRAMES)
    assert len(waits) == 2
    assert 0 < waits[0] <= 1


def test_after_the_last_try_it_says_how_far_it_came(
    tmp_path: Path, videos: Path, model: str, waits: list[float], monkeypatch: Any
) -> None:
    commit = StreamStore.commit

    def failing(self: StreamStore, first: int, *rest: Any) -> bool:
        if first == 5:
            raise StoreError("the bucket does not answer")
        return commit(self, first, *rest)

    monkeypatch.setattr(StreamStore, "commit", failing)
    batch = {"uri": [str(videos / "a.mp4")], "stream_id": ["cam"]}
    (line,) = lines(stage(tmp_path, model, tries=2)(batch))
    assert (line["state"], line["cause"]) == ("failed", "the bucket does not answer")
    assert (line["frames"], line["rows"]) == (5, 5)
    assert len(waits) == 1


def test_no_column_holds_credentials(tmp_path: Path, model: str, waits: list[float]) -> None:
    uri = "http://me:hunter2@127.0.0.1:9/clip.mp4?X-Amz-Signature=abcdef"
    result = stage(tmp_path, model, tries=1)({"uri": [uri]})
    text = repr(lines(result))
    assert lines(result)[0]["state"] == "failed"
    assert "127.0.0.1:9/clip.mp4" in lines(result)[0]["uri"]
    assert "hunter2" not in text
    assert "abcdef" not in text


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"tries": 0}, "tries=0"),
        ({"chunk": 5}, "unknown setting 'chunk'; available: .*chunk_frames"),
        ({"device": "tpu9"}, "tpu9"),
        ({"sinks": ("nobody",)}, "no sink 'nobody'"),
    ],
)
def test_wrong_settings_are_an_error(tmp_path: Path, model: str, settings: Any, complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        stage(tmp_path, model, **settings)


def test_a_model_that_cannot_be_had_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(XmemError, match="nowhere"):
        TrackVideos(str(tmp_path), model=str(tmp_path / "nowhere.safetensors"))


def test_a_batch_without_videos_is_an_error(tmp_path: Path, model: str) -> None:
    with pytest.raises(UsageError, match="no column 'uri'; its columns are: url, n"):
        stage(tmp_path, model)({"url": ["a"], "n": [1]})
    assert tuple(stage(tmp_path, model)({"uri": []})) == RESULT_COLUMNS


# --- Ray Data ------------------------------------------------------------------------------------


def test_the_example_runs_on_a_real_ray(tmp_path: Path, videos: Path, model: str) -> None:
    """Two processes, four videos, one of them broken."""
    manifest = tmp_path / "videos.jsonl"
    names = ["a.mp4", "b.mkv", "broken.mp4", "a.mp4"]
    given = [
        {"uri": str(videos / name), "stream_id": f"cam-{i}", "prompts": json.dumps(PROMPTS), "site": f"s{i}"}
        for i, name in enumerate(names)
    ]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in given))
    out, results = tmp_path / "out", tmp_path / "results"
    command = [
        sys.executable, str(ROOT / "examples" / "ray_data.py"), str(manifest),
        "--out", str(out), "--results", str(results), "--model", model, "--workers", "2",
    ]  # fmt: skip
    environment = dict(
        os.environ,
        PYTHONPATH=str(ROOT),
        OMP_DISPLAY_ENV="verbose",  # each process that loads OpenMP says how its threads wait
        RAY_DEDUP_LOGS="0",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_AUTH_MODE="disabled",
        RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES=str(200 * 2**20),
    )
    environment.pop("RAY_ADDRESS", None)
    environment.pop("OMP_WAIT_POLICY", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1, done.stderr
    spins = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stdout + done.stderr)
    assert sys.platform != "linux" or (len(spins) >= 2 and set(spins) == {"0"})
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines() if line.startswith("cam-"))
    assert said["cam-0"].startswith(f"finished: {FRAMES} frames, {FRAMES} rows in ")
    assert said["cam-2"].startswith("failed: ")
    assert "broken.mp4" in said["cam-2"]
    table = pq.read_table(results).sort_by("stream_id").to_pylist()
    assert [(r["stream_id"], r["site"], r["state"], r["frames"]) for r in table] == [
        ("cam-0", "s0", "finished", FRAMES),
        ("cam-1", "s1", "finished", FRAMES + 5),
        ("cam-2", "s2", "failed", 0),
        ("cam-3", "s3", "finished", FRAMES),
    ]
    assert rows(out, "cam-0") == rows(out, "cam-3")
    settings: dict[str, Any] = {"model": model, "threads": 1, "stream_id": "cam-0"}
    track(videos / "a.mp4", tmp_path / "alone", PromptSet.from_record(PROMPTS), **settings)
    assert rows(out, "cam-0") == rows(tmp_path / "alone", "cam-0")
