"""Listing of an output folder's chunk files: on first use, one stream at a time where few are needed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from pipeline.base.errors import StoreError, UsageError
from pipeline.base.garbage import no_collection
from pipeline.base.stream_ids import is_stream_id
from pipeline.storage.files import Files
from pipeline.tracks.copies import Copy, load_copies
from pipeline.tracks.layout import MEND, chunk_folder, chunk_name, chunk_sizes

logger = logging.getLogger(__name__)

_PARTITION = "stream_id="
_ONE_BY_ONE = 32
"""Up to so many streams are listed folder by folder; more, or all, in one listing of everything."""
_NAMED = 3
"""Streams that a message names."""


class Chunk(NamedTuple):
    """A committed chunk. A tuple: there are a hundred thousand of them.

    Args:
        stream_id: its stream.
        first: its first frame.
        following: the first frame of the next chunk; None for the newest.
        size: bytes of its tracks file.
        is_first: whether the stream has no file of earlier frames.
    """

    stream_id: str
    first: int
    following: int | None
    size: int
    is_first: bool = False


def _chunks(stream_id: str, sizes: Mapping[int, int]) -> list[Chunk]:
    firsts = sorted(sizes)
    return [
        Chunk(stream_id, first, following, sizes[first], first == firsts[0])
        for first, following in zip(firsts, [*firsts[1:], None], strict=True)
    ]


class Listing:
    """The chunks of an output folder. Each stream's are listed once, so that they do not change afterwards.

    Args:
        files: the output folder.

    Raises:
        UsageError: it is not an output folder.
    """

    def __init__(self, files: Files) -> None:
        self.files = files
        self._lock = threading.Lock()
        self._sizes: dict[str, dict[int, int]] = {}
        self._known: dict[str, list[Chunk]] = {}
        names = files.folders("tracks")
        found = (name.removeprefix(_PARTITION) for name in names if name.startswith(_PARTITION))
        self.tracked = sorted(stream_id for stream_id in found if is_stream_id(stream_id))
        self._tracked = {*self.tracked}
        self._recorded: list[str] | None = None
        self._copies: list[Copy] | None = None
        self._copies_of: dict[str, list[Copy]] = {}
        if not self.tracked and not self.recorded:
            raise UsageError(
                f"{files.root} is no output folder of xmem: nothing in it under tracks/ or streams/"
            )

    @property
    def recorded(self) -> list[str]:
        """Ids of the streams that have a record, sorted."""
        if self._recorded is None:
            names = (name.rpartition("/")[2] for name in self.files.names("streams"))
            ids = (name.removesuffix(".json") for name in names if name.endswith(".json"))
            self._recorded = [stream_id for stream_id in ids if is_stream_id(stream_id)]
        return self._recorded

    @property
    def streams(self) -> list[str]:
        """Ids of all streams, sorted."""
        return sorted({*self.tracked, *self.recorded})

    def chunks(self, stream_ids: Iterable[str] | None = None) -> dict[str, list[Chunk]]:
        """The chunks of some or all streams, by stream, ascending; streams without tracks are left out."""
        found = {}
        sizes = self.sizes(stream_ids)
        with no_collection():
            for stream_id, of_stream in sizes.items():
                if stream_id not in self._known:
                    self._known[stream_id] = _chunks(stream_id, of_stream)
                found[stream_id] = self._known[stream_id]
        return found

    def sizes(self, stream_ids: Iterable[str] | None = None) -> dict[str, dict[int, int]]:
        """Bytes of the chunks' files by stream and first frame, as in `chunks`; their order is any."""
        with self._lock, no_collection():
            wanted = self.tracked if stream_ids is None else sorted(self._tracked & {*stream_ids})
            unknown = [stream_id for stream_id in wanted if stream_id not in self._sizes]
            if len(unknown) > _ONE_BY_ONE or len(unknown) == len(self.tracked) > 1:
                found = self.files.sizes("tracks", recursive=True)
                self._keep([s for s in self.tracked if s not in self._sizes], found)
            else:
                for stream_id in unknown:
                    self._keep([stream_id], self.files.sizes(chunk_folder("tracks", stream_id)))
            return {stream_id: self._sizes[stream_id] for stream_id in wanted if self._sizes[stream_id]}

    def copies(self, stream_id: str) -> dict[int, Copy]:
        """The compacted files that hold for chunks of a stream, by the chunks' first frames.

        They are listed after the stream's own files; see `pipeline.tracks.copies`.
        """
        return {first: copy for copy in self.copies_of(stream_id) for first in copy.chunks[stream_id]}

    def copies_of(self, stream_id: str) -> list[Copy]:
        """The compacted files that hold for chunks of a stream."""
        sizes = self.sizes([stream_id]).get(stream_id, {})
        self.all_copies()
        return [copy for copy in self._copies_of.get(stream_id, []) if copy.matches(stream_id, sizes)]

    def all_copies(self) -> list[Copy]:
        """The compacted files that are written and not withdrawn. Streams may be others by now."""
        with self._lock, no_collection():
            if self._copies is None:
                found = load_copies(self.files)
                if found.problem is not None:
                    logger.warning("%s", found.problem)
                self._copies = [copy for copy in found.files if copy.bytes is not None and not copy.void]
                for copy in self._copies:
                    for name in copy.chunks:
                        self._copies_of.setdefault(name, []).append(copy)
            return self._copies

    def _keep(self, stream_ids: Iterable[str], sizes: Mapping[str, int]) -> None:
        found = chunk_sizes(sizes)
        if len(sizes) > sum(map(len, found.values())):
            self._warn_of_others(sizes, found)
        for stream_id in stream_ids:
            self._sizes[stream_id] = found.get(stream_id, {})

    def _warn_of_others(self, sizes: Mapping[str, int], found: Mapping[str, Mapping[int, int]]) -> None:
        """Name Parquet files that are no chunk files: other tools read them beside ours."""
        known = {chunk_name("tracks", s, first) for s, chunks in found.items() for first in chunks}
        others = [name for name in sizes if name.endswith(".parquet") and name not in known]
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            logger.warning("%s%s is not read: it is no file of xmem", self.files.uri(others[0]), more)

    def none_chosen(self) -> str:
        """What to say if conditions on `stream_id` leave no stream: a misspelt id is no error in SQL."""
        some = ", ".join(self.tracked[:_NAMED])
        more = f" and {len(self.tracked) - _NAMED} more" if len(self.tracked) > _NAMED else ""
        return f"no stream matches the conditions on stream_id: {self.files.root} has {some}{more}"

    def check_begins(self, chunks: list[Chunk]) -> None:
        """StoreError if the first file of a stream is missing."""
        if chunks and chunks[0].first != 0:
            missing = self.files.uri(chunk_name("tracks", chunks[0].stream_id, 0))
            raise StoreError(f"{missing} is missing, though files of later frames exist: {MEND}")
