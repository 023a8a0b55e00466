"""Compacted copies of chunk files: their layout, which of them hold, and how they are withdrawn.

    OUT/compacted/plans/<number:06d>.json                 which chunks each file of a plan has; created once
    OUT/compacted/tracks/<number:06d>-<index:04d>.parquet sorted by stream_id, frame_index, object_id
    OUT/compacted/events/<number:06d>-<index:04d>.parquet
    OUT/compacted/void/<number:06d>-<index:04d>.json      withdrawn: nobody reads or writes that file again
    OUT/compacted/void/<number:06d>.json                  all files of that plan are withdrawn, itself removed

The files of `tracks/` remain the truth; all of `compacted/` can be removed at any time and written anew.

A plan is created, never replaced, before its files are written. A plan has only chunks that no file of
an earlier plan has, except withdrawn ones. So no two files under `compacted/tracks/` have a row in common,
whichever process is killed when, and a reader needs no more than that folder's names. Files are created as a
whole, from plans that anybody may finish.

Small files are merged by withdrawing them, and planning what they had anew as one file. Whoever reads a file
that is withdrawn meanwhile reads the chunk files instead: a row group has the rows of whole chunks.

A restart of a stream withdraws the files with its rows before it removes the stream's own files, and once
more afterwards: a plan made meanwhile is withdrawn too, and one made later finds no old files. A reader
lists a stream's own files first and opens a compacted file afterwards; if that is still there, its rows are
those of the files that were listed.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.base.errors import StoreError
from pipeline.storage.files import Files

logger = logging.getLogger(__name__)

FOLDER = "compacted"
OWNER = "compact"
"""Owner of temporary files."""
PLAN_VERSION = 1
_PLAN = re.compile(FOLDER + r"/plans/(\d{6})\.json")
_RETIRED = re.compile(FOLDER + r"/void/(\d{6})\.json")

Sizes = dict[str, dict[int, int]]
"""Bytes of chunk files by stream and first frame."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One file of a plan.

    Args:
        name: without folder and suffix.
        chunks: first frame and bytes of the chunk files that it replaces, ascending, by stream.
        bytes: size of its tracks file and of its events file; None if it is not written.
        void: whether it is withdrawn.
    """

    name: str
    chunks: Sizes
    bytes: tuple[int, int] | None = None
    void: bool = False

    def matches(self, stream_id: str, sizes: Mapping[int, int]) -> bool:
        """Whether a stream's chunk files are there, with the sizes that they had."""
        return self.chunks[stream_id].items() <= sizes.items()


def plan_name(number: int) -> str:
    """The name of a plan."""
    return f"{FOLDER}/plans/{number:06d}.json"


def copy_name(number: int, index: int) -> str:
    """The name of a file of a plan, without folder and suffix."""
    return f"{number:06d}-{index:04d}"


def copy_path(kind: str, name: str) -> str:
    """The path of a compacted file; `kind` is "tracks" or "events"."""
    return f"{FOLDER}/{kind}/{name}.parquet"


def plan_bytes(chunks: list[Sizes], token: str) -> bytes:
    """A plan as bytes."""
    files = [{s: list(map(list, sizes.items())) for s, sizes in of_file.items()} for of_file in chunks]
    plan = {"format_version": PLAN_VERSION, "token": token, "files": files}
    return json.dumps(plan, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Copies:
    """All plans of an output folder.

    Args:
        files: the files of all plans that can be read, in the plans' order.
        next_plan: number of the next plan.
        problem: why a plan could not be read.
    """

    files: list[Copy]
    next_plan: int = 1
    problem: StoreError | None = None


def load_copies(files: Files) -> Copies:
    """The compacted files of a folder, and those that are planned. StoreError if it cannot be read."""
    there = files.sizes(FOLDER, recursive=True)
    found: list[Copy] = []
    retired = {int(match[1]) for match in map(_RETIRED.fullmatch, there) if match}
    highest, problem = max(retired, default=0), None
    for name in sorted(there):
        match = _PLAN.fullmatch(name)
        if match is None or (last := int(match[1])) in retired:
            continue
        highest = max(highest, last)
        try:
            plan = _plan(files, name)
        except StoreError as error:
            if not files.exists(_retired_name(last)):  # else it was removed since it was listed
                problem = error
            continue
        for index, chunks in enumerate(plan):
            copy = copy_name(last, index)
            tracks, events = there.get(copy_path("tracks", copy)), there.get(copy_path("events", copy))
            size = None if tracks is None or events is None else (tracks, events)
            found.append(Copy(copy, chunks, size, f"{FOLDER}/void/{copy}.json" in there))
    return Copies(found, highest + 1, problem)


def _plan(files: Files, name: str) -> list[Sizes]:
    try:
        plan: dict[str, Any] = json.loads(files.read(name))
        version = plan["format_version"]
        if version == PLAN_VERSION:
            return [{s: dict(chunks) for s, chunks in of_file.items()} for of_file in plan["files"]]
    except FileNotFoundError:
        raise StoreError(f"{files.uri(name)} has vanished") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{files.uri(name)} is damaged: remove the folder {FOLDER}/, which holds only copies, and run "
            "`xmem compact` again"
        ) from error
    raise StoreError(
        f"{files.uri(name)} has format version {version}, and this xmem reads {PLAN_VERSION}: upgrade it"
    )


def withdraw(files: Files, name: str) -> None:
    """Withdraw a file for good: mark it, then remove it."""
    files.create(f"{FOLDER}/void/{name}.json", b"{}\n", OWNER)
    for kind in ("tracks", "events"):
        files.remove(copy_path(kind, name))


def is_withdrawn(files: Files, name: str) -> bool:
    """Whether a file is withdrawn by now."""
    plan = int(name.partition("-")[0])
    return files.exists(f"{FOLDER}/void/{name}.json") or files.exists(_retired_name(plan))


def retire_plans(files: Files, copies: Copies) -> None:
    """Leave one small file of each plan whose files are all withdrawn."""
    by_plan: dict[int, list[Copy]] = {}
    for copy in copies.files:
        by_plan.setdefault(int(copy.name.partition("-")[0]), []).append(copy)
    for number, of_plan in by_plan.items():
        if all(copy.void and copy.bytes is None for copy in of_plan):
            files.create(_retired_name(number), b"{}\n", OWNER)
            files.remove(plan_name(number))
            for copy in of_plan:
                files.remove(f"{FOLDER}/void/{copy.name}.json")


def _retired_name(number: int) -> str:
    return f"{FOLDER}/void/{number:06d}.json"


def withdraw_stream(files: Files, stream_id: str) -> None:
    """Withdraw all files with rows of a stream, planned ones included."""
    copies = load_copies(files)
    if copies.problem is not None:
        logger.warning("%s", copies.problem)  # nobody reads its files either
    for copy in copies.files:
        if stream_id in copy.chunks and not copy.void:
            withdraw(files, copy.name)
