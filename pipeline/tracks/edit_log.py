"""Edits of what a stream remembers: files that are created once and never changed.

    OUT/edits/<id>/<frame:012d>-<number:06d>.json

An edit takes effect before frame `frame`, the first without rows when it was asked for; edits of the same
frame are numbered from 0. It changes no snapshot: a snapshot holds the edits of the frames before it, and
whoever tracks on from it makes the others when it comes to their frames. So an edit is made once in each
state, however often frames are repeated, and its event is committed with the rows of its frame.

A run that is at work meanwhile does not know of the edit. `StreamStore.commit` therefore refuses a chunk that
lacks an edit of its frames, before and after creating its file, and the editor takes its edit back if its
frame has rows after it was created: at least one of the two sees the other. An edit whose frame has rows
without its event (the editor was killed before it could take it back) was never made, and is ignored.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.base.errors import StoreError
from pipeline.storage.files import Files

VERSION = 1
EDITED = "memory_edited"
"""Kind of the events of edits."""
_NAME = re.compile(r"(\d{12,18})-(\d{6})\.json")


@dataclass(frozen=True, order=True)
class LoggedEdit:
    """One edit: it takes effect before `frame`, after those of the same frame with smaller numbers."""

    frame: int
    number: int
    name: str


class EditLog:
    """The edits of one stream.

    Args:
        files: the output folder.
    """

    def __init__(self, files: Files, stream_id: str) -> None:
        self._files, self._stream_id = files, stream_id
        self._folder = f"edits/{stream_id}"

    def list(self) -> list[LoggedEdit]:
        """All edits, in order."""
        found = []
        for name in self._files.names(self._folder):
            if match := _NAME.fullmatch(name.rpartition("/")[2]):
                found.append(LoggedEdit(int(match[1]), int(match[2]), name))
        return sorted(found)

    def add(self, frame: int, number: int, edit: Mapping[str, Any]) -> LoggedEdit | None:
        """Create an edit, durably. None, changing nothing, if there is another of this number.

        Args:
            edit: its content, JSON-ready. A retried request finds its own bytes, which must differ from those
                of any other edit: give each a unique value.
        """
        name = f"{self._folder}/{frame:012d}-{number:06d}.json"
        data = (json.dumps({"format_version": VERSION, **edit}, indent=2) + "\n").encode()
        if not self._files.create(name, data, self._stream_id):
            try:
                if self._files.read(name) != data:
                    return None
            except FileNotFoundError:
                return None
        return LoggedEdit(frame, number, name)

    def read(self, edit: LoggedEdit) -> dict[str, Any]:
        """The content of an edit; StoreError if it is damaged or of a newer format."""
        uri = self._files.uri(edit.name)
        try:
            content = json.loads(self._files.read(edit.name))
            version = content["format_version"]
        except FileNotFoundError:
            raise StoreError(f"{uri} has vanished while it was read: run again") from None
        except (ValueError, LookupError, TypeError) as error:
            raise StoreError(f"{uri} is damaged: restore it from a copy, or delete it") from error
        if version != VERSION:
            raise StoreError(f"{uri} has format version {version}, and this xmem reads {VERSION}: upgrade it")
        return dict(content)

    def remove(self, edit: LoggedEdit) -> None:
        """Take back an edit that took no effect."""
        self._files.remove(edit.name)

    def remove_all(self) -> None:
        """Remove all edits."""
        for edit in self.list():
            self._files.remove(edit.name)
        self._files.remove_empty_folder(self._folder)

    def missing(self, first: int, last: int, made: Mapping[int, int]) -> int | None:
        """The first of the frames `first`..`last` with more edits than were made; None if there is none.

        Args:
            made: number of edits that were made, by frame.
        """
        logged = Counter(edit.frame for edit in self.list() if first <= edit.frame <= last)
        return min((frame for frame, count in logged.items() if count > made.get(frame, 0)), default=None)


def edits_made(events: Any) -> dict[int, int]:
    """Number of edits by frame in a table of `EVENTS_SCHEMA`."""
    kinds, frames = events["kind"].to_pylist(), events["frame_index"].to_pylist()
    return Counter(frame for kind, frame in zip(kinds, frames, strict=True) if kind == EDITED)
