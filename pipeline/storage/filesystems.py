"""fsspec file systems configured for the pipeline: no stale listings, timeouts, one retry policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

CONNECT_SECONDS = 10
READ_SECONDS = 20
"""Time without data after which a request counts as failed, in seconds."""


def is_s3(fs: Any) -> bool:
    """Whether this is s3fs's file system, or one derived from it."""
    protocol = getattr(fs, "protocol", ())
    return "s3" in ((protocol,) if isinstance(protocol, str) else protocol)


def connect(
    uri: str, storage_options: Mapping[str, Any] | None = None, *, library_retries: bool = False
) -> tuple[Any, str]:
    """Return the file system of a URI or plain path, and the path on it; nothing is read yet.

    Args:
        storage_options: options that take precedence over those set here.
        library_retries: leave retries to the client library, for callers that do not retry.

    Raises whatever fsspec does.
    """
    options = dict(storage_options or {})
    scheme = uri.partition("://")[0].lower() if "://" in uri else ""
    if scheme and scheme not in ("file", "local") and "::" not in uri:
        # A listing cache would hide files that another process commits.
        options.setdefault("use_listings_cache", False)
    if scheme in ("s3", "s3a"):
        config: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
        if not library_retries:
            config |= {
                "retries": {"total_max_attempts": 1, "mode": "standard"},
                "user_agent_extra": "xmem-pipeline",  # also separates our cached instances from others'
            }
        options["config_kwargs"] = config | dict(options.get("config_kwargs") or {})
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout  # used by fsspec for these schemes

        limits = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        options["client_kwargs"] = {"timeout": limits} | dict(options.get("client_kwargs") or {})
    fs, path = fsspec.core.url_to_fs(uri, **options)
    if is_s3(fs) and not library_retries:
        fs.retries = 1  # s3fs's own setting, for which it has no option
    return fs, str(path)


def is_local(fs: Any) -> bool:
    """Whether the files are on this machine's disk."""
    return isinstance(fs, LocalFileSystem)
