"""Listing of an output folder's chunk files: on first use, one stream at a time where few are needed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pipeline.base.errors import StoreError, UsageError
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


@dataclass(frozen=True, slots=True)
class Chunk:
    """A committed chunk.

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
        self._known: dict[str, list[Chunk]] = {}
        names = files.folders("tracks")
        found = (name.removeprefix(_PARTITION) for name in names if name.startswith(_PARTITION))
        self.tracked = sorted(stream_id for stream_id in found if is_stream_id(stream_id))
        self._tracked = {*self.tracked}
        self._recorded: list[str] | None = None
        self._copies: dict[str, list[Copy]] | None = None
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
        with self._lock:
            wanted = self.tracked if stream_ids is None else sorted(self._tracked & {*stream_ids})
            unknown = [stream_id for stream_id in wanted if stream_id not in self._known]
            if len(unknown) > _ONE_BY_ONE or len(unknown) == len(self.tracked) > 1:
                found = self.files.sizes("tracks", recursive=True)
                self._keep(unknown, found)
            else:
                for stream_id in unknown:
                    self._keep([stream_id], self.files.sizes(chunk_folder("tracks", stream_id)))
            return {stream_id: self._known[stream_id] for stream_id in wanted if self._known[stream_id]}

    def copies(self, stream_id: str) -> dict[int, Copy]:
        """The compacted files that hold for chunks of a stream, by the chunks' first frames.

        They are listed after the stream's own files; see `pipeline.tracks.copies`.
        """
        chunks = {chunk.first: chunk.size for chunk in self.chunks([stream_id]).get(stream_id, [])}
        with self._lock:
            if self._copies is None:
                found = load_copies(self.files)
                if found.problem is not None:
                    logger.warning("%s", found.problem)
                self._copies = {}
                for copy in found.files:
                    if copy.bytes is not None and not copy.void:
                        for name in copy.chunks:
                            self._copies.setdefault(name, []).append(copy)
            of_stream = [c for c in self._copies.get(stream_id, []) if c.matches(stream_id, chunks)]
        return {first: copy for copy in of_stream for first in copy.chunks[stream_id]}

    def _keep(self, stream_ids: Iterable[str], sizes: Mapping[str, int]) -> None:
        found = chunk_sizes(sizes)
        if len(sizes) > sum(map(len, found.values())):
            self._warn_of_others(sizes, found)
        for stream_id in stream_ids:
            chunks = found.get(stream_id, {})
            firsts = sorted(chunks)
            self._known[stream_id] = [
                Chunk(stream_id, first, following, chunks[first], first == firsts[0])
                for first, following in zip(firsts, [*firsts[1:], None], strict=False)
            ]

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
