"""Delta Lake tables of `publish`; number and token of progress files are application transactions (`txn`)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.analytics.publishing.table import OvertakenError, PublishedTable, of_streams
from pipeline.base.errors import UsageError, bare_reason
from pipeline.storage.filesystems import connect, is_local, is_s3

_STATISTICS = ("stream_id", "frame_index", "pts_seconds", "wall_time", "object_id")
_ROWS_PER_GROUP = 1 << 17
_TRANSACTIONS = ("xmem", "xmem-progress")
"""Ids of the transactions with number and token of the progress file."""


class DeltaTable(PublishedTable):
    """A Delta table."""

    format = "Delta"

    def __init__(self, uri: str, kind: str, storage_options: Mapping[str, Any] | None) -> None:
        super().__init__(uri, kind, storage_options)
        self._options = _delta_options(uri, storage_options)
        self._delta: Any = None
        self.reload()

    @property
    def _errors(self) -> tuple[type[Exception], ...]:
        from deltalake.exceptions import DeltaError

        return (DeltaError,)

    def _open(self) -> tuple[int, int]:
        from deltalake import DeltaTable as Table
        from deltalake.exceptions import TableNotFoundError

        statistics = ",".join(name for name in _STATISTICS if name in self.schema.names)
        try:
            delta = Table(self.uri, storage_options=self._options)
        except TableNotFoundError:
            delta = Table.create(
                self.uri,
                self.schema,
                mode="ignore",  # another run may be creating it
                name=self.kind,
                configuration={"delta.dataSkippingStatsColumns": statistics},
                storage_options=self._options,
            )
        self.check_columns([item.name for item in delta.schema().fields])
        self._delta = delta
        number, token = (delta.transaction_version(name) or 0 for name in _TRANSACTIONS)
        return number, token

    def _write(self, rows: pa.Table, marks: tuple[int, int]) -> None:
        from deltalake import WriterProperties, write_deltalake
        from deltalake.exceptions import CommitFailedError

        try:
            write_deltalake(
                self._delta,
                rows,
                mode="append",
                writer_properties=WriterProperties(compression="ZSTD", max_row_group_size=_ROWS_PER_GROUP),
                commit_properties=_marked(marks),
            )
        except CommitFailedError as error:
            raise OvertakenError(str(error)) from error

    def _delete(self, stream_ids: Sequence[str], marks: tuple[int, int]) -> None:
        from deltalake.exceptions import CommitFailedError

        before = self._delta.version()
        try:
            self._delta.delete(of_streams(stream_ids), commit_properties=_marked(marks))
        except CommitFailedError as error:
            raise OvertakenError(str(error)) from error
        if self._delta.version() == before:  # there are no such rows: Delta has committed nothing
            self._write(self.schema.empty_table(), marks)


def _marked(marks: tuple[int, int]) -> Any:
    from deltalake import CommitProperties, Transaction

    return CommitProperties(
        app_transactions=[Transaction(*mark, None) for mark in zip(_TRANSACTIONS, marks, strict=True)]
    )


def _delta_options(target: str, storage_options: Mapping[str, Any] | None) -> dict[str, str]:
    """deltalake's storage options for a URI, from those of fsspec; the rest comes from the environment.

    Raises:
        UsageError: deltalake cannot write there.
    """
    try:
        fs, _ = connect(target, storage_options)
    except (ImportError, ValueError, TypeError) as error:
        raise UsageError(f"Delta tables cannot be written to {target!r}: {bare_reason(error)}") from error
    if is_local(fs):
        return {}
    scheme = target.partition("://")[0].lower()
    if scheme in ("gs", "az", "abfs", "abfss"):
        return {}
    if not is_s3(fs):
        raise UsageError(
            f"Delta tables cannot be written to {target!r}: give a local folder or a URI that begins with "
            "s3://, gs://, az:// or abfss://"
        )
    client = dict(fs.client_kwargs or {})
    endpoint = client.get("endpoint_url") or fs.endpoint_url or os.environ.get("AWS_ENDPOINT_URL_S3")
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL")
    region = client.get("region_name") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    found = {
        "AWS_ACCESS_KEY_ID": fs.key,
        "AWS_SECRET_ACCESS_KEY": fs.secret,
        "AWS_SESSION_TOKEN": fs.token,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": region or ("us-east-1" if endpoint else None),
        "AWS_ALLOW_HTTP": "true" if str(endpoint).startswith("http://") else None,
        "AWS_SKIP_SIGNATURE": "true" if fs.anon else None,
        "AWS_CONDITIONAL_PUT": "etag",  # commits create files and overwrite none
    }
    return {name: str(value) for name, value in found.items() if value}
