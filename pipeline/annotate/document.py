"""The content of an annotation (objects, prompts, removals, memory), and the changes that edits make."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.annotate.recipe import CHANGEABLE
from pipeline.base.errors import PromptError, UsageError
from pipeline.prompts import values as check
from pipeline.prompts.files import PromptObject, PromptSet
from pipeline.tracking.settings import DIRECTIONS
from pipeline.tracking.snapshots.memory_edit import COPY, MemoryEdit

MOST_OBJECTS = 200
MOST_EDITS = 200
"""Of the memory, on one frame."""
_COLOUR_DIGITS = frozenset("0123456789abcdef")


@dataclass(frozen=True)
class AnnotatedObject:
    """What is known of an object besides its masks.

    Args:
        category: free text, stored in its rows; None: none.
        colour: `#rrggbb` in which the page draws it; None: the colour of its id.
        hidden: whether the page draws it.
        locked: whether the page refuses to change its masks.
    """

    category: str | None = None
    colour: str | None = None
    hidden: bool = False
    locked: bool = False


Change = Mapping[str, Any]
"""One change of an edit, JSON-ready: its kind under "op", and the values that it needs."""


@dataclass(frozen=True)
class Document:
    """Objects by id; prompts, removals and edits of the memory by frame; memory settings that were changed;
    the direction of tracking, None: the project's own.

    Changes make a new document.
    """

    objects: Mapping[int, AnnotatedObject] = field(default_factory=dict)
    prompts: Mapping[int, Mapping[int, PromptObject]] = field(default_factory=dict)
    removals: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    edits: Mapping[int, tuple[MemoryEdit, ...]] = field(default_factory=dict)
    memory: Mapping[str, int] = field(default_factory=dict)
    direction: str | None = None

    @classmethod
    def of_prompts(cls, prompts: PromptSet) -> Document:
        """A document with the prompts of a prompts file. UsageError: some are other streams' states."""
        if prompts.states:
            raise UsageError("objects of other streams' states cannot be annotated: give masks or boxes")
        names: dict[int, str | None] = dict.fromkeys(sorted(prompts.object_ids))
        for frame in sorted(prompts.objects):
            for entry in prompts.objects[frame]:
                names[entry.object_id] = names[entry.object_id] or entry.category
        return cls(
            {i: AnnotatedObject(category) for i, category in names.items()},
            {f: {e.object_id: e for e in entries} for f, entries in prompts.objects.items() if entries},
            {f: tuple(ids) for f, ids in prompts.removals.items() if ids},
        )

    def prompt_set(self) -> PromptSet:
        """The prompts to track with; each has its object's category."""
        return PromptSet(
            {
                frame: tuple(replace(e, category=self.objects[i].category) for i, e in by_id.items())
                for frame, by_id in sorted(self.prompts.items())
            },
            dict(sorted(self.removals.items())),
        )

    @property
    def next_id(self) -> int:
        """The lowest id above all that are in use."""
        return max(self.objects, default=0) + 1

    def changed(self, changes: Sequence[Change]) -> Document:
        """The document after an edit.

        Raises:
            UsageError, PromptError: a change is not allowed, or does not fit the document.
        """
        document = self
        for change in changes:
            document = document._changed(change)
        return document

    def _changed(self, change: Change) -> Document:
        given = dict(change)
        op = given.pop("op", None)
        known: dict[str, Callable[..., Document]] = {
            "object": self._with_object,
            "delete": self._without_object,
            "prompt": self._with_prompt,
            "unprompt": self._without_prompt,
            "remove": self._with_removal,
            "keep": self._without_removal,
            "memory": self._with_memory_edit,
            "unmemory": self._without_memory_edit,
            "settings": self._with_settings,
            "direction": self._with_direction,
        }
        apply = known.get(op if isinstance(op, str) else "")
        if apply is None:
            raise UsageError(f"edit {check.short(op)} is not known")
        try:
            return apply(**given)
        except TypeError as error:
            raise UsageError(f"edit {op!r}: {error}") from None

    def _with_object(self, id: int, **given: Any) -> Document:
        object_id = check.object_id(id, "edit")
        if object_id not in self.objects and len(self.objects) >= MOST_OBJECTS:
            raise UsageError(f"there are {MOST_OBJECTS} objects already, which is the limit")
        name = f"object {object_id}"
        values: dict[str, Any] = {}
        for key, value in given.items():
            if key == "category":
                values[key] = check.category(value or None, name)
            elif key == "colour":
                values[key] = _colour(value, name)
            elif key in ("hidden", "locked"):
                values[key] = bool(value)
            else:
                raise UsageError(f"{name} has no {check.short(key)}")
        known = self.objects.get(object_id, AnnotatedObject())
        return replace(self, objects={**self.objects, object_id: replace(known, **values)})

    def _without_object(self, id: int) -> Document:
        self._known(id)
        edits = {f: tuple(e for e in edited if e.object_id != id) for f, edited in self.edits.items()}
        return replace(
            self,
            objects={i: o for i, o in self.objects.items() if i != id},
            prompts=_without_empty(
                {f: {i: e for i, e in p.items() if i != id} for f, p in self.prompts.items()}
            ),
            removals=_without_empty(
                {f: tuple(i for i in ids if i != id) for f, ids in self.removals.items()}
            ),
            edits=_without_empty(edits),
        )

    def _with_prompt(self, frame: int, object: Mapping[str, Any]) -> Document:
        record = {"version": 1, "objects": [{"frame": frame, **object}]}
        ((number, (entry,)),) = PromptSet.from_record(record, "prompt").objects.items()
        self._changeable(entry.object_id)
        others = {i: e for i, e in self.prompts.get(number, {}).items() if i != entry.object_id}
        # Last of its frame: where masks overlap, the one that was given last gets the pixels.
        entries = {**others, entry.object_id: replace(entry, category=None)}
        return replace(self, prompts={**self.prompts, number: entries})

    def _without_prompt(self, frame: int, id: int) -> Document:
        self._changeable(id)
        if id not in self.prompts.get(frame, {}):
            raise PromptError(f"object {id} has no prompt on frame {frame}")
        left = {i: e for i, e in self.prompts[frame].items() if i != id}
        return replace(self, prompts=_without_empty({**self.prompts, frame: left}))

    def _with_removal(self, frame: int, id: int) -> Document:
        self._changeable(id)
        number = check.frame_number(frame, "edit")
        ids = tuple(sorted({*self.removals.get(number, ()), id}))
        return replace(self, removals={**self.removals, number: ids})

    def _without_removal(self, frame: int, id: int) -> Document:
        self._changeable(id)
        left = tuple(i for i in self.removals.get(frame, ()) if i != id)
        return replace(self, removals=_without_empty({**self.removals, frame: left}))

    def _with_memory_edit(self, frame: int, edit: Mapping[str, Any]) -> Document:
        number = check.frame_number(frame, "edit")
        wanted = MemoryEdit.from_json(edit)
        if wanted.kind == COPY:
            raise UsageError("objects of other streams are not copied into an annotation: prompt them here")
        if wanted.object_id is not None:
            self._changeable(wanted.object_id)
        if wanted.first >= number:
            raise UsageError(
                f"frame {wanted.first} is not remembered before frame {number}: edit it on a later frame"
            )
        known = self.edits.get(number, ())
        if len(known) >= MOST_EDITS:
            raise UsageError(f"there are {MOST_EDITS} edits on frame {number} already, which is the limit")
        return replace(self, edits={**self.edits, number: (*known, wanted)})

    def _without_memory_edit(self, frame: int, number: int) -> Document:
        known = self.edits.get(frame, ())
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(known):
            raise UsageError(f"there is no edit {check.short(number)} of the memory on frame {frame}")
        left = known[:number] + known[number + 1 :]
        return replace(self, edits=_without_empty({**self.edits, frame: left}))

    def _with_settings(self, values: Mapping[str, Any]) -> Document:
        unknown = sorted(set(values) - set(CHANGEABLE))
        if unknown:
            raise UsageError(
                f"memory setting {check.short(unknown[0])} cannot be changed: {', '.join(CHANGEABLE)} can"
            )
        for name, value in values.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise UsageError(f"{name}={check.short(value)} is not allowed: a whole number is needed")
        changed = {**self.memory, **values}
        # None is the project's own value. Whether they go together is checked with those, see `Annotator`.
        return replace(self, memory={name: value for name, value in changed.items() if value is not None})

    def _with_direction(self, value: str | None) -> Document:
        if value is not None and value not in DIRECTIONS:
            raise UsageError(f"direction {check.short(value)} is not known: use {', '.join(DIRECTIONS)}")
        return replace(self, direction=value)

    def _known(self, object_id: int) -> AnnotatedObject:
        found = self.objects.get(object_id)
        if found is None:
            raise UsageError(f"there is no object {check.short(object_id)}: add it first")
        return found

    def _changeable(self, object_id: int) -> None:
        if self._known(object_id).locked:
            raise UsageError(f"object {object_id} is locked: unlock it to change it")


def _without_empty(by_frame: Mapping[int, Any]) -> dict[int, Any]:
    return {frame: value for frame, value in by_frame.items() if value}


def _colour(value: Any, name: str) -> str | None:
    if value is None:
        return None
    text = value.lower() if isinstance(value, str) else ""
    if len(text) != 7 or text[0] != "#" or not _COLOUR_DIGITS.issuperset(text[1:]):
        raise UsageError(f"{name}: colour {check.short(value)} is not of the form #rrggbb")
    return text
