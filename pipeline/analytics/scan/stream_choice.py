"""Chooses the streams to read for a statement by conditions on `stream_id` that DuckDB does not push down.

DuckDB offers comparisons with constants to a scan, but neither patterns (LIKE, regular expressions) nor what
a join with `streams` leaves. Here its own parser gives the statement as a tree. A condition of a WHERE that
all rows of a view must fulfil, and that names nothing but its `stream_id`, is evaluated over the ids of all
streams: what is left out would not have passed its conditions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from pipeline.analytics.scan.listing import Listing

DATASETS_OF = {
    "tracks": "tracks",
    "masks": "tracks",
    "objects": "tracks",
    "events": "events",
    "gaps": "events",
    "frames": "frames",
    "files": "files",
}
"""The dataset from which each view reads."""
_VIEWS = {*DATASETS_OF, "streams"}
_WORTH = re.compile(
    r"like|glob|similar|starts_with|prefix|ends_with|suffix|contains|regexp|~|\bjoin\b|lower|upper|split_part"
    r"|substr|left|right",
    re.IGNORECASE,
)
_FUNCTIONS = {
    "~~", "!~~", "~~*", "!~~*", "~~~", "like_escape", "not_like_escape", "ilike_escape", "not_ilike_escape",
    "prefix", "starts_with", "suffix", "ends_with", "contains", "regexp_matches", "regexp_full_match",
    "regexp_extract", "lower", "upper", "substr", "substring", "left", "right", "split_part", "replace",
    "length", "strpos", "concat", "||", "->", "->>", "^@",
}  # fmt: skip
"""Functions whose results depend on their arguments alone."""
_CLASSES = {
    "COLUMN_REF", "CONSTANT", "FUNCTION", "OPERATOR", "COMPARISON", "CONJUNCTION", "BETWEEN", "CAST", "TYPE",
}  # fmt: skip

Node = dict[str, Any]


def needed_streams(
    connection: duckdb.DuckDBPyConnection,
    statement: str,
    listing: Listing,
    columns: Callable[[str], Sequence[str]],
    *,
    compared: bool = False,
) -> dict[str, frozenset[str]]:
    """The streams that a statement can need of each dataset; datasets of which it may need all are left out.

    Args:
        connection: has the views.
        listing: has all streams.
        columns: gives the names of a view's columns, in lower case.
        compared: look at comparisons too, which DuckDB offers to scans.
    """
    if not compared and not _WORTH.search(statement):
        return {}
    _, found = _parsed_and_found(connection, statement, listing, columns)
    return {name: frozenset().union(*(use.streams for use in uses)) for name, uses in found.items()}


def narrowed(
    connection: duckdb.DuckDBPyConnection,
    statement: str,
    listing: Listing,
    columns: Callable[[str], Sequence[str]],
) -> str:
    """The statement with its `needed_streams` as conditions `stream_id IN (...)`, which scans are given.

    They exclude only rows that do not fulfil its own conditions. For statements that are run later.
    """
    if not _WORTH.search(statement):
        return statement
    tree, found = _parsed_and_found(connection, statement, listing, columns)
    if not found:
        return statement
    for use in (use for uses in found.values() for use in uses):
        alias = use.leaf["alias"] or use.leaf["table_name"]
        ids = ", ".join(f"'{stream_id}'" for stream_id in sorted(use.streams)) or "''"
        quoted = str(alias).replace('"', '""')
        extra = statement_tree(connection, f'SELECT 1 FROM x WHERE 1 AND "{quoted}".stream_id IN ({ids})')
        both = extra["statements"][0]["node"]["where_clause"]
        both["children"][0] = use.select["where_clause"]
        use.select["where_clause"] = both
    (text,) = connection.execute("SELECT json_deserialize_sql(?::JSON)", [json.dumps(tree)]).fetchall()[0]
    return str(text)


def statement_tree(connection: duckdb.DuckDBPyConnection, statement: str) -> Node:
    """A statement as DuckDB's parser sees it; its entry `error` is true if it is no SELECT."""
    (text,) = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [statement]).fetchall()[0]
    tree: Node = json.loads(text)
    return tree


