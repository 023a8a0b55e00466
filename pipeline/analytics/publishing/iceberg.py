"""Iceberg tables of `publish`, in a catalog that is an SQLite file beside them.

Number and token of the progress file are properties of the table, which are set in the commit of the rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import pyarrow as pa

from pipeline.analytics.publishing.table import LocalTable, OvertakenError, of_streams
from pipeline.base.errors import StoreError

CATALOG = "catalog.db"
NAMESPACE = "xmem"
_RETRIES = "commit.retry.num-retries"
"""pyiceberg appends once more what another commit has overtaken; here it must be planned anew."""
_MARKS = ("xmem.number", "xmem.token")


class IcebergTable(LocalTable):
    """An Iceberg table in a folder of this machine. UsageError for another folder."""

    format = "Iceberg"

    def __init__(self, uri: str, kind: str, storage_options: Mapping[str, Any] | None) -> None:
        super().__init__(uri, kind, storage_options)
        self._table: Any = None
        self.reload()

    @property
    def _errors(self) -> tuple[type[Exception], ...]:
        from sqlalchemy.exc import SQLAlchemyError

        return (SQLAlchemyError,)

    def _open(self) -> tuple[int, int]:
        from pyiceberg.catalog.sql import SqlCatalog
        from pyiceberg.exceptions import NamespaceAlreadyExistsError

        above = self._folder.parent
        above.mkdir(parents=True, exist_ok=True)
        catalog = SqlCatalog(NAMESPACE, uri=f"sqlite:///{above / CATALOG}", warehouse=above.as_uri())
        with suppress(NamespaceAlreadyExistsError):  # another run was faster
            catalog.create_namespace_if_not_exists(NAMESPACE)
        self._table = catalog.create_table_if_not_exists(
            (NAMESPACE, self.kind),
            schema=self.schema,
            location=self._folder.as_uri(),
            properties={"write.parquet.compression-codec": "zstd", _RETRIES: "0"},
        )
        self.check_columns([item.name for item in self._table.schema().fields])
        if self._table.properties.get(_RETRIES) != "0":
            raise StoreError(
                f"the Iceberg table {self.uri} lacks the property {_RETRIES} = 0, without which rows could "
                "be published twice: set it"
            )
        number, token = (int(self._table.properties.get(name, 0)) for name in _MARKS)
        return number, token

    def _write(self, rows: pa.Table, marks: tuple[int, int]) -> None:
        with self._transaction(marks) as transaction:
            transaction.append(rows)

    def _delete(self, stream_ids: Sequence[str], marks: tuple[int, int]) -> None:
        with self._transaction(marks) as transaction:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of streams without rows
                transaction.delete(of_streams(stream_ids))
            # A commit with a snapshot is refused if another run has made one.
            transaction.append(self.schema.empty_table())

    @contextmanager
    def _transaction(self, marks: tuple[int, int]) -> Iterator[Any]:
        """A commit that sets number and token, too. Raises `OvertakenError`."""
        from pyiceberg.exceptions import CommitFailedException

        try:
            with self._table.transaction() as transaction:
                yield transaction
                transaction.set_properties(dict(zip(_MARKS, map(str, marks), strict=True)))
        except CommitFailedException as error:
            raise OvertakenError(str(error)) from error
