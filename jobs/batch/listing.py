"""Lists the videos of a folder or glob on any fsspec URI, and the prompts that lie beside them.

One listing finds videos and sidecars together: in a bucket of 10,000 videos a request per video would take
too long.
"""

from __future__ import annotations

import logging
import os
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fsspec.utils import glob_translate

from pipeline.base.errors import UsageError, one_line
from pipeline.base.stream_ids import expanded
from pipeline.storage.filesystems import connect
from pipeline.storage.locations import read_error, scheme_of
from pipeline.video.image_folder import SUFFIXES as IMAGE_SUFFIXES

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".m2ts", ".mpg", ".mpeg", ".m2v"),
    *(".wmv", ".asf", ".flv", ".ogv", ".3gp", ".3g2", ".mxf", ".vob", ".y4m", ".mjpeg", ".mjpg"),
    *(".h264", ".264", ".h265", ".265", ".hevc"),
)
SIDECARS = (".prompts.json", ".masks.png")
_MAGIC = re.compile(r"[*?\[]")
_FOLDERS_REMEMBERED = 256
# Limit, since a folder may hold a million images beside its videos.
_MOST_SKIPPED = 1000
_MOST_NAMED = 8
_NO_SUFFIX = "not a video suffix"
_NO_VIDEO = "prompts or masks without a video"


@dataclass
class Skipped:
    """Files of a folder or a glob that are not tracked.

    Args:
        count: number of these files.
        files: the first of them, each with the reason.
    """

    count: int = 0
    files: list[tuple[str, str]] = field(default_factory=list)

    def add(self, uri: str, reason: str) -> None:
        """Record a skipped file."""
        self.count += 1
        if len(self.files) < _MOST_SKIPPED:
            self.files.append((uri, reason))

    def __str__(self) -> str:
        """One line for the log: the first few names with their reasons."""
        named: dict[str, list[str]] = {}
        for uri, reason in self.files[:_MOST_NAMED]:
            named.setdefault(reason, []).append(uri.rpartition("/")[2])
        texts = [f"{', '.join(names)} ({reason})" for reason, names in named.items()]
        more = self.count - min(self.count, _MOST_NAMED)
        skipped = f"{self.count} {'file' if self.count == 1 else 'files'} skipped: {'; '.join(texts)}"
        return skipped + (f"; and {more} more, see the report" if more else "")


def has_wildcard(uri: str) -> bool:
    """Whether a URI may be a glob. In an HTTP URL `?` starts the query and is no wildcard."""
    return scheme_of(uri) not in ("http", "https") and _MAGIC.search(uri) is not None


def videos_in(
    uri: str,
    storage_options: Mapping[str, Any] | None = None,
    skipped: Skipped | None = None,
    *,
    out: str | None = None,
) -> Iterator[tuple[str, str | None]]:
    """(video, its sidecar or None) of a folder and all below it, or of a glob; sorted, local paths absolute.

    A folder, or a glob without a suffix, yields files with a video suffix; a glob with a suffix yields all
    matches. Hidden files and folders and sidecars are excluded.

    Args:
        skipped: collects the other files of the folder or glob, except hidden ones.
        out: the batch's output folder, local and absolute or a URI; what is in it is left out.

    Raises:
        UsageError: it cannot be listed, or there is no video.
    """
    pattern, chain, magic, root = _split(uri)
    matches = _matcher(pattern[len(root) :] if root != "." else pattern) if magic else None
    # A glob that names a suffix takes all that match.
    any_suffix = magic is None or "." not in pattern.rpartition("/")[2]
    place, depth = f"{root}{chain}", _depth(pattern[magic.start() :]) if magic else None
    names = _listing(place, depth, storage_options)
    prefix = _prefix(root, chain)
    if out is not None and not chain:
        own = f"{out.rstrip('/')}/"
        names = [n for n in names if not f"{prefix}/{n}".startswith(own)]
    found = {n for n in names if n.endswith(SIDECARS)}
    count = 0
    unused = set(found) if skipped is not None else set()
    for name in names:
        if name in found or (matches is not None and matches(name) is None):
            continue
        if any_suffix and not _has_video_suffix(name):
            if skipped is not None:
                skipped.add(f"{prefix}/{name}{chain}", _NO_SUFFIX)
            continue
        count += 1
        beside = sidecar_of(name, found)
        unused.difference_update(_sidecars_of(name))
        yield f"{prefix}/{name}{chain}", None if beside is None else f"{prefix}/{beside}{chain}"
    for name in sorted(unused):
        if skipped is not None and (matches is None or matches(name) is not None):
            skipped.add(f"{prefix}/{name}{chain}", _NO_VIDEO)
    if not count:
        raise UsageError(_nothing(uri, bool(magic), names))


