"""A real Ray head with its dashboard and a token, as a child process, stopped by process id."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.servers import free_ports

TOKEN = "a-token-of-these-tests-0123456789abcdef"
KEPT = ("RAY_worker_niceness",)
"""Ray's variables that conftest.py sets for all Rays."""
_START_SECONDS = 180.0


@dataclass(frozen=True, slots=True)
class RayHead:
    """A running head.

    Args:
        dashboard: http://..., for the Jobs API.
        address: host:port, for drivers.
    """

    dashboard: str
    address: str


@contextlib.contextmanager
def ray_head(cpus: int = 2) -> Iterator[RayHead]:
    """Start a head on free local ports, in its own session and folder, that requires `TOKEN`."""
    folder = Path(tempfile.mkdtemp(prefix="rh-", dir="/tmp"))  # socket names in it must stay short
    gcs, dashboard, agent, client = free_ports(4)
    command = [
        str(Path(sys.executable).parent / "ray"),
        "start",
        "--head",
        "--block",
        "--disable-usage-stats",
    ]
    command += ["--node-ip-address=127.0.0.1", f"--port={gcs}", f"--num-cpus={cpus}", "--num-gpus=0"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]  # any: the default range includes our ports
    command += [f"--object-store-memory={100 * 2**20}", f"--temp-dir={folder / 't'}"]
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=folder, env=_environment(), start_new_session=True
        )
    try:
        _wait(process, f"http://127.0.0.1:{dashboard}", log)
        # Ray chooses the address of its machine; workers must be reached under it.
        yield RayHead(f"http://127.0.0.1:{dashboard}", f"{_own_address(log)}:{gcs}")
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        for pid in _session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _environment() -> dict[str, str]:
    """This process's environment without variables that refer to this checkout.

    Jobs' `python` is this interpreter.
    """
    kept = {k: v for k, v in os.environ.items() if k in KEPT or not k.startswith(("RAY_", "PYTHONPATH"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    threads = {"OMP_NUM_THREADS": "1", "AWS_EC2_METADATA_DISABLED": "true"}
    return {**kept, **threads, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}


def _wait(process: subprocess.Popen[bytes], dashboard: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    request = urllib.request.Request(f"{dashboard}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"})
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(0.25)
    raise RuntimeError(
        f"the Ray head did not start; its log ends:\n{log.read_text(errors='replace')[-2000:]}"
    )


def _own_address(log: Path) -> str:
    for line in log.read_text(errors="replace").splitlines():
        if "Local node IP" in line:
            words = [w.replace("\x1b[22m", "").replace("\x1b[1m", "") for w in line.split()]
            return words[-1]
    return "127.0.0.1"


def _session(leader: int) -> list[int]:
    """All processes of a session: Ray puts some into other process groups."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader:
                found.append(int(stat.parent.name))
    return found
