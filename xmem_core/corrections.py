"""Corrections: what a prompt implies about the masks that were there before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

# An object whose mask lies by more than this share on what is something else was on the wrong thing.
_MOST = 0.5
# But for masks so much smaller than the one given: crumbs, and what is seen of somebody nearly hidden.
_LEAST = 0.25


def contradicted(shown: Tensor, object_ids: Sequence[int], given: Mapping[int, Tensor]) -> list[int]:
    """The objects that a prompt says were on something else.

    For one that is not given, that is where most of its mask lies on one given mask, and is not small beside
    that; for one that is given, where most of its mask, not small either, lies outside of the given one.

    Args:
        shown: (O + 1, H, W), what the tracker made of the frame without the prompt, the background first.
        object_ids: the O objects.
        given: the prompt's masks, (H, W) bool; they don't overlap.
    """
    labels = shown.argmax(0)
    wrong = []
    for k, i in enumerate(object_ids):
        own = labels == k + 1
        others = [~given[i]] if i in given else list(given.values())
        sizes = [given[i]] if i in given else others
        on = [int((own & other).sum()) for other in others]
        area = int(own.sum())
        if any(n > _MOST * area and n >= _LEAST * int(size.sum()) for n, size in zip(on, sizes, strict=True)):
            wrong.append(i)
    return wrong
