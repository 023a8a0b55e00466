"""Tables that `publish` writes: what those of all formats have in common, and how far each is published.

A commit of a table holds, beside the rows of some chunks, number and token of a progress file that was
created before it. So rows and progress change together: a run that was killed has published all rows of a
commit or none, and the next one goes on from there. A run that another one has overtaken is refused, and
plans anew.
"""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.base.errors import StoreError, UsageError, bare_reason
from pipeline.base.records import EVENTS_SCHEMA, TRACKS_SCHEMA
from pipeline.storage.opening import open_files

SCHEMAS = {"tracks": TRACKS_SCHEMA, "events": EVENTS_SCHEMA}
ATTEMPTS = 10
_PROGRESS = "_xmem"
_OWNER = "publish"


class OvertakenError(Exception):
    """Another run has committed meanwhile."""


class PublishedTable(ABC):
    """A table at its newest version, and how far it is.

    Args:
        uri: its folder.
        kind: "tracks" or "events".
        storage_options: fsspec's options.

    Attributes:
        progress: first frame of the newest published chunk, and the fingerprint up to it, by stream.
        number: of the progress file; 0 before the first one.
        refusal: why the last commit was refused that another run had overtaken.
    """

    format: str
    """The format's name in messages."""

    def __init__(self, uri: str, kind: str, storage_options: Mapping[str, Any] | None) -> None:
        self.uri, self.kind = uri, kind
        self._files = open_files(uri, storage_options)
        fields = [pa.field("stream_id", pa.string(), nullable=False)]
        for item in SCHEMAS[kind]:
            # Table formats have no dictionaries.
            plain = item.type.value_type if pa.types.is_dictionary(item.type) else item.type
            fields.append(pa.field(item.name, plain, item.nullable))
        self.schema = pa.schema(fields)
        self.number, self.progress = 0, dict[str, tuple[int, int]]()
        self.refusal = ""

    @abstractmethod
    def _open(self) -> tuple[int, int]:
        """Open the newest version, or create the table; returns number and token of its progress, or 0."""

    @abstractmethod
    def _write(self, rows: pa.Table, marks: tuple[int, int]) -> None:
        """Commit rows with number and token. Raises `OvertakenError`."""

    @abstractmethod
    def _delete(self, stream_ids: Sequence[str], marks: tuple[int, int]) -> None:
        """Commit that rows of streams are deleted, with number and token. Raises `OvertakenError`."""

    @property
    @abstractmethod
    def _errors(self) -> tuple[type[Exception], ...]:
        """Errors of the format's library."""

    def reload(self) -> None:
        """Open the newest version; create the table if there is none."""
        for _ in range(ATTEMPTS):
            try:
                number, token = self._open()
            except self._failures as error:
                raise self._failure("opened", error) from error
            try:
                self.progress = _parsed(self._files.read(_progress_name(number, token))) if number else {}
            except FileNotFoundError:
                continue  # another run has committed meanwhile, and removed that file
            except ValueError as error:
                raise StoreError(
                    f"{self._files.uri(_progress_name(number, token))} is damaged: {self._remake}"
                ) from error
            self.number = number
            return
        missing = self._files.uri(_progress_name(number, token))
        raise StoreError(f"{missing} is missing: {self._remake}")

    def append(self, rows: pa.Table, changes: Mapping[str, tuple[int, int]]) -> bool:
        """Append rows, and change the progress of their streams. False if another run was faster."""
        return self._commit(lambda marks: self._write(rows, marks), self.progress | dict(changes))

    def delete(self, stream_ids: Sequence[str]) -> bool:
        """Delete the rows and the progress of streams. False if another run was faster."""
        left = {name: value for name, value in self.progress.items() if name not in stream_ids}
        return self._commit(lambda marks: self._delete(stream_ids, marks), left)

    def check_columns(self, names: Sequence[str]) -> None:
        """StoreError if a table has other columns."""
        if list(names) != self.schema.names:
            raise StoreError(
                f"the {self.format} table {self.uri} has the columns {', '.join(names)}, not those of "
                f"{self.kind}: publish to another folder, or remove that table"
            )

    def _commit(
        self, act: Callable[[tuple[int, int]], None], progress: Mapping[str, tuple[int, int]]
    ) -> bool:
        marks = self.number + 1, secrets.randbits(63)
        name = _progress_name(*marks)
        self._files.create(name, json.dumps(progress, separators=(",", ":")).encode(), _OWNER)
        try:
            act(marks)
        except OvertakenError as error:
            self.refusal = bare_reason(error)
            self._files.remove(name)
            self.reload()
            return False
        except self._failures as error:
            # Its file stays: the commit may have succeeded.
            raise self._failure("written", error) from error
        self.reload()
        for other in self._files.names(_PROGRESS):
            known = other.rpartition("/")[2].partition("-")[0]
            if known.isdigit() and int(known) <= marks[0] <= self.number and other != name:
                self._files.remove(other)
        return self.number == marks[0]

    @property
    def _failures(self) -> tuple[type[Exception], ...]:
        return (*self._errors, OSError, ValueError)

    @property
    def _remake(self) -> str:
        return "remove that table's folder, and run `xmem publish` again"

    def _failure(self, verb: str, error: Exception) -> StoreError:
        return StoreError(f"the {self.format} table {self.uri} cannot be {verb}: {bare_reason(error)}")


class LocalTable(PublishedTable):
    """A table whose catalog is an SQLite file beside its folder. UsageError if it is not on this machine."""

    def __init__(self, uri: str, kind: str, storage_options: Mapping[str, Any] | None) -> None:
        if "://" in uri:
            raise UsageError(
                f"{self.format} tables cannot be written to {uri!r}: their catalog is an SQLite file, which "
                "needs a folder of this machine"
            )
        super().__init__(uri, kind, storage_options)
        self._folder = Path(uri).absolute()


def _progress_name(number: int, token: int) -> str:
    return f"{_PROGRESS}/{number:09d}-{token:016x}.json"


def _parsed(data: bytes) -> dict[str, tuple[int, int]]:
    """A progress file. ValueError if it is damaged."""
    try:
        return {str(s): (int(newest), int(mark)) for s, (newest, mark) in json.loads(data).items()}
    except (TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error


def of_streams(stream_ids: Sequence[str]) -> str:
    """A filter of the rows of streams, in SQL; ids have no quotes."""
    ids = ", ".join(f"'{stream_id}'" for stream_id in stream_ids)
    return f"stream_id IN ({ids})"
