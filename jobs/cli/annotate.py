"""The `xmem annotate` command: shows a video in the browser, and tracks what is pointed at."""

from __future__ import annotations

import socket
import webbrowser
from contextlib import ExitStack
from functools import partial
from typing import Annotated

import typer

from jobs.cli.options import SAID_BY_SIZE, tracking_options
from jobs.cli.terminal import fetch_model, say
from pipeline.base.errors import UsageError, bare_reason
from pipeline.base.garbage import no_collection
from pipeline.base.redaction import redacted
from pipeline.tracking.settings import TrackSettings

_HOST = "127.0.0.1"
_FIXED = {
    "detector": "objects are pointed at",
    "detect_every": "there is no detector",
    "detect_confirmations": "there is no detector",
    "max_objects": "there is no detector",
    "out_of_sight_frames": "there is no detector",
    "max_frames": "the page pauses where it is told to",
    "snapshot_chunks": "a correction goes on from the chunk before it",
    "keep_state": "a correction goes on from the chunk before it",
    "sinks": "rows may be corrected until they are right",
}


@tracking_options(without=SAID_BY_SIZE | _FIXED)
def annotate(
    video: Annotated[
        str,
        typer.Argument(help="A video file or a folder of images; or, without --out, a folder to go on with."),
    ],
    out: Annotated[str | None, typer.Option(help="Output folder: a path or any fsspec URI.")] = None,
    stream_id: Annotated[
        str | None,
        typer.Option(help="Name of the stream in the output folder. Default: derived from the video's URI."),
    ] = None,
    port: Annotated[int, typer.Option(help="Port to listen on. Default: any free one.")] = 0,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")
    ] = True,
    click_segmenter: Annotated[
        str | None,
        typer.Option(
            help="What makes a mask of clicks: xmem-click (the bundled network; the default), grabcut, or an "
            "installed plugin's name."
        ),
    ] = None,
    imported: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            help="Masks to begin with: a palette PNG, a folder of them named by their frames, a COCO file "
            "or a prompts file; repeatable.",
        ),
    ] = None,
    users: Annotated[
        list[str] | None,
        typer.Option(
            "--user",
            help="Name of a user, who gets a link and a folder OUT/users/NAME; repeatable. Default: one.",
        ),
    ] = None,
    *,
    tracking: TrackSettings,
) -> None:
    """Point at objects in the browser, track them, and correct them.

    The page is served on this machine only. `xmem annotate OUT` goes on where it was left; with --user,
    give the same users.
    """
    with no_collection():
        import uvicorn

        from pipeline.annotate.annotator import Annotator
        from pipeline.annotate.app import create_app
        from pipeline.annotate.users import UserApps, check_users, user_folder
        from pipeline.api.guard import App
        from pipeline.api.tokens import Sessions
        from pipeline.base.malloc import keep_freed_memory
        from pipeline.exchange.masks_as_prompts import read_masks_as_prompts

    check_users(users or ())
    keep_freed_memory()
    fetch_model(tracking.model.name)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((_HOST, port))
        except (OSError, OverflowError) as error:
            raise UsageError(f"port {port} cannot be used: {bare_reason(error)}; choose another") from error
        address = f"http://{_HOST}:{listening.getsockname()[1]}/"
        root = out or video
        folders = {name: user_folder(root, name) for name in users or ()} or {"": root}
        with ExitStack() as open_ones:
            apps: dict[str, App] = {}
            links: list[str] = []
            for name, folder in folders.items():
                annotator = open_ones.enter_context(
                    Annotator(
                        None if out is None else video,
                        folder,
                        stream_id,
                        tracking,
                        click_segmenter=click_segmenter,
                    )
                )
                for path in imported or ():
                    annotator.add_prompts(*read_masks_as_prompts(path, stream_id=annotator.stream_id))
                page = f"{address}{name}/" if name else address
                sessions = Sessions(partial(_say_again, page))
                apps[name] = create_app(annotator, sessions)
                links.append(f"{page}#code={sessions.code}")
                say(f"annotating {redacted(annotator.video)} into {redacted(annotator.root)}; Ctrl-C ends it")
                say(f"open {links[-1]}")
            if browser and not users:
                webbrowser.open(links[0])
            app = UserApps(apps) if users else apps[""]
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
            uvicorn.Server(config).run([listening])
    say(f"xmem annotate {redacted(root)} goes on from here")


def _say_again(page: str, code: str) -> None:
    say(f"to open the page again: {page}#code={code}")
