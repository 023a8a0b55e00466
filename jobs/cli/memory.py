"""The `xmem memory` command."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.cli.terminal import say
from pipeline.base.redaction import redacted


def memory(
    folder: Annotated[str, typer.Argument(help="Output folder of `xmem track`, `batch` or `serve`.")],
    stream_id: Annotated[
        str | None, typer.Option("--stream-id", help="Stream to list. Default: the only one in the folder.")
    ] = None,
    thumbnails: Annotated[
        str | None, typer.Option(help="Folder for a PNG of each remembered frame, with its masks.")
    ] = None,
    video: Annotated[
        str | None, typer.Option(help="The tracked video, for thumbnails. Default: that of the record.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List what a stream remembers: frames, objects, use. Reads its newest snapshot."""
    from pipeline.live.remembered import stream_memory, write_thumbnails

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
            str(frame.age),
            frame.kind.replace("_", "-") + (", pinned" if frame.pinned else ""),
            str(frame.elements),
            ", ".join(map(str, frame.objects)),
            ", ".join(map(str, frame.given)),
            f"{frame.use:.2g}",
        )
    Console(highlight=False).print(table)
