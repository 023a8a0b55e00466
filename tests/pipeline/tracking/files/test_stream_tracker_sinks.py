"""Sinks receive every committed range with the rows of Parquet, whichever process dies."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import textwrap
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.forked import Forked
from support.tiny import SHORT_MEMORY
from support.videos import damage_packets, make_video

from pipeline.analytics.query import query
from pipeline.base.errors import AnotherWriterError, StoreError
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.files.executor import Executor
from pipeline.tracking.files.stream_tracker import StreamTracker
from pipeline.tracking.segmenters import open_segmenter
from pipeline.tracking.settings import ModelSettings, TrackSettings
from pipeline.tracks.sinks import Sinks
from pipeline.tracks.store import StreamStore
from pipeline.video.sources import open_source

pytestmark = pytest.mark.usefixtures("one_thread")

WORKER = Path(__file__).parents[3] / "support" / "track_worker.py"
KILLS = int(os.environ.get("XMEM_CHAOS", "2"))
CHUNK = 4
FRAMES = 22
RANGES = [(0, 3), (4, 7), (8, 11), (12, 15), (16, 19), (20, 21)]
PROMPTS: dict[str, Any] = {
    "version": 1,
    "objects": [
        {"id": 1, "category": "square", "polygons": [[2, 28, 34, 28, 34, 55, 2, 55]]},
        {"frame": 9, "id": 3, "polygons": [[60, 10, 90, 10, 90, 40, 60, 40]]},
    ],
}

# Keeps every call as a file, and dies as it is told to: "before:8" with nothing kept of frames 8.., "after:8"
# when they are kept, which is before they are committed. Once only.
PLUGIN = """
import os, signal, uuid
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq

class Kept:
    def __init__(self):
        self.folder = Path(os.environ["KEPT"])

    def commit(self, stream_id, first, last, tracks, events):
        self._die("before", first)
        name = f"{stream_id}-{first}-{last}-{uuid.uuid4().hex}"
        for kind, table in (("events", events), ("tracks", tracks)):
            part = self.folder / f"{name}.{kind}.part"
            pq.write_table(table, part)
            part.rename(self.folder / f"{name}.{kind}")
        self._die("after", first)

    def _die(self, when, first):
        mark = self.folder / "dead"
        if os.environ.get("DIE") == f"{when}:{first}" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a damaged picture in it, so that there are events, too."""
    folder = tmp_path_factory.mktemp("video")
    clean = make_video(folder / "clean.mp4", FRAMES, width=80, height=60, gop=6)
    return damage_packets(clean, folder / "clip.mp4", [14], spared=0.5)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the plugin records its calls, in other processes and in this one."""
    folder = tmp_path / "kept"
    folder.mkdir()
    monkeypatch.setenv("KEPT", str(folder))
    return folder


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH in which the sink "kept" is installed."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "kept_sink.py").write_text(textwrap.dedent(PLUGIN))
    info = folder / "kept_sink-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kept-sink\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[xmem.sinks]\nkept = kept_sink:Kept\n")
    return folder


