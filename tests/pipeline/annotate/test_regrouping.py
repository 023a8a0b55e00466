"""Merging and splitting of objects."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.annotate.document import Document
from pipeline.annotate.regrouping import merge, split
from pipeline.base.errors import UsageError
from pipeline.tracks.masks import rle_to_mask

FIRST = {"op": "prompt", "frame": 2, "object": {"id": 1, "box": [0, 0, 4, 4]}}
SECOND = {"op": "prompt", "frame": 8, "object": {"id": 2, "box": [4, 4, 4, 4]}}


def mask(columns: slice) -> NDArray[np.bool_]:
    found = np.zeros((8, 8), np.bool_)
    found[:, columns] = True
    return found


def unseen(frame: int, object_id: int) -> None:
    return None


def document(*more: dict[str, object]) -> Document:
    objects = [{"op": "object", "id": 1, "category": "dog"}, {"op": "object", "id": 2}]
    return Document().changed([*objects, FIRST, SECOND, *more])


def test_merge_joins_what_was_lost_and_found_again() -> None:
    before = document({"op": "remove", "frame": 5, "id": 1}, {"op": "remove", "frame": 20, "id": 2})
    after = before.changed(merge(before, 1, 2, unseen))
    assert list(after.objects) == [1]
    assert {f: list(by_id) for f, by_id in after.prompts.items()} == {2: [1], 8: [1]}
    assert after.prompts[8][1].box == (4, 4, 4, 4)
    assert after.removals == {5: (1,), 20: (1,)}


def test_merge_unites_masks_where_both_are_tracked() -> None:
    before = document({"op": "remove", "frame": 20, "id": 2})
    parts = {1: mask(slice(0, 2)), 2: mask(slice(5, 8))}
    after = before.changed(merge(before, 1, 2, lambda frame, i: parts[i] if frame >= 2 * i * i else None))
    rle = after.prompts[8][1].rle
    assert rle is not None
    assert (rle_to_mask(rle[2], 8, 8) == parts[1] | parts[2]).all()
    assert after.prompts[2][1].box == (0, 0, 4, 4)
    assert not after.removals  # object 1 goes on


def test_split_moves_what_follows_to_a_new_id_and_merging_undoes_it() -> None:
    correction = {"op": "prompt", "frame": 9, "object": {"id": 1, "box": [1, 1, 3, 3]}}
    before = document(correction, {"op": "remove", "frame": 12, "id": 1})
    after = before.changed(split(before, 1, 6, lambda frame, i: mask(slice(0, 3))))
    assert after.objects[3].category == "dog"
    assert {f: list(by_id) for f, by_id in after.prompts.items()} == {2: [1], 6: [3], 8: [2], 9: [3]}
    assert after.removals == {6: (1,), 12: (3,)}
    shown = mask(slice(0, 3))
    again = after.changed(merge(after, 1, 3, lambda frame, i: shown if (i, frame) == (3, 6) else None))
    assert {f for f, by_id in again.prompts.items() if 1 in by_id} == {2, 6, 9}
    assert again.removals == {12: (1,)}


def test_split_of_an_object_that_is_tracked_backward() -> None:
    before = document()
    after = before.changed(split(before, 2, 9, lambda frame, i: mask(slice(0, 3)), backward=True))
    assert {f: list(by_id) for f, by_id in after.prompts.items()} == {2: [1], 8: [2], 9: [3]}
    assert after.removals == {8: (3,), 9: (2,)}  # object 3 ends backward there
    early = before.changed(split(before, 2, 5, lambda frame, i: mask(slice(0, 3)), backward=True))
    assert {f: list(by_id) for f, by_id in early.prompts.items()} == {2: [1], 4: [2], 8: [3]}
    assert early.removals == {4: (3,), 5: (2,)}
    with pytest.raises(UsageError, match="does not exist before frame 5"):
        split(before, 2, 5, unseen, backward=True)


def test_what_cannot_be_merged_or_split() -> None:
    before = document()
    locked = before.changed([{"op": "object", "id": 2, "locked": True}])
    with pytest.raises(UsageError, match="itself"):
        merge(before, 1, 1, unseen)
    with pytest.raises(UsageError, match="no object 9"):
        merge(before, 1, 9, unseen)
    with pytest.raises(UsageError, match="locked"):
        merge(locked, 1, 2, unseen)
    with pytest.raises(UsageError, match="does not exist before frame 2"):
        split(before, 1, 2, unseen)
    with pytest.raises(UsageError, match="not seen on frame 6"):
        split(before, 1, 6, unseen)
