"""The `xmem query` and `xmem schema` commands."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

from pipeline.base.errors import UsageError, XmemError


def query(
    folder: Annotated[str, typer.Argument(help="Output folder of `xmem track` or `xmem batch`.")],
    sql: Annotated[str, typer.Argument(help="SQL query over the views tracks, events and streams.")],
    fmt: Annotated[
        str, typer.Option("--format", help="Output format: table, csv, json or parquet.")
    ] = "table",
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Output file. Default: stdout.")
    ] = None,
) -> None:
    """Run an SQL query (DuckDB) on an output folder."""
    from pipeline.analytics.query import format_result
    from pipeline.analytics.query import query as ask

    if fmt not in ("table", "csv", "json", "parquet"):
        raise UsageError(f"--format {fmt!r} is not allowed: table, csv, json or parquet")
    result = ask(folder, sql)
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


def schema() -> None:
    """Print the JSON Schema of a prompts file."""
    from pipeline.prompts.resolving import prompts_schema

    typer.echo(json.dumps(prompts_schema(), indent=2))
