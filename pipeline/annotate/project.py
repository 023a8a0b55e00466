"""Project: the durable form of an annotation, a log of edits below the output folder.

    OUT/annotate/<stream>/project.json          video and settings, written once
    OUT/annotate/<stream>/edits/<number>.json   one edit each, numbered from 1, created and never replaced

An edit is durable before it takes effect. Undoing is an edit, too: the log only grows, and replaying it gives
the document and everything that can be undone and redone. Two annotators of one project cannot both create
the same number, so that the second one is refused.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.annotate.document import Change, Document
from pipeline.base.errors import AnotherWriterError, StoreError, UsageError, XmemError
from pipeline.storage.files import Files

VERSION = 1
_EDIT = re.compile(r"(\d{12})\.json")


def project_folder(stream_id: str) -> str:
    """The folder of a project in the output folder."""
    return f"annotate/{stream_id}"


def project_ids(files: Files) -> list[str]:
    """The streams of an output folder that have a project."""
    return [i for i in files.folders("annotate") if files.exists(f"{project_folder(i)}/project.json")]


@dataclass(frozen=True)
class ProjectHeader:
    """What a project is about; fixed when it is created.

    Args:
        video: URI of the video.
        fingerprint: fingerprint of its content.
        settings: `TrackSettings.to_dict()`, as asked for.
        imported: prompts file of the stream that the folder already held; None: it held none.
        imported_edits: its edits of the memory, as (frame, JSON-ready edit).
    """

    video: str
    fingerprint: str
    settings: Mapping[str, Any]
    imported: Mapping[str, Any] | None = None
    imported_edits: tuple[tuple[int, Mapping[str, Any]], ...] = ()


def read_header(files: Files, stream_id: str) -> ProjectHeader | None:
    """The header of a project, None if there is none; StoreError if it is damaged."""
    name = f"{project_folder(stream_id)}/project.json"
    try:
        stored = _parsed(files, name)
    except FileNotFoundError:
        return None
    try:
        return ProjectHeader(
            str(stored["video"]),
            str(stored["fingerprint"]),
            dict(stored["settings"]),
            stored.get("imported"),
            tuple((int(frame), dict(edit)) for frame, edit in stored.get("imported_edits", ())),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise StoreError(f"{files.uri(name)} is damaged: restore it from a copy") from error


def create_header(files: Files, stream_id: str, header: ProjectHeader) -> None:
    """Begin a project."""
    content = {
        "format_version": VERSION,
        "video": header.video,
        "fingerprint": header.fingerprint,
        "settings": dict(header.settings),
        "imported": header.imported,
        "imported_edits": [list(pair) for pair in header.imported_edits],
    }
    name = f"{project_folder(stream_id)}/project.json"
    if not files.create(name, _bytes(content), stream_id):
        raise AnotherWriterError(f"{files.uri(name)} has just been written by another annotator: try again")


class Project:
    """The document of one project with its history. Thread-safe.

    Args:
        files: the output folder.
        stream_id: its stream.
        first: the document before the first edit.

    Raises:
        StoreError: an edit is missing or damaged.
    """

    def __init__(self, files: Files, stream_id: str, first: Document) -> None:
        self._files, self._stream_id = files, stream_id
        self._history = [first]
        self._position = 0
        self._lock = threading.RLock()
        self.edits = 0
        self._load()

    @property
    def document(self) -> Document:
        return self._history[self._position]

    @property
    def can_undo(self) -> bool:
        return self._position > 0

    @property
    def can_redo(self) -> bool:
        return self._position < len(self._history) - 1

    def edit(self, changes: Sequence[Change]) -> Document:
        """Apply an edit; durable when it returns.

        Raises:
            UsageError, PromptError: it does not fit the document; nothing is stored.
            StoreError: it cannot be stored; the document is as before.
        """
        with self._lock:
            new = self.document.changed(changes)
            if new != self.document:
                self._store({"changes": list(changes)})
                self._take(new)
            return self.document

    def undo(self) -> Document:
        """Take back the last edit that is in effect; durable when it returns."""
        with self._lock:
            if not self.can_undo:
                raise UsageError("there is nothing to undo")
            self._store({"undo": True})
            self._position -= 1
            return self.document

    def redo(self) -> Document:
        """Apply again what was undone last; durable when it returns."""
        with self._lock:
            if not self.can_redo:
                raise UsageError("there is nothing to redo")
            self._store({"redo": True})
            self._position += 1
            return self.document

    def _take(self, document: Document) -> None:
        self._history = [*self._history[: self._position + 1], document]
        self._position += 1

    def _name(self, number: int) -> str:
        return f"{project_folder(self._stream_id)}/edits/{number:012d}.json"

    def _store(self, content: Mapping[str, Any]) -> None:
        name = self._name(self.edits + 1)
        data = _bytes({"format_version": VERSION, **content})
        if not self._files.create(name, data, self._stream_id):
            raise AnotherWriterError(
                f"{self._files.uri(name)} exists: another annotator has this project open; close one, and "
                "open the other one again"
            )
        self.edits += 1

    def _load(self) -> None:
        names = self._files.names(f"{project_folder(self._stream_id)}/edits")
        numbers = sorted(int(m[1]) for n in names if (m := _EDIT.fullmatch(n.rpartition("/")[2])))
        if numbers != list(range(1, len(numbers) + 1)):
            missing = next(i for i in range(1, len(numbers) + 2) if i not in numbers)
            raise StoreError(f"{self._files.uri(self._name(missing))} is missing: restore it from a copy")
        for number in numbers:
            name = self._name(number)
            stored = _parsed(self._files, name)
            try:
                if stored.get("undo"):
                    if not self.can_undo:
                        raise UsageError("there is nothing to undo")
                    self._position -= 1
                elif stored.get("redo"):
                    if not self.can_redo:
                        raise UsageError("there is nothing to redo")
                    self._position += 1
                else:
                    self._take(self.document.changed(stored["changes"]))
            except (XmemError, LookupError, TypeError, ValueError) as error:
                raise StoreError(
                    f"{self._files.uri(name)} is damaged ({error}): restore it from a copy"
                ) from error
        self.edits = len(numbers)


def _bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _parsed(files: Files, name: str) -> dict[str, Any]:
    try:
        stored = json.loads(files.read(name))
    except ValueError as error:
        raise StoreError(f"{files.uri(name)} is damaged: restore it from a copy") from error
    if not isinstance(stored, dict) or stored.get("format_version") != VERSION:
        raise StoreError(
            f"{files.uri(name)} is not of format version {VERSION}: upgrade xmem, or restore it from a copy"
        )
    return stored
