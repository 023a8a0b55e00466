"""Prompt input: JSON files, index PNGs and command-line boxes, read and validated.

Everything is checked here except what needs the frame: mask sizes, and what boxes and polygons cover.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files as resource_files
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from pipeline.base.errors import PromptError
from pipeline.base.picture_size import MAX_PIXELS
from pipeline.base.redaction import redacted, shareable
from pipeline.prompts import values as check
from pipeline.prompts.index_png import decode_index_png
from pipeline.prompts.remembered_object import RememberedObject
from pipeline.storage.locations import locate, read_error
from pipeline.storage.retries import may_pass
from pipeline.tracks.masks import mask_to_rle

logger = logging.getLogger(__name__)

_KINDS = ("box", "rle", "polygons", "state")
_OBJECT_KEYS = {"frame", "id", "category", *_KINDS}
_MANY_OBJECTS = 64


@dataclass(frozen=True)
class PromptObject:
    """One object on one frame, given by a box, polygons, a mask, or what another stream remembers of it.

    Args:
        object_id: 1 .. 2^31 - 1.
        category: free text, or None.
        box: x, y, width, height in pixels.
        polygons: each x1, y1, x2, y2, ... in pixels; the object is their union.
        rle: (height, width, COCO compressed counts).
        state: the object in another stream's state. It is sought from this frame on; it need not be there.
    """

    object_id: int
    category: str | None = None
    box: tuple[float, float, float, float] | None = None
    polygons: tuple[tuple[float, ...], ...] | None = None
    rle: tuple[int, int, str] | None = None
    state: RememberedObject | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the object as an entry of a prompts file, without its frame."""
        entry: dict[str, Any] = {"id": self.object_id}
        if self.category is not None:
            entry["category"] = self.category
        if self.box is not None:
            entry["box"] = list(self.box)
        if self.polygons is not None:
            entry["polygons"] = [list(p) for p in self.polygons]
        if self.rle is not None:
            entry["rle"] = {"size": list(self.rle[:2]), "counts": self.rle[2]}
        if self.state is not None:
            entry["state"] = self.state.to_json()
        return entry


@dataclass(frozen=True)
class PromptSet:
    """All prompts of one stream, by frame.

    Raises:
        PromptError: an id is given or removed twice on the same frame.
    """

    objects: Mapping[int, tuple[PromptObject, ...]] = field(default_factory=dict)
    removals: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = {frame: [e.object_id for e in entries] for frame, entries in self.objects.items()}
        for verb, by_frame in (("given", given), ("removed", self.removals)):
            for frame, ids in by_frame.items():
                twice = [object_id for object_id, count in Counter(ids).items() if count > 1]
                if twice:
                    raise PromptError(
                        f"object id {min(twice)} is {verb} twice on frame {frame}: use each id once"
                    )

    @property
    def frames(self) -> list[int]:
        """The frames that have objects or removals, in order."""
        return sorted({*self.objects, *self.removals})

    def first_difference(self, other: PromptSet) -> int | None:
        """The first frame on which the two sets differ; None if they are equal."""
        frames = sorted({*self.frames, *other.frames})
        return next(
            (
                f
                for f in frames
                if self.at(f) != other.at(f) or sorted(self.removals_at(f)) != sorted(other.removals_at(f))
            ),
            None,
        )

    def is_empty(self) -> bool:
        """Whether there are no objects at all."""
        return not any(self.objects.values())

    def at(self, frame_index: int) -> tuple[PromptObject, ...]:
        """The objects given on a frame, in order."""
        return self.objects.get(frame_index, ())

    @property
    def most_objects(self) -> int:
        """The largest number of objects at the same time."""
        living: set[int] = set()
        most = 0
        for frame in self.frames:
            living -= set(self.removals_at(frame))
            living |= {entry.object_id for entry in self.at(frame)}
            most = max(most, len(living))
        return most

    @property
    def object_ids(self) -> set[int]:
        """All ids that are given or removed on any frame."""
        given = {entry.object_id for entries in self.objects.values() for entry in entries}
        return given.union(*self.removals.values())

    def removals_at(self, frame_index: int) -> tuple[int, ...]:
        """The ids that are removed on a frame."""
        return self.removals.get(frame_index, ())

    @property
    def states(self) -> list[tuple[int, PromptObject]]:
        """The objects that are copied from other streams' states, with their frames, in order."""
        return [(f, e) for f in sorted(self.objects) for e in self.objects[f] if e.state is not None]

    def combined(self, other: PromptSet | None) -> PromptSet:
        """Both sets. PromptError if they give the same id on the same frame."""
        if other is None:
            return self
        objects = {f: (*self.at(f), *other.at(f)) for f in sorted({*self.objects, *other.objects})}
        gone = sorted({*self.removals, *other.removals})
        return PromptSet(objects, {f: (*self.removals_at(f), *other.removals_at(f)) for f in gone})

    def to_record(self) -> dict[str, Any]:
        """Return the content of a prompts file; equal prompts give equal dicts."""
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
        """Make prompts from the content of a prompts file and check them.

        Raises:
            PromptError: names the entry, the error and what is allowed.
        """
        return _collect(*_parse(record, name), name)

    @classmethod
    def from_masks(
        cls,
        masks: Mapping[int, Mapping[int, ArrayLike]],
        categories: Mapping[int, str] | None = None,
    ) -> PromptSet:
        """Make prompts from arrays.

        Args:
            masks: by frame and object id, H x W bool or 0/1 at the video's size: {0: {7: mask}}. If masks of
                a frame overlap, later ones win.
            categories: by object id.

        Raises:
            PromptError: a mask is not H x W, has other values or no pixel; or an id, frame or category is
                out of range.
        """
        names = categories or {}
        objects: dict[int, tuple[PromptObject, ...]] = {}
        for frame, by_id in masks.items():
            where = f"frame {check.short(frame)}"
            number = check.frame_number(frame, where)
            entries = []
            for given, mask in by_id.items():
                object_id = check.object_id(given, where)
                name = f"{where}: object {object_id}"
                category = check.category(names.get(object_id), name)
                entries.append(PromptObject(object_id, category, rle=check.mask(mask, name)))
            objects[number] = (*objects.get(number, ()), *entries)
        return cls(objects)


