"""Stream ids: names that are safe in paths, URIs, hive partitions and SQL."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import unicodedata
from urllib.parse import unquote, urlsplit

from pipeline.base.errors import UsageError
from pipeline.base.joined_uris import joined_parts
from pipeline.base.redaction import redacted

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_STEM_LENGTH = 100
_HASH_LENGTH = 10
_SUFFIX_LENGTH = 5


def is_stream_id(text: str) -> bool:
    """Whether a text is a valid stream id."""
    return _ID.fullmatch(text) is not None


def validate_stream_id(stream_id: str) -> str:
    """Return the id; UsageError if it is not valid."""
    if not isinstance(stream_id, str) or not _ID.fullmatch(stream_id):
        raise UsageError(
            f"stream id {stream_id!r} is not allowed: use 1 to 128 of the characters A-Z a-z 0-9 . _ -, "
            f"starting with a letter or digit"
        )
    return stream_id


def generate_stream_id(uri: str) -> str:
    """Make a stream id `<stem>-<hash>` from a stream's source; the same source always gives the same id.

    Local paths are made absolute, and user name, password and signature are removed from URIs, so the id does
    not depend on the working directory, a new password or a freshly signed URL. The hash begins with a
    letter, so that no reader of hive partitions takes the id for a number or a date. Joined files are named
    after the first.
    """
    if (files := joined_parts(uri)) is not None:
        digest = hashlib.sha256("\n".join(map(generate_stream_id, files)).encode()).hexdigest()
        first = unquote(urlsplit(files[0]).path) if "://" in files[0] else files[0]
        return f"{_stem(first)}-{_letter(digest)}{digest[1:_HASH_LENGTH]}"
    # "#" begins a fragment only in web addresses: in a bucket it is part of the name.
    parts = urlsplit(uri, allow_fragments=uri.lower().startswith(("http://", "https://", "rtsp")))
    if "://" not in uri or parts.scheme in ("file", "local"):
        path = os.path.abspath(expanded(unquote(parts.path) if "://" in uri else uri))
        canonical = f"file://{path}"
    else:
        path = unquote(parts.path)
        host = parts.netloc.rpartition("@")[2]
        canonical = redacted(parts._replace(netloc=host, fragment="").geturl())
        path = path if path.strip("/") else host
    digest = hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{_stem(path)}-{_letter(digest)}{digest[1:_HASH_LENGTH]}"


def relative_stream_id(path: str) -> str:
    """Make a stream id `<stem>-<hash>` from a path below an archive's root; it survives moving the archive.

    Args:
        path: path with forward slashes; `./a.mp4` and `a.mp4` are the same.
    """
    path = posixpath.normpath(path)
    digest = hashlib.sha256(f"relative:{path}".encode("utf-8", "surrogatepass")).hexdigest()
    return f"{_stem(path)}-{_letter(digest)}{digest[1:_HASH_LENGTH]}"


def named_stream_id(uri: str) -> str:
    """Make a stream id from only the file's name; files of the same name share it."""
    path = unquote(urlsplit(uri).path) if "://" in uri else uri
    return _stem(path)


def _letter(digest: str) -> str:
    return "abcdefghijklmnop"[int(digest[0], 16)]


def _stem(path: str) -> str:
    name = path.rstrip("/").rpartition("/")[2]
    stem, suffix = os.path.splitext(name)
    if not 1 < len(suffix) <= _SUFFIX_LENGTH or suffix[1:].isdigit():
        stem = name
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", plain)[:_STEM_LENGTH].strip("._-")
    return cleaned or "video"


def expanded(path: str) -> str:
    """Expand a leading `~` to the home folder; a text that cannot be a path is returned unchanged."""
    try:
        return os.path.expanduser(path)
    except ValueError:  # a null byte; opening it reports the error
        return path
