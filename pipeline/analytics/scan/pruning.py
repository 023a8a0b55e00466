"""Skips files and row groups whose statistics rule out every row that a query's condition could match."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Set
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.fs

from pipeline.analytics.scan.listing import Chunk

_GREATEST_KEY = 0x7FF << 52
_TIMES = {"pts_seconds", "wall_time"}
PRUNING = {"stream_id", "frame_index", *_TIMES}


def named_fields(condition: pc.Expression | None, schema: pa.Schema) -> set[str]:
    """Columns that an expression may name. pyarrow tells only its text, where strings may look like names."""
    if condition is None:
        return set()
    words = set(re.findall(r"\w+", str(condition)))
    return {name for name in schema.names if name in words}


def satisfying(condition: pc.Expression, schema: pa.Schema, known: Mapping[str, pc.Expression]) -> list[str]:
    """Those of which a row may fulfil the condition, given what is known of all of their rows."""
    if not known:
        return []
    dataset = ds.FileSystemDataset.from_paths(
        list(known),
        schema=schema,
        format=ds.ParquetFileFormat(),
        filesystem=pyarrow.fs.LocalFileSystem(),  # it opens none of them
        partitions=list(known.values()),
    )
    return [fragment.path for fragment in dataset.get_fragments(filter=condition)]


def bounds_of(condition: pc.Expression, schema: pa.Schema, name: str) -> tuple[float, float]:
    """Values of a column in BOUNDED between which all rows lie that fulfil a condition.

    An expression cannot be taken apart, only be compared with what is known. So both values are searched for,
    until they are as near as 1 in 2 ** 32, or a second.
    """
    field, kind = ds.field(name), schema.field(name).type
    value: Callable[[int], float] = _double if pa.types.is_floating(kind) else int

    def may_hold(known: pc.Expression) -> bool:
        return bool(satisfying(condition, schema, {"0": known}))

    low = _last_false(lambda key: may_hold(field <= pa.scalar(value(key), kind)))
    high = -_last_false(lambda key: may_hold(field >= pa.scalar(value(-key), kind)))
    return value(low), value(high)


def _last_false(test: Callable[[int], bool]) -> int:
    """A key at which a test fails that succeeds soon above it; the least key if it succeeds for all."""
    low, high = -_GREATEST_KEY, _GREATEST_KEY
    if test(low):
        return low
    while high - low > 1 << 20:
        middle = (low + high) // 2
        low, high = (low, middle) if test(middle) else (middle, high)
    return low


def _double(key: int) -> float:
    """Doubles in the order of integers: of 0 it is 0, of `_GREATEST_KEY` infinity."""
    found: tuple[float] = struct.unpack("<d", struct.pack("<q", abs(key)))
    return found[0] if key >= 0 else -found[0]


def prunable(node: Any) -> Any:
    """A filter of DuckDB, equal to the given one, that statistics can be compared with.

    A NaN is greater than all numbers, so that DuckDB's "x > 1" becomes "x > 1 or x is NaN", of which no
    statistics say that it is false. "Not x <= 1" is as true for a NaN, and for a null as unknown.
    """
    from duckdb._sources.nodes import Binary, Unary

    opposite = {">": "<=", ">=": "<"}
    if isinstance(node, Binary) and node.op in ("AND", "OR"):
        return Binary(node.op, prunable(node.left), prunable(node.right))
    if isinstance(node, Unary):
        return Unary(node.op, prunable(node.operand))
    if (
        isinstance(node, Binary)
        and node.op in opposite
        and getattr(node.left, "parts", ())[:1] == ("pts_seconds",)
    ):
        return Unary("NOT", Binary(opposite[node.op], node.left, node.right))
    return node


def known_of(group: Any, names: Set[str] = PRUNING) -> pc.Expression:
    """What the statistics of a row group say of some columns."""
    known = pc.scalar(True)
    for index in range(group.num_columns):
        column = group.column(index)
        stats = column.statistics if column.path_in_schema in names else None
        if stats is not None and stats.has_min_max and stats.null_count == 0:
            field = ds.field(column.path_in_schema)
            known = known & (field >= stats.min) & (field <= stats.max)
    return known


def known_frames(first: Chunk, last: Chunk) -> pc.Expression:
    """What is known of the rows of consecutive chunks."""
    frames = ds.field("frame_index")
    known = (ds.field("stream_id") == first.stream_id) & (frames >= first.first)
    return known if last.following is None else known & (frames < last.following)
