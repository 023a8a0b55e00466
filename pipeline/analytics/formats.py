"""Query results as a table, one column per line, CSV, JSON or Parquet."""

from __future__ import annotations

import base64
import csv
import json
import math
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.base.errors import UsageError

FORMATS = ("table", "vertical", "csv", "json", "parquet")
MAX_TABLE_ROWS = 200
MAX_VERTICAL_LINES = 1000
PAGED = 10
"""So many times more is written where it can be paged."""
_MAX_CELL = 60
_BATCH_ROWS = 4096
_UNBOUNDED = 1_000_000


def format_result(table: pa.Table, fmt: str, out: IO[Any], *, paged: bool = False) -> None:
    """Writes a query's result to a stream.

    Args:
        table: of `query`.
        fmt: "table" (at most `MAX_TABLE_ROWS` rows and 60 characters a cell), "vertical" (a line for each
            column of a row, whole values, about `MAX_VERTICAL_LINES` lines), "csv" (with a header, nulls
            empty), "json" (one array with an object a row) or "parquet". The first two say how many rows
            they left out, and on a terminal how many there are.
        out: a text stream; for Parquet a binary one. Times are ISO 8601 in UTC, whole numbers exact. A table
            that is wider than the terminal is written vertically; in a pipe or file each of its rows is one
            line of plain characters.
        paged: whether `out` is a pager: tables then have up to `PAGED` times as many rows.

    Raises:
        UsageError: no such format.
    """
    table = _distinct_names(table)
    if fmt == "table":
        _write_table(table, out, PAGED if paged else 1)
    elif fmt == "vertical":
        _write_vertical(table, out, PAGED if paged else 1)
    elif fmt == "csv":
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(table.schema.names)
        writer.writerows([_csv_cell(v) for v in row] for row in _rows(table))
    elif fmt == "json":
        out.write("[")
        for i, row in enumerate(_rows(table)):
            line = dict(zip(table.schema.names, row, strict=True))
            out.write((",\n " if i else "\n ") + json.dumps(line, ensure_ascii=False, allow_nan=False))
        out.write("\n]\n" if table.num_rows else "]\n")
    elif fmt == "parquet":
        pq.write_table(table, out, compression="zstd")
    else:
        raise UsageError(f"format {fmt!r} is not known: use {', '.join(FORMATS)}")


def _distinct_names(table: pa.Table) -> pa.Table:
    """`SELECT a.x, b.x` has two columns x; JSON objects and Parquet readers need two names."""
    names: list[str] = []
    for name in table.schema.names:
        count, new = 1, name
        while new in names:
            new, count = f"{name}_{count}", count + 1
        names.append(new)
    return table.rename_columns(names)


def _rows(table: pa.Table) -> Iterator[list[Any]]:
    """The rows as values that JSON knows."""
    for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
        columns = [[_plain(value) for value in column.to_pylist()] for column in batch.columns]
        yield from (list(row) for row in zip(*columns, strict=True))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, (date, time)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)


def _csv_cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    return value


def _write_table(table: pa.Table, out: IO[str], factor: int) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = _console(out)
    terminal = console.is_terminal
    style = box.HEAVY_HEAD if terminal else box.ASCII
    shown = Table(box=style, show_edge=False, pad_edge=False)
    for field in table.schema:
        numeric = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        right = numeric or pa.types.is_decimal(field.type)
        shown.add_column(Text(field.name), justify="right" if right else "left", overflow="fold")
    most = MAX_TABLE_ROWS * factor
    for row in _rows(table.slice(0, most)):
        shown.add_row(*[Text(_shorten(value)) for value in row])
    if terminal and console.measure(shown, options=console.options.update(width=_UNBOUNDED)).maximum > (
        console.width
    ):
        _write_vertical(table, out, factor)
        return
    console.print(shown)
    _write_count(console, table.num_rows, min(table.num_rows, most))


def _write_vertical(table: pa.Table, out: IO[str], factor: int) -> None:
    from rich.text import Text

    console = _console(out)
    names = table.schema.names
    widest = max((len(name) for name in names), default=0)
    shown = min(table.num_rows, max(1, factor * MAX_VERTICAL_LINES // (len(names) + 1)))
    for number, row in enumerate(_rows(table.slice(0, shown)), start=1):
        console.print(f"row {number}".ljust(widest, "-"), style="dim", markup=False, highlight=False)
        for name, value in zip(names, row, strict=True):
            text = " ".join(_cell(value).split())
            console.print(Text(f"{name.ljust(widest)}  {text}".rstrip()), soft_wrap=True)
    _write_count(console, table.num_rows, shown)


def _console(out: IO[str]) -> Any:
    """A rich console on a stream. If its reader is gone, rich itself would end the process."""
    from rich.console import Console

    class Own(Console):
        def on_broken_pipe(self) -> None:
            raise  # what it handles

    console = Own(file=out)
    # A pipe or file has no width: rich would assume 80 columns, and fold or cut cells to fit.
    return console if console.is_terminal else Own(file=out, width=_UNBOUNDED)


def _write_count(console: Any, rows: int, shown: int) -> None:
    """How many rows there are, on a terminal, and how many of them were left out."""
    if shown < rows:
        text = f"{rows - shown} of {rows} rows left out: add LIMIT, or use --format csv"
    elif console.is_terminal:
        text = f"{rows} row{'' if rows == 1 else 's'}"
    else:
        return
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _cell(value: Any) -> str:
    return "" if value is None else str(_csv_cell(value))


def _shorten(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else _cell(value)
    text = " ".join(text.split())
    return text if len(text) <= _MAX_CELL else text[: _MAX_CELL - 3] + "..."
