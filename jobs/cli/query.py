"""The `xmem query` and `xmem schema` commands."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from jobs.cli.pager import paged
from pipeline.base.errors import UsageError, XmemError

_MANY_FILES = 1000
"""From so many small files on, a query says that compacting would make it faster."""

# Options of the commands that print a result.
FormatOption = Annotated[
    str, typer.Option("--format", help="Output format: table, vertical, csv, json or parquet.")
]
OutputOption = Annotated[str | None, typer.Option("--output", "-o", help="Output file. Default: stdout.")]


class QueryCommand(TyperCommand):
    """A command whose arguments may be SQL that begins with a comment (`-- ...`)."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # No option has white space in its name. SQL may as well begin with a blank.
        return super().parse_args(ctx, [f" {a}" if re.match(r"--(\s|[^=]*\s)", a) else a for a in args])


def query(
    folder: Annotated[str, typer.Argument(help="Output folder of `xmem track` or `xmem batch`.")],
    sql: Annotated[
        str | None,
        typer.Argument(
            help="SQL query over the views tracks, events, streams, objects, frames, gaps, files, masks; "
            "-: read it from stdin."
        ),
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", "-f", help="File with the SQL query. -: stdin.")
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="Memory for sorting, joining and grouping, such as 2GB. Default: 80 % of the machine's."
        ),
    ] = None,
    fmt: FormatOption = "table",
    output: OutputOption = None,
) -> None:
    """Run an SQL query (DuckDB) on an output folder."""
    from pipeline.analytics.archive import Archive

    check_format(fmt)
    statement = _statement(sql, file)
    with Archive(folder, memory_limit=memory_limit) as archive:
        result = archive.arrow(statement)
        small_files = archive.small_files
    write_result(result, fmt, output)
    if small_files >= _MANY_FILES and sys.stderr.isatty():
        typer.echo(
            f"xmem: {small_files:,} small files were read: `xmem compact {folder}` copies their rows into "
            "few files, which are read in a fraction of the time",
            err=True,
        )


def _statement(sql: str | None, file: str | None) -> str:
    """The statement of an argument, a file or stdin."""
    if (sql is None) == (file is None):
        given = "both a query and --file are" if sql is not None else "no query is"
        raise UsageError(f"{given} given: give SQL as an argument, --file FILE, or - to read it from stdin")
    if "-" in (sql, file):
        return sys.stdin.read()
    if file is None:
        return sql or ""
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise UsageError(f"--file {file} cannot be read: {reason}") from error


def check_format(fmt: str) -> None:
    """UsageError for a format that is none; before anything is asked."""
    from pipeline.analytics.formats import FORMATS

    if fmt not in FORMATS:
        raise UsageError(f"--format {fmt!r} is not allowed: {', '.join(FORMATS)}")


def write_result(result: Any, fmt: str, output: str | None) -> None:
    """Write a result (pyarrow.Table) to a file, or to stdout, with a pager on too small a terminal."""
    from pipeline.analytics.formats import format_result

    if output is None:
        binary = fmt == "parquet"
        if binary and sys.stdout.isatty():
            raise UsageError("parquet is binary: redirect it, or give --output FILE")
        try:
            if binary:
                format_result(result, fmt, sys.stdout.buffer)
            else:
                with paged(sys.stdout) as (out, pages):
                    format_result(result, fmt, out, paged=pages)
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
