"""The batch report for programs: totals, and one entry per video."""

from __future__ import annotations

import json
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, get_args

from jobs.batch.listing import Skipped
from jobs.scheduling.actions import VideoResult, VideoState
from jobs.scheduling.video_job import VideoJob
from pipeline.base.errors import StoreError, XmemError, one_line
from pipeline.base.redaction import redacted
from pipeline.storage.failures import Failure
from pipeline.storage.opening import open_files
from pipeline.tracks.lease import running

FORMAT_VERSION = 1
FOLDER = "batches"
STATES: tuple[VideoState, ...] = get_args(VideoState)
BAD: frozenset[VideoState] = frozenset({"failed", "quarantined"})
INTERRUPTED = 130


@dataclass(frozen=True)
class BatchReport:
    """Outcome of a batch.

    Args:
        jobs: all videos, in order.
        results: result by stream id.
        out: output folder, as given.
        started, ended: times in UTC.
        stopped: failure that stopped the whole batch, such as a full disk; None: no such failure.
        interrupted: whether it was stopped before all videos had ended.
        frames: frames tracked in this run, with repeated ones counted again.
        workers: maximum number of tracker processes at the same time.
        skipped: files of the folder or glob that are not tracked.
        request: command line of the batch, without credentials.
        batch_id: id used in the report's name. Default: time and a random suffix.
    """

    jobs: Sequence[VideoJob] = field(repr=False)
    results: Mapping[str, VideoResult] = field(repr=False)
    out: str = field(repr=False)
    started: datetime
    ended: datetime
    interrupted: bool = False
    stopped: Failure | None = None
    frames: int = 0
    workers: int = 0
    skipped: Skipped = field(default_factory=Skipped, repr=False)
    request: Sequence[str] = field(default=(), repr=False)
    batch_id: str = ""

    def __post_init__(self) -> None:
        if not self.batch_id:
            made = f"{self.started:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
            object.__setattr__(self, "batch_id", made)

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return (self.ended - self.started).total_seconds()

    @property
    def exit_code(self) -> int:
        """0: all finished; 130: interrupted; 1: videos failed, were cancelled or are pending."""
        if self.interrupted and self.stopped is None:
            return INTERRUPTED
        return 0 if self.totals()["finished"] == len(self.jobs) else 1

    def each(self) -> Iterator[tuple[VideoJob, VideoResult]]:
        """The videos with results, in order; a video never begun is pending."""
        for job in self.jobs:
            stream_id = job.spec.stream_id
            yield job, self.results.get(stream_id) or VideoResult(stream_id, "pending", 0, 0, 0, 0, 0.0, None)

    def bad(self) -> Iterator[tuple[VideoJob, VideoResult]]:
        """The failed and quarantined videos, in order."""
        return ((job, result) for job, result in self.each() if result.state in BAD)

    def totals(self) -> dict[str, int]:
        """Number of videos, in all and by state, and the sums of frames, rows, losses and ellipses."""
        totals = dict.fromkeys(("videos", *STATES, "frames", "rows", "losses", "ellipses"), 0)
        for _, result in self.each():
            totals["videos"] += 1
            totals[result.state] += 1
            totals["frames"] += result.frames
            totals["rows"] += result.rows
            totals["losses"] += result.losses
            totals["ellipses"] += result.ellipses
        return totals

    def to_json(self) -> Iterator[str]:
        """The report as pieces of JSON text, one line per video, without credentials."""
        head = {
            "format_version": FORMAT_VERSION,
            "batch_id": self.batch_id,
            "out": redacted(self.out),
            "started": _iso(self.started),
            "ended": _iso(self.ended),
            "seconds": round(self.seconds, 3),
            "interrupted": self.interrupted,
            "stopped": _cause(self.stopped),
            "frames_tracked": self.frames,
            "workers": self.workers,
            "request": [redacted(token) for token in self.request],
            "totals": self.totals(),
            "skipped": {
                "files": self.skipped.count,
                "first": [{"uri": redacted(uri), "reason": reason} for uri, reason in self.skipped.files],
            },
        }
        yield json.dumps(head, indent=2)[:-2] + ',\n  "videos": ['
        separator = "\n    "
        for job, result in self.each():
            yield separator + json.dumps(_line(job, result))
            separator = ",\n    "
        yield "\n  ]\n}\n"

    @property
    def location(self) -> str:
        """The URI that `save` writes to."""
        return f"{self.out.rstrip('/')}/{FOLDER}/{self.batch_id}.json"

    def check(self, storage_options: Mapping[str, Any] | None = None) -> None:
        """Check before any tracking that the output folder can be written.

        Raises StoreError.
        """
        with self.probe(storage_options):
            pass

    @contextmanager
    def probe(self, storage_options: Mapping[str, Any] | None = None) -> Iterator[str]:
        """Write a small file into the output folder, by which workers verify that they see the same folder.

        Returns:
            the file's name in the folder. Raises StoreError if it cannot be written.
        """
        files = open_files(self.out, storage_options)
        name = f"{FOLDER}/.{self.batch_id}"
        files.create(name, b"", owner=self.batch_id)
        try:
            yield name
        finally:
            with suppress(StoreError):
                files.remove(name)

    def save(self, storage_options: Mapping[str, Any] | None = None) -> None:
        """Write the report into the output folder, atomically.

        Raises StoreError.
        """
        data = "".join(self.to_json()).encode()
        open_files(self.out, storage_options).create(
            f"{FOLDER}/{self.batch_id}.json", data, owner=self.batch_id
        )

    def write(self, path: str) -> None:
        """Write the report to a local file, atomically; `-` is stdout. Raises XmemError."""
        if path == "-":
            sys.stdout.writelines(self.to_json())
            sys.stdout.flush()
            return
        path = os.path.abspath(path)
        temporary = ""
        try:
            handle, temporary = tempfile.mkstemp(
                prefix=".", suffix=os.path.basename(path), dir=os.path.dirname(path)
            )
            with open(handle, "w", encoding="utf-8") as file:
                file.writelines(self.to_json())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except OSError as error:
            raise XmemError(
                f"the report cannot be written to {path}: {error.strerror or one_line(error)}"
            ) from error
        finally:
            with suppress(OSError):
                os.remove(temporary)


