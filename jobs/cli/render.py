"""The `xmem render` command: draws masks over a video."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli.terminal import frame_bar, say, short_name
from pipeline.base.errors import UsageError
from pipeline.base.picture_size import MAX_PIXELS
from pipeline.base.redaction import redacted


def render(
    video: Annotated[str, typer.Argument(help="The tracked video; of several joined: 'join:a.mp4;b.mp4'.")],
    folder: Annotated[str, typer.Argument(help="Output folder of `xmem track`.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Overlay video to write: .mp4, .mkv, .webm, ...")
    ],
    stream_id: Annotated[
        str | None,
        typer.Option(help="Stream to draw. Default: the video's own, or the only one in the folder."),
    ] = None,
    first: Annotated[int, typer.Option(help="First frame.")] = 0,
    last: Annotated[int | None, typer.Option(help="Last frame.")] = None,
    overlay: Annotated[
        str,
        typer.Option(
            help="davis (masks tinted), fade (the rest darker), light (a faint tint), popup (all but the "
            "objects is grey), or layered (--layer behind or before the objects)."
        ),
    ] = "davis",
    opacity: Annotated[
        float | None,
        typer.Option(
            help="Opacity of the tint, of the grey or of the layer, 0 to 1. Default: 0.5; light 0.1; popup "
            "and layered 1."
        ),
    ] = None,
    outline: Annotated[
        bool | None,
        typer.Option("--outline/--no-outline", help="Draw outlines. Default: except with popup and layered."),
    ] = None,
    ids: Annotated[
        bool | None,
        typer.Option("--ids/--no-ids", help="Draw ids and categories. Default: as for outlines."),
    ] = None,
    objects: Annotated[
        list[int] | None, typer.Option("--object", help="Id of an object to draw; repeatable. Default: all.")
    ] = None,
    colours: Annotated[
        list[str] | None, typer.Option("--colour", help="Colour of an object: id:#rrggbb; repeatable.")
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(help="Picture with an alpha channel for --overlay layered; scaled to the frames."),
    ] = None,
    layer_place: Annotated[
        str, typer.Option(help="Where the layer lies: behind the objects, or before them.")
    ] = "behind",
    sheet: Annotated[str | None, typer.Option(help="Also write a contact sheet (PNG).")] = None,
    max_pixels: Annotated[
        int, typer.Option(help="Reject pictures with more pixels than this before they are decoded.")
    ] = MAX_PIXELS,
) -> None:
    """Draw masks, outlines and object ids over a video."""
    from pipeline.draw.render import render as render_tracks

    with frame_bar(short_name(output)) as (progress, task):
        count = render_tracks(
            video,
            folder,
            output,
            stream_id=stream_id,
            first=first,
            last=last,
            overlay=overlay,
            opacity=opacity,
            outlines=outline,
            ids=ids,
            objects=objects,
            colours=dict(map(_colour, colours or ())),
            layer=layer,
            layer_place=layer_place,
            sheet=sheet,
            max_pixels=max_pixels,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    say(
        f"{count} frames written to {redacted(output)}"
        + (f", contact sheet to {redacted(sheet)}" if sheet else "")
    )


def _colour(text: str) -> tuple[int, str]:
    object_id, separator, colour = text.partition(":")
    if not separator or not object_id.isascii() or not object_id.isdigit():
        raise UsageError(f"--colour {text!r} is not of the form id:#rrggbb")
    return int(object_id), colour
