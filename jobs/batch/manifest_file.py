"""Reads manifest files (JSONL, CSV, Parquet) as a stream of rows and checks each row."""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.base.errors import PromptError, UsageError, one_line
from pipeline.base.joined_uris import joined_parts, joined_uri
from pipeline.base.redaction import redacted
from pipeline.base.stream_ids import expanded, validate_stream_id
from pipeline.prompts.resolving import PromptSet
from pipeline.storage.filesystems import connect
from pipeline.tracking.settings import DIRECTIONS

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".parquet")
COLUMNS = ("uri", "stream_id", "sequence", "prompts", "priority", "direction")
PROMPT_SUFFIXES = (".json", ".png")
_BATCH_ROWS = 4096
_SHOWN = 80
_ALMOST = 0.8


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a manifest.

    Args:
        line: line number, from 1; for Parquet, the row's number.
        uri: absolute URI of the video.
        sequence: rows with the same one are files of one recording, in their order.
        prompts_uri, prompts: at most one of them is set.
        extra: the other columns, as plain data.
        direction: one of `pipeline.tracking.settings.DIRECTIONS`; None: that of the batch.
    """

    line: int
    uri: str
    stream_id: str | None = None
    prompts_uri: str | None = None
    prompts: Mapping[str, Any] | None = None
    priority: float | None = None
    extra: Mapping[str, Any] | None = None
    sequence: str | None = None
    direction: str | None = None


def is_manifest(uri: str) -> bool:
    """Whether a name is that of a manifest file; JSONL and CSV may be compressed (.gz)."""
    return _suffix(uri) is not None


def read_rows(
    uri: str, storage_options: Mapping[str, Any] | None = None, errors: list[str] | None = None
) -> Iterator[Row]:
    """The rows of a manifest file, read as a stream.

    Args:
        errors: collects errors of single rows instead of raising; the valid rows are still yielded.

    Raises:
        UsageError: the file cannot be read, has unknown columns or no `uri`. An invalid row raises it too,
            after all rows were read; the message gives the number of other invalid rows.
    """
    first: UsageError | None = None
    others = 0
    for line, given in _raw_rows(uri, storage_options):
        if isinstance(given, UsageError):
            failure = given
        else:
            try:
                row = _checked(uri, line, given)
            except UsageError as error:
                failure = error
            else:
                if first is None:
                    yield row
                continue
        if errors is not None:
            errors.append(str(failure))
            continue
        others += first is not None
        first = first or failure
    if first is not None:
        more = f"; {others} more {'line is' if others == 1 else 'lines are'} invalid, too" if others else ""
        raise UsageError(f"{first}{more}")


def absolute(uri: str, base: str) -> str:
    """Make a URI or path in the manifest at `base` absolute; relative paths are relative to the manifest."""
    if (files := joined_parts(uri)) is not None:
        return joined_uri([absolute(file, base) for file in files])
    if "://" in uri or "::" in uri or uri.startswith(("/", "~")):
        return expanded(uri) if uri.startswith("~") else uri
    head, scheme, path = _split(base)
    if not scheme:
        return os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(path)), uri))
    # The first part is a bucket or server: `..` cannot leave it.
    root, _, rest = path.partition("/")
    joined = posixpath.normpath(posixpath.join("/", posixpath.dirname(rest), uri))
    return f"{head}{scheme}{root}{joined}"


def _split(uri: str) -> tuple[str, str, str]:
    """`simplecache::`, `s3://`, `bucket/key`; the scheme is empty for a plain path."""
    chain, separator, last = uri.rpartition("::")
    scheme, colon, path = last.partition("://")
    if not colon:
        return "", "", uri
    if scheme in ("file", "local"):
        return "", "", path
    if scheme in ("http", "https"):
        path = path.partition("?")[0]
    return chain + separator, scheme + colon, path


def _suffix(uri: str) -> str | None:
    name = uri.partition("?")[0].lower() if uri.startswith(("http://", "https://")) else uri.lower()
    plain = name.removesuffix(".gz")
    for suffix in SUFFIXES:
        if (name if suffix == ".parquet" else plain).endswith(suffix):
            return suffix
    return None


# --- reading -------------------------------------------------------------------------------------


def _raw_rows(
    uri: str, storage_options: Mapping[str, Any] | None
) -> Iterator[tuple[int, dict[str, Any] | UsageError]]:
    suffix = _suffix(uri)
    compression = "gzip" if uri.lower().partition("?")[0].endswith(".gz") else None
    try:
        fs, path = connect(uri, storage_options, library_retries=True)
        with fs.open(path, "rb", compression=compression) as file:
            if suffix == ".parquet":
                yield from _parquet(uri, file)
            elif suffix == ".csv":
                yield from _csv(uri, file)
            else:
                yield from _jsonl(uri, file)
    except UsageError:
        raise
    except FileNotFoundError as error:
        raise UsageError(f"manifest {uri}: no such file; check the path") from error
    except Exception as error:  # fsspec file systems raise their own exceptions
        raise UsageError(f"manifest {uri} cannot be read: {one_line(error)}") from error


def _jsonl(uri: str, file: Any) -> Iterator[tuple[int, dict[str, Any] | UsageError]]:
    for line, raw in enumerate(file, 1):
        if not raw.strip():
            continue
        where = f"{uri} line {line}"
        try:
            value = json.loads(raw.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            yield line, UsageError(f"{where}: not a JSON object ({one_line(error)})")
            continue
        if not isinstance(value, dict):
            yield line, UsageError(f'{where}: {_short(value)} is not a JSON object; give {{"uri": ...}}')
        elif wrong := _misspelt(value):
            yield line, UsageError(f"{where}: {wrong}")
        else:
            yield line, {k: v for k, v in value.items() if v is not None}


def _csv(uri: str, file: Any) -> Iterator[tuple[int, dict[str, Any] | UsageError]]:
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.reader(text, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_columns(uri, header)
        for cells in reader:
            line = reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                count = f"{len(cells)} cells where the header names {len(header)}"
                yield line, UsageError(f"{uri} line {line}: {count}; quote a cell that holds commas")
                continue
            yield line, {n: c.strip() for n, c in zip(header, cells, strict=True) if c.strip()}
    except csv.Error as error:
        raise UsageError(f"{uri} line {reader.line_num}: not CSV ({one_line(error)})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{uri} after line {reader.line_num}: not UTF-8 ({one_line(error)})") from error
    finally:
        text.detach()


def _parquet(uri: str, file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        _check_columns(uri, table.schema_arrow.names)
        line = 0
        for batch in table.iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                line += 1
                yield line, {k: v for k, v in row.items() if v is not None}
    except pa.ArrowInvalid as error:
        raise UsageError(f"manifest {uri} is not Parquet: {one_line(error)}") from error


def _check_columns(uri: str, names: list[str]) -> None:
    if wrong := _misspelt(names):
        raise UsageError(f"{uri}: {wrong}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{uri}: column {twice[0]} appears twice")
    if "uri" not in names:
        raise UsageError(f"{uri}: no column uri; it is required, {', '.join(COLUMNS[1:])} are optional")


def _misspelt(names: Iterable[str]) -> str | None:
    """Error for the first column whose name is almost a known one; other columns are the user's own."""
    for name in names:
        if name in COLUMNS:
            continue
        plain = name.strip().lower().replace("-", "_").replace(" ", "_")
        if meant := difflib.get_close_matches(plain, COLUMNS, n=1, cutoff=_ALMOST):
            return f"column {_short(name)} is unknown: did you mean {meant[0]}? Otherwise rename it"
        if not plain:
            return f"a column has no name; allowed are {', '.join(COLUMNS)} and any other names"
    return None


