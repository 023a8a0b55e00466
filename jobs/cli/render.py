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
    alpha: Annotated[float, typer.Option(help="Opacity of the masks, 0 to 1.")] = 0.5,
    sheet: Annotated[str | None, typer.Option(help="Also write a contact sheet (PNG).")] = None,
    max_pixels: Annotated[
        int, typer.Option(help="Reject pictures with more pixels than this before they are decoded.")
    ] = MAX_PIXELS,
) -> None:
    """Draw masks, outlines and object ids over a video."""
    from pipeline.draw.render import render as render_tracks

    if not 0 <= alpha <= 1:
        raise UsageError(f"--alpha {alpha} is not allowed: from 0 to 1")
    with frame_bar(short_name(output)) as (progress, task):
        count = render_tracks(
            video,
            folder,
            output,
            stream_id=stream_id,
            first=first,
            last=last,
            alpha=alpha,
            sheet=sheet,
            max_pixels=max_pixels,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    say(
        f"{count} frames written to {redacted(output)}"
        + (f", contact sheet to {redacted(sheet)}" if sheet else "")
    )
