"""An output folder that is opened for questions: SQL, pyarrow, pandas and polars, and masks as arrays.

DuckDB's views are pyarrow datasets (`pipeline.analytics.scan.dataset`). DuckDB itself opens no file and no
socket: its access to both is switched off and the configuration locked, so a statement can only read these
views.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs
from numpy.typing import NDArray

from pipeline.analytics.compacted_tracks import TRIES, CompactedTracks
from pipeline.analytics.mask_functions import MASKS_SQL, MaskFunctions
from pipeline.analytics.scan.dataset import ChunkDataset, chunk_fragments
from pipeline.analytics.scan.listing import Listing
from pipeline.analytics.scan.stream_choice import narrowed, needed_streams, statement_tree, streams_use
from pipeline.analytics.streams import streams_table
from pipeline.analytics.views import GAPS_SQL, OBJECTS_SQL, FileDataset, FrameDataset
from pipeline.base.errors import StoreError, UsageError, XmemError
from pipeline.base.records import EVENTS_SCHEMA, TRACKS_SCHEMA
from pipeline.storage.opening import open_files
from pipeline.tracks.masks import rle_to_mask

if TYPE_CHECKING:
    import pandas
    import polars

VIEWS = ("tracks", "events", "streams", "objects", "frames", "gaps", "files", "masks")
DATASETS = {"tracks": TRACKS_SCHEMA, "events": EVENTS_SCHEMA}
_SETTINGS = (
    "autoinstall_known_extensions=false",
    "autoload_known_extensions=false",
    "python_enable_replacements=false",
    "TimeZone='UTC'",
)
_LAST_SETTINGS = ("enable_external_access=false", "lock_configuration=true")
_ALLOWED = (
    duckdb.StatementType.SELECT,
    duckdb.StatementType.EXPLAIN,
    duckdb.StatementType.PRAGMA,
    duckdb.StatementType.CALL,
    duckdb.StatementType.MULTI,  # PIVOT
)


class Archive:
    """The streams of an output folder, as they were committed when they were first read.

        with open_archive("s3://bucket/tracks") as archive:
            table = archive.arrow("SELECT * FROM tracks WHERE stream_id = 'gate'")
            masks = archive.masks(table)

    `sql`, `arrow`, `pandas` and `polars` take one SQL statement over the views of `connect` (docs/query.md).

    Args:
        root, storage_options: the output folder and fsspec's options for it.
        memory_limit: how much memory DuckDB may take for sorting, joining and grouping, such as "2GB"; None:
            80 % of the machine's. What is read at a time and the result come on top of it.
        tables: further views by name.

    Raises:
        UsageError: the folder is not an output folder, or the memory limit is not a size.
        StoreError: the folder cannot be read.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        storage_options: Mapping[str, Any] | None = None,
        *,
        memory_limit: str | None = None,
        tables: Mapping[str, pa.Table] | None = None,
    ) -> None:
        self._limit = _checked_limit(memory_limit)
        self._listing = Listing(open_files(root, storage_options))
        self._views: tuple[str, ...] = VIEWS
        self._has_streams = False
        self._connection = connection = duckdb.connect(":memory:")
        if memory_limit is not None:
            connection.execute(f"SET memory_limit = '{memory_limit}'")
        self._functions = MaskFunctions(connection)
        self._copies = CompactedTracks(connection, self._listing)
        for setting in (*_SETTINGS, *self._copies.settings, *_LAST_SETTINGS):
            connection.execute(f"SET {setting}")
        self._datasets: dict[str, ChunkDataset] = {
            **{kind: ChunkDataset(self._listing, kind, schema) for kind, schema in DATASETS.items()},
            "frames": FrameDataset(self._listing),
            "files": FileDataset(self._listing),
        }
        for name, source in self._datasets.items():
            connection.register(self._copies.own_name if name == "tracks" else name, source)
        self._copies.make_view(self._datasets["tracks"])
        for view in (OBJECTS_SQL, GAPS_SQL, MASKS_SQL):
            connection.execute(view)
        self.add_tables(tables or {})

    def __repr__(self) -> str:
        return f"Archive({self.root!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the DuckDB connection."""
        self._connection.close()
        self._copies.close()

    @property
    def root(self) -> str:
        """The output folder."""
        return self._listing.files.root

    @property
    def listing(self) -> Listing:
        """The folder's files."""
        return self._listing

    def add_tables(self, tables: Mapping[str, pa.Table]) -> None:
        """Further views by name."""
        for name, table in tables.items():
            self._connection.register(name, table)
        self._views = (*self._views, *tables)

    def tree(self, statement: str) -> dict[str, Any]:
        """A statement as DuckDB's parser sees it; {} if it is not one SELECT."""
        try:
            return statement_tree(self._connection, statement)
        except duckdb.Error:
            return {}

    @property
    def streams(self) -> list[str]:
        """Ids of all streams, sorted."""
        return self._listing.streams

    @property
    def small_files(self) -> int:
        """Files of single chunks that statements have needed: what `xmem compact` makes few of."""
        return sum(dataset.small_files for dataset in self._datasets.values() if dataset.reads_copies)

    @property
    def connection(self) -> duckdb.DuckDBPyConnection:
        """The DuckDB connection, for statements of any kind; it keeps tables that are created in it.

        Its statements choose files by comparisons of `stream_id` (`=`, `IN`, `<`), `sql` and `arrow` by
        patterns and joins with `streams`, too.
        """
        self._listing.chunks()  # what is committed from now on is not seen
        self._register_streams()
        try:
            self._copies.keep()
        except duckdb.Error as error:
            raise self._failure(error) from error
        return self._connection

    def sql(self, statement: str) -> Any:
        """A statement as a DuckDB relation: run when its rows are asked for; it can be queried further.

        Raises:
            UsageError: it is not one statement that only reads, or DuckDB rejects it. Failures while its rows
                are read later are errors of DuckDB.
        """
        self._parsed(statement)
        try:
            self._copies.keep()
            return self._connection.sql(narrowed(self._connection, statement, self._listing, self._columns))
        except duckdb.Error as error:
            raise self._failure(error) from error

    def arrow(self, statement: str) -> pa.Table:
        """The result of a statement as a pyarrow Table.

        Raises:
            UsageError: it is not one statement that only reads, DuckDB rejects it (its message is included),
                or it needs more than `memory_limit`.
            StoreError: a file that it needs is missing, damaged or foreign, or cannot be read.
        """
        parsed = self._parsed(statement)
        self._functions.failure = None
        compared = self._copies.may_hold
        chosen = needed_streams(self._connection, statement, self._listing, self._columns, compared=compared)
        try:
            for name, dataset in self._datasets.items():
                dataset.only = chosen.get(name)
            for left in reversed(range(TRIES)):
                for dataset in self._datasets.values():
                    dataset.failure = None
                try:
                    self._copies.choose(chosen.get("tracks"), none=not left)
                    return self._connection.sql(parsed).to_arrow_table()
                except duckdb.Error as error:
                    if not left or not self._copies.is_worth_a_retry(error):
                        raise self._failure(error) from error
            raise AssertionError("unreachable")
        finally:
            for dataset in self._datasets.values():
                dataset.only = None

    def pandas(self, statement: str) -> pandas.DataFrame:
        """The result of a statement as a pandas DataFrame. Raises as `arrow`; UsageError without pandas."""
        try:
            import pandas  # noqa: F401
        except ImportError as error:
            raise UsageError("pandas is not installed: pip install pandas, or use Archive.arrow") from error
        return self.arrow(statement).to_pandas()

    def polars(self, statement: str) -> polars.DataFrame:
        """The result of a statement as a polars DataFrame. Raises as `arrow`; UsageError without polars."""
        try:
            import polars
        except ImportError as error:
            raise UsageError("polars is not installed: pip install polars, or use Archive.arrow") from error
        found = polars.from_arrow(self.arrow(statement))
        assert isinstance(found, polars.DataFrame)
        return found

    def dataset(self, kind: str = "tracks") -> ds.Dataset:
        """The files of all streams as a pyarrow Dataset, for tools that read one; checksums are verified.

        Filters on `stream_id` and `frame_index` choose the files. Unlike the views, it does not notice files
        that are missing in the middle of a stream.

        Args:
            kind: "tracks" or "events".

        Raises:
            UsageError: another kind.
            StoreError: the folder cannot be read.
        """
        if kind not in DATASETS:
            raise UsageError(f"there is no dataset {kind!r}: {' or '.join(DATASETS)}")
        return chunk_fragments(self._listing, kind, self._datasets[kind].schema)

    def masks(self, rows: Any) -> Any:
        """The masks of rows as H x W bool arrays; all False for an object out of sight.

        Args:
            rows: a row (a mapping, or a row of a DataFrame), or many (a pyarrow Table, a pandas or polars
                DataFrame, or an iterable of mappings), with the columns `mask_rle`, `frame_height` and
                `frame_width` of `tracks`, or `mask` of `masks`.

        Returns:
            one array for a row, else a list of them.

        Raises:
            UsageError: the rows lack these columns.
            StoreError: a mask is damaged.
        """
        row = _one_row(rows)
        if row is not None:
            return _mask(row)
        return [_mask(row) for row in _rows(rows)]

    def _parsed(self, statement: str) -> Any:
        try:
            statements = self._connection.extract_statements(statement)
        except duckdb.Error as error:
            raise UsageError(f"query: {_first_lines(error)}") from error
        if len(statements) != 1:
            raise UsageError(f"query: one SQL statement is needed, not {len(statements)}")
        if statements[0].type not in _ALLOWED:
            raise UsageError(
                f"query: {statements[0].type.name} is not allowed, an output folder is only read: use SELECT"
            )
        if not self._has_streams and (use := streams_use(statement, self.tree)) is not None:
            self._register_streams(progress=use)
        return statements[0]

    def _columns(self, view: str) -> list[str]:
        """Names of a view's columns in lower case."""
        described = self._connection.execute(f"DESCRIBE {view}").fetchall()
        return [str(row[0]).lower() for row in described]

    def _register_streams(self, *, progress: bool = True) -> None:
        """Make the view `streams`. A read for each stream, with `next_frame` (`progress`) two."""
        if not self._has_streams:
            self._connection.register("streams", streams_table(self._listing, progress=progress))
            self._has_streams = progress

    def _failure(self, error: duckdb.Error) -> XmemError:
        """What is raised for an error of DuckDB, which has only the text of errors in views and functions."""
        failures: list[XmemError | None] = [dataset.failure for dataset in self._datasets.values()]
        failures += [self._functions.failure, self._copies.failure]
        failure = next((found for found in failures if found), None)
        if failure is not None:
            return failure
        if isinstance(error, duckdb.OutOfMemoryException):
            given = "memory of this machine" if self._limit is None else f"limit of {self._limit}"
            return UsageError(
                f"query: the statement needs more memory than the {given}: read fewer streams or frames "
                "in one statement, or give a higher --memory-limit"
            )
        return UsageError(f"query: {_first_lines(error)} (views: {', '.join(self._views)})")


