"""Responses that all HTTP applications share: errors as `Problem`, and the files of the page."""

from __future__ import annotations

import logging
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from pipeline.api.guard import FAULT, problem
from pipeline.api.service import HubUnavailableError, RefusedError, status_of
from pipeline.base.errors import XmemError
from pipeline.base.redaction import redacted

log = logging.getLogger(__name__)


def handle_errors(app: FastAPI) -> None:
    """Answer every error of an application with a `problem` and the status that fits it."""

    def answer(request: Request, status: int, code: str, message: str) -> JSONResponse:
        request_id = getattr(request.state, "request_id", "")
        headers = {"Retry-After": "2"} if status in (429, 503) else None
        return JSONResponse(problem(code, message, request_id), status, headers=headers)

    @app.exception_handler(XmemError)
    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: Exception) -> JSONResponse:
        status, code = status_of(error)
        message = str(error)
        if status == 503 and not isinstance(error, HubUnavailableError):
            log.warning("%s %s: %s", request.method, request.url.path, redacted(message))
        return answer(request, status, code, message.splitlines()[0] if message else code)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # The request's content is not repeated: it may contain a camera's password.
        first = error.errors()[0]
        where = ".".join(str(part)[:40] for part in first.get("loc", ())[:8])
        more = f" (and {len(error.errors()) - 1} more)" if len(error.errors()) > 1 else ""
        status = 400 if first.get("type") == "json_invalid" else 422
        return answer(request, status, "invalid", f"{where}: {first.get('msg', 'not allowed')[:300]}{more}")

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> JSONResponse:
        return answer(request, 500, "internal", FAULT)  # the guard has logged it

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        codes = {400: "bad_request", 404: "no_route", 405: "no_method"}
        response = answer(
            request, error.status_code, codes.get(error.status_code, "refused"), str(error.detail)
        )
        response.headers.update(error.headers or {})
        return response


def page_file(package: str, name: str, media_type: str) -> Any:
    """The route of a file in the folder `page` of a package."""
    content = files(package).joinpath("page", name).read_bytes()

    async def page() -> Response:
        return Response(content, media_type=media_type)

    return page