def batches_in(out: str, storage_options: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The batches of an output folder, newest first: running ones, and reports of finished ones.

    Raises StoreError.
    """
    files = open_files(out, storage_options)
    found = []
    for owner in running(files):
        where = f"on {owner.host}, process {owner.pid}"
        found.append(
            {"batch_id": owner.batch_id, "state": "running", "started": owner.started, "what": where}
        )
    for name in files.names(FOLDER):
        if not name.endswith(".json"):
            continue
        try:
            report = json.loads(files.read(name))
            totals = report["totals"]
            told = [f"{totals[state]} {state}" for state in STATES if totals[state]]
            state = "interrupted" if report["interrupted"] else "ended"
            what = f"{totals['videos']} videos: {', '.join(told)}; {files.uri(name)}"
            line = {
                "batch_id": report["batch_id"],
                "state": state,
                "started": report["started"],
                "what": what,
            }
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            continue  # not a report
        found.append(line)
    return sorted(found, key=lambda line: str(line["batch_id"]), reverse=True)


def _line(job: VideoJob, result: VideoResult) -> dict[str, Any]:
    return {
        "stream_id": result.stream_id,
        "uri": redacted(job.spec.uri),
        "state": result.state,
        "frames": result.frames,
        "rows": result.rows,
        "losses": result.losses,
        "ellipses": result.ellipses,
        "tries": result.tries,
        "seconds": round(result.seconds, 3),
        "cause": _cause(result.cause),
    }


def _cause(failure: Failure | None) -> dict[str, str] | None:
    return None if failure is None else {"kind": failure.kind, "message": redacted(failure.message)}


def _iso(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="milliseconds")


def _umask() -> int:
    """The process's umask. mkstemp creates private files, but reports should be readable by others."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
