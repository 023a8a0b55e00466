"""`xmem serve` as a child process in its own session, with a tiny model."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
from support.ray_head import KEPT
from support.ray_head import TOKEN as RAY_TOKEN
from support.ray_head import _session as processes_of
from support.servers import free_ports
from support.tiny import tiny_weights

PATIENCE = 300.0  # for a busy machine
TOKEN = "a-token-for-tests-0123456789"
HUB, REPLICA = "ray::Live", "ray::ServeReplica:xmem-live"


class Service:
    """`xmem serve` in its own session; can be restarted with the same folder.

    Args:
        cameras: port on this machine on which cameras are allowed; None: no cameras are allowed.
        address: address of a Ray cluster; None: a local Ray.
        environment: additional environment variables.
    """

    def __init__(
        self, folder: Path, cameras: int | None = None, address: str | None = None, **environment: str
    ) -> None:
        self.out, self.log = folder / "out", folder / "log"
        (self.port,) = free_ports(1)
        self._command = [str(Path(sys.executable).parent / "xmem"), "serve", "--out", str(self.out)]
        self._command += ["--port", str(self.port), "--model", tiny_weights(folder), "--size", "48"]
        self._command += ["--allow-network", "127.0.0.0/8", "--allow-port", str(cameras)] if cameras else []
        self._command += ["--secrets", str(folder / "secrets")]
        self._command += ["--address", address] if address else []
        self._environment = environment
        if address:
            self._environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": RAY_TOKEN}
        self.process: subprocess.Popen[bytes] | None = None
        headers = {"Authorization": f"Bearer {TOKEN}"}
        self.client = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=PATIENCE
        )

    def start(self) -> None:
        kept = {k: v for k, v in os.environ.items() if k in KEPT or not k.startswith("RAY_")}
        given = {"XMEM_API_TOKENS": TOKEN, "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self._command,
                stdout=output,
                stderr=output,
                env=kept | given | self._environment,
                start_new_session=True,
            )

    def pids(self, title: str = "") -> list[int]:
        """Ids of its processes whose command line begins with the title."""
        assert self.process is not None
        found = []
        for pid in processes_of(self.process.pid):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_text().startswith(title):
                    found.append(pid)
        return found

    def kill(self) -> None:
        """Kill the started process only; its child processes must notice and end themselves."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Stop it as Ctrl-C does; returns the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)

    def end(self) -> None:
        self.client.close()
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        for pid in processes_of(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def until(self, what: Callable[[], Any], every: float = 0.1) -> Any:
        """Wait for a true result; errors while the service is down count as None.

        Args:
            every: seconds between two tries.
        """
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(httpx.TransportError):
                if found := what():
                    return found
            assert time.monotonic() < end, self.log.read_text(errors="replace")[-3000:]
            time.sleep(every)

    def get(self, path: str) -> Any:
        """The response's JSON; None if there is no response."""
        answer = self.client.get(path)
        return answer.json() if answer.status_code == 200 else None


@contextlib.contextmanager
def served(
    folder: Path, cameras: int | None = None, address: str | None = None, **environment: str
) -> Iterator[Service]:
    service = Service(folder, cameras, address, **environment)
    try:
        service.start()
        yield service
    finally:
        service.end()