def streams_use(statement: str, parse: Callable[[str], Node]) -> bool | None:
    """Whether a statement may need the column `next_frame` of the view `streams`; None if not even that view.

    Args:
        parse: gives a statement's tree, or {}.
    """
    if not re.search(r"\bstreams\b", statement, re.IGNORECASE):
        return None
    tree = parse(statement)
    if tree.get("error", True):  # no SELECT
        return True
    nodes = list(tree_nodes(tree))
    leaves = [node for node in nodes if _table(node) == "streams"]
    if not leaves:
        return None
    # A table's name as a column is a whole row.
    needed = {"next_frame", "streams", *map(_alias, leaves)}
    named = {names[-1] for names in map(column_names, nodes) if names}
    return not named.isdisjoint(needed) or any(node.get("class") == "STAR" for node in nodes)


@dataclass(frozen=True)
class _Use:
    """A use of a dataset in a statement: its table in a SELECT, and the streams that it can need."""

    select: Node
    leaf: Node
    streams: frozenset[str]


def _parsed_and_found(
    connection: duckdb.DuckDBPyConnection,
    statement: str,
    listing: Listing,
    columns: Callable[[str], Sequence[str]],
) -> tuple[Node, dict[str, list[_Use]]]:
    """A statement's tree, and all uses of datasets of which it does not need all streams."""
    try:
        tree = statement_tree(connection, statement)
        if tree["error"]:
            return {}, {}
        return tree, _found(connection, tree["statements"][0]["node"], listing.tracked, columns)
    except (
        duckdb.Error,
        KeyError,
        TypeError,
    ):  # another version's tree, or a condition that cannot be evaluated
        return {}, {}


def _found(
    connection: duckdb.DuckDBPyConnection,
    root: Node,
    ids: Sequence[str],
    columns: Callable[[str], Sequence[str]],
) -> dict[str, list[_Use]]:
    nodes = list(tree_nodes(root))
    uses = [DATASETS_OF.get(_table(node), "") for node in nodes if node.get("type") == "BASE_TABLE"]
    if any(str(entry.get("key", "")).lower() in _VIEWS for node in nodes for entry in _entries(node)):
        return {}  # a name of a view that is something else
    found: dict[str, list[_Use]] = {}
    for node in nodes:
        if node.get("type") != "SELECT_NODE" or not node.get("where_clause"):
            continue
        leaves = list(_leaves(node["from_table"]))
        conditions = [c for c in _conjuncts(node["where_clause"]) if _is_plain(c)]
        for leaf in leaves:
            dataset = DATASETS_OF.get(_table(leaf))
            if dataset is None:
                continue
            if leaf.get("sample") or node.get("sample") or leaf.get("column_name_alias"):
                continue
            own = [c for c in conditions if _refers(c, leaf, ["stream_id"], only=len(leaves) == 1)]
            chosen = {*ids}
            if own:
                chosen &= _passing(connection, leaf, own, "_stream_ids", ids)
            other = _joined_streams(node["from_table"], leaf)
            if other is not None:
                names = columns("streams")
                shared = {*names} - {*columns(_table(leaf))}
                theirs = [c for c in conditions if _refers(c, other, names, shared=shared)]
                if theirs:
                    chosen &= _passing(connection, other, theirs, "streams", ids)
            if len(chosen) < len(ids):
                found.setdefault(dataset, []).append(_Use(node, leaf, frozenset(chosen)))
    return {dataset: some for dataset, some in found.items() if len(some) == uses.count(dataset)}


