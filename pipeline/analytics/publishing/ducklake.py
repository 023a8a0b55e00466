"""DuckLake tables of `publish`, in a catalog that is an SQLite file beside them.

A DuckLake catalog is plain SQL tables (ducklake.select, specification 1.0), so that it is written here
without DuckDB's extension, which has to be downloaded; readers need it. Number and token of the progress file
are a tag of the table, which is changed in the transaction that adds the rows.

Rows of streams are deleted by writing the files anew that hold some. Older snapshots keep theirs, until
DuckLake's own maintenance removes them.
"""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.analytics.publishing.table import LocalTable, OvertakenError
from pipeline.base.errors import StoreError

CATALOG = "catalog.sqlite"
_VERSION = "1.0"
_TAG = "xmem.progress"
_OWNER = "publish"
_WAIT_SECONDS = 60.0
_TYPES = {
    pa.string(): "varchar",
    pa.int32(): "int32",
    pa.int64(): "int64",
    pa.float32(): "float32",
    pa.float64(): "float64",
    pa.timestamp("us", tz="UTC"): "timestamptz",
}
_SCHEMA = """
ducklake_metadata("key" VARCHAR NOT NULL, "value" VARCHAR NOT NULL, "scope" VARCHAR, scope_id BIGINT)
ducklake_snapshot(snapshot_id BIGINT PRIMARY KEY, snapshot_time VARCHAR, schema_version BIGINT, next_catalog_id BIGINT, next_file_id BIGINT)
ducklake_snapshot_changes(snapshot_id BIGINT PRIMARY KEY, changes_made VARCHAR, author VARCHAR, commit_message VARCHAR, commit_extra_info VARCHAR)
ducklake_schema(schema_id BIGINT PRIMARY KEY, schema_uuid VARCHAR, begin_snapshot BIGINT, end_snapshot BIGINT, schema_name VARCHAR, path VARCHAR, path_is_relative BIGINT)
ducklake_schema_versions(begin_snapshot BIGINT, schema_version BIGINT, table_id BIGINT)
ducklake_table(table_id BIGINT, table_uuid VARCHAR, begin_snapshot BIGINT, end_snapshot BIGINT, schema_id BIGINT, table_name VARCHAR, path VARCHAR, path_is_relative BIGINT)
ducklake_column(column_id BIGINT, begin_snapshot BIGINT, end_snapshot BIGINT, table_id BIGINT, column_order BIGINT, column_name VARCHAR, column_type VARCHAR, initial_default VARCHAR, default_value VARCHAR, nulls_allowed BIGINT, parent_column BIGINT, default_value_type VARCHAR, default_value_dialect VARCHAR)
ducklake_data_file(data_file_id BIGINT PRIMARY KEY, table_id BIGINT, begin_snapshot BIGINT, end_snapshot BIGINT, file_order BIGINT, path VARCHAR, path_is_relative BIGINT, file_format VARCHAR, record_count BIGINT, file_size_bytes BIGINT, footer_size BIGINT, row_id_start BIGINT, partition_id BIGINT, encryption_key VARCHAR, mapping_id BIGINT, partial_max BIGINT)
ducklake_delete_file(delete_file_id BIGINT PRIMARY KEY, table_id BIGINT, begin_snapshot BIGINT, end_snapshot BIGINT, data_file_id BIGINT, path VARCHAR, path_is_relative BIGINT, format VARCHAR, delete_count BIGINT, file_size_bytes BIGINT, footer_size BIGINT, encryption_key VARCHAR, partial_max BIGINT)
ducklake_file_column_stats(data_file_id BIGINT, table_id BIGINT, column_id BIGINT, column_size_bytes BIGINT, value_count BIGINT, null_count BIGINT, min_value VARCHAR, max_value VARCHAR, contains_nan BIGINT, extra_stats VARCHAR)
ducklake_file_partition_value(data_file_id BIGINT, table_id BIGINT, partition_key_index BIGINT, partition_value VARCHAR)
ducklake_file_variant_stats(data_file_id BIGINT, table_id BIGINT, column_id BIGINT, variant_path VARCHAR, shredded_type VARCHAR, column_size_bytes BIGINT, value_count BIGINT, null_count BIGINT, min_value VARCHAR, max_value VARCHAR, contains_nan BIGINT, extra_stats VARCHAR)
ducklake_files_scheduled_for_deletion(data_file_id BIGINT, path VARCHAR, path_is_relative BIGINT, schedule_start VARCHAR)
ducklake_inlined_data_tables(table_id BIGINT, table_name VARCHAR, schema_version BIGINT)
ducklake_table_stats(table_id BIGINT, record_count BIGINT, next_row_id BIGINT, file_size_bytes BIGINT)
ducklake_table_column_stats(table_id BIGINT, column_id BIGINT, contains_null BIGINT, contains_nan BIGINT, min_value VARCHAR, max_value VARCHAR, extra_stats VARCHAR)
ducklake_column_mapping(mapping_id BIGINT, table_id BIGINT, "type" VARCHAR)
ducklake_name_mapping(mapping_id BIGINT, column_id BIGINT, source_name VARCHAR, target_field_id BIGINT, parent_column BIGINT, is_partition BIGINT)
ducklake_column_tag(table_id BIGINT, column_id BIGINT, begin_snapshot BIGINT, end_snapshot BIGINT, "key" VARCHAR, "value" VARCHAR)
ducklake_tag(object_id BIGINT, begin_snapshot BIGINT, end_snapshot BIGINT, "key" VARCHAR, "value" VARCHAR)
ducklake_partition_info(partition_id BIGINT, table_id BIGINT, begin_snapshot BIGINT, end_snapshot BIGINT)
ducklake_partition_column(partition_id BIGINT, table_id BIGINT, partition_key_index BIGINT, column_id BIGINT, "transform" VARCHAR)
ducklake_sort_info(sort_id BIGINT, table_id BIGINT, begin_snapshot BIGINT, end_snapshot BIGINT)
ducklake_sort_expression(sort_id BIGINT, table_id BIGINT, sort_key_index BIGINT, expression VARCHAR, dialect VARCHAR, sort_direction VARCHAR, null_order VARCHAR)
ducklake_view(view_id BIGINT, view_uuid VARCHAR, begin_snapshot BIGINT, end_snapshot BIGINT, schema_id BIGINT, view_name VARCHAR, dialect VARCHAR, "sql" VARCHAR, column_aliases VARCHAR)
ducklake_macro(schema_id BIGINT, macro_id BIGINT, macro_name VARCHAR, begin_snapshot BIGINT, end_snapshot BIGINT)
ducklake_macro_impl(macro_id BIGINT, impl_id BIGINT, dialect VARCHAR, "sql" VARCHAR, "type" VARCHAR)
ducklake_macro_parameters(macro_id BIGINT, impl_id BIGINT, column_id BIGINT, parameter_name VARCHAR, parameter_type VARCHAR, default_value VARCHAR, default_value_type VARCHAR)
"""  # noqa: E501  a table a line, of the specification