def open_archive(
    root: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    *,
    memory_limit: str | None = None,
) -> Archive:
    """Open an output folder for questions; see `Archive`."""
    return Archive(root, storage_options, memory_limit=memory_limit)


def _checked_limit(memory_limit: str | None) -> str | None:
    if memory_limit is not None and not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]i?B", memory_limit, re.IGNORECASE):
        raise UsageError(
            f"memory limit {memory_limit!r} is not a size: give a number with a unit, such as 500MB or 2GB"
        )
    return memory_limit


def _one_row(rows: Any) -> Mapping[str, Any] | None:
    """A single row as a mapping; None for many."""
    if isinstance(rows, Mapping):
        return rows
    if hasattr(rows, "_asdict"):  # of DataFrame.itertuples
        return dict(rows._asdict())
    if hasattr(rows, "to_dict") and getattr(rows, "ndim", None) == 1:  # of DataFrame.iterrows
        return dict(rows.to_dict())
    return None


def _rows(rows: Any) -> Iterable[Mapping[str, Any]]:
    wanted = ("mask_rle", "frame_height", "frame_width", "mask")
    if isinstance(rows, (pa.Table, pa.RecordBatch)):
        return list(rows.select([n for n in wanted if n in rows.schema.names]).to_pylist())
    if hasattr(rows, "to_dicts"):  # polars
        return list(rows.to_dicts())
    if hasattr(rows, "to_dict"):  # pandas
        return list(rows.to_dict("records"))
    return [row if isinstance(row, Mapping) else (_one_row(row) or {}) for row in rows]


def _mask(row: Mapping[str, Any]) -> NDArray[np.bool_]:
    mask = row.get("mask")
    if isinstance(mask, Mapping):
        counts, height, width = mask["counts"], mask["height"], mask["width"]
    else:
        missing = [name for name in ("mask_rle", "frame_height", "frame_width") if name not in row]
        if missing:
            raise UsageError(
                f"a row lacks {', '.join(missing)}: select mask_rle, frame_height and frame_width from tracks"
            )
        counts, height, width = row["mask_rle"], row["frame_height"], row["frame_width"]
    if not isinstance(counts, str):  # out of sight; pandas has NaN for null
        return np.zeros((int(height), int(width)), np.bool_)
    try:
        return rle_to_mask(counts, int(height), int(width))
    except ValueError as error:
        raise StoreError(f"a mask is damaged: {error}") from error


def _first_lines(error: BaseException) -> str:
    """DuckDB's message without its excerpt of the statement, on one line."""
    text = str(error).split("\n\nLINE ")[0]
    return " ".join(text.split()) or type(error).__name__
