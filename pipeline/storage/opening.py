"""Opens an output folder: on a local disk or any fsspec file system."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.base.errors import StoreError, bare_reason
from pipeline.base.redaction import shareable
from pipeline.storage.files import Files
from pipeline.storage.filesystems import connect, is_local
from pipeline.storage.remote_files import RemoteFiles


def open_files(root: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> Files:
    """Open files under `root`: a path or a URI that fsspec supports, with that file system's options."""
    text = os.fspath(root)
    if not text:
        raise StoreError("the output folder's name is empty: give a path or a URI such as s3://bucket/folder")
    if "::" in text:
        raise StoreError(f"output {text!r}: chained URIs (a::b) cannot be written to; give the inner URI")
    try:
        fs, path = connect(text, storage_options)
    except ImportError as error:
        raise StoreError(
            f"output {text!r} needs a package that is not installed: {bare_reason(error)}"
        ) from shareable(error)
    except (ValueError, TypeError) as error:
        raise StoreError(f"output {text!r} cannot be opened: {bare_reason(error)}") from shareable(error)
    if is_local(fs):
        from pipeline.storage.local_files import LocalFiles  # it imports this module's Files

        return LocalFiles(Path(path))
    return RemoteFiles(text, fs, path, lambda: connect(text, storage_options, library_retries=True)[0])
