"""From which remembered frames a tracked file was read, from Python and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.small_net import SMALL_MEMORY, frame_at
from support.tiny import tiny_weights
from support.videos import make_video
from support.written import files

from pipeline.base.errors import StoreError, UsageError
from pipeline.memory.editing import edit_memory
from pipeline.memory.memory_reads import FrameShare, memory_reads
from pipeline.prompts.resolving import PromptSet
from pipeline.tracking.files.executor import Executor
from pipeline.tracking.files.stream_tracker import StreamTracker
from pipeline.tracking.files.track import track
from pipeline.tracking.segmenters import open_segmenter
from pipeline.tracking.settings import TrackSettings
from pipeline.tracks.store import StreamStore
from pipeline.video.sources import open_source

FRAMES, CHUNK = 24, 8
PIXEL = (12, 20)
PROMPTS: dict[str, Any] = {
    "version": 1,
    "objects": [
        {"frame": 2, "id": 1, "category": "square", "polygons": [[4, 2, 18, 2, 18, 16, 4, 16]]},
        {"frame": 5, "id": 7, "polygons": [[27, 8, 39, 8, 39, 20, 27, 20]]},
        {"frame": 12, "id": 9, "polygons": [[4, 22, 16, 22, 16, 30]]},
    ],
    "remove": [{"frame": 14, "id": 9}],
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> TrackSettings:
    weights = tiny_weights(tmp_path_factory.mktemp("weights"))
    options = TrackSettings.of(model=weights, threads=1, chunk_frames=CHUNK, snapshot_chunks=1)
    return options.with_options({"memory": SMALL_MEMORY})


@pytest.fixture(scope="module")
def tracked(settings: TrackSettings, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A video and the folder in which it was tracked as `walk`; frame 7 is forgotten before frame 16."""
    folder = tmp_path_factory.mktemp("reads")
    video = str(make_video(folder / "walk.mkv", [frame_at(i) for i in range(FRAMES)]))
    out = folder / "out"
    prompts = PromptSet.from_record(PROMPTS)
    track(video, out, prompts, stream_id="walk", settings=settings.with_options({"max_frames": 16}))
    assert edit_memory(out, {"forget": [8, 14]}) == 16
    track(video, out, prompts, stream_id="walk", settings=settings)
    return video, out


def read_while_tracking(
    video: str, settings: TrackSettings, frame: int, folder: Path
) -> dict[int, list[tuple[str, int | None, float]]]:
    """The shares at PIXEL, asked of the state of a run from frame 0."""
    segmenter = open_segmenter(settings.model, settings.memory)
    resolved = settings.of_segmenter(segmenter, 1)
    store = StreamStore(folder, "walk")
    prompts = PromptSet.from_record(PROMPTS)
    where = np.zeros(frame_at(0).shape[:2], bool)
    where[PIXEL[1], PIXEL[0]] = True
    with StreamTracker(open_source(video), store, segmenter, resolved, prompts) as stream:
        executor = Executor(segmenter, 1)
        while stream.next_frame < frame:
            executor.advance([stream])
        step = stream.next_input()
        assert step is not None
        shift = frame - 1 - step.state.time
        return {
            i: [(s.kind, None if s.time is None else s.time + shift, s.share) for s in shares]
            for i, shares in segmenter.reads(step.state, step.image, where).items()
        }


def test_shares_are_those_of_the_run(
    tracked: tuple[str, Path], settings: TrackSettings, tmp_path: Path
) -> None:
    video, out = tracked
    before = files(out, "tracks", "events", "state", "streams", "edits")
    for frame in (6, 13):  # from frame 0, and from the snapshot of frame 8
        expected = read_while_tracking(video, settings, frame, tmp_path / str(frame))
        found = memory_reads(out, frame, PIXEL)
        assert list(found.objects) == list(expected)
        for i, own in expected.items():
            told = {(str(share.kind), share.frame_index): share.share for share in found.objects[i]}
            assert told == pytest.approx({(kind, at): share for kind, at, share in own}, abs=1e-6)
    assert list(found.objects) == [1, 7, 9]
    late = memory_reads(out, 20, object_id=7)
    assert list(late.objects) == [7]
    named = {share.frame_index for share in late.objects[7]}
    assert not named & set(range(8, 15))  # forgotten by the edit before frame 16
    assert sum(share.share for share in late.objects[7]) == pytest.approx(1)
    assert files(out, "tracks", "events", "state", "streams", "edits") == before


def test_the_command_shows_them(tracked: tuple[str, Path], call: Callable[..., tuple[int, str, str]]) -> None:
    _, out = tracked
    code, text, _ = call("memory", out, "--read", "13,12,20", "--json")
    assert code == 0
    told = json.loads(text)
    expected = memory_reads(out, 13, PIXEL).objects
    assert {o["id"]: tuple(FrameShare(**s) for s in o["frames"]) for o in told["objects"]} == dict(expected)
    assert "frame 13, on their masks" in call("memory", out, "--read", "13", "--object", "1")[1]
    for wrong, said in (
        (("--read", "13,1"), "FRAME,X,Y"),
        (("--read", "13", "--pin", "2"), "without edits"),
        (("--read", "13,900,1"), "outside frame 13"),
        (("--read", "400"), "no frame 400"),
        (("--read", "13", "--object", "5"), "object 5 is not remembered before frame 13: 1, 7, 9 are"),
    ):
        code, _, text = call("memory", out, *wrong)
        assert code != 0
        assert said in " ".join(text.split())


def test_another_video_or_model_is_refused(
    tracked: tuple[str, Path], settings: TrackSettings, tmp_path: Path
) -> None:
    _, out = tracked
    other = make_video(tmp_path / "other.mkv", [frame_at(i) for i in range(FRAMES - 1)])
    with pytest.raises(UsageError, match="not the video that stream 'walk' was tracked on"):
        memory_reads(out, 6, video=str(other))
    weights = Path(settings.model.name)
    kept = weights.read_bytes()
    try:
        weights.write_bytes(Path(tiny_weights(tmp_path, seed=1)).read_bytes())
        with pytest.raises(StoreError, match="another version of"):
            memory_reads(out, 6)
    finally:
        weights.write_bytes(kept)
