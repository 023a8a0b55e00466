"""Bodies of the annotator's requests; unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FrameIndex = Annotated[int, Field(ge=0, le=2**53)]
ObjectId = Annotated[int, Field(ge=1, le=2**31 - 1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Counts = Annotated[list[Annotated[int, Field(ge=0, le=2**40)]], Field(max_length=4_000_000)]
"""Run lengths of a mask down its columns, background first, as COCO's uncompressed counts."""


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Code(_Body):
    code: Annotated[str, Field(max_length=200)]


class NewObject(_Body):
    category: Annotated[str, Field(max_length=200)] | None = None
    colour: Annotated[str, Field(max_length=7)] | None = None


class ObjectChange(_Body):
    category: Annotated[str, Field(max_length=200)] | None = None
    colour: Annotated[str, Field(max_length=7)] | None = None
    hidden: bool | None = None
    locked: bool | None = None

    def given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.model_fields_set}


class Merge(_Body):
    """The object that becomes a part of the one in the path."""

    other: Annotated[int, Field(ge=1, le=2**31 - 1)]


class Split(_Body):
    """The frame from which on the object has a new id."""

    frame: FrameIndex


class NewPrompt(_Body):
    """Exactly one of box, polygons and counts."""

    box: Annotated[list[Number], Field(min_length=4, max_length=4)] | None = None
    polygons: (
        Annotated[list[Annotated[list[Number], Field(max_length=20_000)]], Field(max_length=200)] | None
    ) = None
    counts: Counts | None = None


class ClickPoint(_Body):
    x: Annotated[int, Field(ge=0, le=2**20)]
    y: Annotated[int, Field(ge=0, le=2**20)]
    positive: bool = True


_Coordinate = Annotated[float, Field(ge=0, le=2**20)]

_Point = Annotated[tuple[_Coordinate, _Coordinate], Field(strict=False)]
"""x and y. Strict tuples would refuse the lists of JSON."""


class Stroke(_Body):
    """A scribble: points of a line drawn over the object, or beside it."""

    points: Annotated[list[_Point], Field(min_length=1, max_length=2000)]
    positive: bool = True


class Clicks(_Body):
    """Clicks in their order, strokes, and the mask that they correct."""

    clicks: Annotated[list[ClickPoint], Field(max_length=200)] = []
    strokes: Annotated[list[Stroke], Field(max_length=50)] = []
    previous: Counts | None = None


class MemoryEdits(_Body):
    """One edit of the memory before the frame in the path."""

    forget: Annotated[list[FrameIndex], Field(min_length=2, max_length=2)] | None = None
    object: ObjectId | None = None
    pin: FrameIndex | None = None
    unpin: FrameIndex | None = None
    clear: Literal[True] | None = None

    def given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.model_fields_set}


_Setting = Annotated[int, Field(ge=1, le=10_000_000)] | None


class MemorySettings(_Body):
    """Settings of the memory, see `pipeline.annotate.recipe.CHANGEABLE`; null: the project's own."""

    mem_every: _Setting = None
    min_mid_term_frames: _Setting = None
    max_mid_term_frames: Annotated[int, Field(ge=2, le=10_000)] | None = None
    max_long_term_elements: Annotated[int, Field(ge=2, le=10_000_000)] | None = None
    num_prototypes: _Setting = None
    top_k: Annotated[int, Field(ge=1, le=10_000)] | None = None

    def given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.model_fields_set}


class Reads(_Body):
    """A pixel, or the mask of an object; with both, the pixel of one object."""

    x: Annotated[int, Field(ge=0, le=2**20)] | None = None
    y: Annotated[int, Field(ge=0, le=2**20)] | None = None
    object: ObjectId | None = None


class ImportedFile(_Body):
    """A file and its bytes in base64."""

    name: Annotated[str, Field(max_length=255)]
    content: Annotated[str, Field(max_length=8_000_000)]


class Import(_Body):
    """Palette PNGs, a COCO file or a prompts file; `frame` is that of a PNG whose name is not a number."""

    frame: FrameIndex = 0
    files: Annotated[list[ImportedFile], Field(min_length=1, max_length=20_000)]


class Look(BaseModel):
    """How masks are shown; see `Annotator.look`. Without an overlay, the picture is as it is."""

    model_config = ConfigDict(extra="forbid")

    overlay: Annotated[str, Field(max_length=20)] | None = None
    opacity: Annotated[float, Field(ge=0, le=1)] | None = None
    outlines: bool | None = None
    ids: bool | None = None
    layer: Annotated[str, Field(max_length=40)] | None = None
    layer_place: Annotated[str, Field(max_length=20)] = "behind"


class Propagate(_Body):
    until: FrameIndex | None = None
    direction: Annotated[str, Field(max_length=20)] | None = None


class Direction(_Body):
    direction: Annotated[str, Field(max_length=20)]
