"""The log of edits: durable, undone and redone, and safe from a second annotator."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.annotate.document import Document
from pipeline.annotate.project import Project
from pipeline.base.errors import AnotherWriterError, PromptError, StoreError, UsageError
from pipeline.storage.opening import open_files

OBJECT = {"op": "object", "id": 3, "category": "dog"}
BOX = {"op": "prompt", "frame": 5, "object": {"id": 3, "box": [1, 2, 30, 40]}}


def project(folder: Path) -> Project:
    return Project(open_files(str(folder)), "v", Document())


def test_edits_are_there_again_with_their_history(tmp_path: Path) -> None:
    first = project(tmp_path)
    first.edit([OBJECT])
    first.edit([BOX])
    first.edit([{"op": "remove", "frame": 9, "id": 3}])
    first.undo()
    first.undo()
    first.redo()
    again = project(tmp_path)
    assert again.document == first.document
    assert (again.edits, again.can_undo, again.can_redo) == (6, True, True)
    assert again.document.prompt_set().at(5)[0].category == "dog"
    assert again.redo().removals == {9: (3,)}
    again.undo()
    again.edit([{"op": "object", "id": 3, "hidden": True}])
    assert not again.can_redo
    with pytest.raises(UsageError, match="nothing to redo"):
        again.redo()
    for _ in range(3):
        again.undo()
    assert again.document == Document()
    with pytest.raises(UsageError, match="nothing to undo"):
        again.undo()


def test_an_edit_that_changes_nothing_is_not_stored(tmp_path: Path) -> None:
    own = project(tmp_path)
    own.edit([OBJECT])
    own.edit([OBJECT])
    assert own.edits == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"op": "prompt", "frame": 0, "object": {"id": 8, "box": [1, 1, 2, 2]}}, "no object 8"),
        ({"op": "prompt", "frame": 0, "object": {"id": 3, "box": [1, 1, 0, 2]}}, "no area"),
        ({"op": "prompt", "frame": 0, "object": {"id": 3}}, "exactly one"),
        ({"op": "prompt", "frame": -1, "object": {"id": 3, "box": [1, 1, 2, 2]}}, "frame number"),
        ({"op": "unprompt", "frame": 0, "id": 3}, "no prompt on frame 0"),
        ({"op": "object", "id": 3, "colour": "red"}, "#rrggbb"),
        ({"op": "object", "id": 0}, "out of range"),
        ({"op": "object", "id": 3, "size": 1}, "has no 'size'"),
        ({"op": "rename", "id": 3}, "'rename' is not known"),
        ({"op": "memory", "frame": 9, "edit": {"forget": [3, 2]}}, "the first frame is after the last"),
        ({"op": "memory", "frame": 9, "edit": {"forget": [9, 12]}}, "not remembered before frame 9"),
        ({"op": "memory", "frame": 9, "edit": {"forget": [1, 2], "object": 7}}, "no object 7"),
        ({"op": "memory", "frame": 9, "edit": {"erase": 3}}, "forget, pin, unpin"),
        ({"op": "unmemory", "frame": 9, "number": 0}, "no edit 0"),
        ({"op": "settings", "values": {"mem_every": True}}, "whole number"),
        ({"op": "settings", "values": {"search_window": 0}}, "cannot be changed"),
        ({"op": "delete", "id": 3, "frame": 1}, "unexpected keyword"),
    ],
)
def test_a_wrong_edit_is_refused_and_leaves_nothing(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    own = project(tmp_path)
    own.edit([OBJECT])
    with pytest.raises((UsageError, PromptError), match=said):
        own.edit([{"op": "object", "id": 4}, change])
    assert list(own.document.objects) == [3]
    assert project(tmp_path).edits == 1


def test_locked_objects_keep_their_prompts(tmp_path: Path) -> None:
    own = project(tmp_path)
    own.edit([OBJECT, BOX, {"op": "object", "id": 3, "locked": True}])
    with pytest.raises(UsageError, match="locked"):
        own.edit([BOX])
    own.edit([{"op": "object", "id": 3, "locked": False}])
    own.edit([{"op": "delete", "id": 3}])
    assert own.document == Document()


def test_the_second_annotator_is_refused(tmp_path: Path) -> None:
    one, other = project(tmp_path), project(tmp_path)
    one.edit([OBJECT])
    with pytest.raises(AnotherWriterError, match="another annotator"):
        other.edit([OBJECT])
    assert other.document == Document()


def test_missing_and_damaged_edits_are_named(tmp_path: Path) -> None:
    own = project(tmp_path)
    own.edit([OBJECT])
    own.edit([BOX])
    file = tmp_path / "annotate" / "v" / "edits" / "000000000001.json"
    text = file.read_text()
    file.write_text(text[:-9])
    with pytest.raises(StoreError, match=r"000000000001\.json is damaged"):
        project(tmp_path)
    file.unlink()
    with pytest.raises(StoreError, match=r"000000000001\.json is missing"):
        project(tmp_path)
