"""Prompts files: the JSON Schema and the code accept the same documents."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import cv2
import fsspec
import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.plain_png import PALETTE, RGB, plain_png

from pipeline.base.errors import PromptError, SourceError
from pipeline.prompts.resolving import (
    PromptObject,
    PromptSet,
    gather_prompts,
    load_mask_png,
    load_prompts,
    parse_box,
    prompts_schema,
)
from pipeline.tracks.masks import mask_to_rle, rle_to_mask

VALIDATOR = jsonschema.Draft202012Validator(prompts_schema())
BOX = {"box": [1, 2, 3, 4]}
RLE = {"size": [2, 3], "counts": [1, 2, 3]}


def document(*objects: Any, **more: Any) -> dict[str, Any]:
    return {"version": 1, "objects": list(objects), **more}


def accepted(content: Any) -> bool:
    message = None
    try:
        PromptSet.from_record(copy.deepcopy(content), "p.json")
    except PromptError as error:
        message = str(error)
    assert message is None or (message.startswith("p.json: ") and "\n" not in message and len(message) < 250)
    return message is None


GOOD = [
    document(),
    document(BOX),
    document({**BOX, "frame": 0, "id": 1, "category": "person"}),
    document({**BOX, "id": 2147483647, "category": None}),
    document({**BOX, "frame": 3.0, "id": 7.0}),
    document({"box": [-5.5, 1e6, 0.25, 1e-3]}),
    document({"rle": RLE}),
    document({"rle": {"size": [2, 3], "counts": "123"}}),
    document({"rle": {"size": [2.0, 3], "counts": [1.0, 2, 3]}}),
    document({"rle": {"size": [2, 3], "counts": [0, 6]}}),
    document({"polygons": [[0, 0, 4, 0, 4.5, 4]]}),
    document({"polygons": [[0, 0, 4, 0, 4, 4, 0, 4], [-9, -9, 99, 0, 1, 1]]}),
    document({**BOX, "id": 5}, {**BOX, "id": 5, "frame": 1}, {**BOX, "id": 6}),
    document(BOX, BOX, remove=[]),
    document(BOX, remove=[{"frame": 9, "id": 1}, {"frame": 10, "id": 1}]),
    {"version": 1.0, "objects": []},
    document({"state": {"object": 3}}),
    document({"frame": 4, "id": 2, "state": {"object": 3, "stream": "gate-1", "out": "s3://bucket/tracks"}}),
    document({**BOX, "category": "läufer \U0001f3c3\n"}),
]

BAD: list[Any] = [
    None,
    [],
    "x",
    3,
    {},
    {"version": 1},
    {"objects": []},
    {"version": 2, "objects": []},
    {"version": True, "objects": []},
    {"version": "1", "objects": []},
    {"version": None, "objects": []},
    {"version": 1, "objects": {}},
    {"version": 1, "objects": None},
    document(note="mine"),
    document(remove=None),
    document(remove={}),
    document(remove=[3]),
    document(remove=[{"frame": 1}]),
    document(remove=[{"id": 1}]),
    document(remove=[{"frame": 1, "id": 1, "why": "x"}]),
    document(remove=[{"frame": -1, "id": 1}]),
    document(remove=[{"frame": 1, "id": 0}]),
    document(None),
    document([]),
    document("box"),
    document({}),
    document({"id": 1}),
    document({**BOX, "label": "person"}),
    document({**BOX, "rle": RLE}),
    document({**BOX, "polygons": [[0, 0, 1, 0, 1, 1]]}),
    document({**BOX, "frame": -1}),
    document({**BOX, "frame": 1.5}),
    document({**BOX, "frame": None}),
    document({**BOX, "frame": True}),
    document({**BOX, "frame": "0"}),
    document({**BOX, "id": 0}),
    document({**BOX, "id": -1}),
    document({**BOX, "id": 2147483648}),
    document({**BOX, "id": 1.5}),
    document({**BOX, "id": None}),
    document({**BOX, "id": True}),
    document({**BOX, "id": "1"}),
    document({**BOX, "category": ""}),
    document({**BOX, "category": 3}),
    document({**BOX, "category": ["person"]}),
    document({"box": None}),
    document({"box": "1,2,3,4"}),
    document({"box": []}),
    document({"box": [1, 2, 3]}),
    document({"box": [1, 2, 3, 4, 5]}),
    document({"box": [1, 2, 0, 4]}),
    document({"box": [1, 2, 3, -4]}),
    document({"box": [1, 2, 3, "4"]}),
    document({"box": [1, 2, 3, True]}),
    document({"box": [1, 2, 3, None]}),
    document({"box": [[1, 2, 3, 4]]}),
    document({"rle": None}),
    document({"rle": "123"}),
    document({"rle": {"size": [2, 3]}}),
    document({"rle": {"counts": [6]}}),
    document({"rle": {**RLE, "order": "C"}}),
    document({"rle": {**RLE, "size": [2]}}),
    document({"rle": {**RLE, "size": [2, 3, 1]}}),
    document({"rle": {**RLE, "size": [0, 3]}}),
    document({"rle": {**RLE, "size": [2.5, 3]}}),
    document({"rle": {**RLE, "size": "23"}}),
    document({"rle": {**RLE, "size": [True, 6]}}),
    document({"rle": {**RLE, "counts": None}}),
    document({"rle": {**RLE, "counts": ""}}),
    document({"rle": {**RLE, "counts": []}}),
    document({"rle": {**RLE, "counts": [1, -2, 7]}}),
    document({"rle": {**RLE, "counts": [1, 2.5, 2.5]}}),
    document({"rle": {**RLE, "counts": [1, "2", 3]}}),
    document({"rle": {**RLE, "counts": [1, True, 4]}}),
    document({"rle": {**RLE, "counts": {"0": 6}}}),
    document({"state": None}),
    document({"state": 3}),
    document({"state": {}}),
    document({"state": {"stream": "gate"}}),
    document({"state": {"object": 0}}),
    document({"state": {"object": 3, "stream": None}}),
    document({"state": {"object": 3, "stream": "-gate"}}),
    document({"state": {"object": 3, "out": ""}}),
    document({"state": {"object": 3, "frame": 1}}),
    document({**BOX, "state": {"object": 3}}),
    document({"polygons": None}),
    document({"polygons": []}),
    document({"polygons": [[]]}),
    document({"polygons": [0, 0, 4, 0, 4, 4]}),
    document({"polygons": [[0, 0, 4, 0]]}),
    document({"polygons": [[0, 0, 4, 0, 4, "4"]]}),
    document({"polygons": [[0, 0, 4, 0, 4, None]]}),
    document({"polygons": [[[0, 0], [4, 0], [4, 4]]]}),
]

# A schema can't count, add up, decode or compare: these only the code refuses.
BAD_BEYOND_SCHEMA = {
    "an id twice on one frame": document({**BOX, "id": 1}, {**BOX, "id": 1}),
    "a removal twice on one frame": document(BOX, remove=[{"frame": 1, "id": 1}, {"frame": 1, "id": 1}]),
    "half a point": document({"polygons": [[0, 0, 4, 0, 4, 4, 1]]}),
    "an empty mask": document({"rle": {"size": [2, 3], "counts": [6]}}),
    "runs of another size": document({"rle": {"size": [2, 3], "counts": [1, 2, 4]}}),
    "runs that end early": document({"rle": {"size": [2, 3], "counts": [1, 2]}}),
    "counts cut off": document({"rle": {"size": [2, 3], "counts": "12P"}}),
    "counts of no encoder": document({"rle": {"size": [2, 3], "counts": "1 3"}}),
    "counts beyond ASCII": document({"rle": {"size": [2, 3], "counts": "1é3"}}),
    "a mask larger than memory": document({"rle": {"size": [10**9, 10**9], "counts": [0, 10**18]}}),
    "a run beyond int64": document({"rle": {"size": [2, 3], "counts": [10**30]}}),
    "a number beyond floats": document({"box": [10**400, 0, 1, 1]}),
    "a frame beyond int64": document({**BOX, "frame": 10**30}),
    "credentials": document({"state": {"object": 3, "out": "https://me:secret@host/tracks"}}),
    "half a character": document({**BOX, "category": "\ud800"}),
}


@pytest.mark.parametrize("content", GOOD, ids=str)
def test_code_and_schema_accept_the_same(content: Any) -> None:
    assert VALIDATOR.is_valid(content)
    assert accepted(content)


@pytest.mark.parametrize("content", BAD, ids=str)
def test_code_and_schema_refuse_the_same(content: Any) -> None:
    assert not VALIDATOR.is_valid(content)
    assert not accepted(content)


@pytest.mark.parametrize("what", BAD_BEYOND_SCHEMA)
def test_the_code_refuses_what_a_schema_cannot_say(what: str) -> None:
    assert VALIDATOR.is_valid(BAD_BEYOND_SCHEMA[what])
    assert not accepted(BAD_BEYOND_SCHEMA[what])


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(prompts_schema())


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 4)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["123", 1, 2, 10**400])
)
_ANYTHING = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=7)
        | st.dictionaries(
            st.sampled_from(["frame", "id", "category", "box", "rle", "polygons", "size", "counts", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
_NUMBERS = st.lists(st.integers(-3, 9) | st.floats(), min_size=4, max_size=8)
_NEARLY_RIGHT = st.fixed_dictionaries(
    {},
    optional={
        "frame": st.integers(-1, 3) | _SCALARS,
        "id": st.integers(0, 3) | _SCALARS,
        "category": st.text(max_size=3) | _SCALARS,
        "box": _NUMBERS | _ANYTHING,
        "polygons": st.lists(_NUMBERS, max_size=2) | _ANYTHING,
        "rle": st.fixed_dictionaries(
            {
                "size": st.lists(st.integers(0, 4), min_size=2, max_size=2) | _ANYTHING,
                "counts": st.lists(st.integers(0, 9), max_size=5) | st.text("0123Pb", max_size=6) | _ANYTHING,
            }
        ),
    },
)


@given(
    st.fixed_dictionaries(
        {"version": st.just(1) | _SCALARS, "objects": st.lists(_NEARLY_RIGHT | _ANYTHING, max_size=4)},
        optional={"remove": st.lists(_ANYTHING, max_size=2) | _ANYTHING},
    )
    | _ANYTHING
)
def test_any_json_is_read_or_refused_in_one_line(content: Any) -> None:
    if accepted(content):
        assert VALIDATOR.is_valid(content)
        prompts = PromptSet.from_record(content)
        stored = json.loads(json.dumps(prompts.to_record()))
        assert PromptSet.from_record(stored) == prompts
        assert PromptSet.from_record(stored).to_record() == prompts.to_record()


def test_a_record_round_trip_keeps_everything() -> None:
    content = document(
        {"frame": 0, "id": 3, "category": "dog", "box": [1.5, 2.0, 3.0, 4.0]},
        {"frame": 0, "id": 1, "polygons": [[0.0, 0.0, 4.0, 0.0, 4.0, 4.0]]},
        {"frame": 7, "id": 3, "rle": {"size": [2, 3], "counts": "123"}},
        remove=[{"frame": 4, "id": 1}, {"frame": 9, "id": 3}],
    )
    prompts = PromptSet.from_record(content)
    assert prompts.to_record() == content
    assert prompts.frames == [0, 4, 7, 9]
    assert [e.object_id for e in prompts.at(0)] == [3, 1]
    assert prompts.at(1) == ()
    assert prompts.removals_at(4) == (1,)
    assert prompts.removals_at(5) == ()
    assert prompts.at(7) == (PromptObject(3, rle=(2, 3, "123")),)


def test_run_lengths_and_compressed_counts_are_the_same_prompt() -> None:
    mask = np.array([[0, 1, 1], [0, 1, 0]], np.bool_)
    compressed = mask_to_rle(mask)
    listed = document({"rle": {"size": [2, 3], "counts": [2, 3, 1]}})
    assert PromptSet.from_record(listed).at(0)[0].rle == (2, 3, compressed)
    np.testing.assert_array_equal(rle_to_mask(compressed, 2, 3), mask)


def test_objects_without_an_id_get_the_lowest_that_nobody_has() -> None:
    content = document(BOX, {**BOX, "id": 2}, BOX, {**BOX, "id": 1, "frame": 5}, {**BOX, "frame": 5})
    prompts = PromptSet.from_record(content)
    assert [e.object_id for e in prompts.at(0)] == [3, 2, 4]
    assert [e.object_id for e in prompts.at(5)] == [1, 5]


def test_a_set_without_objects_is_empty() -> None:
    assert PromptSet().is_empty()
    assert PromptSet.from_record(document(remove=[{"frame": 1, "id": 1}])).is_empty()
    assert not PromptSet.from_record(document(BOX)).is_empty()


# --- boxes on the command line -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,2,3,4", PromptObject(0, None, (1, 2, 3, 4))),
        ("1.5,-2,3e1,.4", PromptObject(0, None, (1.5, -2, 30, 0.4))),
        (" 1, 2 ,3,4", PromptObject(0, None, (1, 2, 3, 4))),
        ("1,2,3,4:7", PromptObject(7, None, (1, 2, 3, 4))),
        ("1,2,3,4:7:dog", PromptObject(7, "dog", (1, 2, 3, 4))),
        ("1,2,3,4::dog", PromptObject(0, "dog", (1, 2, 3, 4))),
        ("1,2,3,4:7:a:b, c", PromptObject(7, "a:b, c", (1, 2, 3, 4))),
        ("1,2,3,4:", PromptObject(0, None, (1, 2, 3, 4))),
        ("1,2,3,4:2147483647:", PromptObject(2147483647, None, (1, 2, 3, 4))),
    ],
)
def test_boxes_are_parsed(text: str, expected: Any) -> None:
    assert parse_box(text) == expected


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "is not x,y,w,h"),
        ("1,2,3", "needs four numbers"),
        ("1,2,3,4,5", "needs four numbers"),
        ("1,2,3,", "is not x,y,w,h"),
        ("1;2;3;4", "is not x,y,w,h"),
        ("1 2 3 4", "is not x,y,w,h"),
        ("a,b,c,d", "is not x,y,w,h"),
        ("1,2,0,4", "has no area"),
        ("1,2,3,-4", "has no area"),
        ("nan,2,3,4", "nan is not a number of pixels"),
        ("1,2,inf,4", "inf is not a number of pixels"),
        ("1,2,1e999,4", "inf is not a number of pixels"),
        ("1,2,3,4:0", "object id 0 is out of range; ids go from 1 to 2147483647"),
        ("1,2,3,4:-1", "object id -1 is out of range"),
        ("1,2,3,4:2147483648", "out of range"),
        ("1,2,3,4:" + "9" * 5000, "is not x,y,w,h"),
        ("1,2,3,4:1.5", "is not x,y,w,h"),
        ("1,2,3,4:dog", "is not x,y,w,h"),
        ("1,2,3,4:1:\udcff", "half a character"),
    ],
)
def test_boxes_of_another_form_are_refused(text: str, fault: str) -> None:
    with pytest.raises(PromptError, match=fault) as caught:
        parse_box(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


# --- mask pictures -------------------------------------------------------------------------------


def write(path: Path, values: Any, *arguments: Any, **more: Any) -> str:
    path.write_bytes(plain_png(np.asarray(values), *arguments, **more))
    return str(path)


def masks_of(prompts: PromptSet, frame: int = 0) -> dict[int, list[list[int]]]:
    found = {}
    for entry in prompts.at(frame):
        assert entry.rle is not None
        height, width, counts = entry.rle
        found[entry.object_id] = rle_to_mask(counts, height, width).astype(int).tolist()
    return found


def test_each_value_of_a_mask_picture_is_an_object(tmp_path: Path) -> None:
    found = load_mask_png(write(tmp_path / "m.png", [[0, 3, 3], [200, 0, 3]]))
    assert masks_of(found) == {3: [[0, 1, 1], [0, 0, 1]], 200: [[0, 0, 0], [1, 0, 0]]}
    found = load_mask_png(write(tmp_path / "m.png", [[0, 3], [60000, 0]], 16), frame=8)
    assert masks_of(found, 8) == {3: [[0, 1], [0, 0]], 60000: [[0, 0], [1, 0]]}
    palette = [(0, 0, 0), (9, 9, 9), (200, 0, 0)]
    found = load_mask_png(write(tmp_path / "m.png", [[2, 0], [1, 1]], 8, PALETTE, palette))
    assert masks_of(found) == {1: [[0, 0], [1, 1]], 2: [[1, 0], [0, 0]]}


@pytest.mark.parametrize(("full", "depth"), [(1, 1), (1, 8), (255, 8), (65535, 16), (255, 16)])
def test_a_binary_mask_is_object_one(tmp_path: Path, full: int, depth: int) -> None:
    found = load_mask_png(write(tmp_path / "m.png", [[0, full], [full, 0]], depth))
    assert masks_of(found) == {1: [[0, 1], [1, 0]]}


def test_255_beside_other_values_is_an_object_like_any(tmp_path: Path) -> None:
    found = load_mask_png(write(tmp_path / "m.png", [[0, 255], [1, 0]]))
    assert sorted(masks_of(found)) == [1, 255]


def test_soft_edges_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "m.png", [list(range(66))])
    with caplog.at_level(logging.WARNING):
        load_mask_png(path)
    assert "shows 65 objects, one per value; if it is one mask with soft edges" in caplog.text


def test_unusable_mask_pictures_are_named(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.png", [[0, 0]])
    with pytest.raises(PromptError, match=r"empty\.png shows no object: all its pixels are 0"):
        load_mask_png(empty)
    coloured = write(tmp_path / "c.png", [[[0, 0, 0], [1, 2, 3]]], 8, RGB)
    with pytest.raises(PromptError, match=r"c\.png is a coloured picture"):
        load_mask_png(coloured)
    (tmp_path / "t.png").write_text("no picture")
    with pytest.raises(PromptError, match=r"t\.png is not a PNG"):
        load_mask_png(str(tmp_path / "t.png"))
    with pytest.raises(PromptError, match=r"gone\.png cannot be read: No such file or directory"):
        load_mask_png(str(tmp_path / "gone.png"))
    with pytest.raises(PromptError, match="cannot be read: Is a directory"):
        load_mask_png(str(tmp_path))


# --- files ---------------------------------------------------------------------------------------


def test_prompts_files_are_read_from_paths_and_uris(tmp_path: Path) -> None:
    text = json.dumps(document(BOX))
    (tmp_path / "p.json").write_text(text)
    (tmp_path / "bom.json").write_text(text, "utf-8-sig")
    with fsspec.open("memory://prompt-files/p.json", "w") as file:
        file.write(text)
    expected = PromptSet.from_record(document(BOX))
    assert load_prompts(str(tmp_path / "p.json")) == expected
    assert load_prompts(str(tmp_path / "bom.json")) == expected
    assert load_prompts((tmp_path / "p.json").as_uri()) == expected
    assert load_prompts("memory://prompt-files/p.json") == expected


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe\xff", b"[" * 100_000, b'{"version": 1, "objects": [' + b"9" * 5000 + b"]}"],
    ids=["empty", "half", "bytes", "deep", "long"],
)
def test_what_is_no_json_is_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(PromptError, match=r"p\.json is not JSON: [^\n]+$"):
        load_prompts(str(tmp_path / "p.json"))


def test_deep_json_gets_a_short_message(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"version": 1, "objects": [' + "[" * 300 + "]" * 300 + "]}")
    with pytest.raises(PromptError, match=r"objects\[0\]: expected an object, not \[\[\[\.\.\.\]\]\]$"):
        load_prompts(str(tmp_path / "p.json"))


@pytest.mark.parametrize("path", ["gone.json", "nope://x/p.json", "s3://", "/proc/self/mem"])
def test_unreadable_files_are_named(path: Any) -> None:
    with pytest.raises(PromptError) as caught:
        load_prompts(path)
    assert str(caught.value).startswith(f"{path} cannot be read: ")
    assert "\n" not in str(caught.value)


# --- all together --------------------------------------------------------------------------------


def test_nothing_given_is_none() -> None:
    assert gather_prompts() is None
    assert gather_prompts(masks=[], files=[], boxes=[]) is None


def test_masks_files_and_boxes_are_gathered_in_this_order(tmp_path: Path) -> None:
    mask = write(tmp_path / "m.png", [[0, 2], [2, 4]])
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    first.write_text(json.dumps(document(BOX, {**BOX, "frame": 3}, remove=[{"frame": 8, "id": 2}])))
    second.write_text(
        json.dumps(document({**BOX, "id": 1}, {**BOX, "frame": 3, "id": 9}, remove=[{"frame": 8, "id": 4}]))
    )
    found = gather_prompts([mask], [str(first), str(second)], ["5,6,7,8", "5,6,7,8:3:cat"])
    assert found is not None
    # 5, 6 and 7 had no id of their own: ids that anybody asked for, before or after, are not for them.
    assert [e.object_id for e in found.at(0)] == [2, 4, 5, 1, 7, 3]
    assert [e.object_id for e in found.at(3)] == [6, 9]
    assert found.removals_at(8) == (2, 4)
    assert found.at(0)[-1] == PromptObject(3, "cat", (5, 6, 7, 8))


def test_an_id_given_twice_is_refused_wherever_it_comes_from(tmp_path: Path) -> None:
    mask = write(tmp_path / "m.png", [[0, 2]])
    with pytest.raises(PromptError, match="object id 2 is given twice on frame 0: use each id once"):
        gather_prompts(masks=[mask], boxes=["1,2,3,4:2"])
    with pytest.raises(PromptError, match="object id 2 is given twice"):
        gather_prompts(masks=[mask, mask])
    (tmp_path / "p.json").write_text(json.dumps(document({**BOX, "id": 5}, {**BOX, "id": 5})))
    with pytest.raises(PromptError, match=r"p\.json: object id 5 is given twice on frame 0"):
        gather_prompts(files=[str(tmp_path / "p.json")])


def test_files_that_only_remove_are_kept_for_going_on(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(document(remove=[{"frame": 8, "id": 2}])))
    found = gather_prompts(files=[str(tmp_path / "p.json")])
    assert found is not None
    assert found.removals_at(8) == (2,)


def test_a_mask_picture_written_by_opencv_is_read(tmp_path: Path) -> None:
    values = np.zeros((40, 50), np.uint8)
    cv2.circle(values, (20, 20), 9, 3, -1)
    cv2.imwrite(str(tmp_path / "m.png"), values)
    assert masks_of(load_mask_png(str(tmp_path / "m.png"))) == {3: (values == 3).astype(int).tolist()}


def test_a_store_that_does_not_answer_is_no_fault_of_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reset(self: object, *args: Any) -> None:
        raise ConnectionResetError("cut off by key:secret@host")

    monkeypatch.setattr("pipeline.storage.locations.Location.read_bytes", reset)
    for load in (load_prompts, load_mask_png):
        with pytest.raises(SourceError, match=r"a\.json: reading failed .*try again"):
            load(str(tmp_path / "a.json"))


# --- arrays --------------------------------------------------------------------------------------


def drawn(*pixels: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((4, 6), bool)
    for row, column in pixels:
        mask[row, column] = True
    return mask


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_masks_are_prompts(dtype: Any) -> None:
    one, two = drawn((0, 0), (3, 5)), drawn((1, 2))
    given: dict[Any, Any] = {
        0: {7: one.astype(dtype)},
        np.int64(9): {np.int64(7): two.astype(dtype), 2: one.tolist()},
    }
    prompts = PromptSet.from_masks(given, {7: "ball"})
    expected = [(0, 7, "ball", one), (9, 7, "ball", two), (9, 2, None, one)]
    found = [
        (frame, e.object_id, e.category, rle_to_mask(e.rle[2], *e.rle[:2]))
        for frame in prompts.frames
        for e in prompts.at(frame)
        if e.rle is not None
    ]
    assert [f[:3] for f in found] == [e[:3] for e in expected]
    assert all(np.array_equal(f[3], e[3]) for f, e in zip(found, expected, strict=True))
    assert accepted(prompts.to_record())
    assert PromptSet.from_record(prompts.to_record()) == prompts


@pytest.mark.parametrize(
    ("masks", "complaint"),
    [
        ({0: {1: drawn()}}, "frame 0: object 1: its mask is empty"),
        ({0: {1: drawn((0, 0))[None]}}, r"frame 0: object 1: mask has shape \(1, 4, 6\)"),
        ({0: {1: np.zeros((0, 6), bool)}}, r"mask has shape \(0, 6\)"),
        ({0: {1: drawn((0, 0)) * 255}}, "mask holds 255"),
        ({0: {1: drawn((0, 0)) * 0.5}}, "mask holds 0.5"),
        ({0: {1: np.full((4, 6), "x")}}, "mask holds 'x'"),
        ({0: {0: drawn((0, 0))}}, "object id 0 is out of range"),
        ({-1: {1: drawn((0, 0))}}, "frame -1 is not a frame number"),
    ],
)
def test_masks_that_are_none_are_refused(masks: Any, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        PromptSet.from_masks(masks)


def test_categories_of_masks_are_texts() -> None:
    three: Any = 3
    with pytest.raises(PromptError, match="frame 0: object 1: category 3 is not a text"):
        PromptSet.from_masks({0: {1: drawn((0, 0))}}, {1: three})
