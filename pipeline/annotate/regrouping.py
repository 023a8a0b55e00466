"""Merging and splitting objects: edits of a document that move masks from one object id to another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.annotate.document import Change, Document
from pipeline.base.errors import UsageError
from pipeline.prompts.files import PromptObject
from pipeline.tracks.masks import mask_to_rle

MaskAt = Callable[[int, int], NDArray[np.bool_] | None]
"""The mask of an object on a frame, of its prompt or tracked: (frame, id) to H x W, or None."""


def merge(document: Document, into: int, other: int, mask_at: MaskAt) -> list[Change]:
    """The changes that make one object of two: `other` becomes a part of `into` and is deleted.

    Where one of them is prompted, the merged object is given the union of both masks on that frame. It is
    removed where neither is tracked any longer.

    Raises:
        UsageError: there is no such object, it is locked, or both are the same.
    """
    if into == other:
        raise UsageError(f"object {into} cannot be merged with itself: choose another one")
    for object_id in (into, other):
        _changeable(document, object_id)
    changes: list[Change] = []
    ends: set[int] = set()
    for frame in sorted(_frames(document, into) | _frames(document, other)):
        prompted = [i for i in (into, other) if i in document.prompts.get(frame, {})]
        if prompted:
            if len(prompted) == 1:
                entry = document.prompts[frame][prompted[0]]
                rest = mask_at(frame, other if prompted == [into] else into)
                if rest is None or not rest.any():
                    if prompted == [other]:
                        changes.append(_prompt(frame, into, entry))
                    continue
            masks = [mask for i in (into, other) if (mask := mask_at(frame, i)) is not None]
            changes.append(_mask_prompt(frame, into, np.logical_or.reduce(masks)))
        elif not (_is_alive(document, into, frame) or _is_alive(document, other, frame)):
            ends.add(frame)
    own = {frame for frame, ids in document.removals.items() if into in ids}
    changes.append({"op": "delete", "id": other})
    changes += [{"op": "keep", "frame": frame, "id": into} for frame in sorted(own - ends)]
    changes += [{"op": "remove", "frame": frame, "id": into} for frame in sorted(ends - own)]
    return changes


def split(
    document: Document, object_id: int, frame: int, mask_at: MaskAt, *, backward: bool = False
) -> list[Change]:
    """The changes that give an object a new id, `document.next_id`, from a frame on.

    The object ends there. The new one starts with its mask on that frame, or with its next prompt if it is
    out of sight; prompts and ends from the frame on are moved to it.

    Args:
        backward: whether objects are also tracked backward. The new one then ends, backward, on the frame
            before; and the old one, if it is prompted from the frame on only, with its mask on that frame.

    Raises:
        UsageError: there is no such object, it is locked, it does not exist before the frame or from it on.
    """
    _changeable(document, object_id)
    frames = _frames(document, object_id)
    new = document.next_id
    known = document.objects[object_id]
    changes: list[Change] = [{"op": "object", "id": new, "category": known.category}]
    if not any(f < frame and object_id in document.prompts.get(f, {}) for f in frames):
        before = mask_at(frame - 1, object_id) if backward and frame else None
        if before is None or not before.any():
            raise UsageError(
                f"object {object_id} does not exist before frame {frame}: split it on a later frame"
            )
        changes.append(_mask_prompt(frame - 1, object_id, before))
    if backward:
        changes.append({"op": "remove", "frame": frame - 1, "id": new})
    begins = False
    if object_id not in document.prompts.get(frame, {}) and _is_alive(document, object_id, frame):
        mask = mask_at(frame, object_id)
        if mask is not None and mask.any():
            changes.append(_mask_prompt(frame, new, mask))
            begins = True
    for f in sorted(f for f in frames if f >= frame):
        if (entry := document.prompts.get(f, {}).get(object_id)) is not None:
            changes += [_prompt(f, new, entry), {"op": "unprompt", "frame": f, "id": object_id}]
            begins = True
        if object_id in document.removals.get(f, ()):
            changes.append({"op": "keep", "frame": f, "id": object_id})
            if begins:
                changes.append({"op": "remove", "frame": f, "id": new})
    if not begins:
        raise UsageError(
            f"object {object_id} is not seen on frame {frame} and has no later prompt: split it where it is "
            "seen, or propagate first"
        )
    changes.append({"op": "remove", "frame": frame, "id": object_id})
    return changes


def _changeable(document: Document, object_id: int) -> None:
    known = document.objects.get(object_id)
    if known is None:
        raise UsageError(f"there is no object {object_id}")
    if known.locked:
        raise UsageError(f"object {object_id} is locked: unlock it to change it")


def _frames(document: Document, object_id: int) -> set[int]:
    """The frames on which an object is prompted or removed."""
    return {f for f, by_id in document.prompts.items() if object_id in by_id} | {
        f for f, ids in document.removals.items() if object_id in ids
    }


def _is_alive(document: Document, object_id: int, frame: int) -> bool:
    """Whether an object is tracked on a frame: it was prompted, and not removed since."""
    last = max((f for f in _frames(document, object_id) if f <= frame), default=None)
    return last is not None and object_id in document.prompts.get(last, {})


def _prompt(frame: int, object_id: int, entry: PromptObject) -> Change:
    given: dict[str, Any] = {**entry.to_json(), "id": object_id}
    return {"op": "prompt", "frame": frame, "object": given}


def _mask_prompt(frame: int, object_id: int, mask: NDArray[np.bool_]) -> Change:
    rle = {"size": list(mask.shape), "counts": mask_to_rle(mask)}
    return {"op": "prompt", "frame": frame, "object": {"id": object_id, "rle": rle}}