# --- checking ------------------------------------------------------------------------------------


def _checked(manifest: str, line: int, given: Mapping[str, Any]) -> Row:
    where = f"{manifest} line {line}"
    uri = given.get("uri")
    if not isinstance(uri, str) or not uri.strip() or "\0" in uri:
        raise UsageError(f"{where}: uri {_short(uri)} is not allowed: give the video's path or URI as text")
    stream_id, sequence = given.get("stream_id"), given.get("sequence")
    for name, value in (("stream id", stream_id), ("sequence", sequence)):
        if value is not None:
            try:
                validate_stream_id(value)
            except UsageError as error:
                raise UsageError(f"{where}: {str(error).replace('stream id', name, 1)}") from None
    if sequence is not None and stream_id not in (None, sequence):
        raise UsageError(
            f"{where}: stream_id {stream_id!r} in the sequence {sequence!r}: the stream of a sequence has "
            "its name; leave stream_id out"
        )
    prompts_uri, prompts = _prompts(where, manifest, given.get("prompts"))
    priority = _priority(where, given.get("priority"))
    extra = {name: _plain(value) for name, value in given.items() if name not in COLUMNS} or None
    video = absolute(uri.strip(), manifest)
    direction = _direction(where, given.get("direction"))
    return Row(line, video, stream_id, prompts_uri, prompts, priority, extra, sequence, direction)


def _plain(value: Any) -> Any:
    """A cell as JSON-ready data, without credentials."""
    if isinstance(value, str):
        return redacted(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.isoformat() if hasattr(value, "isoformat") else redacted(str(value))


def _prompts(where: str, manifest: str, given: Any) -> tuple[str | None, Mapping[str, Any] | None]:
    if given is None:
        return None, None
    if isinstance(given, str) and given.strip():
        check_prompts_name(given, where)
        return absolute(given.strip(), manifest), None
    if isinstance(given, dict) and _suffix(manifest) != ".parquet":
        try:
            PromptSet.from_record(given, f"{where}: prompts")
        except PromptError as error:
            raise UsageError(str(error)) from None
        return None, given
    allowed = "the URI of a .json prompts file or a .png of masks, or in JSONL the content of a prompts file"
    raise UsageError(f"{where}: prompts {_short(given)} is not allowed: give {allowed}")


def check_prompts_name(uri: str, where: str) -> None:
    """UsageError unless the name is that of a prompts file or of a picture of masks."""
    if not uri.partition("?")[0].strip().lower().endswith(PROMPT_SUFFIXES):
        raise UsageError(
            f"{where}: prompts {_short(uri)} is not allowed: give a .json prompts file or a .png of masks"
        )


def _priority(where: str, given: Any) -> float | None:
    if given is None:
        return None
    try:
        number = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UsageError(f"{where}: priority {_short(given)} is not allowed: give a number above 0")
    return number


def _direction(where: str, given: Any) -> str | None:
    if given is not None and given not in DIRECTIONS:
        raise UsageError(
            f"{where}: direction {_short(given)} is not allowed: give one of {', '.join(DIRECTIONS)}"
        )
    return None if given is None else str(given)


def _short(value: Any) -> str:
    text = redacted(repr(value))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
