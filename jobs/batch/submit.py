"""Ray Jobs: submits batches to a cluster's dashboard, follows and cancels them.

Only Ray's public Jobs API is used. The packages, local manifests and prompts files are uploaded with the job.
Videos and output must be reachable from the cluster.

A job runs in a temporary folder of Ray's, where relative paths do not work. They are made absolute for a
cluster on this machine, and rejected for other clusters.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jobs.batch.manifest import local_absolute
from jobs.batch.manifest_file import is_manifest, read_rows
from jobs.batch.storage_options import parse_storage_options
from jobs.cluster import auth_token as ray_token
from jobs.cluster.ray_errors import brief
from jobs.cluster.shipping import runtime_env
from pipeline.base.errors import UsageError, XmemError, one_line
from pipeline.base.redaction import redacted
from pipeline.base.stream_ids import expanded
from pipeline.storage.locations import scheme_of

logger = logging.getLogger(__name__)

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_OUT = "xmem_out"
# Set for a job whose relative paths were made absolute: the host whose paths they are.
_PATHS_OF = "XMEM_PATHS_OF"
# Maps the files that travel with a job to where they are on the machine that submitted it, as JSON.
_ORIGINALS = "XMEM_ORIGINALS"
_PATH_OPTIONS = ("--report", "--model")
_GIVE = "give an absolute path that the cluster's machines share, or a URI such as s3://bucket/folder"
# These loggers log each package and connection, whatever the level of Ray's own logger.
_CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)


@dataclass(frozen=True, slots=True)
class JobStatus:
    """Status of a job.

    Args:
        state: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        message: Ray's message, on one line.
        out: the batch's output folder, without credentials; None if `xmem` did not submit the job.
        started, ended: times in UTC.
    """

    job_id: str
    state: str
    message: str
    out: str | None
    started: datetime | None
    ended: datetime | None

    def to_json(self) -> dict[str, Any]:
        """As plain data; times in ISO 8601."""
        times = {"started": self.started, "ended": self.ended}
        shown = {name: t.isoformat(timespec="seconds") if t else None for name, t in times.items()}
        return {
            "job_id": self.job_id, "state": self.state, "message": self.message, "out": self.out, **shown
        }  # fmt: skip


class Jobs:
    """A cluster's jobs.

    Args:
        address: URL of the dashboard, http://host:8265. Default: RAY_API_SERVER_ADDRESS or RAY_ADDRESS, else
            this machine's.

    Raises:
        UsageError: the address is not that of a dashboard. XmemError: there is no cluster, or it rejects the
        token (see `auth_token`).
    """

    def __init__(self, address: str | None = None) -> None:
        named = address is not None or any(os.environ.get(name) for name in _ADDRESS_VARIABLES)
        self.address = _dashboard(address)
        header = ray_token.header(this_machine=not named)
        with self._talking("connect to"):
            from ray.job_submission import JobSubmissionClient

            for name in _CHATTY:
                logging.getLogger(name).setLevel(logging.WARNING)
            with _without_variables():  # an explicit address takes precedence over the environment
                self._client: Any = JobSubmissionClient(self.address, headers=header)

    def submit(
        self,
        videos: str | Sequence[str],
        arguments: Sequence[str],
        *,
        out: str,
        prompts: str | None = None,
        job_id: str | None = None,
        env: dict[str, str] | None = None,
    ) -> str:
        """Start `xmem batch` on the cluster; returns the job's id.

        Args:
            videos: as for `xmem batch`. Local manifests are uploaded.
            arguments: further options of `xmem batch`, except --address. Storage options are uploaded in a
                file, so that they are not visible on the dashboard.
            out: output folder, as seen from the cluster's machines.
            prompts: as for `xmem batch`. A local file is uploaded.
            env: environment variables of the job's processes, visible to everyone who sees the dashboard.

        Raises:
            UsageError: a path is relative and the cluster is not on this machine.
        """
        videos = [videos] if isinstance(videos, str) else list(videos)
        for given in (*videos, out, prompts or ""):
            if redacted(given) != given:
                raise UsageError(
                    f"{given}: credentials would show on the dashboard; let the cluster's machines have "
                    f"them, for instance as environment variables"
                )
        paths = _Paths(self.address)
        out = paths.absolute("--out", out)
        arguments = paths.in_options(arguments)
        videos = [v if is_manifest(v) and _is_here(v) else paths.absolute("VIDEOS", v) for v in videos]
        if prompts is not None and not _is_here(prompts):
            prompts = paths.absolute("--prompts", prompts)
        if paths.changed:
            env = {**(env or {}), _PATHS_OF: socket.gethostname()}
        with tempfile.TemporaryDirectory(prefix="xmem-submit-") as folder:
            shipped = {_shipped_manifest(v, Path(folder), n): v for n, v in enumerate(videos)}
            command = ["python", "-m", "jobs.cli", "batch", "run", *shipped]
            command += ["--out", out, "--address", "auto", *_shipped_options(arguments, Path(folder))]
            if prompts is not None:
                name = _shipped_file(prompts, Path(folder))
                command += ["--prompts", name]
                shipped[name] = prompts
            originals = {name: local_absolute(given) for name, given in shipped.items() if name != given}
            if originals:
                env = {**(env or {}), _ORIGINALS: json.dumps(originals)}
            environment = runtime_env() | ({"env_vars": env} if env else {})
            if any(Path(folder).iterdir()):
                environment["working_dir"] = folder
            with self._talking("submit to"):
                return str(
                    self._client.submit_job(
                        entrypoint=shlex.join(command),
                        submission_id=job_id,
                        runtime_env=environment,
                        metadata={_OUT: redacted(out)},
                    )
                )

    def status(self, job_id: str) -> JobStatus:
        """Status of a job."""
        with self._talking("ask", job_id):
            info = self._client.get_job_info(job_id)
        return _status(job_id, info)

    def logs(self, job_id: str) -> str:
        """A job's log so far."""
        with self._talking("ask", job_id):
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str, on_text: Callable[[str], None]) -> JobStatus:
        """Pass on a job's log from its start until it ends; returns its final status."""

        async def tail() -> None:
            async for text in self._client.tail_job_logs(job_id):
                on_text(text)

        self.status(job_id)  # raises for an unknown job
        with self._talking("follow a job of", job_id):
            asyncio.run(tail())
        return self.wait(job_id)

    def wait(self, job_id: str, poll_seconds: float = 0.5) -> JobStatus:
        """Wait until a job has ended; returns its final status."""
        while (status := self.status(job_id)).state not in ENDED:
            time.sleep(poll_seconds)
        return status

    def list(self) -> list[JobStatus]:
        """The batches among the cluster's jobs, newest first."""
        with self._talking("ask"):
            infos = self._client.list_jobs()
        found = [_status(str(info.submission_id), info) for info in infos if info.submission_id]
        epoch = datetime.fromtimestamp(0, UTC)
        batches = (status for status in found if status.out is not None)
        return sorted(batches, key=lambda status: status.started or epoch, reverse=True)

    def cancel(self, job_id: str) -> bool:
        """Stop a job; False if it had ended already. Committed rows are kept."""
        with self._talking("ask", job_id):
            return bool(self._client.stop_job(job_id))

    @contextmanager
    def _talking(self, verb: str, job_id: str | None = None) -> Iterator[None]:
        """Convert exceptions of Ray's client to one-line errors."""
        try:
            yield
        except XmemError:
            raise
        except (
            Exception
        ) as error:  # the client raises RuntimeError for everything; only the text tells causes apart
            raise _explained(error, self.address, verb, job_id) from error


