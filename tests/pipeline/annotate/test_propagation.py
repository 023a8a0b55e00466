"""Rows written through the annotator are those of `track` with the same prompts, byte for byte."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.annotating import AnnotateProcess, propagated, until
from support.videos import make_video
from support.written import files

from pipeline.analytics.query import query
from pipeline.annotate import propagation
from pipeline.annotate.annotator import Annotator
from pipeline.base.errors import SettingsConflictError, UsageError
from pipeline.memory.editing import edit_memory
from pipeline.prompts.files import PromptSet
from pipeline.storage.opening import open_files
from pipeline.tracking.files.carry_over import carry_over
from pipeline.tracking.files.executor import Executor
from pipeline.tracking.files.stream_tracker import StreamTracker
from pipeline.tracking.files.track import track
from pipeline.tracking.settings import TrackSettings
from xmem_core import StepResult

FRAMES, CHUNK = 30, 8
SQUARE = {"op": "prompt", "frame": 0, "object": {"id": 1, "box": [10, 10, 40, 40]}}
CORRECTION = {"op": "prompt", "frame": 20, "object": {"id": 1, "box": [60, 40, 40, 40]}}
ByTrack = Callable[[PromptSet, TrackSettings], Path]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_video(tmp_path_factory.mktemp("video") / "v.mp4", FRAMES, gop=10))


@pytest.fixture(scope="module")
def settings() -> TrackSettings:
    # A network that follows the objects: rows without masks would be equal whatever is tracked.
    return TrackSettings.of(chunk_frames=CHUNK, threads=1)


@pytest.fixture
def annotator(video: str, settings: TrackSettings, tmp_path: Path) -> Iterator[Annotator]:
    with Annotator(video, str(tmp_path / "out"), "v", settings) as opened:
        opened.edit([{"op": "object", "id": 1, "category": "square"}, SQUARE])
        yield opened


@pytest.fixture(scope="module")
def by_track(video: str, tmp_path_factory: pytest.TempPathFactory) -> ByTrack:
    """Returns a folder into which `track` has tracked the video, with each prompts and settings once."""
    written: dict[tuple[str, TrackSettings], Path] = {}

    def tracked(prompts: PromptSet, settings: TrackSettings) -> Path:
        key = json.dumps(prompts.to_record()), settings
        if key not in written:
            out = tmp_path_factory.mktemp("track")
            track(video, out, prompts, stream_id="v", settings=settings)
            written[key] = out
        return written[key]

    return tracked


def test_rows_are_those_of_track(
    annotator: Annotator, video: str, settings: TrackSettings, tmp_path: Path, by_track: ByTrack
) -> None:
    propagated(annotator, 13)  # in the middle of a chunk
    assert not files(tmp_path / "out")  # nothing is published before the end
    propagated(annotator)
    first = annotator.project.document.prompt_set()
    assert files(tmp_path / "out") == files(by_track(first, settings))
    before = files(tmp_path / "out")
    areas = query(tmp_path / "out", "SELECT area FROM tracks").to_pydict()["area"]
    assert min(areas) > 100

    annotator.edit([CORRECTION])
    second = annotator.project.document.prompt_set()
    assert annotator.tracked == 20  # what is before the correction is still valid
    assert [m["source"] for m in annotator.masks(19)] == ["tracked"]
    assert [m["source"] for m in annotator.masks(20)] == ["prompt"]
    assert [m["source"] for m in annotator.masks(21)] == ["stale"]
    assert files(tmp_path / "out") == before  # readers still see the whole former result
    propagated(annotator)
    after = files(tmp_path / "out")
    assert after == files(by_track(second, settings))
    same = [after[name] == before[name] for name in sorted(after) if name.startswith("tracks")]
    assert same[:3] == [True, True, False]  # chunks of frames 0 to 7, 8 to 15, 16 to 23

    annotator.project.undo()
    assert annotator.tracked == FRAMES  # the former result is there still
    propagated(annotator)
    assert files(tmp_path / "out") == before
    # `track` takes the published stream for its own: there is nothing left to do.
    summary = track(video, tmp_path / "out", first, stream_id="v", settings=settings)
    assert summary.tracked == 0


def test_a_correction_tracks_again_only_what_it_changes(
    video: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_track: ByTrack
) -> None:
    monkeypatch.setattr(propagation, "CUT_FRAMES", 6)
    settings = TrackSettings.of(chunk_frames=12, threads=1)
    tracked: list[int] = []
    accept = StreamTracker.accept

    def counted(self: StreamTracker, result: StepResult) -> None:
        tracked.append(self.next_frame)
        accept(self, result)

    monkeypatch.setattr(StreamTracker, "accept", counted)
    with Annotator(video, str(tmp_path / "out"), "v", settings) as opened:
        opened.edit([{"op": "object", "id": 1, "category": "square"}, SQUARE])
        propagated(opened)
        assert len(tracked) == FRAMES
        for frame, first in ((20, 18), (24, 24), (13, 12)):
            tracked.clear()
            opened.edit([{**CORRECTION, "frame": frame}])
            propagated(opened)
            assert len(tracked) == FRAMES - first
        prompts = opened.project.document.prompt_set()
        expected = files(by_track(prompts, settings))
        assert files(tmp_path / "out") == expected


def test_tracking_pauses_where_an_edit_outdates_it(
    annotator: Annotator, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Executor.advance

    def slowly(self: Executor, *given: Any, **more: Any) -> Any:
        time.sleep(0.2)  # else so short a video may be tracked before the edit comes
        return advance(self, *given, **more)

    monkeypatch.setattr(Executor, "advance", slowly)

    def edited_at(frame: int, change: dict[str, Any]) -> int:
        """Edit once a frame is tracked; return how many are once it has paused."""
        until(lambda: annotator.tracked >= frame)
        annotator.edit([change])
        until(lambda: annotator.propagation.status.state == "paused")
        return annotator.propagation.available()

    annotator.propagate()
    ahead = edited_at(3, CORRECTION)  # at frame 20
    assert ahead == 20  # up to there, the rows are those of the new prompts
    annotator.propagate()
    box = {"id": 1, "box": [12, 12, 40, 40]}
    behind = edited_at(22, {"op": "prompt", "frame": 2, "object": box})
    assert behind < FRAMES
    annotator.undo()
    assert annotator.tracked == behind
    propagated(annotator)
    assert annotator.state()["published"]


def test_a_removal_and_a_second_object(
    annotator: Annotator, settings: TrackSettings, tmp_path: Path, by_track: ByTrack
) -> None:
    annotator.edit(
        [
            {"op": "object", "id": 2},
            {"op": "prompt", "frame": 9, "object": {"id": 2, "polygons": [[80, 20, 120, 20, 120, 60]]}},
            {"op": "remove", "frame": 22, "id": 1},
        ]
    )
    propagated(annotator)
    prompts = annotator.project.document.prompt_set()
    assert files(tmp_path / "out") == files(by_track(prompts, settings))
    assert [m["id"] for m in annotator.masks(15)] == [1, 2]
    assert [m["id"] for m in annotator.masks(22)] == [2]


def test_both_ways_rows_are_those_of_track(
    video: str, settings: TrackSettings, tmp_path: Path, by_track: ByTrack
) -> None:
    both = settings.with_options({"direction": "both"})
    late = {"op": "prompt", "frame": 12, "object": {"id": 1, "box": [40, 10, 40, 40]}}
    with Annotator(video, str(tmp_path / "out"), "v", both) as annotator:
        annotator.edit([{"op": "object", "id": 1}, late])
        propagated(annotator)
        assert [m["source"] for m in annotator.masks(0)] == ["tracked"]
        first = annotator.project.document.prompt_set()
        assert files(tmp_path / "out") == files(by_track(first, both))

        annotator.edit([CORRECTION])
        assert annotator.tracked == 20  # a correction acts forward
        propagated(annotator)
        annotator.edit(
            [
                {"op": "object", "id": 2},
                {"op": "prompt", "frame": 5, "object": {"id": 2, "polygons": [[80, 20, 120, 20, 120, 60]]}},
            ]
        )
        assert annotator.tracked == 0  # a new object gets rows on the frames before its prompt
        assert [m["source"] for m in annotator.masks(3)] == ["stale"]
        propagated(annotator)
        assert [m["id"] for m in annotator.masks(3)] == [1, 2]
        second = annotator.project.document.prompt_set()
        assert files(tmp_path / "out") == files(by_track(second, both))

        new = annotator.split(1, 15)
        propagated(annotator)
        assert [m["id"] for m in annotator.masks(14)] == [1, 2]
        assert [m["id"] for m in annotator.masks(15)] == [2, new]
        third = annotator.project.document.prompt_set()
        assert files(tmp_path / "out") == files(by_track(third, both))

        annotator.edit([{"op": "direction", "value": "forward"}])  # for this propagation
        assert annotator.tracked == 0
        propagated(annotator)
        assert annotator.masks(4) == []
        assert files(tmp_path / "out") == files(by_track(third, settings))
        annotator.project.undo()
        assert not annotator.state()["published"]
        assert annotator.state()["direction"] == "both"
        assert annotator.tracked == FRAMES  # the rows of both ways are kept


def test_changed_memory_gives_the_rows_of_track(
    annotator: Annotator, video: str, settings: TrackSettings, tmp_path: Path, by_track: ByTrack
) -> None:
    """Settings of the memory act on the whole stream, edits from their frame on, also after a restart."""
    propagated(annotator)
    usual = files(tmp_path / "out")
    with pytest.raises(UsageError, match="max_mid_term_frames=3 is not allowed: more than min_mid_term_fr"):
        annotator.edit([{"op": "settings", "values": {"max_mid_term_frames": 3}}])
    changed = {"mem_every": 2, "min_mid_term_frames": 2, "max_mid_term_frames": 4, "top_k": 8}
    annotator.edit([{"op": "settings", "values": changed}])
    assert annotator.tracked == 0
    assert [m["source"] for m in annotator.masks(9)] == ["stale"]
    propagated(annotator)
    prompts = annotator.project.document.prompt_set()
    other = settings.with_options(changed)
    first = files(tmp_path / "out")
    assert first == files(by_track(prompts, other))
    assert first != usual

    forgets = {"forget": [9, 13]}
    annotator.edit([{"op": "memory", "frame": 16, "edit": forgets}])
    assert annotator.tracked == 16
    propagated(annotator, 20)
    annotator.close()
    track(video, tmp_path / "edited", prompts, stream_id="v", settings=other.with_options({"max_frames": 16}))
    assert edit_memory(tmp_path / "edited", forgets) == 16
    track(video, tmp_path / "edited", prompts, stream_id="v", settings=other)
    with Annotator(None, str(tmp_path / "out")) as again:
        assert again.tracked == 20
        propagated(again)
        assert files(tmp_path / "out", "tracks", "events") == files(tmp_path / "edited", "tracks", "events")
        assert list(files(tmp_path / "out", "edits")) == list(files(tmp_path / "edited", "edits"))
        again.project.undo()
        again.project.undo()
        propagated(again)
    assert files(tmp_path / "out") == usual
    assert not list((tmp_path / "out").glob("edits/v/*"))
    # What was edited by the command is corrected like what the annotator edited.
    with Annotator(video, str(tmp_path / "edited"), "v", other) as imported:
        assert imported.tracked == FRAMES
        assert imported.state()["published"]
        imported.edit([{"op": "unmemory", "frame": 16, "number": 0}])
        assert imported.tracked == 16


def test_a_new_prompt_keeps_rows_and_states_before_it(
    annotator: Annotator, settings: TrackSettings, tmp_path: Path
) -> None:
    propagated(annotator)
    annotator.edit([CORRECTION])
    (work,) = (tmp_path / "out" / "annotate" / "v" / "work").iterdir()
    target = open_files(str(tmp_path / "target"))
    prompts = annotator.project.document.prompt_set()
    assert carry_over(open_files(str(work)), target, "v", prompts) == 20
    kept = files(tmp_path / "target", "tracks", "events")
    assert kept == {n: b for n, b in files(work, "tracks", "events").items() if n in kept}
    assert len(kept) == 6  # the chunk of frames 16 to 23 is cut at frame 20
    summary = track(annotator.video, tmp_path / "target", prompts, stream_id="v", settings=settings)
    assert summary.tracked == FRAMES - 20  # from the state before the correction


def test_what_track_wrote_is_corrected(
    video: str, settings: TrackSettings, tmp_path: Path, by_track: ByTrack
) -> None:
    prompts = PromptSet.from_record({"version": 1, "objects": [SQUARE["object"]]})
    shutil.copytree(by_track(prompts, settings), tmp_path / "out")
    with Annotator(video, str(tmp_path / "out"), "v") as annotator:
        assert annotator.tracked == FRAMES
        assert annotator.state()["published"]
        annotator.edit([CORRECTION])
        propagated(annotator)
        corrected = annotator.project.document.prompt_set()
        assert files(tmp_path / "out") == files(by_track(corrected, settings))


def test_going_on(
    annotator: Annotator, video: str, settings: TrackSettings, tmp_path: Path, by_track: ByTrack
) -> None:
    propagated(annotator, 20)
    annotator.close()
    out = str(tmp_path / "out")
    with pytest.raises(UsageError, match="no annotation of stream 'w'"):
        Annotator(None, out, "w")
    with pytest.raises(SettingsConflictError, match="chunk_frames was 8, now 9"):
        Annotator(video, out, "v", settings.with_options({"chunk_frames": 9}))
    with Annotator(None, out) as again:
        assert again.tracked == 20  # what was shown as tracked, in the middle of a chunk
        assert again.project.can_undo
        propagated(again)
        prompts = again.project.document.prompt_set()
    assert files(tmp_path / "out") == files(by_track(prompts, settings))


def test_closed_while_it_tracks(annotator: Annotator, tmp_path: Path) -> None:
    annotator.propagate()
    shown: int = until(lambda: annotator.tracked > 2 and annotator.tracked)
    annotator.close()
    with Annotator(None, str(tmp_path / "out")) as again:
        assert shown <= again.tracked < FRAMES


def test_a_video_that_changes(settings: TrackSettings, tmp_path: Path) -> None:
    video = make_video(tmp_path / "v.mp4", FRAMES)
    with Annotator(str(video), str(tmp_path / "out"), "v", settings) as annotator:
        annotator.edit([{"op": "object", "id": 1}, SQUARE])
        make_video(video, FRAMES + 1)
        annotator.propagate()
        until(lambda: annotator.propagation.status.state == "failed")
        assert "has changed since it was first annotated" in str(annotator.propagation.status.message)
        video.unlink()
        annotator.propagate()
        until(lambda: "no such file" in str(annotator.propagation.status.message).lower())
        assert annotator.project.edits == 1  # the prompts are still there
    make_video(video, FRAMES + 1)
    with pytest.raises(SettingsConflictError, match="its content has changed"):
        Annotator(str(video), str(tmp_path / "out"), "v", settings)


def test_killed_while_it_tracks(
    video: str, settings: TrackSettings, tmp_path: Path, by_track: ByTrack
) -> None:
    out = tmp_path / "out"
    options = ["--model", settings.model.name, "--chunk", str(CHUNK), "--threads", "1", "--stream-id", "v"]
    first = AnnotateProcess(tmp_path / "first.log", video, "--out", str(out), *options)
    try:
        assert first.ask("POST", "objects", category="square")["id"] == 1
        first.ask("PATCH", "memory/settings", mem_every=3)
        saved = first.ask("PUT", "prompts/0/1", box=[10, 10, 40, 40])
        first.ask("POST", "propagate", until=FRAMES)
        work: list[Any] = until(lambda: list(out.glob("annotate/v/work/*/tracks/*/frames-*8.parquet")))
        shown = first.ask("PUT", "prompts/25/1", box=[60, 40, 40, 40])
    finally:
        first.kill()
    assert work
    assert shown["edits"] == saved["edits"] + 1
    again = AnnotateProcess(tmp_path / "again.log", str(out))
    try:
        state = again.ask("GET", "state")
        assert state["objects"] == shown["objects"]
        assert state["edits"] == shown["edits"]
        assert state["tracked"] >= CHUNK
        assert state["memory"]["settings"]["mem_every"] == 3
        again.ask("POST", "propagate", until=None)
        until(lambda: again.ask("GET", "state")["published"])
        prompts = PromptSet.from_record(again.ask("GET", "export/prompts"))
    finally:
        again.kill()
    changed = settings.with_options({"mem_every": 3})
    assert files(out) == files(by_track(prompts, changed))
