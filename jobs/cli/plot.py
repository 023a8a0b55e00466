"""The `xmem plot` command."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli.terminal import say
from pipeline.base.picture_size import MAX_PIXELS
from pipeline.base.redaction import redacted


def plot(
    folder: Annotated[str, typer.Argument(help="Output folder of `xmem track`, `batch` or `serve`.")],
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="Folder for a PNG of each plot and report.html with all."),
    ],
    stream_id: Annotated[
        str | None, typer.Option("--stream-id", help="Stream to plot. Default: the only one in the folder.")
    ] = None,
    video: Annotated[
        str | None,
        typer.Option(help="The tracked video: its first frame is drawn below trajectories and heat map."),
    ] = None,
    zones: Annotated[
        str | None, typer.Option(help="Zones file: zones and lines to draw, occupancy by zone.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Plot only this: presence, trajectories, heat, measures, occupancy; repeatable."),
    ] = None,
    first: Annotated[int, typer.Option(help="First frame.")] = 0,
    last: Annotated[int | None, typer.Option(help="Last frame.")] = None,
    max_pixels: Annotated[
        int, typer.Option(help="Reject pictures with more pixels than this before they are decoded.")
    ] = MAX_PIXELS,
) -> None:
    """Plot one stream: timeline, trajectories, heat map, area and score, occupancy."""
    from pipeline.plots.stream_report import KINDS
    from pipeline.plots.stream_report import plot as plot_stream
    from pipeline.zones.config import load_zones

    written = plot_stream(
        folder,
        output,
        stream_id=stream_id,
        video=video,
        zones=load_zones(zones) if zones is not None else None,
        kinds=only or KINDS,
        first=first,
        last=last,
        max_pixels=max_pixels,
    )
    count = len(written) - 1
    say(f"{count} plot{'' if count == 1 else 's'} and {redacted(written[-1])} written")
