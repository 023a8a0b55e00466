"""Objects of a stream: prompts, removals and detections, recorded as they happen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from support.small_net import SMALL_MEMORY, frame_at, small_model, square

from pipeline.base.errors import PromptError
from pipeline.base.records import Event, Frame
from pipeline.detect.lifecycle.decisions import Decisions, NewObject
from pipeline.live.pending_rows import Unwritten
from pipeline.live.record import Books
from pipeline.prompts.box_segmenters import load_box_segmenter
from pipeline.prompts.resolving import PromptSet, resolve
from pipeline.tracking.objects import Masks, TrackedObjects
from pipeline.tracks.masks import mask_to_rle
from xmem_core import Prompt, TrackerState, VideoSegmenter

HEIGHT, WIDTH = 48, 64


@pytest.fixture(scope="module")
def segmenter() -> VideoSegmenter:
    return VideoSegmenter(small_model(), SMALL_MEMORY)


def found(object_id: int, mask: Any, reason: str = "detector") -> NewObject:
    return NewObject(object_id, mask, "cat", 0.87654, reason)


@dataclass
class Finder:
    """Finds and gives up objects as scripted."""

    finds: list[NewObject] = field(default_factory=list)
    gives_up: list[int] = field(default_factory=list)
    reserved: set[int] = field(default_factory=set)
    sights: list[tuple[int, list[int]]] = field(default_factory=list)
    started: list[int] = field(default_factory=list)

    def release(self, ids: Iterable[int]) -> None:
        self.started = [i for i in self.started if i not in set(ids)]

    def make_room(self, frame_index: int, count: int, among: Iterable[int]) -> dict[int, int]:
        chosen = [i for i in self.started if i in set(among)][:count]
        self.release(chosen)
        return dict.fromkeys(chosen, 9)

    def reserve(self, ids: Iterable[int]) -> None:
        self.reserved |= set(ids)

    looked = -1

    def look(self, frame: Frame, live: Any, masks: Any, *, may_detect: bool = True) -> Decisions:
        self.looked = frame.frame_index if may_detect else self.looked
        self.started += [new.object_id for new in self.finds]
        return Decisions(dict.fromkeys(self.gives_up, "out_of_sight"), list(self.finds))

    def saw(self, frame_index: int, label_map: Any, live: Iterable[int]) -> Any:
        self.sights.append((frame_index, list(live)))
        return label_map


class Scene:
    def __init__(self, segmenter: VideoSegmenter, finder: Any = None) -> None:
        self.segmenter, self.unwritten = segmenter, Unwritten(Books(), 0)
        self.boxes = load_box_segmenter("grabcut")
        self.objects = TrackedObjects(segmenter.new_state(), self.unwritten, most=2, finder=finder)

    def prompt(self, index: int, content: dict[str, Any]) -> Masks:
        """Prompts of a frame, as a live stream handles them."""
        asked = PromptSet.from_record(content).at(0)
        self.objects.check_room([entry.object_id for entry in asked])
        return self.objects.prompt(frame_of(index), resolve(asked, frame_of(index), self.boxes))

    def step(self, index: int, masks: Any) -> Any:
        """Track a frame; returns ids and categories of its records."""
        frame = frame_of(index)
        result = self.segmenter.step(self.objects.state, frame.image, Prompt(masks) if masks else None)
        return [(r.object_id, r.category) for r in self.objects.seen(frame, result)]

    def told(self) -> list[tuple[Any, ...]]:
        self.unwritten.covered += 1
        content = self.unwritten.cut()
        assert content is not None
        return [(e.kind, e.reason, e.object_id, e.detail) for e in content.events]


def frame_of(index: int) -> Frame:
    return Frame(frame_at(index, HEIGHT, WIDTH), index, index / 10)


def prompts(*objects: tuple[int, str | None]) -> dict[str, Any]:
    entries = []
    for k, (object_id, category) in enumerate(objects):
        mask = square(HEIGHT, WIDTH, 8, 4 + 16 * k, 14)
        rle = {"size": [HEIGHT, WIDTH], "counts": mask_to_rle(mask)}
        entries.append({"id": object_id, "rle": rle} | ({"category": category} if category else {}))
    return {"version": 1, "objects": entries}


def test_prompts_begin_objects_and_correct_them(segmenter: VideoSegmenter) -> None:
    scene = Scene(segmenter)
    masks = scene.prompt(0, prompts((1, "dog"), (4, None)))
    assert scene.objects.changed
    assert scene.step(0, masks) == [(1, "dog"), (4, None)]
    assert scene.told() == [
        ("object_added", "prompt", 1, {"category": "dog"}),
        ("object_added", "prompt", 4, {"category": None}),
    ]
    masks = scene.prompt(1, prompts((1, None), (4, "cow")))
    assert scene.step(1, masks) == [(1, "dog"), (4, "cow")]
    assert scene.told() == [("corrected", "prompt", 1, None), ("corrected", "prompt", 4, None)]
    assert scene.objects.living() == {1: "dog", 4: "cow"}


def test_what_cannot_be_prompted_changes_nothing(segmenter: VideoSegmenter) -> None:
    scene = Scene(segmenter)
    with pytest.raises(PromptError, match="3 objects would be tracked, 2 are allowed"):
        scene.prompt(0, prompts((1, "dog"), (2, None), (3, None)))
    assert (scene.objects.changed, scene.objects.categories, scene.told()) == (False, {}, [])


def test_removed_objects_are_gone_at_once(segmenter: VideoSegmenter) -> None:
    scene = Scene(segmenter)
    scene.step(0, scene.prompt(0, prompts((1, "dog"), (2, None))))
    scene.objects.changed = False
    assert scene.objects.remove(frame_of(1), 1, "requested")
    assert not scene.objects.remove(frame_of(1), 1, "requested")
    assert scene.objects.changed
    assert scene.objects.living() == {2: None}
    assert scene.objects.categories == {2: None}
    assert scene.step(1, None) == [(2, None)]
    assert scene.told()[-1] == ("object_removed", "requested", 1, None)


def test_a_renamed_object_has_its_name_from_then_on(segmenter: VideoSegmenter) -> None:
    finder = Finder(started=[1])
    scene = Scene(segmenter, finder)
    scene.step(0, scene.prompt(0, prompts((1, "dog"))))
    finder.started = [1]  # as if it had been detected
    scene.objects.changed = False
    assert scene.objects.rename(frame_of(1), 1, "wolf")
    assert not scene.objects.rename(frame_of(1), 5, "wolf")
    assert scene.objects.changed
    assert finder.started == []
    assert scene.step(1, None) == [(1, "wolf")]
    assert scene.told()[-1] == ("corrected", "renamed", 1, {"category": "wolf", "before": "dog"})


def test_the_finder_brings_objects_and_gives_them_up(segmenter: VideoSegmenter) -> None:
    finder = Finder([found(7, square(HEIGHT, WIDTH, 20, 40, 12))])
    scene = Scene(segmenter, finder)
    masks = scene.prompt(0, prompts((1, None)))
    scene.objects.look(frame_of(0), masks)
    assert finder.reserved == {1}
    assert scene.step(0, masks) == [(1, None), (7, "cat")]
    assert finder.sights == [(0, [1, 7])]
    assert scene.told()[-1] == ("object_added", "detector", 7, {"score": 0.8765, "category": "cat"})
    finder.finds, finder.gives_up = [], [1, 7, 99]
    masks = {1: np.ones((HEIGHT, WIDTH), np.bool_)}
    scene.objects.look(frame_of(1), masks)  # what is being prompted just now is not given up
    assert scene.objects.living() == {1: None}
    assert scene.told() == [("object_removed", "out_of_sight", 7, None)]


def test_the_finder_corrects_an_object_and_starts_one_again_that_it_gave_up(
    segmenter: VideoSegmenter,
) -> None:
    first, second = square(HEIGHT, WIDTH, 20, 40, 12), square(HEIGHT, WIDTH, 4, 4, 12)
    finder = Finder([found(7, first)])
    scene = Scene(segmenter, finder)
    for index, (finds, gone) in enumerate(
        [
            ([found(7, first)], []),
            ([found(7, second, "drifted")], []),
            ([], [7]),
            ([found(7, first, "found_again")], []),
        ]
    ):
        finder.finds, finder.gives_up = finds, gone
        masks: Any = {}
        scene.objects.look(frame_of(index), masks)
        scene.step(index, masks)
    assert [told[:3] for told in scene.told()] == [
        ("object_added", "detector", 7),
        ("corrected", "drifted", 7),
        ("object_removed", "out_of_sight", 7),
        ("object_added", "found_again", 7),
    ]
    assert scene.objects.living() == {7: "cat"}


def test_detected_objects_give_way_to_prompts_and_those_of_prompts_do_not(segmenter: VideoSegmenter) -> None:
    finder = Finder([found(7, square(HEIGHT, WIDTH, 20, 40, 12))])
    scene = Scene(segmenter, finder)
    masks = scene.prompt(0, prompts((1, None)))
    scene.objects.look(frame_of(0), masks)
    scene.step(0, masks)
    scene.told()
    finder.finds = []
    assert (scene.objects.object_ids, scene.objects.detected_ids) == ((1, 7), [7])
    # Two are allowed, and two are tracked.
    masks = scene.prompt(1, prompts((1, None), (8, "dog")))
    assert scene.step(1, masks) == [(1, None), (8, "dog")]
    assert scene.told() == [
        ("object_removed", "made_room", 7, {"for": [1, 8], "unseen_frames": 9}),
        ("corrected", "prompt", 1, None),
        ("object_added", "prompt", 8, {"category": "dog"}),
    ]
    with pytest.raises(PromptError, match="3 objects would be tracked, 2 are allowed"):
        scene.prompt(2, prompts((9, None)))
    assert scene.told() == []


def test_a_detected_object_that_a_user_corrects_is_the_users(segmenter: VideoSegmenter) -> None:
    finder = Finder([found(7, square(HEIGHT, WIDTH, 20, 40, 12)), found(8, square(HEIGHT, WIDTH, 2, 2, 8))])
    scene = Scene(segmenter, finder)
    masks: Any = {}
    scene.objects.look(frame_of(0), masks)
    scene.step(0, masks)
    finder.finds = []
    scene.step(1, scene.prompt(1, prompts((7, None))))
    assert scene.objects.detected_ids == [8]
    scene.step(2, scene.prompt(2, prompts((9, None))))
    assert scene.objects.object_ids == (7, 9)
    with pytest.raises(PromptError, match="3 objects would be tracked, 2 are allowed"):
        scene.prompt(3, prompts((10, None)))


def test_a_prompt_that_cannot_be_resolved_makes_no_room(segmenter: VideoSegmenter) -> None:
    finder = Finder([found(7, square(HEIGHT, WIDTH, 20, 40, 12)), found(8, square(HEIGHT, WIDTH, 2, 2, 8))])
    scene = Scene(segmenter, finder)
    masks: Any = {}
    scene.objects.look(frame_of(0), masks)
    scene.step(0, masks)
    outside = {"version": 1, "objects": [{"id": 9, "box": [500, 500, 5, 5]}]}
    with pytest.raises(PromptError, match="no pixel inside the frame"):
        scene.prompt(1, outside)
    assert scene.objects.object_ids == (7, 8)
    assert scene.objects.detected_ids == [7, 8]


def test_without_objects_and_finder_nothing_is_read(segmenter: VideoSegmenter) -> None:
    class Untouched:
        object_ids: tuple[int, ...] = ()

    scene = Scene(segmenter)
    assert scene.objects.seen(frame_of(0), Untouched()) == []  # type: ignore[arg-type]
    finder = Finder()
    assert Scene(segmenter, finder).step(3, None) == []
    assert finder.sights == [(3, [])]


def test_another_frame_size_is_recorded_unless_the_source_tells_of_it(segmenter: VideoSegmenter) -> None:
    scene = Scene(segmenter)
    smaller = Frame(frame_at(1, 24, 32), 1, 0.1)
    scene.objects.arrive(frame_of(0))
    scene.step(0, None)
    scene.objects.arrive(smaller)
    assert scene.told() == [("resized", None, None, {"from": [HEIGHT, WIDTH], "to": [24, 32]})]
    scene.objects.arrive(replace(smaller, losses=(Event(1, "resized", detail={"to": [24, 32]}),)))
    assert scene.told() == []


def test_a_snapshot_holds_what_the_objects_are(segmenter: VideoSegmenter) -> None:
    scene = Scene(segmenter)
    scene.step(0, scene.prompt(0, prompts((1, "dog"), (4, None))))
    made = scene.objects.snapshot(1, "run", 0.0, rows=2, losses=0)
    snapshot = made()
    assert (snapshot.categories, snapshot.previous_size) == (((1, "dog"), (4, None)), (HEIGHT, WIDTH))
    state = TrackerState.from_bytes(snapshot.tracker, device="cpu")
    assert state.object_ids == (1, 4)
    again = TrackedObjects(state, scene.unwritten, categories=dict(snapshot.categories))
    assert again.snapshot(1, "run", 0.0, rows=2, losses=0)().tracker == snapshot.tracker
    for index in range(1, 7):  # memory frames and a consolidation among them
        scene.step(index, None)
    scene.objects.categories[1] = "cat"
    assert made() == snapshot
    assert TrackerState.from_bytes(scene.objects.state.to_bytes()).time == 6


def test_frames_that_have_rows_are_seen_without_records(segmenter: VideoSegmenter) -> None:
    finder = Finder()
    scene = Scene(segmenter, finder)
    masks = scene.prompt(0, prompts((1, "dog")))
    result = segmenter.step(scene.objects.state, frame_of(0).image, Prompt(masks))
    assert scene.objects.seen(frame_of(0), result, recorded=False) == []
    assert finder.sights == [(0, [1])]
