"""The `xmem zones` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from jobs.cli.query import FormatOption, OutputOption, check_format, write_result


def zones(
    folder: Annotated[str, typer.Argument(help="Output folder of `xmem track`, `batch` or `serve`.")],
    file: Annotated[
        str, typer.Argument(metavar="ZONES", help="Zones file; see `xmem schema zones`. -: stdin.")
    ],
    sql: Annotated[
        str | None,
        typer.Argument(
            help="SQL query over the views visits, crossings, encounters, motion, occupancy, flow, inside, "
            "and those of `xmem query`. Default: a row per zone and line."
        ),
    ] = None,
    streams: Annotated[
        list[str] | None,
        typer.Option("--stream-id", help="Stream id or pattern to read; repeatable. Default: all."),
    ] = None,
    period: Annotated[float, typer.Option("--period", help="Seconds of a row of occupancy and flow.")] = 60.0,
    fmt: FormatOption = "table",
    output: OutputOption = None,
) -> None:
    """Ask who was in a zone, for how long, and who crossed a line."""
    from pipeline.analytics.zones import SUMMARY, query_zones
    from pipeline.zones.config import load_zones, read_zones

    check_format(fmt)
    chosen = read_zones(sys.stdin.buffer.read(), "stdin") if file == "-" else load_zones(file)
    result = query_zones(folder, chosen, sql or SUMMARY, streams=streams or (), period_seconds=period)
    write_result(result, fmt, output)