def prompts_schema() -> dict[str, Any]:
    """The JSON Schema of a prompts file."""
    text = resource_files("pipeline.prompts").joinpath("schema.json").read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


def gather_prompts(
    masks: Sequence[str] = (),
    files: Sequence[str] = (),
    boxes: Sequence[str] = (),
    max_pixels: int = MAX_PIXELS,
) -> PromptSet | None:
    """Combine mask images, prompts files and boxes into one set of prompts; None if there are none.

    Objects without an id get the lowest free one. On the same frame, boxes come after files, and files after
    masks; if they overlap, later ones win.

    Raises:
        PromptError: one of them is invalid, or two give the same id on the same frame.
    """
    entries: list[tuple[int, PromptObject]] = []
    removals: list[tuple[int, int]] = []
    for path in masks:
        entries += [
            (frame, e)
            for frame, found in load_mask_png(path, max_pixels=max_pixels).objects.items()
            for e in found
        ]
    for path in files:
        given, gone = _parse(_read_json(path), path)
        _collect(given, gone, path)  # so that errors within the file are reported with its name
        entries += given
        removals += gone
    entries += [(0, parse_box(text)) for text in boxes]
    result = _collect(entries, removals)
    return None if result.is_empty() and not removals else result


def load_prompts(path: str, storage_options: Mapping[str, Any] | None = None) -> PromptSet:
    """Read a prompts file (JSON, see `prompts_schema`) from a path or fsspec URI.

    Raises:
        PromptError: the file is missing or invalid. SourceError: its store does not respond now.
    """
    return PromptSet.from_record(_read_json(path, storage_options), path)


def load_mask_png(
    path: str,
    frame: int = 0,
    storage_options: Mapping[str, Any] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> PromptSet:
    """Read an index or palette PNG: each value but 0 is an object id.

    A picture with only the values 0 and 255 (16 bit: 65535) is a binary mask as in DAVIS-2016: object 1.

    Raises:
        PromptError: the file is missing or coloured, or shows no object. SourceError: its store does not
            respond now.
    """
    index = decode_index_png(_read(path, storage_options), path, max_pixels)
    values = [int(v) for v in np.unique(index) if v]
    if not values:
        raise PromptError(f"{path} shows no object: all its pixels are 0")
    if values in ([255], [65535]):
        logger.info("%s has only 0 and %d: used as the mask of object 1", redacted(path), values[0])
        index, values = (index > 0).astype(np.int32), [1]
    if len(values) > _MANY_OBJECTS:
        logger.warning(
            "%s shows %d objects, one per value; if it is one mask with soft edges, save it without them",
            redacted(path),
            len(values),
        )
    height, width = index.shape
    objects = tuple(PromptObject(value, rle=(height, width, mask_to_rle(index == value))) for value in values)
    return PromptSet({frame: objects})


def parse_box(text: str) -> PromptObject:
    """Parse `x,y,w,h[:id[:category]]`, in pixels; the id is 0 if none is given.

    Raises:
        PromptError: the text has another form.
    """
    form = "x,y,w,h[:id[:category]] in pixels, for instance 40,60,120,300:1:person"
    where = f"box {check.short(text)}"
    numbers, _, rest = text.partition(":")
    id_text, _, category = rest.partition(":")
    try:
        box = [float(n) for n in numbers.split(",")]
        object_id = int(id_text) if id_text else 0
    except ValueError:
        raise PromptError(f"{where} is not {form}") from None
    if id_text:
        object_id = check.object_id(object_id, where)
    return PromptObject(object_id, check.category(category or None, where), box=check.box(box, where))


# --- reading -------------------------------------------------------------------------------------


def _read(path: str, storage_options: Mapping[str, Any] | None = None) -> bytes:
    try:
        return locate(path, storage_options).read_bytes()
    except Exception as error:  # every store behind fsspec has its own errors
        if may_pass(error):
            # Not an invalid request: in a batch, the video is retried.
            raise read_error(path, error) from shareable(error)
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PromptError(f"{path} cannot be read: {' '.join(reason.split())}") from shareable(error)


def _read_json(path: str, storage_options: Mapping[str, Any] | None = None) -> Any:
    try:
        return json.loads(_read(path, storage_options))
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path} is not JSON: {error}") from error