def _status(job_id: str, info: Any) -> JobStatus:
    message = redacted(info.message or "").partition(", last available logs")[0]
    logger.debug("job %s: %s", job_id, message)
    return JobStatus(
        job_id,
        str(getattr(info.status, "value", info.status)),
        brief(message),
        (info.metadata or {}).get(_OUT),
        _time(info.start_time),
        _time(info.end_time),
    )


def _explained(error: Exception, address: str, verb: str, job_id: str | None) -> XmemError:
    text = one_line(error)
    kind = type(error).__name__
    if kind == "AuthenticationError":
        what = "requires a token" if "equired" in text or "Missing" in text else "rejects this token"
        return XmemError(f"{address} {what}: {ray_token.HOW}")
    if isinstance(error, ConnectionError) or kind in ("ConnectionError", "ConnectTimeout"):
        return XmemError(f"no Ray cluster answers at {address}: check the address and that it is running")
    if job_id is not None and ("404" in text or "does not exist" in text):
        return UsageError(f"there is no job {job_id} at {address}")
    if "already" in text and "submission_id" in text:
        return UsageError(f"{address}: a job of this id exists already; give another --id")
    return XmemError(f"cannot {verb} {address}: {text}")


def _dashboard(address: str | None) -> str:
    if address is None:
        address = next((os.environ[v] for v in _ADDRESS_VARIABLES if os.environ.get(v)), DEFAULT_ADDRESS)
    if scheme_of(address) not in ("http", "https"):
        raise UsageError(
            f"address {address!r} is not allowed: give the dashboard's, for instance http://head:8265"
        )
    return address.rstrip("/")


