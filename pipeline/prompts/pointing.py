"""Objects that are pointed at on the command line: clicks on frames, made into masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.base.errors import PromptError
from pipeline.base.picture_size import MAX_PIXELS
from pipeline.prompts import values as check
from pipeline.prompts.click_segmenters import load_click_segmenter, segment_clicks
from pipeline.prompts.clicks import Click
from pipeline.prompts.files import PromptObject, PromptSet
from pipeline.tracks.masks import mask_to_rle
from pipeline.video.random_access import FrameAccess
from pipeline.video.sources import open_source


@dataclass(frozen=True)
class Pointed:
    """A click on a frame; object 0 is one without an id."""

    frame: int
    click: Click
    object_id: int
    category: str | None


def parse_click(text: str, positive: bool = True) -> Pointed:
    """Parse `frame,x,y[:id[:category]]`, in pixels; PromptError if the text has another form."""
    where = f"click {check.short(text)}"
    numbers, _, rest = text.partition(":")
    id_text, _, category = rest.partition(":")
    parts = numbers.split(",")
    if len(parts) != 3 or not all(part.isascii() and part.strip().isdigit() for part in parts):
        raise PromptError(
            f"{where} is not frame,x,y[:id[:category]] in pixels, for instance 0,320,180:1:person"
        )
    if id_text and not (id_text.isascii() and id_text.isdigit()):
        raise PromptError(f"{where}: id {check.short(id_text)} is not a whole number")
    frame, x, y = (int(part) for part in parts)
    object_id = check.object_id(int(id_text), where) if id_text else 0
    return Pointed(
        check.frame_number(frame, where),
        Click(x, y, positive),
        object_id,
        check.category(category or None, where),
    )


def add_clicks(
    prompts: PromptSet | None,
    video: str,
    at: Sequence[str],
    not_at: Sequence[str] = (),
    *,
    segmenter: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> PromptSet:
    """Add the masks of clicks to prompts.

    Args:
        prompts: those that there are; None: none.
        video: its path or URI.
        at: `frame,x,y[:id[:category]]`, on the object. Clicks of one id on one frame add up; each without an
            id is an object of its own, with the lowest free id.
        not_at: `frame,x,y[:id]`, beside the object; without an id, beside the only one on that frame.
        segmenter: name, see `load_click_segmenter`.
        storage_options: of the video's file system.
        max_pixels: larger pictures are not decoded.

    Raises:
        PromptError: a click has another form or lies outside its frame, a click beside an object fits none,
            or the mask of an object is empty. UsageError: there is no such frame. SourceError: the video
            cannot be read.
    """
    known = prompts or PromptSet()
    clicks, categories = _grouped([parse_click(text) for text in at], known)
    for text in not_at:
        pointed = parse_click(text, positive=False)
        there = [key for key in clicks if key[0] == pointed.frame]
        chosen = [key for key in there if pointed.object_id in (0, key[1])]
        if len(chosen) != 1:
            raise PromptError(
                f"click {text!r} takes away from {'several objects' if chosen else 'no object'} on frame "
                f"{pointed.frame}: give frame,x,y:id of one that --at points at there"
            )
        clicks[chosen[0]].append(pointed.click)
    model = load_click_segmenter(segmenter)
    objects = dict(known.objects)
    source = open_source(video, storage_options=storage_options, max_pixels=max_pixels)
    with FrameAccess(source) as frames:
        for (frame, object_id), made in sorted(clicks.items()):
            try:
                mask = segment_clicks(model, frames.at(frame).image, made)
            except PromptError as error:
                raise PromptError(f"object {object_id} on frame {frame}: {error}") from None
            if not mask.any():
                raise PromptError(f"object {object_id} on frame {frame}: its clicks give an empty mask")
            rle = (*mask.shape, mask_to_rle(mask))
            entry = PromptObject(object_id, categories.get(object_id), rle=rle)
            objects[frame] = (*objects.get(frame, ()), entry)
    return PromptSet(objects, known.removals)


def _grouped(
    given: Sequence[Pointed], known: PromptSet
) -> tuple[dict[tuple[int, int], list[Click]], dict[int, str]]:
    """Clicks by frame and object, and categories by object."""
    used = known.object_ids | {pointed.object_id for pointed in given}
    clicks: dict[tuple[int, int], list[Click]] = {}
    categories: dict[int, str] = {}
    for pointed in given:
        object_id = pointed.object_id
        if not object_id:
            object_id = next(i for i in range(1, len(used) + 2) if i not in used)
            used.add(object_id)
        clicks.setdefault((pointed.frame, object_id), []).append(pointed.click)
        if pointed.category is not None:
            categories[object_id] = pointed.category
    return clicks, categories
