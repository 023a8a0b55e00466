"""The HTTP API for live streams: a FastAPI application in front of a hub that tracks elsewhere.

No request waits for tracking: each makes a quick call to the hub, and gets 503 if the hub does not respond in
time. Nothing here imports Ray; `pipeline.distributed.serve` runs this application in Ray Serve.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path, Query, Response, Security, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer

from pipeline.api import models
from pipeline.api.clicking import outline
from pipeline.api.following import BOUNDARY, follow, pictures
from pipeline.api.guard import OPEN_PATHS, ApiGuard
from pipeline.api.metrics import CONTENT_TYPE, metrics_text
from pipeline.api.responses import handle_errors, page_file
from pipeline.api.service import CLICK_SECONDS, ApiSettings, Hub, RefusedError, Service
from pipeline.base.errors import UsageError
from pipeline.base.stream_ids import generate_stream_id
from pipeline.live.camera.url_guard import Resolver, system_resolver
from pipeline.live.recent import LiveView
from pipeline.live.spec import JPEG_QUALITIES, JPEG_SIDES, LivePrompts, LiveSpec
from pipeline.zones.config import parse_zones

VERSION = "1"

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/live.css": ("live.css", "text/css"),
    **{
        f"/{name}.js": (f"{name}.js", "text/javascript")
        for name in ("page", "server", "words", "wall", "stream", "drawing", "pointer", "keys", "adding")
    },
}
"""Path: file in the folder `page`, media type. They need no token: they reveal nothing about any stream."""

StreamIdPath = Annotated[models.StreamId, Path()]

_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": models.Problem, "description": text}
    for status, text in {
        400: "The body is not JSON.",
        401: "The token is missing or invalid.",
        403: "Cross-site requests are refused.",
        404: "No such stream.",
        409: "The stream exists already, or lacks capacity; the message gives the numbers.",
        413: "The body is too large.",
        421: "The Host header names a host that is not allowed.",
        422: "A value in the request is not allowed.",
        429: "Too many viewers.",
        503: "The tracker does not respond; try again.",
    }.items()
}


def _router(service: Service) -> APIRouter:
    router = APIRouter(
        prefix="/v1",
        responses=_PROBLEMS,
        dependencies=[Security(HTTPBearer(auto_error=False))],
        tags=["streams"],
    )
    hub, settings = service.hub, service.settings

    @router.post("/streams", status_code=201, response_model=models.StreamView, summary="Add a stream")
    async def add_stream(new: models.NewStream, response: Response) -> models.StreamView:
        url = new.url.get_secret_value()
        await service.check(service.guard.check, url)
        if new.detector is not None and new.detector not in settings.detectors:
            allowed = ", ".join(settings.detectors) or "none"
            raise UsageError(f"detector {new.detector!r} is not allowed: available are {allowed}")
        prompts = None if new.prompts is None else new.prompts.document()
        spec = await service.check(
            LiveSpec,
            new.id or generate_stream_id(url),
            url,
            prompts,
            new.detector,
            settings.streams.with_options(new.settings.given()),
            new.zones,
        )
        added = models.StreamView.of(await service.add(spec))
        response.headers["Location"] = f"/v1/streams/{added.id}"
        return added

    @router.get("/options", response_model=models.Options, summary="What requests may ask for")
    async def options() -> models.Options:
        return models.Options(
            detectors=list(settings.detectors),
            networks=list(settings.networks),
            ports=list(settings.ports),
            max_streams=settings.max_streams,
            streams=settings.streams.to_dict(),
        )

    @router.get("/streams", response_model=models.StreamList, summary="List streams")
    async def list_streams() -> models.StreamList:
        return models.StreamList(streams=[models.StreamView.of(s) for s in await service.ask(hub.list())])

    @router.get("/streams/{stream_id}", response_model=models.StreamView, summary="Stream status")
    async def get_stream(stream_id: StreamIdPath) -> models.StreamView:
        return models.StreamView.of(await service.known(stream_id))

    @router.patch("/streams/{stream_id}", response_model=models.StreamView, summary="Change a stream")
    async def change_stream(stream_id: StreamIdPath, change: models.StreamChange) -> models.StreamView:
        wanted = change.change()
        if "prompts" in wanted:
            wanted["prompts"] = await service.check(LivePrompts.of, wanted["prompts"])
        if wanted.get("zones"):
            zones = await service.check(parse_zones, wanted["zones"])
            zones.check_streams([stream_id])
        if change.url is not None:
            await service.check(service.guard.check, change.url.get_secret_value())
        await service.about(stream_id, hub.request(stream_id, wanted))
        return models.StreamView.of(await service.known(stream_id))

    @router.delete("/streams/{stream_id}", status_code=204, summary="Stop a stream; its rows are kept")
    async def remove_stream(stream_id: StreamIdPath) -> None:
        await service.about(stream_id, hub.remove(stream_id))

    @router.post(
        "/streams/{stream_id}/ticket", response_model=models.Ticket, summary="Ticket for URLs without headers"
    )
    async def ticket(stream_id: StreamIdPath) -> models.Ticket:
        await service.known(stream_id)
        office = settings.tickets
        return models.Ticket(ticket=office.issue(stream_id), seconds=office.seconds)

    @router.get("/streams/{stream_id}/tracks", response_model=models.TrackList, summary="Recent mask records")
    async def tracks(
        stream_id: StreamIdPath,
        since: Annotated[
            int | None, Query(ge=-1, le=2**62, description="Only frames after this frame_index.")
        ] = None,
        limit: Annotated[int, Query(ge=1, le=2000)] = 500,
    ) -> JSONResponse:
        rows = await service.about(stream_id, hub.view(stream_id, LiveView.tracks, since, limit))
        return JSONResponse({"stream_id": stream_id, "tracks": models.clean(list(rows))})

    @router.get("/streams/{stream_id}/events", response_model=models.EventList, summary="Recent events")
    async def events(
        stream_id: StreamIdPath, limit: Annotated[int, Query(ge=1, le=500)] = 50
    ) -> models.EventList:
        """The newest first, since the service was started; lost frames are counted in the status."""
        happened = await service.about(stream_id, hub.view(stream_id, LiveView.events, limit))
        return models.EventList.model_validate(
            {"stream_id": stream_id, "events": models.clean(list(happened))}
        )

    @router.post(
        "/streams/{stream_id}/clicks",
        response_model=models.Outline,
        summary="Mask of clicks on the newest frame",
    )
    async def clicks(stream_id: StreamIdPath, given: models.Clicks) -> models.Outline:
        """Changes nothing: a prompt with the returned `rle` starts or corrects an object."""
        jpeg = await service.about(stream_id, hub.view(stream_id, LiveView.jpeg, False, JPEG_SIDES[1], 95))
        return await service.check(outline, jpeg, given, settings.click_segmenter, seconds=CLICK_SECONDS)

    @router.get(
        "/streams/{stream_id}/memory", response_model=models.MemoryView, summary="What the stream remembers"
    )
    async def memory(stream_id: StreamIdPath) -> models.MemoryView:
        listing = await service.about(stream_id, hub.view(stream_id, LiveView.memory))
        return models.MemoryView(stream_id=stream_id, **models.clean(listing))

    @router.get(
        "/streams/{stream_id}/memory/{time}.jpg",
        summary="A remembered frame as JPEG, up to 320 pixels long",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}}},
    )
    async def remembered(
        stream_id: StreamIdPath,
        time: Annotated[int, Path(ge=0, le=2**62, description="Its time in the listing of the memory.")],
    ) -> Response:
        """Frames that were remembered before the service was started have no picture."""
        data = await service.about(stream_id, hub.view(stream_id, LiveView.thumbnail, time))
        if data is None:
            raise RefusedError(
                404,
                "not_found",
                f"no picture of time {time}: the listing of the memory has the times; frames "
                "remembered before the service was started have no picture",
            )
        return Response(data, media_type="image/jpeg")

    @router.get(
        "/streams/{stream_id}/frame.jpg",
        summary="Newest frame as JPEG",
        response_class=Response,
        responses={200: {"content": {"image/jpeg": {}}}},
    )
    async def frame(
        stream_id: StreamIdPath,
        overlay: bool = True,
        max_side: Annotated[int, Query(ge=JPEG_SIDES[0], le=JPEG_SIDES[1])] = 960,
        quality: Annotated[int, Query(ge=JPEG_QUALITIES[0], le=JPEG_QUALITIES[1])] = 80,
        ticket: Annotated[str | None, Query(max_length=200)] = None,
    ) -> Response:
        return Response(
            await service.about(stream_id, hub.view(stream_id, LiveView.jpeg, overlay, max_side, quality)),
            media_type="image/jpeg",
        )

    @router.get(
        "/streams/{stream_id}/preview.mjpeg",
        summary="Live preview as MJPEG",
        response_class=Response,
        responses={200: {"content": {f"multipart/x-mixed-replace; boundary={BOUNDARY}": {}}}},
    )
    async def preview(
        stream_id: StreamIdPath,
        overlay: bool = True,
        max_side: Annotated[int, Query(ge=JPEG_SIDES[0], le=JPEG_SIDES[1])] = 640,
        quality: Annotated[int, Query(ge=JPEG_QUALITIES[0], le=JPEG_QUALITIES[1])] = 70,
        fps: Annotated[float, Query(gt=0, le=30, allow_inf_nan=False)] = 5.0,
        frames: Annotated[int | None, Query(ge=1, le=100_000, description="End after N frames.")] = None,
        ticket: Annotated[str | None, Query(max_length=200)] = None,
    ) -> Response:
        first = await service.about(stream_id, hub.view(stream_id, LiveView.jpeg, overlay, max_side, quality))
        service.refuse_if_crowded()
        parts = pictures(service, stream_id, overlay, max_side, quality, fps, frames, first)

        async def counted() -> AsyncIterator[bytes]:
            # Counted only here: the client may disconnect before the first part is read. Others may have
            # joined since.
            if service.crowded:
                return
            with service.viewing():
                async for part in parts:
                    yield part

        return StreamingResponse(counted(), media_type=f"multipart/x-mixed-replace; boundary={BOUNDARY}")

    return router


def _live_router(service: Service) -> APIRouter:
    # Separate: FastAPI's HTTPBearer does not support WebSockets.
    router = APIRouter(prefix="/v1")

    @router.websocket("/streams/{stream_id}/live")
    async def live(websocket: WebSocket, stream_id: StreamIdPath) -> None:
        await follow(service, websocket, stream_id)

    return router


def create_app(hub: Hub, settings: ApiSettings, *, resolver: Resolver = system_resolver) -> ApiGuard:
    """Create the ASGI application: FastAPI's routes behind an `ApiGuard`.

    Args:
        hub: the hub that tracks the streams.
        resolver: resolves the cameras' host names.
    """
    app = create_routes(hub, settings, resolver=resolver)
    return ApiGuard(
        app,
        tokens=settings.tokens,
        tickets=settings.tickets,
        hosts=settings.hosts,
        max_body_bytes=settings.max_body_bytes,
        open_paths={*PAGE, *OPEN_PATHS},
    )


def create_routes(hub: Hub, settings: ApiSettings, *, resolver: Resolver = system_resolver) -> FastAPI:
    """Create the routes without the guard, for the OpenAPI page. Never serve these unguarded."""
    service = Service(hub, settings, resolver)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="xmem live",
        version=VERSION,
        description="Follow objects on live cameras: streams, mask records, pictures and frame counts.",
        docs_url=None,  # FastAPI's docs page loads scripts from other sites
        redoc_url=None,
        lifespan=lifespan,
    )
    handle_errors(app)
    app.include_router(_router(service))
    app.include_router(_live_router(service))
    _public_routes(app, service)
    return app


def _public_routes(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", summary="Liveness: this process responds", tags=["service"])
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        "/readyz",
        summary="Readiness: streams can be tracked",
        tags=["service"],
        responses={503: _PROBLEMS[503]},
    )
    async def readyz() -> dict[str, str]:
        await service.ask(service.hub.capacity())
        return {"status": "ready"}

    @app.get(
        "/metrics",
        summary="Prometheus metrics",
        tags=["service"],
        response_class=Response,
        dependencies=[Security(HTTPBearer(auto_error=False))],
        responses={200: {"content": {"text/plain": {}}}, 401: _PROBLEMS[401], 503: _PROBLEMS[503]},
    )
    async def metrics() -> Response:
        streams = await service.ask(service.hub.list())
        capacity = await service.ask(service.hub.capacity())
        return Response(metrics_text(streams, capacity), headers={"Content-Type": CONTENT_TYPE})

    for path, (name, media_type) in PAGE.items():
        page = page_file("pipeline.api", name, media_type)
        app.add_api_route(path, page, include_in_schema=False, methods=["GET"])