@contextmanager
def _without_variables() -> Iterator[None]:
    saved = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def original(path: str) -> str:
    """The absolute path of a file, for one that was sent with this job on the machine that submitted it."""
    name: str | None = json.loads(os.environ.get(_ORIGINALS, "{}")).get(path)
    return name or local_absolute(path)


def check_paths() -> None:
    """UsageError if this job was submitted with relative paths from another machine.

    A dashboard at 127.0.0.1 may also be a forwarded port of another machine.
    """
    host = os.environ.get(_PATHS_OF)
    if host is not None and host != socket.gethostname():
        raise UsageError(
            f"relative paths of {host} are not valid on {socket.gethostname()}, where the job runs: {_GIVE}"
        )


class _Paths:
    """Makes relative paths absolute for a cluster on this machine.

    Args:
        address: URL of the cluster's dashboard.
    """

    def __init__(self, address: str) -> None:
        self.changed = False
        self._address = address
        self._is_here = _is_this_machine(address)

    def absolute(self, what: str, given: str) -> str:
        """Make a path absolute; UsageError if it is relative and the cluster is on another machine."""
        if scheme_of(given) not in ("file", "local") or "::" in given:
            return given
        path = given.partition("://")[2] if "://" in given else given
        if os.path.isabs(path):
            return given
        if not self._is_here:
            raise UsageError(
                f"{what} {given} is relative to this machine, but the job runs at {self._address}: {_GIVE}"
            )
        self.changed = True
        return os.path.abspath(expanded(path))

    def in_options(self, arguments: Sequence[str]) -> list[str]:
        """Command line options with the paths in them made absolute."""
        made: list[str] = []
        for argument in arguments:
            name, equals, value = argument.partition("=")
            if equals and name in _PATH_OPTIONS:
                made.append(f"{name}={self._in_option(name, value)}")
            elif made and made[-1] in _PATH_OPTIONS:
                made.append(self._in_option(made[-1], argument))
            else:
                made.append(argument)
        return made

    def _in_option(self, name: str, value: str) -> str:
        # `-` is stdout; a model may be a name.
        if value == "-" or (name == "--model" and not _is_here(value)):
            return value
        return self.absolute(name, value)


def _is_this_machine(address: str) -> bool:
    """Whether the host of an http address is an address of this machine."""
    host = urlsplit(address).hostname or ""
    with suppress(OSError, UnicodeError):
        for family, kind, protocol, _, place in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            # Only this machine's addresses can be bound.
            with socket.socket(family, kind, protocol) as bound:
                bound.bind((place[0], 0))
            return True
    return False


# --- files on this machine -----------------------------------------------------------------------


def _is_here(uri: str) -> bool:
    return scheme_of(uri) == "file" and "::" not in uri and os.path.isfile(_path(uri))


def _path(uri: str) -> str:
    return expanded(uri.partition("://")[2] if "://" in uri else uri)


def _shipped_options(arguments: Sequence[str], folder: Path) -> list[str]:
    """The options, storage options in files."""
    shipped = list(arguments)
    for option in ("--storage-options", "--out-storage-options"):
        places = [i for i, token in enumerate(shipped[:-1]) if token == option]
        options = parse_storage_options([shipped[i + 1] for i in places], option)
        if options is None:
            continue
        name = f"{option.strip('-')}.json"
        (folder / name).write_text(json.dumps(options), encoding="utf-8")
        for i in reversed(places):
            del shipped[i : i + 2]
        shipped += [option, f"@{name}"]
    return shipped


def _shipped_manifest(videos: str, folder: Path, number: int = 0) -> str:
    """The job's video arguments; local manifests are copied with relative paths made absolute."""
    if not (is_manifest(videos) and _is_here(videos)):
        return os.path.abspath(_path(videos)) if scheme_of(videos) == "file" else videos
    name = f"videos-{number}.jsonl" if number else "videos.jsonl"
    with open(folder / name, "w", encoding="utf-8") as file:
        for row in read_rows(videos):
            prompts = row.prompts or row.prompts_uri
            given: dict[str, Any] = {"stream_id": row.stream_id, "sequence": row.sequence}
            given |= {"prompts": prompts, "priority": row.priority, "direction": row.direction}
            line = (
                dict(row.extra or {}) | {"uri": row.uri} | {k: v for k, v in given.items() if v is not None}
            )
            file.write(json.dumps(line) + "\n")
    return name


def _shipped_file(path: str, folder: Path) -> str:
    if not _is_here(path):
        return path
    name = f"prompts{Path(_path(path)).suffix.lower()}"
    shutil.copy(_path(path), folder / name)
    return name


def _time(milliseconds: int | None) -> datetime | None:
    return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None
