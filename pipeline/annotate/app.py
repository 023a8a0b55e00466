"""The annotator's HTTP application: its page, and the requests that the page makes, behind an `ApiGuard`."""

from __future__ import annotations

import base64
import re
import tempfile
from pathlib import Path as FilePath
from typing import Annotated, Any

from fastapi import APIRouter, Body, FastAPI, Path, Query, Response

from pipeline.annotate import models
from pipeline.annotate.annotator import Annotator
from pipeline.annotate.exporting import exported_file
from pipeline.api.guard import LOOPBACK_HOSTS, ApiGuard
from pipeline.api.responses import handle_errors, page_file
from pipeline.api.service import RefusedError
from pipeline.api.tokens import Sessions
from pipeline.base.errors import UsageError, XmemError
from pipeline.draw.look import Look
from pipeline.exchange.masks_as_prompts import read_masks_as_prompts
from pipeline.prompts.clicks import Click, Stroke
from pipeline.tracks.masks import mask_to_rle

MAX_BODY_BYTES = 8 * 2**20
"""Room for a mask of many runs; the largest one of a 4K frame that a hand can draw is far smaller."""

PAGE = {
    "/": ("pipeline.annotate", "index.html", "text/html"),
    "/annotate.css": ("pipeline.annotate", "annotate.css", "text/css"),
    "/memory.css": ("pipeline.annotate", "memory.css", "text/css"),
    "/page.css": ("pipeline.api", "page.css", "text/css"),
    "/pointer.js": ("pipeline.api", "pointer.js", "text/javascript"),
    "/keys.js": ("pipeline.api", "keys.js", "text/javascript"),
    **{
        f"/{name}.js": ("pipeline.annotate", f"{name}.js", "text/javascript")
        for name in (
            "annotate",
            "server",
            "masks",
            "stage",
            "view",
            "scribbles",
            "timeline",
            "objects",
            "looks",
            "importing",
            "memory",
        )
    },
}
"""Path: package, file in its folder `page`, media type."""

THUMBNAIL_SIDE = 160
_FILE_NAME = re.compile(r"[\w][\w .-]{0,199}", re.ASCII)

FrameIndex = Annotated[int, Path(ge=0, le=2**53)]
ObjectId = Annotated[int, Path(ge=1, le=2**31 - 1)]
Answer = dict[str, Any]


def create_app(annotator: Annotator, sessions: Sessions, hosts: tuple[str, ...] = LOOPBACK_HOSTS) -> ApiGuard:
    """Create the ASGI application.

    Args:
        annotator: the project; closed by the caller.
        sessions: gives a token for the code in the link.
        hosts: allowed values of the Host header.
    """
    app = FastAPI(title="xmem annotate", docs_url=None, redoc_url=None, openapi_url=None)
    handle_errors(app)
    app.include_router(_router(annotator, sessions))
    for path, (package, name, media_type) in PAGE.items():
        app.add_api_route(path, page_file(package, name, media_type), methods=["GET"])
    return ApiGuard(
        app,
        tokens=sessions,
        tickets=None,
        hosts=hosts,
        max_body_bytes=MAX_BODY_BYTES,
        open_paths={*PAGE, "/v1/session"},
    )