def root_of(uri: str) -> str:
    """The common parent folder of all videos of a folder or glob, as a prefix of their URIs."""
    _, chain, _, root = _split(uri)
    return _prefix(root, chain)


def sidecar_of(video: str, names: Iterable[str]) -> str | None:
    """The sidecar of a video among `names` (preferably a set); prompts files come before masks."""
    return next((name for name in _sidecars_of(video) if name in names), None)


def _sidecars_of(video: str) -> list[str]:
    stem, suffix = os.path.splitext(video)
    return [base + ending for base in ((video, stem) if suffix else (video,)) for ending in SIDECARS]


class Sidecars:
    """Finds sidecars of a manifest's videos; listings of recent folders are cached."""

    def __init__(self, storage_options: Mapping[str, Any] | None = None) -> None:
        self._options = storage_options
        self._folders: OrderedDict[str, frozenset[str]] = OrderedDict()

    def of(self, video: str) -> str | None:
        """The URI of the prompts beside a video; None if there are none or its folder cannot be listed."""
        if scheme_of(video) in ("http", "https") or "::" in video or "/" not in video.rstrip("/"):
            return None
        folder, _, name = video.rstrip("/").rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = self._look(folder)
            if len(self._folders) > _FOLDERS_REMEMBERED:
                self._folders.popitem(last=False)
        self._folders.move_to_end(folder)
        found = sidecar_of(name, self._folders[folder])
        return None if found is None else f"{folder}/{found}"

    def _look(self, folder: str) -> frozenset[str]:
        try:
            fs, path = connect(folder or "/", self._options, library_retries=True)
            fs.invalidate_cache()
            entries = fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError, ImportError, ValueError):
            return frozenset()  # no such folder, or not listable: opening the video reports the error
        except Exception as error:
            logger.warning("%s cannot be listed, so prompts beside its videos are ignored: %s",
                           folder, one_line(error))  # fmt: skip
            return frozenset()
        names = (str(entry).rstrip("/").rpartition("/")[2] for entry in entries)
        return frozenset(name for name in names if name.endswith(SIDECARS))


# --- listing -------------------------------------------------------------------------------------


def _split(uri: str) -> tuple[str, str, re.Match[str] | None, str]:
    """A folder's or glob's pattern, the chain behind it, the first wildcard, and the folder before that."""
    pattern, chain = _unchained(uri)
    magic = _MAGIC.search(pattern) if has_wildcard(pattern) else None
    root = pattern[: magic.start()].rpartition("/")[0] if magic else pattern.rstrip("/")
    if magic and "/" not in pattern[: magic.start()]:
        root = "."
    elif not root or root.endswith(":/"):
        root += "/"
    return pattern, chain, magic, root


def _prefix(root: str, chain: str) -> str:
    start = os.path.abspath(root.partition("://")[2] if "://" in root else expanded(root))
    prefix = start if scheme_of(root) in ("file", "local") and not chain else root
    return prefix.rstrip("/") if not prefix.endswith("://") else prefix[:-1]


def _unchained(uri: str) -> tuple[str, str]:
    """The part that names files, and the chain after it: of `zip://*.mp4::s3://b/a.zip` it is the first."""
    head, separator, tail = uri.partition("::")
    return (head, separator + tail) if separator and "://" in head else (uri, "")


def _listing(place: str, depth: int | None, storage_options: Mapping[str, Any] | None) -> list[str]:
    """Names below a folder, sorted, without hidden ones."""
    try:
        fs, path = connect(place, storage_options, library_retries=True)
        root = path.rstrip("/") + "/"
        fs.invalidate_cache()
        paths = fs.find(path, maxdepth=depth)
        fs.invalidate_cache()  # clears fsspec's listing cache, which may hold a million files
    except Exception as error:  # fsspec file systems raise their own exceptions
        raise UsageError(str(read_error(place, error))) from error
    root = root.lstrip("/")
    names = (p.lstrip("/").removeprefix(root) for p in paths if not p.endswith("/"))
    return sorted(n for n in names if n and not n.startswith(".") and "/." not in n)


def _matcher(pattern: str) -> Any:
    """Matches names below the root against a glob."""
    return re.compile(glob_translate(pattern.lstrip("/"))).match


def _depth(pattern: str) -> int | None:
    """Number of folder levels that a glob spans."""
    return None if "**" in pattern else pattern.count("/") + 1


def _has_video_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def _nothing(uri: str, is_glob: bool, names: list[str]) -> str:
    if is_glob:
        return f"{uri} matches no video; check the pattern (`**` includes subfolders)"
    if any(n.lower().endswith(IMAGE_SUFFIXES) and not n.endswith(SIDECARS) for n in names):
        hint = "images only; to track a folder of images, name it in a manifest"
    else:
        hint = f"{len(names)} other files; videos end in .mp4, .mkv, .mov, ... - a glob accepts others, too"
    return f"{uri} holds no video ({hint})"
