"""The `xmem export` and `xmem import` commands."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.cli.terminal import say


def export(
    folder: Annotated[str, typer.Argument(help="Output folder of `xmem track`, `batch` or `serve`.")],
    output: Annotated[str, typer.Option("--output", "-o", help="File or folder to write; must not exist.")],
    fmt: Annotated[
        str,
        typer.Option(
            "--format",
            help="Format: coco, youtube-vis, mot, mots, davis, workspace, burst, cvat, labelstudio, "
            "supervision or geojson.",
        ),
    ] = "coco",
    streams: Annotated[
        list[str] | None,
        typer.Option("--stream-id", help="Stream id or pattern to export; repeatable. Default: all."),
    ] = None,
) -> None:
    """Write the tracks of an output folder in another tool's format."""
    from pipeline.exchange.export import export as write

    done = write(folder, fmt, output, streams=streams or ())
    say(f"{done.streams} streams, {done.frames} frames, {done.rows} masks written to {output}")


def import_tracks(
    path: Annotated[str, typer.Argument(help="File or folder to read.")],
    out: Annotated[str, typer.Option("--out", help="Output folder to write to.")],
    fmt: Annotated[str, typer.Option("--format", help="Format: coco, mots or davis.")] = "coco",
    frame_rate: Annotated[
        float | None, typer.Option("--frame-rate", help="Frames per second, for the times of frames.")
    ] = None,
) -> None:
    """Write another tool's tracks into an output folder."""
    from pipeline.exchange.importing import import_tracks as read

    done = read(path, fmt, out, frame_rate=frame_rate)
    say(f"{done.streams} streams, {done.frames} frames, {done.rows} rows written to {out}")
