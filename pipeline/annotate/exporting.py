"""Exports as HTTP responses: written to a temporary file on disk, and sent from there in pieces."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from pipeline.annotate.annotator import Annotator
from pipeline.base.errors import UsageError
from pipeline.draw.look import Look

_PIECE_BYTES = 2**18


def exported_file(annotator: Annotator, fmt: str, look: Look | None) -> Response:
    """The response with an export as a file to download.

    Memory stays bounded whatever the length of the video: at most a piece of the file is in memory. The
    temporary file has no name any more once sending begins, so that a client that goes away, or a server
    that is killed, leaves nothing behind.

    Args:
        fmt: prompts, coco, davis, workspace or video.
        look: of the video; None: davis.

    Raises:
        UsageError: the format is not known, or the video is not tracked to its end.
    """
    stream_id = annotator.stream_id
    if fmt == "prompts":
        text = json.dumps(annotator.project.document.prompt_set().to_record(), indent=1) + "\n"
        return Response(text, media_type="application/json", headers=_named(f"{stream_id}.prompts.json"))
    if fmt not in ("coco", "davis", "workspace", "video"):
        raise UsageError(f"format {fmt!r} is not known: use coco, davis, workspace, video or prompts")
    if not annotator.propagation.is_published(annotator.recipe):
        raise UsageError("the video is not tracked to its end with these prompts: propagate first")
    with tempfile.TemporaryDirectory(prefix="xmem-export-") as folder:
        if fmt == "video":
            name, media_type, path = f"{stream_id}.mp4", "video/mp4", Path(folder) / "overlay.mp4"
            annotator.render(str(path), look or annotator.look("davis"))
        elif fmt == "coco":
            name, media_type, path = f"{stream_id}.coco.json", "application/json", Path(folder) / "coco.json"
            annotator.export(fmt, path)
        else:
            name, media_type = f"{stream_id}.{fmt}.zip", "application/zip"
            annotator.export(fmt, Path(folder) / fmt)
            path = Path(shutil.make_archive(f"{folder}/{fmt}", "zip", Path(folder) / fmt))
        file = path.open("rb")
    size = os.fstat(file.fileno()).st_size
    headers = {**_named(name), "Content-Length": str(size)}
    return _FileResponse(file, media_type, headers)


class _FileResponse(StreamingResponse):
    """Sends an open file in pieces, and closes it, also if the client goes away."""

    def __init__(self, file: IO[bytes], media_type: str, headers: dict[str, str]) -> None:
        super().__init__(_pieces(file), media_type=media_type, headers=headers)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)


def _named(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.read(_PIECE_BYTES):
        yield piece
