"""Leases on the streams of an output folder, so that a batch started twice is noticed.

    OUT/running/<batch id>.json       the owner: machine, process, start time and heartbeat
    OUT/running/<batch id>.streams    the streams: 8 bytes each

Rows are safe without leases, since commits never overwrite. A lease only avoids duplicate work. A run first
writes its own lease with state "claiming", then looks for other leases on its streams, then sets "running".
If two runs claim at the same moment, the one with the smaller id continues.

A run on this machine is alive as long as its process exists. A run on another machine is alive as long as its
heartbeat is not older than `EXPIRY_SECONDS`, by the clocks of both machines.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path

from pipeline.base.errors import StoreError, UsageError, XmemError
from pipeline.storage.files import Files

logger = logging.getLogger(__name__)

FOLDER = "running"
HEARTBEAT_SECONDS = 15.0
EXPIRY_SECONDS = 120.0
_CLAIM_SECONDS = 20.0
_LOOK_SECONDS = 0.5
_ID_BYTES = 8


class AnotherRunError(UsageError):
    """Another batch is tracking the same streams into the same folder."""


@dataclass(frozen=True)
class Owner:
    """The owner of a lease.

    Args:
        batch_id: id of its batch.
        host: name of its machine, for messages.
        boot: boot id and PID namespace of that machine; equal only for processes that see each other.
        pid, born: process id, and the clock tick of the process's start, since process ids are reused.
        started: start time, ISO 8601 in UTC.
        alive: last heartbeat, seconds since 1970 by its machine's clock.
        state: "claiming" or "running".
    """

    batch_id: str
    host: str
    boot: str
    pid: int
    born: int
    started: str
    alive: float
    state: str

    @classmethod
    def here(cls, batch_id: str) -> Owner:
        """The owner for this process."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        pid = os.getpid()
        return cls(batch_id, socket.gethostname(), _boot(), pid, _born(pid), started, time.time(), "claiming")

    def lives(self) -> bool:
        """Whether the owner is considered alive."""
        if self.boot and self.boot == _boot():
            return _born(self.pid) == self.born
        return time.time() - self.alive < EXPIRY_SECONDS


@contextmanager
def lease(
    files: Files, batch_id: str, stream_ids: Iterable[str], *, take_over: bool = False
) -> Iterator[None]:
    """Hold leases on a batch's streams until the end of the block.

    Args:
        files: the output folder.
        take_over: take the streams from a run that seems to be alive.

    Raises:
        AnotherRunError: a live run holds some of the streams. StoreError: the folder cannot be read or
        written.
    """
    ours = {_digest(stream_id) for stream_id in stream_ids}
    owner = Owner.here(batch_id)
    ended = threading.Event()
    beating: threading.Thread | None = None
    try:
        files.create(_name(batch_id, "streams"), b"".join(sorted(ours)), owner=batch_id)
        _write(files, owner)
        _claim(files, owner, ours, take_over)
        owner = replace(owner, state="running", alive=time.time())
        _write(files, owner)
        beating = threading.Thread(target=_beat, args=(files, owner, ended), name="xmem-lease", daemon=True)
        beating.start()
        yield
    finally:
        ended.set()
        if beating is not None:
            beating.join()
        with suppress(XmemError):
            _remove(files, batch_id)


def _claim(files: Files, owner: Owner, ours: set[bytes], take_over: bool) -> None:
    deadline = time.monotonic() + _CLAIM_SECONDS
    while True:
        undecided = False
        for other in _others(files, owner.batch_id):
            if not other.lives():
                logger.info(
                    "batch %s on %s did not release its lease: lease removed", other.batch_id, other.host
                )
                _remove(files, other.batch_id)
                continue
            shared = len(ours & _streams(files, other.batch_id))
            if not shared:
                continue
            if take_over:
                logger.warning("took over the lease of batch %s on %s", other.batch_id, other.host)
                _remove(files, other.batch_id)
            elif (
                other.state == "claiming" and owner.batch_id < other.batch_id and time.monotonic() < deadline
            ):
                undecided = True  # it sees this lease, or checked before this lease existed
            else:
                raise AnotherRunError(
                    f"batch {other.batch_id} on {other.host} (process {other.pid}, since {other.started}) is "
                    f"tracking {shared} of these {len(ours)} videos into {files.root}: wait until it has "
                    "ended, or stop it; if it is certainly dead, use --take-over"
                )
        if not undecided:
            return
        time.sleep(_LOOK_SECONDS)


def running(files: Files) -> list[Owner]:
    """The batches that hold leases and are alive."""
    return [owner for owner in _others(files, "") if owner.lives()]


def holder(files: Files, stream_id: str) -> Owner | None:
    """The batch that is alive and holds the lease of a stream; None if there is none."""
    ours = _digest(stream_id)
    return next((owner for owner in running(files) if ours in _streams(files, owner.batch_id)), None)


def _others(files: Files, batch_id: str) -> list[Owner]:
    found = []
    for name in files.names(FOLDER):
        if not name.endswith(".json") or name == _name(batch_id, "json"):
            continue
        try:
            found.append(Owner(**json.loads(files.read(name))))
        except FileNotFoundError:
            continue  # ended just now
        except (ValueError, TypeError):
            logger.warning("%s is damaged and ignored: remove it", files.uri(name))
    return found


def _streams(files: Files, batch_id: str) -> set[bytes]:
    try:
        data = files.read(_name(batch_id, "streams"))
    except FileNotFoundError:
        return set()
    return {data[i : i + _ID_BYTES] for i in range(0, len(data), _ID_BYTES)}


def _beat(files: Files, owner: Owner, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
        try:
            # Not the .json file: a write that began before the other run removed it may bring it back.
            if not files.exists(_name(owner.batch_id, "streams")):
                files.remove(_name(owner.batch_id, "json"))
                logger.warning("another run has taken over the lease of this one")
                return
            _write(files, replace(owner, alive=time.time()))
        except StoreError as error:  # not fatal: the commits report a folder that cannot be written
            logger.debug("heartbeat: %s", error)


def _write(files: Files, owner: Owner) -> None:
    data = json.dumps(asdict(owner), indent=2).encode()
    files.replace(_name(owner.batch_id, "json"), data, owner=owner.batch_id)


def _remove(files: Files, batch_id: str) -> None:
    for kind in ("json", "streams"):
        files.remove(_name(batch_id, kind))
    files.remove_empty_folder(FOLDER)


def _name(batch_id: str, kind: str) -> str:
    return f"{FOLDER}/{batch_id}.{kind}"


def _digest(stream_id: str) -> bytes:
    return blake2b(stream_id.encode(), digest_size=_ID_BYTES).digest()


def _boot() -> str:
    """Boot id and PID namespace of this process; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> int:
    """The clock tick of a process's start; 0 if there is no such process or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])
