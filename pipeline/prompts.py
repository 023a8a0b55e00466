"""What to track: masks, polygons and boxes at any frame, read from files and the command line.

Everything is checked when read, except what needs the frame: sizes, and boxes, which become masks on their
frame (`resolve`).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files as resource_files
from typing import Any

import cv2
import fsspec
import numpy as np
from numpy.typing import NDArray

from pipeline.boxes import Box, BoxSegmenter, inscribed_ellipse
from pipeline.errors import PromptError
from pipeline.index_png import decode_index_png
from pipeline.masks import MAX_OBJECT_ID, mask_to_rle, rle_to_mask
from pipeline.records import Frame

logger = logging.getLogger(__name__)

_KINDS = ("box", "rle", "polygons")
_OBJECT_KEYS = {"frame", "id", "category", *_KINDS}


@dataclass(frozen=True)
class PromptObject:
    """One object on one frame, given in exactly one way.

    Args:
        object_id: 1 .. 2^31 - 1.
        category: free text, or None.
        box: x, y, width, height in pixels.
        polygons: each x1, y1, x2, y2, ... in pixels; the object is their union.
        rle: (height, width, COCO compressed counts).
    """

    object_id: int
    category: str | None = None
    box: tuple[float, float, float, float] | None = None
    polygons: tuple[tuple[float, ...], ...] | None = None
    rle: tuple[int, int, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """As an entry of a prompts file, without its frame."""
        entry: dict[str, Any] = {"id": self.object_id}
        if self.category is not None:
            entry["category"] = self.category
        if self.box is not None:
            entry["box"] = list(self.box)
        if self.polygons is not None:
            entry["polygons"] = [list(p) for p in self.polygons]
        if self.rle is not None:
            entry["rle"] = {"size": list(self.rle[:2]), "counts": self.rle[2]}
        return entry


@dataclass(frozen=True)
class PromptSet:
    """All prompts of one stream, by frame.

    Raises:
        PromptError: an id is given twice on one frame.
    """

    objects: Mapping[int, tuple[PromptObject, ...]] = field(default_factory=dict)
    removals: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for frame, entries in self.objects.items():
            ids = [e.object_id for e in entries]
            twice = sorted({i for i in ids if ids.count(i) > 1})
            if twice:
                raise PromptError(f"object id {twice[0]} is given twice on frame {frame}: use each id once")

    @property
    def frames(self) -> list[int]:
        """The frames that have objects or removals, in order."""
        return sorted({*self.objects, *self.removals})

    def is_empty(self) -> bool:
        """Whether nothing is ever tracked."""
        return not any(self.objects.values())

    def at(self, frame_index: int) -> tuple[PromptObject, ...]:
        """The objects given on a frame, in order."""
        return self.objects.get(frame_index, ())

    def removals_at(self, frame_index: int) -> tuple[int, ...]:
        """The ids to stop tracking from a frame on."""
        return self.removals.get(frame_index, ())

    def to_record(self) -> dict[str, Any]:
        """The prompts as the content of a prompts file; equal prompts give equal dicts."""
        record: dict[str, Any] = {
            "version": 1,
            "objects": [{"frame": f, **e.to_json()} for f in sorted(self.objects) for e in self.objects[f]],
        }
        if self.removals:
            record["remove"] = [
                {"frame": f, "id": i} for f in sorted(self.removals) for i in self.removals[f]
            ]
        return record

    @classmethod
    def from_record(cls, record: Any, name: str = "prompts") -> PromptSet:
        """Prompts from the content of a prompts file, checked.

        Raises:
            PromptError: names the entry, its fault and what is allowed.
        """
        return _parse(record, name, taken=set())


@dataclass(frozen=True)
class ResolvedPrompt:
    """The masks of one frame's prompts, H x W bool each, none overlapping another."""

    masks: dict[int, NDArray[np.bool_]]
    categories: dict[int, str | None]
    warnings: tuple[str, ...] = ()

    def to_record(self) -> dict[str, Any]:
        """JSON-ready, masks as RLE."""
        height, width = next(iter(self.masks.values())).shape
        return {
            "size": [height, width],
            "masks": [[i, self.categories.get(i), mask_to_rle(m)] for i, m in self.masks.items()],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ResolvedPrompt:
        """What `to_record` stored."""
        height, width = record["size"]
        masks = {int(i): rle_to_mask(counts, height, width) for i, _, counts in record["masks"]}
        return cls(masks, {int(i): category for i, category, _ in record["masks"]})


def prompts_schema() -> dict[str, Any]:
    """The JSON Schema of a prompts file."""
    text = resource_files("pipeline").joinpath("prompts.schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def gather_prompts(
    masks: Sequence[str] = (), files: Sequence[str] = (), boxes: Sequence[str] = ()
) -> PromptSet | None:
    """Prompts from any mix of mask images, prompts files and boxes; None if there are none.

    Objects without an id get the lowest that nobody else has. On one frame, boxes come after files, and these
    after masks: where they overlap, the later has the pixels.

    Raises:
        PromptError: one of them is wrong, or two give the same id on the same frame.
    """
    parts = [load_mask_png(path) for path in masks]
    taken = {e.object_id for part in parts for entries in part.objects.values() for e in entries}
    for path in files:
        parts.append(_parse(_read_json(path), path, taken))
        taken |= {e.object_id for entries in parts[-1].objects.values() for e in entries}
    drawn = [parse_box(text) for text in boxes]
    taken |= {e.object_id for e in drawn if e.object_id}
    parts.append(PromptSet({0: tuple(_with_ids(drawn, taken))} if drawn else {}))
    merged: dict[int, tuple[PromptObject, ...]] = {}
    removals: dict[int, tuple[int, ...]] = {}
    for part in parts:
        for frame, entries in part.objects.items():
            merged[frame] = (*merged.get(frame, ()), *entries)
        for frame, ids in part.removals.items():
            removals[frame] = (*removals.get(frame, ()), *ids)
    result = PromptSet(merged, removals)
    return None if result.is_empty() and not removals else result


def load_prompts(path: str) -> PromptSet:
    """Read a prompts file (JSON, see `prompts_schema`) from a path or fsspec URI."""
    return _parse(_read_json(path), path, taken=set())


def load_mask_png(path: str, frame: int = 0) -> PromptSet:
    """Read an index or palette PNG: each value but 0 is an object's id; 8 or 16 bit.

    A picture of the two values 0 and 255 is a binary mask, as DAVIS-2016 has them: object 1.

    Raises:
        PromptError: it cannot be read, is coloured, or shows no object.
    """
    index = decode_index_png(_read(path), path)
    values = [int(v) for v in np.unique(index) if v]
    if not values:
        raise PromptError(f"{path} shows no object: all its pixels are 0")
    if values == [255]:
        logger.info("%s holds 0 and 255 only: taken as the mask of object 1", path)
        index, values = (index > 0).astype(np.int32), [1]
    height, width = index.shape
    objects = tuple(PromptObject(value, rle=(height, width, mask_to_rle(index == value))) for value in values)
    return PromptSet({frame: objects})


def parse_box(text: str) -> PromptObject:
    """`x,y,w,h[:id[:category]]` in pixels; the id is 0 where none is given.

    Raises:
        PromptError: the text is something else.
    """
    form = "x,y,w,h[:id[:category]] in pixels, for instance 40,60,120,300:1:person"
    numbers, _, rest = text.partition(":")
    id_text, _, category = rest.partition(":")
    try:
        box = [float(n) for n in numbers.split(",")]
        object_id = int(id_text) if id_text else 0
    except ValueError:
        raise PromptError(f"box {text!r} is not {form}") from None
    if id_text:
        object_id = _object_id(object_id, f"box {text!r}")
    return PromptObject(object_id, category or None, box=_box(box, f"box {text!r}"))


# --- to masks ------------------------------------------------------------------------------------


def resolve(objects: Iterable[PromptObject], frame: Frame, segmenter: BoxSegmenter) -> ResolvedPrompt:
    """Turn a frame's prompts into masks of its size.

    Where masks overlap the later entry has the pixels, with one warning.

    Raises:
        PromptError: a mask has another size than the frame or is empty, a box or polygon lies outside the
            frame, or an object is wholly covered by later ones.
    """
    masks: dict[int, NDArray[np.bool_]] = {}
    categories: dict[int, str | None] = {}
    warnings: list[str] = []
    overlapping: set[int] = set()
    covered_by: dict[int, int] = {}
    for entry in objects:
        name = f"object {entry.object_id} on frame {frame.frame_index}"
        mask = _mask_of(entry, frame, segmenter, name, warnings)
        if not mask.any():
            raise PromptError(f"{name}: its mask is empty; draw it again")
        for earlier, other in masks.items():
            if (other & mask).any():
                overlapping |= {earlier, entry.object_id}
                masks[earlier] = other & ~mask
                covered_by[earlier] = entry.object_id
        masks[entry.object_id] = mask
        categories[entry.object_id] = entry.category
    for object_id, mask in masks.items():
        if not mask.any():
            raise PromptError(
                f"object {object_id} on frame {frame.frame_index} is wholly covered by object "
                f"{covered_by[object_id]}: give it a pixel of its own"
            )
    if overlapping:
        ids = ", ".join(map(str, sorted(overlapping)))
        warnings.append(
            f"frame {frame.frame_index}: prompts of objects {ids} overlap; the later entry has the pixels"
        )
    for warning in warnings:
        logger.warning("%s", warning)
    return ResolvedPrompt(masks, categories, tuple(warnings))


def _mask_of(
    entry: PromptObject, frame: Frame, segmenter: BoxSegmenter, name: str, warnings: list[str]
) -> NDArray[np.bool_]:
    height, width = frame.size
    if entry.rle is not None:
        if entry.rle[:2] != (height, width):
            raise PromptError(
                f"{name}: its mask is {entry.rle[1]}x{entry.rle[0]}, the frame {width}x{height}; "
                "give masks at the video's size"
            )
        return rle_to_mask(entry.rle[2], height, width)
    if entry.polygons is not None:
        canvas = np.zeros((height, width), np.uint8)
        for polygon in entry.polygons:
            points = np.round(np.asarray(polygon, np.float64).reshape(-1, 2)).clip(-(10**6), 10**6)
            # One by one: filled together, overlapping outlines would cut holes into each other.
            cv2.fillPoly(canvas, [points.astype(np.int32)], 1)
        if not canvas.any():
            raise PromptError(f"{name}: its polygons lie outside the frame of {width}x{height}")
        return canvas.astype(np.bool_)
    assert entry.box is not None
    box = _clip(entry.box, width, height, name)
    mask = segmenter.segment(frame.image, box)
    if not mask.any():
        warnings.append(
            f"{name}: the box could not be told from its surroundings; an ellipse is taken instead"
        )
        mask = inscribed_ellipse(frame.size, box)
    return mask


def _clip(box: tuple[float, float, float, float], width: int, height: int, name: str) -> Box:
    x, y, w, h = box
    left, top = max(0, round(x)), max(0, round(y))
    right, bottom = min(width, round(x + w)), min(height, round(y + h))
    if right <= left or bottom <= top:
        raise PromptError(
            f"{name}: box {x:g},{y:g},{w:g},{h:g} has no pixel inside the frame of {width}x{height}"
        )
    return left, top, right - left, bottom - top


# --- reading -------------------------------------------------------------------------------------


def _read(path: str) -> bytes:
    try:
        with fsspec.open(path, "rb") as file:
            data: bytes = file.read()
            return data
    except (OSError, ValueError, ImportError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PromptError(f"{path} cannot be read: {reason}") from error


def _read_json(path: str) -> Any:
    try:
        return json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path} is not JSON: {error}") from error


# --- checking ------------------------------------------------------------------------------------


def _parse(document: Any, name: str, taken: set[int]) -> PromptSet:
    if not isinstance(document, dict) or "objects" not in document or "version" not in document:
        raise PromptError(f'{name}: not a prompts file; need {{"version": 1, "objects": [...]}}')
    unknown = sorted(set(document) - {"version", "objects", "remove"})
    if unknown:
        raise PromptError(f"{name}: unknown key {unknown[0]!r}; allowed are version, objects, remove")
    if document["version"] != 1 or isinstance(document["version"], (bool, float)):
        raise PromptError(f"{name}: version {document['version']!r} is not known; this release reads 1")
    entries = _list(document["objects"], f"{name}: objects")
    parsed = [_entry(e, f"{name}: objects[{i}]") for i, e in enumerate(entries)]
    used = taken | {entry.object_id for _, entry in parsed if entry.object_id}
    objects: dict[int, list[PromptObject]] = {}
    named = _with_ids([entry for _, entry in parsed], used)
    for (frame, _), entry in zip(parsed, named, strict=True):
        objects.setdefault(frame, []).append(entry)
    removals: dict[int, list[int]] = {}
    for i, entry in enumerate(_list(document.get("remove", []), f"{name}: remove")):
        where = f"{name}: remove[{i}]"
        if not isinstance(entry, dict) or set(entry) != {"frame", "id"}:
            raise PromptError(f'{where}: need {{"frame": ..., "id": ...}}, not {_short(entry)}')
        removals.setdefault(_frame(entry["frame"], where), []).append(_object_id(entry["id"], where))
    try:
        return PromptSet(
            {f: tuple(e) for f, e in objects.items()}, {f: tuple(ids) for f, ids in removals.items()}
        )
    except PromptError as error:
        raise PromptError(f"{name}: {error}") from None


def _with_ids(entries: Sequence[PromptObject], taken: set[int]) -> list[PromptObject]:
    """The entries, those of id 0 with the lowest free ids; `taken` grows by them."""
    named = []
    candidate = 1
    for entry in entries:
        if not entry.object_id:
            while candidate in taken:
                candidate += 1
            taken.add(candidate)
            entry = replace(entry, object_id=candidate)
        named.append(entry)
    return named


def _entry(entry: Any, where: str) -> tuple[int, PromptObject]:
    if not isinstance(entry, dict):
        raise PromptError(f"{where}: need an object, not {_short(entry)}")
    unknown = sorted(map(str, set(entry) - _OBJECT_KEYS))
    if unknown:
        raise PromptError(
            f"{where}: unknown key {unknown[0]!r}; allowed are {', '.join(sorted(_OBJECT_KEYS))}"
        )
    kinds = [k for k in _KINDS if k in entry]
    if len(kinds) != 1:
        raise PromptError(
            f"{where}: has {' and '.join(kinds) or 'none'} of {', '.join(_KINDS)}; give exactly one"
        )
    frame = _frame(entry.get("frame", 0), where)
    object_id = _object_id(entry["id"], where) if "id" in entry else 0
    category = entry.get("category")
    if category is not None and (not isinstance(category, str) or not category):
        raise PromptError(f"{where}: category {_short(category)} is not a text")
    if "box" in entry:
        return frame, PromptObject(object_id, category, box=_box(entry["box"], where))
    if "rle" in entry:
        return frame, PromptObject(object_id, category, rle=_rle(entry["rle"], where))
    return frame, PromptObject(object_id, category, polygons=_polygons(entry["polygons"], where))


def _frame(value: Any, where: str) -> int:
    if not _is_int(value) or value < 0:
        raise PromptError(f"{where}: frame {_short(value)} is not a frame number, 0 or more")
    return int(value)


def _object_id(value: Any, where: str) -> int:
    if not _is_int(value) or not 1 <= value <= MAX_OBJECT_ID:
        raise PromptError(
            f"{where}: object id {_short(value)} is out of range; ids go from 1 to {MAX_OBJECT_ID}"
        )
    return int(value)


def _box(value: Any, where: str) -> tuple[float, float, float, float]:
    numbers = _numbers(value, f"{where}: box")
    if len(numbers) != 4:
        raise PromptError(f"{where}: box {_short(value)} needs four numbers: x, y, width, height")
    if numbers[2] <= 0 or numbers[3] <= 0:
        raise PromptError(f"{where}: box {_short(value)} has no area; width and height must be above 0")
    return numbers[0], numbers[1], numbers[2], numbers[3]


def _polygons(value: Any, where: str) -> tuple[tuple[float, ...], ...]:
    outlines = [_numbers(p, f"{where}: polygon") for p in _list(value, f"{where}: polygons")]
    if not outlines:
        raise PromptError(f"{where}: polygons is empty; give at least one")
    for outline in outlines:
        if len(outline) < 6 or len(outline) % 2:
            raise PromptError(
                f"{where}: a polygon of {len(outline)} numbers; need x, y of at least three points"
            )
    return tuple(outlines)


def _rle(value: Any, where: str) -> tuple[int, int, str]:
    if not isinstance(value, dict) or set(value) != {"size", "counts"}:
        raise PromptError(f'{where}: rle {_short(value)}: need {{"size": [height, width], "counts": ...}}')
    size = value["size"]
    if not isinstance(size, list) or len(size) != 2 or not all(_is_int(n) and n >= 1 for n in size):
        raise PromptError(f"{where}: rle size {_short(size)} is not [height, width]")
    counts = value["counts"]
    if isinstance(counts, list) and not all(_is_int(n) and n >= 0 for n in counts):
        raise PromptError(f"{where}: rle counts must be run lengths, whole numbers of 0 or more")
    if not isinstance(counts, (str, list)):
        raise PromptError(f"{where}: rle counts {_short(counts)} are neither a text nor a list")
    try:
        mask = rle_to_mask(counts, size[0], size[1])
    except ValueError as error:
        raise PromptError(f"{where}: {error}") from error
    if not mask.any():
        raise PromptError(f"{where}: its mask is empty; draw it again")
    return int(size[0]), int(size[1]), mask_to_rle(mask)


def _numbers(value: Any, where: str) -> tuple[float, ...]:
    numbers = _list(value, where) if not isinstance(value, tuple) else list(value)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise PromptError(f"{where}: {_short(number)} is not a number of pixels")
    return tuple(float(n) for n in numbers)


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise PromptError(f"{where}: need a list, not {_short(value)}")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
