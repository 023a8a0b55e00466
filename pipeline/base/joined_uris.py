"""URIs of joined videos: several files that are one stream, as `join:first.mp4;second.mp4`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pipeline.base.errors import UsageError

_PREFIX, _SEPARATOR = "join:", ";"


def joined_uri(parts: Sequence[str | os.PathLike[str]]) -> str:
    """The URI of files in this order; of one file its own.

    Raises UsageError if there is none, or one is twice.
    """
    uris = [os.fspath(part) for part in parts]
    if not uris:
        raise UsageError("no files to join: give at least one")
    if len(uris) == 1:
        return uris[0]
    for position, uri in enumerate(uris):
        if not uri or uri.startswith(_PREFIX):
            raise UsageError(f"{uri!r} cannot be joined with others: give files")
        if uri in uris[:position]:
            raise UsageError(f"{uri} is given twice: a stream has each file once")
    return _PREFIX + _SEPARATOR.join(uri.replace("%", "%25").replace(_SEPARATOR, "%3B") for uri in uris)


def joined_parts(uri: str) -> list[str] | None:
    """The files of a joined URI, in order; None if it is another URI or a path."""
    if not uri.startswith(_PREFIX):
        return None
    parts = uri.removeprefix(_PREFIX).split(_SEPARATOR)
    return [part.replace("%3B", _SEPARATOR).replace("%25", "%") for part in parts]
