"""The `xmem memory` command."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.cli.terminal import say
from pipeline.base.errors import UsageError
from pipeline.base.redaction import redacted


def memory(
    folder: Annotated[str, typer.Argument(help="Output folder of `xmem track`, `batch` or `serve`.")],
    stream_id: Annotated[
        str | None,
        typer.Option("--stream-id", help="Stream to show or edit. Default: the only one."),
    ] = None,
    thumbnails: Annotated[
        str | None, typer.Option(help="Folder for a PNG of each remembered frame, with its masks.")
    ] = None,
    video: Annotated[
        str | None, typer.Option(help="The tracked video, for thumbnails. Default: that of the record.")
    ] = None,
    forget: Annotated[
        str | None, typer.Option(metavar="FIRST:LAST", help="Forget these frames, the last included.")
    ] = None,
    object_id: Annotated[
        int | None,
        typer.Option(
            "--object",
            help="With --forget and --read: only this object. With --copy: id of the new object; default: "
            "its id there.",
        ),
    ] = None,
    pin: Annotated[
        int | None, typer.Option(metavar="FRAME", help="Keep a frame in memory as a whole from now on.")
    ] = None,
    unpin: Annotated[int | None, typer.Option(metavar="FRAME", help="Undo --pin.")] = None,
    read: Annotated[
        str | None,
        typer.Option(
            metavar="FRAME[,X,Y]",
            help="Show which remembered frames the objects were read from on a frame, at a pixel or on their "
            "masks. The video is tracked once more from the snapshot before the frame.",
        ),
    ] = None,
    copy: Annotated[
        int | None,
        typer.Option(
            metavar="OBJECT",
            help="Start an object from what another stream (--from-stream) remembers of it; it is sought.",
        ),
    ] = None,
    from_stream: Annotated[
        str | None, typer.Option(help="With --copy: the stream that remembers the object.")
    ] = None,
    from_state: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="With --copy: output folder of that stream. Default: the same."),
    ] = None,
    category: Annotated[
        str | None,
        typer.Option(help="With --copy: the new object's category. Default: the original's."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List what a stream remembers: frames, objects, use. Or edit it, before the next run goes on from it."""
    from pipeline.memory.editing import edit_memory
    from pipeline.memory.stream_memory import stream_memory, write_thumbnails

    if read is not None:
        if thumbnails is not None or any(edit is not None for edit in (forget, pin, unpin, copy)):
            raise UsageError("--read is a question of its own: give it without edits and --thumbnails")
        return _show_reads(folder, read, object_id, stream_id, video, as_json)
    source = {"object": copy, "stream": from_stream, "out": from_state}
    edit = _edit(forget, object_id, pin, unpin, {k: v for k, v in source.items() if v is not None}, category)
    if edit is not None:
        if thumbnails is not None:
            raise UsageError("--thumbnails is for listing: give it without --copy, --forget, --pin, --unpin")
        at = edit_memory(folder, edit, stream_id)
        if at is None:
            say("nothing changed: the memory is so already")
        else:
            say(f"edited: the next run of the same command tracks frame {at} with the edited memory")
    found = stream_memory(folder, stream_id)
    if thumbnails is not None:
        written = write_thumbnails(found, folder, thumbnails, video=video)
        say(f"{len(written)} thumbnails written to {redacted(thumbnails)}")
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    objects = ", ".join(f"{i} ({c})" if c else str(i) for i, c in found.objects.items()) or "none"
    table = Table(title=Text(f"{found.stream_id}: after frame {found.next_frame - 1}, objects {objects}"))
    for name in ("frame", "age", "kind", "elements", "objects", "prompted", "use"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for frame in found.frames:
        table.add_row(
            "" if frame.frame_index is None else str(frame.frame_index),
            "" if frame.age is None else str(frame.age),
            frame.kind.replace("_", "-") + (", pinned" if frame.pinned else ""),
            str(frame.elements),
            ", ".join(map(str, frame.objects)),
            ", ".join(map(str, frame.given)),
            f"{frame.use:.2g}",
        )
    Console(highlight=False).print(table)
    for waiting in found.edits:
        say(f"waiting for the next run: {json.dumps(waiting)}")


def _show_reads(
    folder: str, read: str, object_id: int | None, stream_id: str | None, video: str | None, as_json: bool
) -> None:
    from pipeline.memory.memory_reads import memory_reads

    match = re.fullmatch(r"(\d{1,15})(?:,(\d{1,9}),(\d{1,9}))?", read)
    if match is None:
        raise UsageError(f"--read {read!r} is not allowed: FRAME, or FRAME,X,Y such as 40,320,180")
    pixel = None if match[2] is None else (int(match[2]), int(match[3]))
    found = memory_reads(folder, int(match[1]), pixel, object_id, stream_id, video=video)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    where = "on their masks" if pixel is None else f"at {pixel[0]},{pixel[1]}"
    table = Table(title=Text(f"{found.stream_id}: frame {found.frame_index}, {where}"))
    for name in ("object", "read from", "kind", "share"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for number, shares in found.objects.items():
        for share in shares:
            frame = "prototypes" if share.frame_index is None else str(share.frame_index)
            table.add_row(str(number), frame, share.kind.replace("_", "-"), f"{share.share:.1%}")
        if not shares:
            table.add_row(str(number), "nothing", "", "")
    Console(highlight=False).print(table)


def _edit(
    forget: str | None,
    object_id: int | None,
    pin: int | None,
    unpin: int | None,
    source: dict[str, Any],
    category: str | None,
) -> Any:
    """The edit that the options ask for; None: list the memory.

    Args:
        source: the object to copy, as `edit_memory` takes it.
    """
    copy = source if "object" in source else None
    asked: dict[str, Any] = {"pin": pin, "unpin": unpin, "forget": forget, "copy": copy}
    asked = {name: value for name, value in asked.items() if value is not None}
    if len(asked) > 1:
        raise UsageError(f"--{' and --'.join(asked)} are edits of their own: give one at a time")
    if object_id is not None and forget is None and copy is None:
        raise UsageError("--object goes with --forget FIRST:LAST or --copy OBJECT")
    if copy is None and (source or category is not None):
        name = "from-stream" if "stream" in source else "from-state" if source else "category"
        raise UsageError(f"--{name} goes with --copy OBJECT")
    if category is not None:
        asked["category"] = category
    if forget is not None:
        match = re.fullmatch(r"(\d{1,15}):(\d{1,15})", forget)
        if match is None:
            raise UsageError(f"--forget {forget!r} is not allowed: FIRST:LAST, such as 40:55")
        asked["forget"] = [int(match[1]), int(match[2])]
    if object_id is not None:
        asked["object"] = object_id
    return asked or None
