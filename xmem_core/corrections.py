"""Corrections: which existing masks a prompt contradicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

# An object is contradicted if more than this share of its mask belongs to something else.
_MOST = 0.5
# Masks smaller than this share of the prompt's mask are ignored: fragments and nearly hidden objects.
_LEAST = 0.25


def contradicted(shown: Tensor, object_ids: Sequence[int], given: Mapping[int, Tensor]) -> list[int]:
    """Objects whose masks a prompt contradicts.

    An object without a mask in the prompt is contradicted if most of its mask lies on one prompted mask and
    is not small compared with it. A prompted object is contradicted if most of its previous mask, unless
    small, lies outside its prompted mask.

    Args:
        shown: (O + 1, H, W), the tracker's result for the frame without the prompt, background first.
        object_ids: ids of the O objects.
        given: the prompt's masks, (H, W) bool, which do not overlap.
    """
    best = shown.amax(0)
    # As `argmax` would give it, which takes many times as long on a CPU: of equal values the first counts.
    taken = shown[0] == best
    wrong = []
    for k, i in enumerate(object_ids):
        own = (shown[k + 1] == best) & ~taken
        taken |= own
        others = [~given[i]] if i in given else list(given.values())
        sizes = [given[i]] if i in given else others
        on = [int((own & other).sum()) for other in others]
        area = int(own.sum())
        if any(n > _MOST * area and n >= _LEAST * int(size.sum()) for n, size in zip(on, sizes, strict=True)):
            wrong.append(i)
    return wrong