# --- checking ------------------------------------------------------------------------------------


def _parse(document: Any, name: str) -> tuple[list[tuple[int, PromptObject]], list[tuple[int, int]]]:
    """Return (frame, object) of every entry, id 0 if none is given, and (frame, id) of every removal."""
    if not isinstance(document, dict) or "objects" not in document or "version" not in document:
        raise PromptError(f'{name}: not a prompts file; expected {{"version": 1, "objects": [...]}}')
    unknown = sorted(map(str, set(document) - {"version", "objects", "remove"}))
    if unknown:
        raise PromptError(
            f"{name}: unknown key {check.short(unknown[0])}; allowed are version, objects, remove"
        )
    if check.whole(document["version"]) != 1:
        raise PromptError(
            f"{name}: version {check.short(document['version'])} is not supported; this release reads 1"
        )
    objects = check.as_list(document["objects"], f"{name}: objects")
    removals = check.as_list(document.get("remove", []), f"{name}: remove")
    return (
        [_entry(e, f"{name}: objects[{i}]") for i, e in enumerate(objects)],
        [_removal(e, f"{name}: remove[{i}]") for i, e in enumerate(removals)],
    )


def _collect(
    entries: Sequence[tuple[int, PromptObject]], removals: Sequence[tuple[int, int]], name: str | None = None
) -> PromptSet:
    """Sort entries by frame; those of id 0 get the lowest ids that no other entry has."""
    taken = {entry.object_id for _, entry in entries}
    objects: dict[int, list[PromptObject]] = {}
    candidate = 1
    for frame, entry in entries:
        if not entry.object_id:
            while candidate in taken:
                candidate += 1
            taken.add(candidate)
            entry = replace(entry, object_id=candidate)
        objects.setdefault(frame, []).append(entry)
    gone: dict[int, list[int]] = {}
    for frame, object_id in removals:
        gone.setdefault(frame, []).append(object_id)
    try:
        return PromptSet({f: tuple(e) for f, e in objects.items()}, {f: tuple(i) for f, i in gone.items()})
    except PromptError as error:
        raise PromptError(f"{name}: {error}" if name else str(error)) from None


def _removal(entry: Any, where: str) -> tuple[int, int]:
    if not isinstance(entry, dict) or set(entry) != {"frame", "id"}:
        raise PromptError(f'{where}: expected {{"frame": ..., "id": ...}}, not {check.short(entry)}')
    return check.frame_number(entry["frame"], where), check.object_id(entry["id"], where)


def _entry(entry: Any, where: str) -> tuple[int, PromptObject]:
    if not isinstance(entry, dict):
        raise PromptError(f"{where}: expected an object, not {check.short(entry)}")
    unknown = sorted(map(str, set(entry) - _OBJECT_KEYS))
    if unknown:
        raise PromptError(
            f"{where}: unknown key {check.short(unknown[0])}; allowed are {', '.join(sorted(_OBJECT_KEYS))}"
        )
    kinds = [k for k in _KINDS if k in entry]
    if len(kinds) != 1:
        raise PromptError(
            f"{where}: has {' and '.join(kinds) or 'none'} of {', '.join(_KINDS)}; give exactly one"
        )
    frame = check.frame_number(entry.get("frame", 0), where)
    object_id = check.object_id(entry["id"], where) if "id" in entry else 0
    category = check.category(entry.get("category"), where)
    if "box" in entry:
        return frame, PromptObject(object_id, category, box=check.box(entry["box"], where))
    if "state" in entry:
        state = RememberedObject.from_json(entry["state"], f"{where}: state")
        return frame, PromptObject(object_id, category, state=state)
    if "rle" in entry:
        return frame, PromptObject(object_id, category, rle=check.rle(entry["rle"], where))
    return frame, PromptObject(object_id, category, polygons=check.polygons(entry["polygons"], where))
