"""Output files that are written completely or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from pipeline.base.errors import SourceError, StoreError, UsageError, XmemError, one_line


@contextmanager
def finished_file(output: str, storage_options: Mapping[str, Any] | None) -> Iterator[Path]:
    """Yield a path to write to; the file replaces the output only if nothing was raised."""
    try:
        fs, target = fsspec.core.url_to_fs(output, **dict(storage_options or {}))
        local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
        folder = Path(target).parent if local else Path(os.environ.get("TMPDIR", "/tmp"))
        if local and Path(target).is_dir():
            raise IsADirectoryError(f"{target} is a folder")
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{secrets.token_hex(6)}.partial{Path(target).suffix.lower()}"
        partial.touch(exist_ok=False)
    except Exception as error:
        raise unwritable(output, error) from error
    try:
        yield partial
        if local:
            os.replace(partial, target)
        else:
            fs.put_file(str(partial), target)
    except XmemError:
        raise
    except OSError as error:
        raise unwritable(output, error) from error
    finally:
        partial.unlink(missing_ok=True)


def unwritable(output: str, error: BaseException) -> XmemError:
    if isinstance(error, SourceError | UsageError | StoreError):
        return error
    reason = getattr(error, "strerror", None) or one_line(error)
    return StoreError(f"{output}: cannot be written ({reason}); check permissions and free space")