def _passing(
    connection: duckdb.DuckDBPyConnection,
    leaf: Node,
    conditions: Sequence[Node],
    table: str,
    ids: Sequence[str],
) -> set[str]:
    """The streams that fulfil conditions; all if a null would, as outer joins make them."""
    tree = statement_tree(connection, "SELECT stream_id FROM x AS y WHERE 1 AND 2")
    node = tree["statements"][0]["node"]
    node["from_table"] |= {"alias": leaf["alias"] or leaf["table_name"], "table_name": table}
    if "qualified_name" in node["from_table"]:
        node["from_table"]["qualified_name"] = {"path": [table]}
    node["where_clause"] = (
        conditions[0] if len(conditions) == 1 else node["where_clause"] | {"children": list(conditions)}
    )
    (sql,) = connection.execute("SELECT json_deserialize_sql(?::JSON)", [json.dumps(tree)]).fetchall()[0]
    if table == "streams":
        return {row[0] for row in connection.execute(sql).fetchall()}
    connection.register(table, pa.table({"stream_id": pa.array([*ids, None], pa.string())}))
    try:
        found = {row[0] for row in connection.execute(sql).fetchall()}
    finally:
        connection.unregister(table)
    return {*ids} if None in found else found


def _joined_streams(node: Node, leaf: Node) -> Node | None:
    """The view `streams`, if it is all that a table is joined with, on equal `stream_id`."""
    if node.get("type") != "JOIN" or node.get("join_type") != "INNER" or node.get("ref_type") != "REGULAR":
        return None
    sides = node["left"], node["right"]
    if any(side.get("type") != "BASE_TABLE" for side in sides) or leaf not in sides:
        return None
    other: Node = sides[1] if sides[0] is leaf else sides[0]
    if _table(other) != "streams" or other.get("sample") or other.get("column_name_alias"):
        return None
    if [name.lower() for name in node.get("using_columns") or []] == ["stream_id"]:
        return other
    condition = node.get("condition") or {}
    if condition.get("type") == "COMPARE_EQUAL":
        names = {column_names(condition["left"]), column_names(condition["right"])}
        if names == {(_alias(leaf), "stream_id"), (_alias(other), "stream_id")}:
            return other
    return None


def _refers(
    condition: Node, leaf: Node, names: Sequence[str], *, only: bool = False, shared: set[str] | None = None
) -> bool:
    """Whether a condition names columns, and those all of one table.

    Args:
        names: columns that it may name.
        only: the table is the only one, so that columns need no table's name.
        shared: columns that need none though there are others.
    """
    columns = [column_names(node) for node in tree_nodes(condition) if node.get("class") == "COLUMN_REF"]
    free = {*names} if only else shared or set()
    return bool(columns) and all(
        (len(column) == 1 and column[0] in free)
        or (len(column) == 2 and column[0] == _alias(leaf) and column[1] in names)
        for column in columns
    )


def _is_plain(condition: Node) -> bool:
    """Whether a condition is made of columns, constants and functions that are always the same."""
    for node in tree_nodes(condition):
        kind = node.get("class")
        if kind is not None and kind not in _CLASSES:
            return False
        if kind == "FUNCTION" and node["function_name"].lower() not in _FUNCTIONS:
            return False
    return True


def _conjuncts(node: Node) -> Iterator[Node]:
    if node.get("type") == "CONJUNCTION_AND":
        for child in node["children"]:
            yield from _conjuncts(child)
    else:
        yield node


def _leaves(node: Node) -> Iterator[Node]:
    """The tables of a FROM clause."""
    if node.get("type") == "JOIN":
        yield from _leaves(node["left"])
        yield from _leaves(node["right"])
    else:
        yield node


def tree_nodes(value: Any) -> Iterator[Node]:
    """All objects of a tree."""
    pending = [value]
    while pending:
        current = pending.pop()
        if isinstance(current, dict):
            yield current
            pending.extend(current.values())
        elif isinstance(current, list):
            pending.extend(current)


def _entries(node: Node) -> list[Node]:
    found = node.get("cte_map")
    return list(found["map"]) if isinstance(found, dict) else []


def _table(node: Node) -> str:
    return str(node.get("table_name", "")).lower() if node.get("type") == "BASE_TABLE" else ""


def _alias(leaf: Node) -> str:
    return str(leaf["alias"] or leaf["table_name"]).lower()


def column_names(node: Node) -> tuple[str, ...]:
    """The parts of a column's name in lower case; none of what is no column."""
    return tuple(str(name).lower() for name in node.get("column_names", ()))
