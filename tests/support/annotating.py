"""An annotator served to tests: in this process, or as `xmem annotate` in another one."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import uvicorn

from pipeline.annotate.annotator import Annotator
from pipeline.annotate.app import create_app
from pipeline.api.tokens import Sessions

PATIENCE = 120.0


def until(what: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Wait for a true result."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def propagated(annotator: Annotator, frames: int | None = None) -> None:
    """Track to the end, or up to a frame, and wait for it."""
    annotator.propagate(frames)
    wanted = "finished" if frames is None else "paused"

    def state() -> bool:
        status = annotator.propagation.status
        assert status.state != "failed", status.message
        if status.state != wanted:
            return False
        return bool(annotator.state()["published"]) if frames is None else annotator.tracked == frames

    until(state)


@contextlib.contextmanager
def served_annotator(annotator: Annotator) -> Iterator[tuple[str, Sessions]]:
    """Its address and sessions, while it is served."""
    sessions = Sessions()
    with served_app(create_app(annotator, sessions)) as address:
        yield address, sessions


@contextlib.contextmanager
def served_app(app: Any) -> Iterator[str]:
    """The address of an application, while it is served."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        until(lambda: server.started or not thread.is_alive())
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


class AnnotateProcess:
    """`xmem annotate` in a process of its own.

    Args:
        log: file for its output.
        arguments: of the command.
    """

    def __init__(self, log: Path, *arguments: str) -> None:
        command = [str(Path(sys.executable).parent / "xmem"), "annotate", *arguments, "--no-browser"]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

        def link() -> re.Match[str] | None:
            assert self.process.poll() is None, log.read_text()
            return re.search(r"open (http://127\.0\.0\.1:\d+)/#code=(\S+)", log.read_text())

        found = until(link)
        self.client = httpx.Client(base_url=found[1], timeout=60)

        def session() -> str | None:
            with contextlib.suppress(httpx.TransportError):
                return str(self.client.post("/v1/session", json={"code": found[2]}).json()["token"])
            return None

        self.client.headers["Authorization"] = f"Bearer {until(session)}"

    def ask(self, method: str, path: str, **body: Any) -> Any:
        answer = self.client.request(method, f"/v1/{path}", json=body or None)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def kill(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait()