class Kept:
    """Keeps the rows it gets, in this process."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls: list[tuple[str, int, int, pa.Table, pa.Table]] = []
        self.fail_at = fail_at

    def commit(self, stream_id: str, first: int, last: int, tracks: pa.Table, events: pa.Table) -> None:
        if first == self.fail_at:
            raise TimeoutError("the database does not answer")
        self.calls.append((stream_id, first, last, tracks, events))


def tracker(video: Path, out: Path, model: str, sinks: Sinks | None, chunk: int = CHUNK) -> StreamTracker:
    segmenter = open_segmenter(ModelSettings(model), SHORT_MEMORY)
    settings = TrackSettings.of(model=model, chunk_frames=chunk, snapshot_chunks=2).of_segmenter(
        segmenter, threads=1
    )
    prompts = PromptSet.from_record(PROMPTS)
    return StreamTracker(
        open_source(str(video)), StreamStore(out, "cam"), segmenter, settings, prompts, sinks=sinks
    )


def run(video: Path, out: Path, model: str, sinks: Sinks | None, stop: int | None = None) -> None:
    with tracker(video, out, model, sinks) as stream:
        executor = Executor(stream._segmenter)
        while stream.next_frame != stop and executor.advance([stream]):
            pass


def committed(out: Path) -> dict[tuple[int, int], tuple[list[Any], list[Any]]]:
    """Content of Parquet: rows and events of each range."""
    found = {}
    for path in sorted((out / "tracks" / "stream_id=cam").glob("*.parquet")):
        meta = {k.decode(): v.decode() for k, v in pq.read_schema(path).metadata.items()}
        frames = (int(meta["xmem.first"]), int(meta["xmem.last"]))
        events = out / "events" / "stream_id=cam" / path.name
        found[frames] = (pq.ParquetFile(path).read().to_pylist(), pq.ParquetFile(events).read().to_pylist())
    return found


def given(calls: list[tuple[str, int, int, pa.Table, pa.Table]]) -> list[Any]:
    assert {call[0] for call in calls} <= {"cam"}
    return [((first, last), (t.to_pylist(), e.to_pylist())) for _, first, last, t, e in calls]


def test_every_range_is_given_once_and_as_it_is_committed(tmp_path: Path, video: Path, model: str) -> None:
    sink = Kept()
    run(video, tmp_path, model, Sinks({"kept": sink}))
    stored = committed(tmp_path)
    assert list(stored) == RANGES
    assert given(sink.calls) == list(stored.items())
    assert any(events for _, events in stored.values())
    kinds = query(tmp_path, "select distinct kind from events order by kind").to_pylist()
    assert [k["kind"] for k in kinds] == ["corrupt", "object_added"]


def test_sinks_change_nothing_of_what_is_committed(tmp_path: Path, video: Path, model: str) -> None:
    run(video, tmp_path / "with", model, Sinks({"kept": Kept()}))
    run(video, tmp_path / "without", model, None)
    assert committed(tmp_path / "with") == committed(tmp_path / "without")


@pytest.mark.parametrize("first", [0, 8, 20])
def test_a_sink_that_fails_stops_the_stream_before_the_range_counts(
    tmp_path: Path, video: Path, model: str, first: int
) -> None:
    sink = Kept(fail_at=first)
    with pytest.raises(StoreError, match=rf"sink 'db' did not take frames {first}\.\.\d+ of stream cam"):
        run(video, tmp_path, model, Sinks({"db": sink}))
    assert StreamStore(tmp_path, "cam").committed().next_frame == first
    assert json.loads((tmp_path / "streams" / "cam.json").read_text())["state"] == "running"
    sink.fail_at = None
    run(video, tmp_path, model, Sinks({"db": sink}))
    assert given(sink.calls) == list(committed(tmp_path).items())  # no range twice either
    assert [frames for frames, _ in given(sink.calls)] == RANGES


def test_a_range_whose_commit_fails_is_given_again(
    tmp_path: Path, video: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = Kept()
    commit = StreamStore.commit

    def failing(self: StreamStore, first: int, *rest: Any) -> bool:
        if first == 8:
            raise StoreError("no space left")
        return commit(self, first, *rest)

    monkeypatch.setattr(StreamStore, "commit", failing)
    with pytest.raises(StoreError, match="no space left"):
        run(video, tmp_path, model, Sinks({"kept": sink}))
    monkeypatch.undo()
    run(video, tmp_path, model, Sinks({"kept": sink}))
    got = given(sink.calls)
    assert [frames for frames, _ in got] == [RANGES[0], RANGES[1], RANGES[2], *RANGES[2:]]
    assert got[2] == got[3]
    assert dict(got) == committed(tmp_path)


def test_a_range_that_somebody_else_has_committed_is_not_given(
    tmp_path: Path, video: Path, model: str
) -> None:
    """A run that was thought dead continues: its rows must not replace newer ones in the sink."""
    asleep, awake = Kept(), Kept()
    with tracker(video, tmp_path, model, Sinks({"kept": asleep})) as stream:
        executor = Executor(stream._segmenter)
        while stream.next_frame < 7:
            executor.advance([stream])
        run(video, tmp_path, model, Sinks({"kept": awake}))
        while executor.advance([stream]):  # equal rows: it may go on
            pass
    assert [frames for frames, _ in given(asleep.calls)] == RANGES[:1]
    assert [frames for frames, _ in given(awake.calls)] == RANGES[1:]


def test_a_run_of_other_settings_never_reaches_the_sink(tmp_path: Path, video: Path, model: str) -> None:
    sink, other = Kept(), Kept()
    with tracker(video, tmp_path, model, Sinks({"kept": other}), chunk=5) as stream:
        executor = Executor(stream._segmenter)
        executor.advance([stream])
        run(video, tmp_path, model, Sinks({"kept": sink}))
        with pytest.raises(AnotherWriterError):
            executor.run(stream)
    assert other.calls == []
    assert len(sink.calls) == len(RANGES)


def test_a_sink_that_came_later_gets_what_comes_later(tmp_path: Path, video: Path, model: str) -> None:
    sink = Kept()
    run(video, tmp_path, model, None, stop=10)
    run(video, tmp_path, model, Sinks({"kept": sink}))
    assert [frames for frames, _ in given(sink.calls)] == RANGES[2:]


# --- processes that die --------------------------------------------------------------------------


def start(video: Path, out: Path, model: str, plugin: Path, kept: Path, die: str = "") -> Forked:
    arguments = {
        "video": str(video), "out": str(out), "stream_id": "cam", "model": model, "threads": 1,
        "chunk_frames": CHUNK, "snapshot_chunks": 2, "memory": asdict(SHORT_MEMORY),
        "prompts": PROMPTS, "sinks": ["kept"],
    }  # fmt: skip
    environment = dict(os.environ, PYTHONPATH=str(plugin), KEPT=str(kept), DIE=die)
    return Forked(WORKER, [json.dumps(arguments)], env=environment)


def kept_calls(kept: Path) -> list[Any]:
    """The calls whose rows the sink kept, in the form of `given`."""
    found = []
    for path in kept.glob("*.tracks"):
        _, first, last, _ = path.stem.split("-")
        tables = [pq.ParquetFile(p).read().to_pylist() for p in (path, path.with_suffix(".events"))]
        found.append(((int(first), int(last)), (tables[0], tables[1])))
    return found


def go_on(video: Path, out: Path, model: str) -> None:
    """Resume the run in this process."""
    names: dict[str, Any] = {}
    exec(PLUGIN, names)
    run(video, out, model, Sinks({"kept": names["Kept"]()}))


@pytest.mark.parametrize("die", ["before:8", "after:8", "after:0", "after:20"])
def test_killed_beside_a_commit_the_range_is_given_again(
    tmp_path: Path, video: Path, model: str, plugin: Path, kept: Path, die: str
) -> None:
    out = tmp_path / "out"
    when, first = die.split(":")
    with start(video, out, model, plugin, kept, die) as worker:
        assert worker.wait() == -9
    assert StreamStore(out, "cam").committed().next_frame == int(first)
    go_on(video, out, model)
    calls, stored = kept_calls(kept), committed(out)
    assert list(stored) == RANGES
    assert all(rows == stored[frames] for frames, rows in calls)
    times = Counter(frames for frames, _ in calls)
    twice = {frames for frames in RANGES if frames[0] == int(first) and when == "after"}
    assert times == {frames: 2 if frames in twice else 1 for frames in RANGES}


@pytest.mark.chaos
def test_killed_at_any_moment_every_committed_range_has_reached_the_sink(
    tmp_path: Path, video: Path, model: str, plugin: Path, kept: Path
) -> None:
    out = tmp_path / "out"
    rng = random.Random(11)
    for _ in range(KILLS):
        with start(video, out, model, plugin, kept) as worker:
            assert worker.stdout.readline() == "go\n"
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(rng.uniform(0.0, 0.5))
            worker.kill()
        reached = dict(kept_calls(kept))
        if (out / "tracks").exists():
            assert all(reached.get(frames) == rows for frames, rows in committed(out).items())
    go_on(video, out, model)
    stored = committed(out)
    assert list(stored) == RANGES
    calls = kept_calls(kept)
    assert {frames for frames, _ in calls} == set(RANGES)
    assert all(rows == stored[frames] for frames, rows in calls)
