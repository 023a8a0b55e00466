"""Contacts: objects that met, and which of them is which after they parted.

Where two people pass each other, their masks may be exchanged, and while they are close, position and
movement do not tell. Their colours do, once both are seen alone again: those before the contact are compared
with those after it, over several looks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from pipeline.detect.lifecycle.appearance import Colours, blended, similarity
from pipeline.detect.lifecycle.association import Shown, distance
from pipeline.detect.lifecycle.found_object import FoundObject, overlap, smaller_area
from pipeline.prompts.box_segmenters import Box

# Two objects meet when their masks' boxes overlap by this share of the smaller one.
_TOUCH = 0.15
# Views of an object alone, before the contact and after it, from which its colours are compared.
_VIEWS = 3
# Views after which an object no longer waits for views of those it met.
_ENOUGH = 8
# Two objects were exchanged if their similarities, added up, are larger by this much the other way round.
# Between pairs of people, right minus wrong sums are below -0.07 in one of 200 cases, at the median 0.5.
_MARGIN = 0.1
# A new object is one that was lost if their colours are this much alike, the other candidates' less by
# _CLEAR, and the way between the two places is at most this many sizes, and one more for so many frames.
_SAME, _CLEAR, _WAY, _FRAMES = 0.88, 0.03, 0.7, 10
# Share that a new view has in the colours of an object.
_NEW = 0.2


def meetings(shown: Mapping[int, Shown]) -> Iterator[tuple[int, int]]:
    """Pairs of objects whose masks' boxes overlap."""
    ids = sorted(shown)
    for at, one in enumerate(ids):
        for other in ids[at + 1 :]:
            a, b = shown[one].box, shown[other].box
            if overlap(a, b) >= _TOUCH * smaller_area(a, b):
                yield one, other


def after_meeting(found: FoundObject, other: int) -> FoundObject:
    """An object that meets another one now: what it looks like is to be seen anew."""
    before = found.before if found.met else (found.box, found.frame)
    met = tuple(sorted({*found.met, other}))
    return replace(found, met=met, since=None, since_views=0, before=before)


def after_view(found: FoundObject, colours: Colours) -> FoundObject:
    """An object after a look that showed it alone, with these colours."""
    if found.met:
        views = found.since_views + 1
        return replace(found, since=_mixed(found.since, colours, 1 / views), since_views=views)
    views = found.views + 1
    return replace(found, portrait=_mixed(found.portrait, colours, max(_NEW, 1 / views)), views=views)


def settled(found: FoundObject) -> FoundObject:
    """An object of which it is known which one it is: what it looks like now is added to its colours."""
    portrait, views = found.portrait, found.views + found.since_views
    if found.since is not None:
        portrait = _mixed(portrait, found.since, max(_NEW, found.since_views / views))
    return replace(found, portrait=portrait, views=views, met=(), since=None, since_views=0, before=None)


def moved_to(found: FoundObject, other: FoundObject, *, visible: bool) -> FoundObject:
    """An object that is where another one was taken to be; views of it there, if visible, are its own."""
    if not visible:
        other = replace(other, since=None, since_views=0)
    return settled(
        replace(
            other,
            category=found.category,
            colours=found.colours,
            hits=max(found.hits, other.hits),
            portrait=found.portrait,
            views=found.views,
            born=found.born,
        )
    )


def parted(
    objects: Mapping[int, FoundObject], visible: Collection[int], agreed: Collection[int]
) -> tuple[list[tuple[int, int]], list[int]]:
    """Which objects were exchanged, and of which it is known that they were not.

    Args:
        objects: the objects, those without a mask and those no longer tracked included.
        visible: ids of those that have a mask.
        agreed: ids of those whose mask is where they were detected.

    Returns:
        pairs of objects to exchange, the first of which has a mask; and the ids of the others that have been
        compared with all that they met.
    """
    ready = [i for i in sorted(agreed) if objects[i].met and objects[i].since_views >= _VIEWS]
    gains = []
    for one in ready:
        for other in objects[one].met:
            if other in objects and (other not in visible or (other in ready and other > one)):
                gains.append((_gain(objects[one], objects[other], other in visible), one, other))
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    for gain, one, other in sorted(gains, key=lambda g: (-g[0], g[1:])):
        if gain > _MARGIN and not {one, other} & taken:
            pairs.append((one, other))
            taken |= {one, other}
    known = []
    for one in ready:
        waits = [j for j in objects[one].met if j in visible and j not in ready and j not in taken]
        if one not in taken and (not waits or objects[one].since_views >= _ENOUGH):
            known.append(one)
    return pairs, known


def lost_before(
    objects: Mapping[int, FoundObject],
    among: Collection[int],
    agreed: Collection[int],
    candidates: Collection[Box],
    frame_index: int,
    long: int,
) -> list[tuple[int, int]]:
    """New objects that are old ones, found again.

    While something else that may be the lost one was not seen well enough, the answer waits, for as many
    views again as it takes.

    Args:
        objects, agreed: as for `parted`.
        among: ids of the lost objects that may be meant.
        candidates: where something was detected that may become an object.
        frame_index: the current frame.
        long: frames after which an object was lost for too long.

    Returns:
        pairs of a new object and the lost one that it is.
    """
    found: list[tuple[float, int, int]] = []
    unknown: set[int] = set()  # lost objects that may be something that was not seen well yet
    for new, one in objects.items():
        if one.met or one.born is None or one.views > _ENOUGH or new in among:
            continue
        for old in among:
            lost = objects[old]
            if old >= new or lost.portrait is None or lost.views < _VIEWS:
                continue
            box, frame = one.born
            soon = lost.frame < frame <= lost.seen + long
            if soon and _may_be_at(lost, box, frame) and lost.category in (None, one.category):
                if one.portrait is None or one.views < _VIEWS:
                    unknown.add(old)
                else:
                    found.append((similarity(lost.portrait, one.portrait), new, old))
    unknown.update(
        old for old in among if any(_may_be_at(objects[old], box, frame_index) for box in candidates)
    )
    pairs = []
    for alike, new, old in sorted(found, key=lambda f: (-f[0], f[1:])):
        others = [a for a, n, o in found if (n == new) != (o == old)]
        waits = old in unknown and objects[new].views < 2 * _VIEWS
        if new in agreed and alike >= _SAME and not waits and all(a < alike - _CLEAR for a in others):
            pairs.append((new, old))
    return pairs


def _may_be_at(lost: FoundObject, box: Box, frame: int) -> bool:
    """Whether a lost object may have come to a box by a frame."""
    return distance(lost.box, box) <= _WAY + (frame - lost.frame) / _FRAMES


def _gain(one: FoundObject, other: FoundObject, both: bool) -> float:
    """By how much the colours agree better if two objects are exchanged; 0 if that can't be told."""
    if one.since is None or one.portrait is None or other.portrait is None:
        return 0.0
    if min(one.views, other.views) < _VIEWS:
        return 0.0
    gain = similarity(other.portrait, one.since) - similarity(one.portrait, one.since)
    if both:
        if other.since is None:
            return 0.0
        gain += similarity(one.portrait, other.since) - similarity(other.portrait, other.since)
    return gain


def _mixed(old: Colours | None, new: Colours, share: float) -> Colours:
    """Like `blended`, in few digits: snapshots hold the colours of all objects."""
    return tuple(round(value, 4) for value in (new if old is None else blended(old, new, share)))