class DuckLakeTable(LocalTable):
    """A DuckLake table in a folder of this machine. UsageError for another folder."""

    format = "DuckLake"

    def __init__(self, uri: str, kind: str, storage_options: Mapping[str, Any] | None) -> None:
        super().__init__(uri, kind, storage_options)
        self._id = 0
        self.reload()

    @property
    def _errors(self) -> tuple[type[Exception], ...]:
        return (sqlite3.Error,)

    def _open(self) -> tuple[int, int]:
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._changing() as catalog:
            if not catalog.execute("SELECT 1 FROM sqlite_master WHERE name = 'ducklake_metadata'").fetchall():
                self._make_catalog(catalog)
            found = dict(
                catalog.execute('SELECT "key", "value" FROM ducklake_metadata WHERE "scope" IS NULL')
            )
            if found.get("version") != _VERSION:
                raise StoreError(
                    f"the DuckLake catalog {self._catalog} has version {found.get('version')!r}, and this "
                    f"xmem writes {_VERSION}: publish to another folder"
                )
            live = catalog.execute(
                "SELECT table_id FROM ducklake_table WHERE table_name = ? AND end_snapshot IS NULL",
                (self.kind,),
            ).fetchone()
            self._id = self._make_table(catalog) if live is None else live[0]
            columns = catalog.execute(
                "SELECT column_name FROM ducklake_column WHERE table_id = ? AND end_snapshot IS NULL "
                "ORDER BY column_order",
                (self._id,),
            )
            self.check_columns([name for (name,) in columns])
            return self._marks(catalog)

    def _write(self, rows: pa.Table, marks: tuple[int, int]) -> None:
        made = [self._make_file(rows, marks, 0)] if rows.num_rows else []
        self._commit_files(made, [], marks)

    def _delete(self, stream_ids: Sequence[str], marks: tuple[int, int]) -> None:
        with closing(self._connect()) as catalog:
            live = catalog.execute(
                "SELECT data_file_id, path, path_is_relative FROM ducklake_data_file "
                "WHERE table_id = ? AND end_snapshot IS NULL",
                (self._id,),
            ).fetchall()
            (deleted,) = catalog.execute(
                "SELECT (SELECT count(*) FROM ducklake_delete_file WHERE table_id = ?1 "
                "AND end_snapshot IS NULL) "
                "+ (SELECT count(*) FROM ducklake_inlined_data_tables WHERE table_id = ?1)",
                (self._id,),
            ).fetchone()
        if deleted:
            raise StoreError(
                f"another program has deleted or changed rows of the DuckLake table {self.uri}: remove its "
                f"folder and {self._catalog}, and run `xmem publish` again"
            )
        made, ended = [], []
        for number, path, is_relative in live:
            place = str(self._folder / path) if is_relative else path
            rows = pq.ParquetFile(place).read()
            left = rows.filter(pc.invert(pc.is_in(rows["stream_id"], pa.array(stream_ids, pa.string()))))
            if left.num_rows < rows.num_rows:
                ended.append(number)
                if left.num_rows:
                    made.append(
                        self._make_file(left.select(self.schema.names).cast(self.schema), marks, number)
                    )
        self._commit_files(made, ended, marks)

    def _commit_files(self, made: Sequence[_DataFile], ended: Sequence[int], marks: tuple[int, int]) -> None:
        """Add files and end others in a snapshot. OvertakenError if another run was faster."""
        try:
            with self._changing() as catalog:
                if self._marks(catalog)[0] != marks[0] - 1:
                    raise OvertakenError("another run has published meanwhile")
                changes = [f"deleted_from_table:{self._id}"] if ended else []
                changes += [f"inserted_into_table:{self._id}"] if made else []
                snapshot, file_id = self._add_snapshot(catalog, ",".join(changes), files=len(made))
                for number in ended:
                    catalog.execute(
                        "UPDATE ducklake_data_file SET end_snapshot = ? WHERE data_file_id = ?",
                        (snapshot, number),
                    )
                for number, file in enumerate(made, start=file_id):
                    self._add_file(catalog, number, snapshot, file)
                catalog.execute(
                    "UPDATE ducklake_table_stats SET (record_count, file_size_bytes) = (SELECT "
                    "coalesce(sum(record_count), 0), coalesce(sum(file_size_bytes), 0) "
                    "FROM ducklake_data_file WHERE table_id = ?1 AND end_snapshot IS NULL) "
                    "WHERE table_id = ?1",
                    (self._id,),
                )
                catalog.execute(
                    "UPDATE ducklake_tag SET end_snapshot = ? "
                    'WHERE object_id = ? AND "key" = ? AND end_snapshot IS NULL',
                    (snapshot, self._id, _TAG),
                )
                catalog.execute(
                    "INSERT INTO ducklake_tag VALUES (?, ?, NULL, ?, ?)",
                    (self._id, snapshot, _TAG, f"{marks[0]} {marks[1]}"),
                )
        except OvertakenError:
            for file in made:
                self._files.remove(file.name)
            raise

    # The catalog

    @property
    def _catalog(self) -> Path:
        return self._folder.parent / CATALOG

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._catalog, timeout=_WAIT_SECONDS, isolation_level=None)

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """A transaction, which no other writer comes between."""
        with closing(self._connect()) as catalog:
            catalog.execute("BEGIN IMMEDIATE")
            try:
                yield catalog
            except BaseException:
                catalog.execute("ROLLBACK")
                raise
            catalog.execute("COMMIT")

    def _make_catalog(self, catalog: sqlite3.Connection) -> None:
        for table in _SCHEMA.strip().splitlines():
            catalog.execute(f"CREATE TABLE {table}")
        place = f"{self._folder.parent}/"
        known = (("version", _VERSION), ("created_by", "xmem"), ("data_path", place), ("encrypted", "false"))
        catalog.executemany("INSERT INTO ducklake_metadata VALUES (?, ?, NULL, NULL)", known)
        catalog.execute("INSERT INTO ducklake_snapshot VALUES (0, ?, 0, 1, 0)", (_now(),))
        catalog.execute(
            "INSERT INTO ducklake_snapshot_changes VALUES (0, 'created_schema:\"main\"', NULL, NULL, NULL)"
        )
        catalog.execute(
            "INSERT INTO ducklake_schema VALUES (0, ?, 0, NULL, 'main', ?, 0)", (str(uuid.uuid4()), place)
        )

    def _make_table(self, catalog: sqlite3.Connection) -> int:
        """Make the table; its id."""
        (number,) = catalog.execute("SELECT max(next_catalog_id) FROM ducklake_snapshot").fetchone()
        snapshot, _ = self._add_snapshot(catalog, f'created_table:"main"."{self.kind}"', tables=1)
        (version,) = catalog.execute(
            "SELECT schema_version FROM ducklake_snapshot WHERE snapshot_id = ?", (snapshot,)
        ).fetchone()
        catalog.execute("INSERT INTO ducklake_schema_versions VALUES (?, ?, ?)", (snapshot, version, number))
        catalog.execute(
            "INSERT INTO ducklake_table VALUES (?, ?, ?, NULL, 0, ?, ?, 1)",
            (number, str(uuid.uuid4()), snapshot, self.kind, f"{self._folder.name}/"),
        )
        for column, item in enumerate(self.schema, start=1):
            catalog.execute(
                "INSERT INTO ducklake_column VALUES "
                "(?, ?, NULL, ?, ?, ?, ?, NULL, 'NULL', ?, NULL, 'literal', 'duckdb')",
                (column, snapshot, number, column, item.name, _TYPES[item.type], int(item.nullable)),
            )
            has_nan = 0 if pa.types.is_floating(item.type) else None
            catalog.execute(
                "INSERT INTO ducklake_table_column_stats VALUES (?, ?, 0, ?, NULL, NULL, NULL)",
                (number, column, has_nan),
            )
        catalog.execute("INSERT INTO ducklake_table_stats VALUES (?, 0, 0, 0)", (number,))
        return int(number)

    def _add_snapshot(
        self, catalog: sqlite3.Connection, changes: str, *, files: int = 0, tables: int = 0
    ) -> tuple[int, int]:
        """Add a snapshot with new files or tables; its number, and that of its first file."""
        last, version, catalog_id, file_id = catalog.execute(
            "SELECT snapshot_id, schema_version, next_catalog_id, next_file_id FROM ducklake_snapshot "
            "ORDER BY snapshot_id DESC LIMIT 1"
        ).fetchone()
        catalog.execute(
            "INSERT INTO ducklake_snapshot VALUES (?, ?, ?, ?, ?)",
            (last + 1, _now(), version + tables, catalog_id + tables, file_id + files),
        )
        catalog.execute(
            "INSERT INTO ducklake_snapshot_changes VALUES (?, ?, 'xmem', NULL, NULL)", (last + 1, changes)
        )
        return last + 1, file_id

    def _marks(self, catalog: sqlite3.Connection) -> tuple[int, int]:
        """Number and token of the progress, or 0."""
        found = catalog.execute(
            'SELECT "value" FROM ducklake_tag WHERE object_id = ? AND "key" = ? AND end_snapshot IS NULL',
            (self._id, _TAG),
        ).fetchone()
        number, token = map(int, found[0].split()) if found else (0, 0)
        return number, token

    # Files

    def _make_file(self, rows: pa.Table, marks: tuple[int, int], part: int) -> _DataFile:
        """Write rows to a file, which no snapshot has yet."""
        fields = [
            item.with_metadata({"PARQUET:field_id": str(number)})
            for number, item in enumerate(rows.schema, start=1)
        ]
        sink = pa.BufferOutputStream()
        pq.write_table(rows.cast(pa.schema(fields)), sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        name = f"rows-{marks[0]:09d}-{marks[1]:016x}-{part}.parquet"
        self._files.create(name, data, _OWNER)
        return _DataFile(name, rows, data)

    def _add_file(self, catalog: sqlite3.Connection, number: int, snapshot: int, file: _DataFile) -> None:
        (row_id,) = catalog.execute(
            "SELECT next_row_id FROM ducklake_table_stats WHERE table_id = ?", (self._id,)
        ).fetchone()
        catalog.execute(
            "INSERT INTO ducklake_data_file VALUES "
            "(?, ?, ?, NULL, NULL, ?, 1, 'parquet', ?, ?, ?, ?, NULL, NULL, NULL, NULL)",
            (number, self._id, snapshot, file.name, file.rows, file.size, file.footer, row_id),
        )
        catalog.executemany(
            "INSERT INTO ducklake_file_column_stats VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
            [(number, self._id, *stats) for stats in file.columns],
        )
        catalog.execute(
            "UPDATE ducklake_table_stats SET next_row_id = next_row_id + ? WHERE table_id = ?",
            (file.rows, self._id),
        )
        for column, _, _, nulls, low, high, has_nan in file.columns:
            self._widen(catalog, column, bool(nulls), low, high, bool(has_nan))

    def _widen(
        self,
        catalog: sqlite3.Connection,
        column: int,
        has_null: bool,
        low: str | None,
        high: str | None,
        has_nan: bool,
    ) -> None:
        """Make a column's statistics of the whole table hold for a new file, too.

        Plans rely on them. DuckDB takes unknown values for those of a column that has none yet.
        """
        least, greatest = catalog.execute(
            "SELECT min_value, max_value FROM ducklake_table_column_stats "
            "WHERE table_id = ? AND column_id = ?",
            (self._id, column),
        ).fetchone()
        kind = self.schema.field(column - 1).type

        def order(text: str) -> Any:
            if pa.types.is_timestamp(kind):
                return datetime.fromisoformat(text)
            return text.encode() if pa.types.is_string(kind) else float(text)

        lows = [text for text in (least, low) if text is not None]
        highs = [text for text in (greatest, high) if text is not None]
        least = min(lows, key=order, default=None)
        greatest = max(highs, key=order, default=None)
        catalog.execute(
            "UPDATE ducklake_table_column_stats SET contains_null = contains_null OR ?, "
            "contains_nan = contains_nan OR ?, min_value = ?, max_value = ? "
            "WHERE table_id = ? AND column_id = ?",
            (has_null, has_nan, least, greatest, self._id, column),
        )


class _DataFile:
    """What the catalog says of a data file.

    Args:
        name: in the table's folder.
        rows: that it has.
        data: its bytes.
    """

    def __init__(self, name: str, rows: pa.Table, data: bytes) -> None:
        self.name, self.rows, self.size = name, rows.num_rows, len(data)
        self.footer = int.from_bytes(data[-8:-4], "little")
        metadata = pq.read_metadata(pa.BufferReader(data))
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        self.columns = []
        """Id, bytes, values, nulls, least and greatest value, and whether there are NaNs, of each column."""
        for index, item in enumerate(rows.schema):
            column = rows[item.name]
            size = sum(group.column(index).total_compressed_size for group in groups)
            has_nan = None
            low = high = None
            if pa.types.is_floating(item.type):
                has_nan = int(pc.any(pc.is_nan(column)).as_py() or False)
            if not has_nan:
                found = pc.min_max(column).as_py()
                low, high = _text(found["min"]), _text(found["max"])
            nulls = column.null_count
            self.columns.append((index + 1, size, len(column) - nulls, nulls, low, high, has_nan))


def _text(value: Any) -> str | None:
    """A value as the catalog has it."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f+00")
    return None if value is None else str(value)


def _now() -> str:
    return _text(datetime.now(UTC)) or ""