def _router(annotator: Annotator, sessions: Sessions) -> APIRouter:
    # Plain functions: FastAPI runs them in threads, so that decoding and writing hold up nobody.
    router = APIRouter(prefix="/v1")

    @router.post("/session")
    def session(body: models.Code) -> Answer:
        token = sessions.exchange(body.code)
        if token is None:
            raise RefusedError(403, "used", "this link was used already, or is an older one: take the newest")
        return {"token": token}

    @router.get("/state")
    def state() -> Answer:
        return annotator.state()

    @router.get("/timeline")
    def timeline() -> Answer:
        return annotator.timeline()

    @router.get("/frames/{frame}.jpg")
    def picture(frame: FrameIndex, look: Annotated[models.Look, Query()]) -> Response:
        return Response(annotator.jpeg(frame, look=_look(annotator, look)), media_type="image/jpeg")

    @router.get("/look")
    def look() -> Answer:
        return {"look": annotator.layers.kept()}

    @router.put("/look")
    def keep_look(body: models.Look) -> Answer:
        shown = body if body.overlay == "layered" else body.model_copy(update={"layer": None})
        _look(annotator, shown)  # refuses one that cannot be shown
        annotator.layers.keep(body.model_dump())
        return {"look": body.model_dump()}

    @router.post("/layers")
    def add_layer(body: Annotated[bytes, Body(media_type="image/png")]) -> Answer:
        return {"layer": annotator.layers.add(body)}

    @router.get("/thumbnails/{frame}.jpg")
    def thumbnail(frame: FrameIndex) -> Response:
        return Response(annotator.jpeg(frame, 80, THUMBNAIL_SIDE), media_type="image/jpeg")

    @router.get("/memory/{frame}")
    def memory(frame: FrameIndex) -> Answer:
        return annotator.memory_view.listing(annotator.recipe, frame)

    @router.post("/memory/{frame}")
    def edit_memory(frame: FrameIndex, body: models.MemoryEdits) -> Answer:
        given = body.given()
        if given.pop("clear", None):
            if given:
                raise UsageError(f"clear and {next(iter(given))} are edits of their own: send one at a time")
            annotator.clear_memory(frame)
        else:
            annotator.edit_memory(frame, [given])
        return annotator.state()

    @router.delete("/memory/{frame}/{number}")
    def take_memory_edit(frame: FrameIndex, number: Annotated[int, Path(ge=0, le=10_000)]) -> Answer:
        return _edited({"op": "unmemory", "frame": frame, "number": number})

    @router.patch("/memory/settings")
    def memory_settings(body: models.MemorySettings) -> Answer:
        return _edited({"op": "settings", "values": body.given()})

    @router.post("/reads/{frame}")
    def reads(frame: FrameIndex, body: models.Reads) -> Answer:
        if (body.x is None) != (body.y is None) or (body.x is None and body.object is None):
            raise UsageError("reads need x and y, an object, or all three")
        pixel = None if body.x is None or body.y is None else (body.x, body.y)
        return annotator.reads(frame, pixel, body.object)

    @router.get("/frames/{frame}/masks")
    def masks(frame: FrameIndex) -> Answer:
        return {"frame": frame, "masks": annotator.masks(frame)}

    @router.post("/objects")
    def add_object(body: models.NewObject) -> Answer:
        return {"id": annotator.add_object(body.category, body.colour), "state": annotator.state()}

    @router.patch("/objects/{object_id}")
    def change_object(object_id: ObjectId, body: models.ObjectChange) -> Answer:
        if object_id not in annotator.project.document.objects:
            raise RefusedError(404, "not_found", f"there is no object {object_id}")
        return _edited({"op": "object", "id": object_id, **body.given()})

    @router.delete("/objects/{object_id}")
    def delete_object(object_id: ObjectId) -> Answer:
        return _edited({"op": "delete", "id": object_id})

    @router.post("/objects/{object_id}/merge")
    def merge(object_id: ObjectId, body: models.Merge) -> Answer:
        annotator.merge(object_id, body.other)
        return annotator.state()

    @router.post("/objects/{object_id}/split")
    def split(object_id: ObjectId, body: models.Split) -> Answer:
        new = annotator.split(object_id, body.frame)
        return {"id": new, "state": annotator.state()}

    @router.put("/prompts/{frame}/{object_id}")
    def prompt(frame: FrameIndex, object_id: ObjectId, body: models.NewPrompt) -> Answer:
        given: dict[str, Any] = {}
        if body.box is not None:
            given["box"] = body.box
        if body.polygons is not None:
            given["polygons"] = body.polygons
        if body.counts is not None:
            mask = annotator.mask(body.counts, f"object {object_id} on frame {frame}")
            given["rle"] = {"size": list(annotator.size), "counts": mask_to_rle(mask)}
        return _edited({"op": "prompt", "frame": frame, "object": {"id": object_id, **given}})

    @router.delete("/prompts/{frame}/{object_id}")
    def take_prompt(frame: FrameIndex, object_id: ObjectId) -> Answer:
        return _edited({"op": "unprompt", "frame": frame, "id": object_id})

    @router.put("/removals/{frame}/{object_id}")
    def remove(frame: FrameIndex, object_id: ObjectId) -> Answer:
        return _edited({"op": "remove", "frame": frame, "id": object_id})

    @router.delete("/removals/{frame}/{object_id}")
    def keep(frame: FrameIndex, object_id: ObjectId) -> Answer:
        return _edited({"op": "keep", "frame": frame, "id": object_id})

    @router.post("/import")
    def imported(body: models.Import) -> Answer:
        with tempfile.TemporaryDirectory(prefix="xmem-import-") as folder:
            path = _unpacked(body.files, FilePath(folder))
            try:
                found = read_masks_as_prompts(path, frame=body.frame, stream_id=annotator.stream_id)
            except XmemError as error:  # whoever chose the files does not know that folder
                text = str(error).replace(f"{folder}/", "").replace(folder, "the files")
                raise UsageError(text) from error
        annotator.add_prompts(*found)
        return annotator.state()

    @router.post("/frames/{frame}/clicks")
    def clicks(frame: FrameIndex, body: models.Clicks) -> Answer:
        before = None if body.previous is None else annotator.mask(body.previous, "the mask before")
        clicks = [Click(c.x, c.y, c.positive) for c in body.clicks]
        mask = annotator.click(
            frame, clicks, before, [Stroke(tuple(s.points), s.positive) for s in body.strokes]
        )
        return {"rle": mask_to_rle(mask), "size": list(mask.shape), "area": int(mask.sum())}

    @router.post("/undo")
    def undo() -> Answer:
        annotator.undo()
        return annotator.state()

    @router.post("/redo")
    def redo() -> Answer:
        annotator.redo()
        return annotator.state()

    @router.post("/propagate")
    def propagate(body: models.Propagate) -> Answer:
        annotator.propagate(body.until, body.direction)
        return annotator.state()

    @router.put("/direction")
    def direction(body: models.Direction) -> Answer:
        return _edited({"op": "direction", "value": body.direction})

    @router.post("/pause")
    def pause() -> Answer:
        annotator.propagation.pause()
        return annotator.state()

    @router.get("/export/{fmt}")
    def exported(fmt: Annotated[str, Path(max_length=20)], look: Annotated[models.Look, Query()]) -> Response:
        return exported_file(annotator, fmt, _look(annotator, look))

    def _edited(change: dict[str, Any]) -> Answer:
        annotator.edit([change])
        return annotator.state()

    return router


def _look(annotator: Annotator, given: models.Look) -> Look | None:
    return None if given.overlay is None else annotator.look(**given.model_dump())


def _unpacked(given: list[models.ImportedFile], folder: FilePath) -> FilePath:
    """Write files into a folder; the only one's path, or the folder's."""
    for file in given:
        name = file.name.rpartition("/")[2]
        if not _FILE_NAME.fullmatch(name):
            raise UsageError(f"file name {name[:80]!r} is not allowed: letters, digits, - _ . and spaces")
        if (folder / name).exists():
            raise UsageError(f"{name} is given twice: choose each file once")
        try:
            (folder / name).write_bytes(base64.b64decode(file.content, validate=True))
        except ValueError:
            raise UsageError(f"{name}: its content is not base64") from None
    if len(given) > 1 and not all(file.name.lower().endswith(".png") for file in given):
        raise UsageError("several files must all be PNGs: choose one JSON file, or PNGs")
    return folder / name if len(given) == 1 else folder
