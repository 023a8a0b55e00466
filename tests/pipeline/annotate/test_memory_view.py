"""The memory of an annotation: listed and read at a frame, edited, cleared, and its gauges."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.annotating import propagated
from support.small_net import SMALL_MEMORY
from support.tiny import tiny_weights
from support.videos import make_video

from pipeline.annotate.annotator import Annotator
from pipeline.base.errors import UsageError
from pipeline.memory.memory_reads import memory_reads
from pipeline.tracking.settings import TrackSettings

FRAMES = 20


@pytest.fixture(scope="module")
def annotator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Annotator]:
    folder = tmp_path_factory.mktemp("memory")
    video = make_video(folder / "v.mp4", FRAMES, gop=10)
    settings = TrackSettings.of(model=tiny_weights(folder), chunk_frames=8, threads=1)
    with Annotator(
        str(video), str(folder / "out"), "v", settings.with_options({"memory": SMALL_MEMORY})
    ) as opened:
        opened.edit([{"op": "object", "id": 1}])
        opened.edit(
            [{"op": "prompt", "frame": 0, "object": {"id": 1, "polygons": [[10, 10, 60, 10, 60, 60]]}}]
        )
        opened.edit([{"op": "object", "id": 2}])
        opened.edit(
            [{"op": "prompt", "frame": 3, "object": {"id": 2, "polygons": [[80, 20, 120, 20, 120, 60]]}}]
        )
        assert opened.state()["memory"]["gauges"] is None
        propagated(opened)
        yield opened


def whole(annotator: Annotator, frame: int) -> dict[int, bool]:
    """Whether they are pinned, of the frames that are remembered as a whole before a frame."""
    entries = annotator.memory_view.listing(annotator.recipe, frame)["frames"]
    return {e["frame"]: e["pinned"] for e in entries if e["kind"] != "long_term"}


def test_gauges(annotator: Annotator) -> None:
    memory = annotator.state()["memory"]
    regions = {region["kind"]: region for region in memory["gauges"]["regions"]}
    assert set(regions) == {"working", "permanent", "long_term"}
    assert all(0 < r["elements"] <= r["limit"] and r["frames"] for r in regions.values())
    assert memory["gauges"]["bytes"] > 0
    assert memory["device"]["name"] == "cpu"
    assert 10 * 2**20 < memory["device"]["bytes"] < memory["device"]["limit"]
    assert memory["settings"] == memory["usual"]


def test_reads_are_those_of_the_written_stream(annotator: Annotator) -> None:
    for frame in (9, 10, 4):  # on, on by a frame, and back
        found = annotator.reads(frame, (20, 20), None)
        expected = memory_reads(annotator.root, frame, (20, 20)).to_json()
        assert found == {"frame": frame, "objects": expected["objects"]}
    of_one = annotator.reads(9, None, 2)
    assert of_one["objects"] == memory_reads(annotator.root, 9, object_id=2).to_json()["objects"]
    assert annotator.reads(0, (5, 5), None)["objects"] == []
    with pytest.raises(UsageError, match="pixel 900,1 is outside"):
        annotator.reads(9, (900, 1), None)


def test_edits_act_from_their_frame_on(annotator: Annotator) -> None:
    before = whole(annotator, 12)
    some = max(before)
    annotator.edit_memory(12, [{"pin": some}])
    assert annotator.tracked == 12
    assert whole(annotator, 12) == {**before, some: True}  # at once, before it is tracked again
    with pytest.raises(UsageError, match="not tracked with the present prompts yet"):
        annotator.edit_memory(15, [{"unpin": some}])
    propagated(annotator)
    assert whole(annotator, 18)[some]

    edits = annotator.project.edits
    with pytest.raises(UsageError, match="object 1 would remember nothing any more"):
        annotator.edit_memory(12, [{"forget": [0, 11]}])
    with pytest.raises(UsageError, match="frame 10 is not in memory as a whole"):
        annotator.edit_memory(12, [{"forget": [1, 2]}, {"pin": 10}])
    assert annotator.project.edits == edits

    annotator.clear_memory(12)
    listed = annotator.memory_view.listing(annotator.recipe, 12)["frames"]
    assert {e["frame"] for e in listed} == {0, 3, some}
    told = annotator.state()["memory"]["edits"]
    assert told[0] == {"frame": 12, "number": 0, "pin": some}
    assert all(edit["frame"] == 12 and "forget" in edit for edit in told[1:])
    with pytest.raises(UsageError, match="only frames with prompts and pinned ones"):
        annotator.clear_memory(12)
    annotator.edit_memory(12, [{"forget": [some, some], "object": 2}])
    propagated(annotator)
    entries = annotator.memory_view.listing(annotator.recipe, 13)["frames"]
    assert [e["objects"] for e in entries if e["frame"] == some] == [(1,)]
    for _ in range(3):
        annotator.project.undo()
    assert annotator.tracked == FRAMES
