"""fsspec file systems configured for the pipeline: no stale listings, timeouts, one retry policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

CONNECT_SECONDS = 10
READ_SECONDS = 20
"""How long a connection may say nothing before the request counts as failed."""


def is_s3(fs: Any) -> bool:
    """Whether this is s3fs' file system, or one derived from it."""
    protocol = getattr(fs, "protocol", ())
    return "s3" in ((protocol,) if isinstance(protocol, str) else protocol)


def connect(
    uri: str, storage_options: Mapping[str, Any] | None = None, *, library_retries: bool = False
) -> tuple[Any, str]:
    """The file system of a URI or plain path, and the path on it; nothing is read yet.

    Args:
        storage_options: what is given there has precedence over the settings made here.
        library_retries: leave retries to the client library, for callers that have none of their own.

    Raises whatever fsspec does.
    """
    options = dict(storage_options or {})
    scheme = uri.partition("://")[0].lower() if "://" in uri else ""
    if scheme and scheme not in ("file", "local") and "::" not in uri:
        # A listing cache would hide what another process commits.
        options.setdefault("use_listings_cache", False)
    if scheme in ("s3", "s3a"):
        config: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
        if not library_retries:
            config |= {
                "retries": {"total_max_attempts": 1, "mode": "standard"},
                "user_agent_extra": "xmem-pipeline",  # also keeps others' instances apart from ours
            }
        options["config_kwargs"] = config | dict(options.get("config_kwargs") or {})
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout  # which fsspec needs for these schemes

        limits = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        options["client_kwargs"] = {"timeout": limits} | dict(options.get("client_kwargs") or {})
    fs, path = fsspec.core.url_to_fs(uri, **options)
    if is_s3(fs) and not library_retries:
        fs.retries = 1  # of s3fs itself, which has no option for it
    return fs, str(path)


def is_local(fs: Any) -> bool:
    """Whether files lie on this machine's disk."""
    return isinstance(fs, LocalFileSystem)
