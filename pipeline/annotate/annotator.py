"""Annotator: one project, open: its document, the video's pictures, prompts as masks, and tracking."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.annotate.document import Change, Document
from pipeline.annotate.gauges import device_memory
from pipeline.annotate.look_layers import LookLayers
from pipeline.annotate.memory_view import MemoryView
from pipeline.annotate.project import (
    Project,
    ProjectHeader,
    create_header,
    project_ids,
    read_header,
)
from pipeline.annotate.propagation import Propagation
from pipeline.annotate.recipe import Recipe, changed_memory, edits_of, memory_values
from pipeline.annotate.regrouping import merge, split
from pipeline.base.closeable import Closing
from pipeline.base.errors import PromptError, SettingsConflictError, SourceError, UsageError
from pipeline.base.records import MaskRecord
from pipeline.base.stream_ids import generate_stream_id
from pipeline.draw.look import Look, parse_colour
from pipeline.draw.overlay import object_color, overlay
from pipeline.draw.pictures import within
from pipeline.draw.video import render_video
from pipeline.exchange.export import export
from pipeline.prompts.box_segmenters import load_box_segmenter
from pipeline.prompts.click_segmenters import load_click_segmenter, segment_clicks
from pipeline.prompts.clicks import Click, Stroke, joined
from pipeline.prompts.files import PromptObject, PromptSet
from pipeline.prompts.resolving import ResolvedPrompt, resolve
from pipeline.storage.opening import open_files
from pipeline.tracking.settings import FORWARD, TrackSettings
from pipeline.tracking.snapshots.memory_edit import MemoryEdit
from pipeline.tracks.layout import load_record
from pipeline.tracks.masks import mask_to_rle, record_of_mask, rle_to_mask
from pipeline.tracks.reader import TrackReader
from pipeline.video.random_access import FrameAccess
from pipeline.video.sources import open_source

log = logging.getLogger(__name__)

_RESOLVED_KEPT = 64


class Annotator(Closing):
    """An open project. Thread-safe.

    Args:
        video: path or URI of the video; None: that of the project in the output folder.
        out: path or URI of the output folder.
        stream_id: the stream in it. Default: made from the video's URI, or the only project of the folder.
        settings: tracking settings; those of a project that exists must be the same.
        click_segmenter: what turns clicks into masks, see `load_click_segmenter`.
        storage_options, out_storage_options: of the file systems of video and output.

    Raises:
        UsageError: there is no such project, or it is of other settings or another video.
        SourceError: the video cannot be opened. StoreError: the folder cannot be read or written.
    """

    def __init__(
        self,
        video: str | None,
        out: str,
        stream_id: str | None = None,
        settings: TrackSettings | None = None,
        *,
        click_segmenter: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
        out_storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._clicks = load_click_segmenter(click_segmenter)
        self._options, self._out_options = storage_options, out_storage_options
        self._files = open_files(out, out_storage_options)
        if video is None:
            stream_id = stream_id or self._only_project()
        self.stream_id = stream_id or generate_stream_id(str(video))
        header = read_header(self._files, self.stream_id)
        if header is None and video is None:
            raise UsageError(f"{self._files.root} has no annotation of stream {self.stream_id!r}")
        self.video = str(video if video is not None else header.video if header is not None else "")
        asked = settings or TrackSettings()
        source = open_source(self.video, storage_options=storage_options, max_pixels=asked.commit.max_pixels)
        self.frames = FrameAccess(source)
        try:
            if header is None:
                header = self._begin(asked)
            self._check(header, None if video is None else settings)
            here = {
                "device": asked.model.device,
                "decoder": asked.commit.decoder,
                "max_pixels": asked.commit.max_pixels,
            }
            self.settings = _asked(header.settings).with_options(here)
            first = Document()
            if header.imported is not None:
                first = Document.of_prompts(PromptSet.from_record(dict(header.imported))).changed(
                    [{"op": "memory", "frame": f, "edit": edit} for f, edit in header.imported_edits]
                )
            self.project = Project(self._files, self.stream_id, first)
            self._boxes = load_box_segmenter(self.settings.commit.box_segmenter)
            self.propagation = Propagation(
                self.video,
                header.fingerprint,
                self._files,
                self.stream_id,
                self.settings,
                storage_options=storage_options,
                out_storage_options=out_storage_options,
            )
        except BaseException:
            self.frames.close()
            raise
        self.memory_view = MemoryView(self.propagation, self.frames)
        self.layers = LookLayers(self._files, self.stream_id)
        self._resolved: OrderedDict[tuple[int, tuple[PromptObject, ...]], ResolvedPrompt] = OrderedDict()
        self._lock = threading.Lock()
        self._editing = threading.RLock()  # an edit is made from the document that it changes

    def close(self) -> None:
        """Stop tracking and close the video; everything that was acknowledged is stored."""
        self.memory_view.close()
        self.propagation.close()
        self.frames.close()

    # --- opening ---------------------------------------------------------------------------------

    def _only_project(self) -> str:
        ids = project_ids(self._files)
        if not ids:
            raise UsageError(
                f"{self._files.root} has no annotation to go on with: give the video, and the folder as --out"
            )
        if len(ids) > 1:
            raise UsageError(
                f"{self._files.root} has annotations of {', '.join(ids[:5])}: choose one with --stream-id"
            )
        return ids[0]

    def _begin(self, settings: TrackSettings) -> ProjectHeader:
        if settings.detector.name is not None:
            raise UsageError("the annotator tracks what it is shown: leave out --detect")
        source = self.frames.source
        record = load_record(self._files, self.stream_id)
        imported, edits = None, []
        if record is not None:
            # `xmem track` was here before: its prompts and settings are what is corrected.
            if record.get("source_fingerprint") != source.fingerprint:
                raise SettingsConflictError(
                    f"{self._files.root} holds stream {self.stream_id!r} of another video: give another "
                    "--stream-id or --out"
                )
            if record["settings"].get("detector") is not None:
                raise SettingsConflictError(
                    f"stream {self.stream_id!r} was tracked with a detector, and only streams of prompts can "
                    "be annotated: give another --stream-id or --out"
                )
            settings = TrackSettings.from_dict(record["settings"]).with_options(
                {"device": settings.model.device}
            )
            imported = record["prompts"]
            edits = [
                (frame, edit.to_json())
                for frame, made in sorted(edits_of(self._files, self.stream_id).items())
                for edit in made
            ]
        asked = {**settings.to_dict(), "full_size": settings.model.full_size}
        header = ProjectHeader(source.uri, source.fingerprint, asked, imported, tuple(edits))
        create_header(self._files, self.stream_id, header)
        return header

    def _check(self, header: ProjectHeader, settings: TrackSettings | None) -> None:
        if self.frames.source.fingerprint != header.fingerprint:
            raise SettingsConflictError(
                f"{self.video} is not the video that was annotated in {self._files.root}: its content has "
                "changed; give another --stream-id or --out"
            )
        if settings is not None and header.imported is None:
            differing = settings.differences(_asked(header.settings).to_dict())
            if differing:
                raise SettingsConflictError(
                    f"stream {self.stream_id!r} was annotated with other settings: {'; '.join(differing)}; "
                    "use the same, or another --stream-id or --out"
                )

    # --- pictures and masks ----------------------------------------------------------------------

    @property
    def root(self) -> str:
        """The output folder."""
        return self._files.root

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the video's first frame."""
        return self.frames.source.height, self.frames.source.width

    def jpeg(
        self, frame_index: int, quality: int = 90, side: int | None = None, look: Look | None = None
    ) -> bytes:
        """A frame as JPEG.

        Args:
            side: its longer side is reduced to so many pixels; None: it is not.
            look: its masks are drawn as by `xmem render`, except outdated ones; None: it is without masks.

        Raises:
            UsageError: the video has no such frame. SourceError: it cannot be read.
        """
        image = self.frames.at(frame_index).image
        if look is not None:
            image = overlay(image, self.records(frame_index), look)
        if side is not None:
            image = within(image, side)
        done, data = cv2.imencode(
            ".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality]
        )
        if not done:
            raise SourceError(f"frame {frame_index} of {self.video} cannot be encoded")
        return bytes(np.asarray(data).tobytes())

    def look(
        self,
        overlay: str,
        opacity: float | None = None,
        outlines: bool | None = None,
        ids: bool | None = None,
        layer: str | None = None,
        layer_place: str = "behind",
    ) -> Look:
        """A look with the project's colours, without hidden objects; `layer` is one of `layers`.

        Raises:
            UsageError: a value is not allowed.
        """
        objects = self.project.document.objects
        return Look(
            overlay,
            opacity,
            outlines,
            ids,
            frozenset(i for i, known in objects.items() if not known.hidden),
            {i: parse_colour(known.colour) for i, known in objects.items() if known.colour is not None},
            None if layer is None else self.layers.get(layer),
            layer_place,
        )

    def records(self, frame_index: int) -> list[MaskRecord]:
        """The masks of a frame that are not outdated: tracked ones, or else those of its prompts."""
        document = self.project.document
        prompts = document.prompt_set()
        found = self.propagation.rows(self.recipe, frame_index)
        records = {} if found is None or found.stale else {r.object_id: r for r in found.records}
        if not records and prompts.at(frame_index):
            for object_id, mask in self._resolve(frame_index, prompts).masks.items():
                records[object_id] = record_of_mask(
                    mask_to_rle(mask), *mask.shape, frame_index=frame_index, object_id=object_id
                )
        return [
            replace(records[i], category=known.category)
            for i, known in sorted(document.objects.items())
            if i in records
        ]

    def render(self, output: str, look: Look) -> int:
        """Write a video of the finished stream, see `render_video`; return its number of frames."""
        reader = TrackReader(self.root, self.stream_id, self._out_options)
        return render_video(
            self.video,
            reader.at,
            output,
            last=reader.next_frame - 1,
            look=look,
            storage_options=self._options,
            max_pixels=self.settings.commit.max_pixels,
        )

    def export(self, fmt: str, output: Path) -> None:
        """Write the finished stream in the format of another tool, see `pipeline.exchange.export.export`."""
        export(self.root, fmt, output, streams=[self.stream_id], storage_options=self._out_options)

    def masks(self, frame_index: int) -> list[dict[str, Any]]:
        """The masks to show on a frame: those of its prompts, and tracked ones of the other objects.

        Returns:
            dicts with id, rle (None: out of sight), size, area, score, presence, and source: prompt, tracked
            or stale (of prompts that have changed since).
        """
        document, recipe = self.project.document, self.recipe
        prompts = recipe.prompts
        found = self.propagation.rows(recipe, frame_index)
        shown: dict[int, dict[str, Any]] = {}
        for record in found.records if found is not None else ():
            assert found is not None
            shown[record.object_id] = {
                "id": record.object_id,
                "rle": record.mask_rle,
                "size": [record.frame_height, record.frame_width],
                "area": record.area,
                "score": record.score,
                "presence": record.presence,
                "source": "stale" if found.stale else "tracked",
            }
        if prompts.at(frame_index):
            resolved = self._resolve(frame_index, prompts)
            for object_id, mask in resolved.masks.items():
                shown[object_id] = {
                    "id": object_id,
                    "rle": mask_to_rle(mask),
                    "size": list(mask.shape),
                    "area": int(mask.sum()),
                    "score": None,
                    "presence": None,
                    "source": "prompt",
                }
        for object_id in document.removals.get(frame_index, ()):
            if object_id not in document.prompts.get(frame_index, {}):
                shown.pop(object_id, None)
        return [shown[i] for i in sorted(shown) if i in document.objects]

    def click(
        self,
        frame_index: int,
        clicks: Sequence[Click],
        previous: NDArray[np.bool_] | None,
        strokes: Sequence[Stroke] = (),
    ) -> NDArray[np.bool_]:
        """The mask of clicks and strokes; PromptError if they do not fit the frame."""
        image = self.frames.at(frame_index).image
        with self._lock:  # OpenCV's random generator is one for the process
            return segment_clicks(self._clicks, image, joined(clicks, strokes, image.shape[:2]), previous)

    def mask(self, counts: Any, what: str) -> NDArray[np.bool_]:
        """A mask given as COCO counts of the video's size.

        Raises:
            PromptError: the counts are damaged or cover another number of pixels.
        """
        try:
            return rle_to_mask(counts, *self.size)
        except ValueError as error:
            raise PromptError(f"{what}: {error}") from None

    def _resolve(self, frame_index: int, prompts: PromptSet) -> ResolvedPrompt:
        entries = prompts.at(frame_index)
        with self._lock:
            known = self._resolved.get((frame_index, entries))
            if known is not None:
                self._resolved.move_to_end((frame_index, entries))
                return known
        frame = self.frames.at(frame_index)
        with self._lock:
            found = resolve(entries, frame, self._boxes)
            self._resolved[frame_index, entries] = found
            while len(self._resolved) > _RESOLVED_KEPT:
                self._resolved.popitem(last=False)
            return found

    # --- edits -----------------------------------------------------------------------------------

    def edit(self, changes: Sequence[Change]) -> None:
        """Apply an edit; durable when it returns. Tracking pauses where its rows are outdated by the edit.

        Raises:
            UsageError, PromptError: it does not fit the document, or its masks do not fit their frame.
        """
        with self._editing:
            before = self.project.document
            after = before.changed(changes)
            changed_memory(self.settings.memory, after.memory)
            prompts = after.prompt_set()
            for frame_index in after.prompts:
                if after.prompts[frame_index] != before.prompts.get(frame_index):
                    self._resolve(frame_index, prompts)
            self.project.edit(changes)
            self.propagation.keep_to(self.recipe)

    def add_object(self, category: str | None = None, colour: str | None = None) -> int:
        """Add an object; durable when its id is returned.

        Raises:
            UsageError: the category or the colour is not allowed.
        """
        with self._editing:
            new = self.project.document.next_id
            self.edit([{"op": "object", "id": new, "category": category, "colour": colour}])
        return new

    def undo(self) -> None:
        """Take back the last edit that is in effect; durable when it returns."""
        with self._editing:
            self.project.undo()
            self.propagation.keep_to(self.recipe)

    def redo(self) -> None:
        """Apply again what was undone last; durable when it returns."""
        with self._editing:
            self.project.redo()
            self.propagation.keep_to(self.recipe)

    def add_prompts(self, prompts: PromptSet, numbered: Collection[int] = ()) -> None:
        """Add prompts of elsewhere as one edit; durable when it returns.

        Objects keep their ids: one that the project has is prompted again, on those frames.

        Args:
            numbered: ids that their source did not give; such objects are new ones.

        Raises:
            UsageError, PromptError: they do not fit the document or their frames.
        """
        with self._editing:
            self._add_prompts(_renumbered(prompts, numbered, self.project.document.next_id))

    def _add_prompts(self, prompts: PromptSet) -> None:
        changes: list[Change] = []
        for frame in prompts.frames:
            for entry in prompts.at(frame):
                changes.append({"op": "prompt", "frame": frame, "object": entry.to_json()})
            changes += [{"op": "remove", "frame": frame, "id": i} for i in prompts.removals_at(frame)]
        known = self.project.document.objects
        new: list[Change] = [
            {"op": "object", "id": object_id, "category": imported.category}
            for object_id, imported in Document.of_prompts(prompts).objects.items()
            if object_id not in known
        ]
        self.edit([*new, *changes])

    def merge(self, into: int, other: int) -> None:
        """Make one object of two, see `regrouping.merge`; durable when it returns."""
        with self._editing:
            self.edit(merge(self.project.document, into, other, self._mask_at))

    def split(self, object_id: int, frame_index: int) -> int:
        """Give an object a new id from a frame on, see `regrouping.split`; durable when it returns.

        Returns:
            the new id.
        """
        self.frames.at(frame_index)
        with self._editing:
            new = self.project.document.next_id
            backward = self.recipe.direction != FORWARD
            self.edit(split(self.project.document, object_id, frame_index, self._mask_at, backward=backward))
        return new

    def edit_memory(self, frame_index: int, edits: Sequence[Mapping[str, Any]]) -> None:
        """Edit what is remembered before a tracked frame; durable when it returns.

        Args:
            edits: as `pipeline.memory.editing.edit_memory` takes them, made in their order.

        Raises:
            UsageError: the frame is not tracked yet, or an edit cannot be made there. Nothing is edited then.
        """
        changes: list[Change] = [{"op": "memory", "frame": frame_index, "edit": edit} for edit in edits]
        with self._editing:
            self.project.document.changed(changes)
            self.memory_view.checked(self.recipe, frame_index, [MemoryEdit.from_json(edit) for edit in edits])
            self.edit(changes)

    def clear_memory(self, frame_index: int) -> None:
        """Forget all but prompted and pinned frames before a tracked frame; durable when it returns."""
        edits = self.memory_view.clearing(self.recipe, frame_index)
        self.edit_memory(frame_index, [edit.to_json() for edit in edits])

    def reads(self, frame_index: int, pixel: tuple[int, int] | None, object_id: int | None) -> dict[str, Any]:
        """From which remembered frames objects are read on a frame, see `MemoryView.reads`.

        Args:
            pixel: (x, y); None: on the mask of the object.
            object_id: the only object to report; None: all.
        """
        rle = None
        if pixel is None:
            rle = next((m["rle"] for m in self.masks(frame_index) if m["id"] == object_id), None)
        return self.memory_view.reads(self.recipe, frame_index, pixel, object_id, rle)

    def _mask_at(self, frame_index: int, object_id: int) -> NDArray[np.bool_] | None:
        """The mask of an object on a frame, unless it comes from prompts that have changed since."""
        for shown in self.masks(frame_index):
            if shown["id"] == object_id and shown["rle"] is not None and shown["source"] != "stale":
                return rle_to_mask(shown["rle"], *shown["size"])
        return None

    def propagate(self, until: int | None = None, direction: str | None = None) -> None:
        """Track the present recipe, see `Propagation.start`.

        Args:
            direction: the direction from now on, an edit like others; None: as before.
        """
        if direction is not None and direction != self.recipe.direction:
            self.edit([{"op": "direction", "value": direction}])
        self.propagation.start(self.recipe, until)

    @property
    def recipe(self) -> Recipe:
        """What the rows come from: the prompts, edits of the memory, memory settings, and direction."""
        document = self.project.document
        memory = changed_memory(self.settings.memory, document.memory)
        direction = document.direction or self.settings.direction
        return Recipe(document.prompt_set(), document.edits, memory_values(memory), direction)

    @property
    def tracked(self) -> int:
        """Number of frames, from 0 on, that are tracked with the present recipe."""
        return self.propagation.tracked(self.recipe)

    # --- state -----------------------------------------------------------------------------------

    def timeline(self) -> dict[str, Any]:
        """Where each object is seen, doubtful (see `strips`) or out of sight, JSON-ready."""
        document = self.project.document
        strips = self.propagation.strips(self.recipe)
        return {
            "tracked": self.tracked,
            "objects": [{"id": i, "runs": strips.get(i, [])} for i in sorted(document.objects)],
        }

    def state(self) -> dict[str, Any]:
        """Everything the page shows besides pictures and masks, JSON-ready."""
        document, source = self.project.document, self.frames.source
        recipe = self.recipe
        status = self.propagation.status
        return {
            "video": {
                "name": self.video.rstrip("/").rpartition("/")[2],
                "width": source.width,
                "height": source.height,
                "frames": self.frames.frame_count,
                "rate": source.rate,
            },
            "stream_id": self.stream_id,
            "edits": self.project.edits,
            "can_undo": self.project.can_undo,
            "can_redo": self.project.can_redo,
            "next_id": document.next_id,
            "objects": [
                {
                    "id": i,
                    "category": o.category,
                    "colour": o.colour or "#{:02x}{:02x}{:02x}".format(*object_color(i)),
                    "hidden": o.hidden,
                    "locked": o.locked,
                    "prompts": sorted(f for f, by_id in document.prompts.items() if i in by_id),
                    "removals": sorted(f for f, ids in document.removals.items() if i in ids),
                }
                for i, o in sorted(document.objects.items())
            ],
            "memory": {
                "settings": dict(recipe.memory),
                "usual": memory_values(self.settings.memory),
                "edits": [
                    {"frame": frame, "number": number, **edit.to_json()}
                    for frame, edits in sorted(recipe.edits.items())
                    for number, edit in enumerate(edits)
                ],
                "gauges": self.propagation.gauges,
                "device": device_memory(self.settings.model.device),
            },
            "direction": recipe.direction,
            "tracked": self.propagation.tracked(recipe),
            "available": self.propagation.available(),
            "published": self.propagation.is_published(recipe),
            "propagation": {
                "state": status.state,
                "position": status.position,
                "until": status.until,
                "rate": status.rate,
                "message": status.message,
            },
        }


def _renumbered(prompts: PromptSet, numbered: Collection[int], least: int) -> PromptSet:
    """The prompts with `numbered` objects under free ids, from `least` on."""
    first = max(least, max(prompts.object_ids - set(numbered), default=0) + 1)
    ids = {old: first + count for count, old in enumerate(sorted(numbered))}
    return replace(
        prompts,
        objects={
            frame: tuple(replace(e, object_id=ids.get(e.object_id, e.object_id)) for e in entries)
            for frame, entries in prompts.objects.items()
        },
    )


def _asked(stored: Mapping[str, Any]) -> TrackSettings:
    """Settings as asked for: a size of None is the model's default, unless frames are not resized."""
    given = dict(stored)
    full_size = bool(given.pop("full_size", False))
    settings = TrackSettings.from_dict(given)
    return replace(settings, model=replace(settings.model, full_size=full_size))
