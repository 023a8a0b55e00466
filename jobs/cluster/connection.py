"""Connects to Ray: a local one started and stopped here, a running cluster, or the caller's connection."""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import ray

from jobs.cluster import auth_token as ray_token
from jobs.cluster import local_ray
from jobs.cluster.ray_errors import brief
from jobs.cluster.ray_watch import RayWatch
from jobs.cluster.shipping import is_submitted_job, runtime_env
from pipeline.base.errors import UsageError, XmemError, one_line

logger = logging.getLogger(__name__)

_OBJECT_STORE_BYTES = 200 * 2**20  # only tracker states use the object store, and rarely in a local run

_KNOCK_SECONDS = 10.0

# On a busy machine the processes of a local Ray may take longer to start than Ray's default timeouts.
_START_WAITS = (3.0, 10.0)
_PATIENCE = {
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_gcs_server_port_wait_time_s": "120",
    "RAY_worker_register_timeout_seconds": "180",
}


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources of a Ray cluster.

    Args:
        node_cpus: CPUs of each node.
        gpus: GPUs of all nodes.
    """

    node_cpus: tuple[int, ...]
    gpus: float = 0.0

    @property
    def cpus(self) -> int:
        """CPUs of all nodes."""
        return sum(self.node_cpus)


@contextmanager
def connected(address: str | None = None, *, gpus: bool = False, debug: bool = False) -> Iterator[Resources]:
    """Context manager that connects to Ray, and disconnects or stops what it started at its end.

    Args:
        address: Ray cluster: `auto`, `host:6379`, `ray://host:10001`. None: a local Ray, which listens on
            loopback and requires a random token, whatever RAY_AUTH_MODE is. If this process is connected
            already, that connection is used and kept.
        gpus: whether a local Ray offers this machine's GPUs.
        debug: show the output of Ray and its workers.

    Raises:
        UsageError: there is no cluster at the address. XmemError: Ray cannot be started or is too old to be
        started safely, or the cluster rejects this process.
    """
    if ray.is_initialized():
        yield resources()
        return
    options: dict[str, Any] = {
        "log_to_driver": debug,
        "logging_level": logging.INFO if debug else logging.ERROR,
        "configure_logging": True,
    }
    if address is None:
        options |= {"address": "local", "num_cpus": usable_cpus(), "include_dashboard": False}
        options |= {"object_store_memory": _OBJECT_STORE_BYTES}
        options |= {} if gpus else {"num_gpus": 0}
    else:
        _knock(address)
        options["address"] = address
        if not is_submitted_job():
            options["runtime_env"] = runtime_env()
    texts: list[str] = []
    with local_ray.protected() if address is None else nullcontext():
        try:
            if address is None:
                _start(options)
            else:
                with nullcontext() if debug else _unprinted(texts):
                    ray.init(**options)
        except Exception as error:  # Ray raises many types, mostly RuntimeError
            raise _explained(error, address, "".join(texts)) from error
        with nullcontext() if debug else unreported():
            try:
                if address is not None and not ray_token.in_use():
                    logger.warning(
                        "the Ray cluster at %s asks for no token: any client can run code", address
                    )
                with nullcontext() if address is not None else _watched():
                    yield resources()
            finally:
                ray.shutdown()


_watch: RayWatch | None = None


def check() -> None:
    """Raise XmemError if the local Ray has died. Call it regularly: Ray's own calls would not return."""
    if _watch is not None:
        _watch.check()


@contextmanager
def _watched() -> Iterator[None]:
    """Convert exceptions inside the block to an XmemError if the local Ray has died."""
    global _watch
    local_ray.check_address()
    watch = _watch = RayWatch()
    watch.start()
    try:
        yield
    except BaseException as error:
        if watch.lost is not None and str(error) != watch.lost:
            raise XmemError(watch.lost) from error
        raise
    finally:
        _watch = None
        watch.leave()


def _start(options: Mapping[str, Any]) -> None:
    """Start a local Ray; retries, since start-up may time out on a busy machine."""
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    for tries, wait in enumerate((*_START_WAITS, None)):
        try:
            # A version of Ray may need its own agent.
            with local_ray.lean_start(logs=options["log_to_driver"], agent=tries > 0):
                ray.init(**options)
            return
        except (ValueError, TypeError, PermissionError):
            raise
        except Exception as error:
            ray.shutdown()  # stops the processes that have started
            if wait is None:
                raise
            logger.warning("Ray did not start (%s); trying again in %g s", brief(str(error)), wait)
            time.sleep(wait)


@contextmanager
def unreported() -> Iterator[None]:
    """Keep raylets' reports, such as 25 lines about a dead machine, out of this process's stdout.

    They are logged at debug level; the pool reports the consequences. Ray has no option for this.
    """
    worker: Any = ray._private.worker
    printed = getattr(worker, "print_to_stdstream", None)

    def log(data: Mapping[str, Any], *given: Any, **named: Any) -> None:
        for line in data.get("lines", ()):
            logger.debug("%s: %s", data.get("pid", "ray"), line)

    if printed is not None:
        worker.print_to_stdstream = log
    try:
        yield
    finally:
        if printed is not None:
            worker.print_to_stdstream = printed


def resources() -> Resources:
    """Resources of the Ray cluster that this process is connected to."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    totals = [node.get("Resources", {}) for node in nodes]
    return Resources(
        tuple(int(total.get("CPU", 0)) for total in totals), sum(total.get("GPU", 0) for total in totals)
    )


def usable_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _knock(address: str) -> None:
    """Check that something listens at the address: Ray itself would wait for minutes or forever."""
    if address == "auto":
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        raise UsageError(f"address {address!r} is not allowed: give auto, host:6379 or ray://host:10001")
    answer = b""
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with suppress(OSError):
                answer = connection.recv(8)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"no Ray cluster answers at {address} ({one_line(error)}): check the address, and that it runs"
        ) from error
    if answer.startswith(b"HTTP/1"):  # the head's own port speaks HTTP/2
        raise UsageError(
            f"a web server answers at {address}, perhaps the dashboard: give the head's own port, usually "
            f"{host}:6379"
        )


@contextmanager
def _unprinted(texts: list[str]) -> Iterator[None]:
    """Collect what this process's libraries write to stderr below Python.

    Ray's client prints every second why it is rejected, but does not say so in its exception.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))


def _explained(error: Exception, address: str | None, printed: str) -> XmemError:
    text = one_line(error)
    if address is None:
        return XmemError(
            f"Ray cannot be started on {socket.gethostname()}: {brief(text)}; if the machine is busy, try "
            "again later (--debug shows what Ray prints)"
        )
    if type(error).__name__ == "AuthenticationError" or "InvalidAuthToken" in printed:
        return XmemError(f"the Ray cluster at {address} requires its token: {ray_token.HOW}")
    if address == "auto" and isinstance(error, ConnectionError):
        return UsageError("no Ray cluster runs on this machine; give its address, host:6379")
    if isinstance(error, ConnectionError | ValueError):
        return UsageError(f"no Ray cluster's head answers at {address}: give host:6379 ({brief(text)})")
    return XmemError(f"the Ray cluster at {address} cannot be used: {brief(text)}")
