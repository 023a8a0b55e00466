"""The `xmem query` and `xmem schema` commands."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer

from pipeline.base.errors import UsageError, XmemError

# Options of the commands that print a result.
FormatOption = Annotated[str, typer.Option("--format", help="Output format: table, csv, json or parquet.")]
OutputOption = Annotated[str | None, typer.Option("--output", "-o", help="Output file. Default: stdout.")]


def query(
    folder: Annotated[str, typer.Argument(help="Output folder of `xmem track` or `xmem batch`.")],
    sql: Annotated[
        str,
        typer.Argument(
            help="SQL query over the views tracks, events, streams, objects, frames, gaps, files."
        ),
    ],
    fmt: FormatOption = "table",
    output: OutputOption = None,
) -> None:
    """Run an SQL query (DuckDB) on an output folder."""
    from pipeline.analytics.query import query as ask

    check_format(fmt)
    write_result(ask(folder, sql), fmt, output)


def check_format(fmt: str) -> None:
    """UsageError for a format that is none; before anything is asked."""
    from pipeline.analytics.formats import FORMATS

    if fmt not in FORMATS:
        raise UsageError(f"--format {fmt!r} is not allowed: table, csv, json or parquet")


def write_result(result: Any, fmt: str, output: str | None) -> None:
    """Write a result (pyarrow.Table) to a file, or to stdout without one."""
    from pipeline.analytics.formats import format_result

    if output is None:
        binary = fmt == "parquet"
        if binary and sys.stdout.isatty():
            raise UsageError("parquet is binary: redirect it, or give --output FILE")
        try:
            format_result(result, fmt, sys.stdout.buffer if binary else sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader has closed the pipe (`| head`); this also silences Python's flush at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    try:
        with open(
            output, "wb" if fmt == "parquet" else "w", encoding=None if fmt == "parquet" else "utf-8"
        ) as file:
            format_result(result, fmt, file)
    except OSError as error:
        raise XmemError(f"{output} cannot be written: {error.strerror or error}") from error


def schema(
    kind: Annotated[str, typer.Argument(help="Kind of file: prompts or zones.")] = "prompts",
) -> None:
    """Print the JSON Schema of a prompts file or a zones file."""
    if kind == "prompts":
        from pipeline.prompts.resolving import prompts_schema

        found = prompts_schema()
    elif kind == "zones":
        from pipeline.zones.config import zones_schema

        found = zones_schema()
    else:
        raise UsageError(f"there is no schema {kind!r}: prompts or zones")
    typer.echo(json.dumps(found, indent=2))
