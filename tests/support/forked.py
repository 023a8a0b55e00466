"""Programs in processes of their own, forked from one that has imported torch and the pipeline.

To import them takes two seconds of CPU time, which a program under test would spend again in every process.
For tests that need a process to kill or to race, and to which its start is of no importance.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

TESTS = Path(__file__).parents[1]
_START_SECONDS = 300.0
_IMPORTED = ("support.live_fake", "support.small_net", "pipeline.live.hub.hub", "pipeline.tracking.track")
_servers: dict[int, tuple[subprocess.Popen[bytes], socket.socket]] = {}


class Forked:
    """A Python program in a forked process; has the methods of `subprocess.Popen` that tests use.

    Args:
        program: path of the program, run as `__main__`.
        arguments: its arguments.
        env: its environment; None: this process's. Folders of its PYTHONPATH come before tests/ and the
            repository.
        stdin: whether its standard input is a pipe to this process; else it is empty.
    """

    def __init__(
        self,
        program: str | Path,
        arguments: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: bool = False,
    ) -> None:
        inside, written = os.pipe()
        read, outside = os.pipe()
        self._status, status = os.pipe()
        request: dict[str, Any] = {"program": str(program), "arguments": list(arguments), "cwd": os.getcwd()}
        request["env"] = dict(os.environ if env is None else env)
        content = json.dumps(request).encode()
        server = _server()
        try:
            socket.send_fds(server, [len(content).to_bytes(8, "big")], [inside, outside, status])
            server.sendall(content)
            self.pid = int.from_bytes(server.recv(8), "big")
        finally:
            for end in (inside, outside, status):
                os.close(end)
        self.returncode: int | None = None
        self.stdout: IO[str] = open(read, encoding="utf-8")  # noqa: SIM115
        self.stdin: IO[str] = open(written, "w", encoding="utf-8")  # noqa: SIM115
        if not stdin:
            self.stdin.close()

    def poll(self) -> int | None:
        """The exit status if it has ended, negative for a signal; else None."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """The exit status; subprocess.TimeoutExpired if it has not ended after this many seconds."""
        code = self._ended(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("a forked program", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, unless it has ended."""
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Forked:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.kill()
        with contextlib.suppress(OSError):
            self.stdin.close()
        self.wait()
        self.stdout.close()

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            told = os.read(self._status, 8)
            os.close(self._status)
            if not told:
                raise RuntimeError("the process that programs are forked from has ended")
            self.returncode = int.from_bytes(told, "big", signed=True)
        return self.returncode


def _server() -> socket.socket:
    """The connection to this process's server, which is started by the first call and ends with it."""
    if os.getpid() not in _servers:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
        # A fork has the forking thread only: no library may have threads of its own.
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment |= {**dict.fromkeys(names, "1"), "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        with theirs:
            command = [sys.executable, "-m", "support.forked", str(theirs.fileno())]
            process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        ours.settimeout(_START_SECONDS)
        if ours.recv(1) != b"r":
            raise RuntimeError("the process that programs are forked from did not start")
        _servers[os.getpid()] = process, ours
    return _servers[os.getpid()][1]


def stop() -> None:
    """Stop this process's server, if it has one."""
    if found := _servers.pop(os.getpid(), None):
        process, connection = found
        connection.close()
        process.wait()


def _serve(connection: socket.socket) -> None:
    """Fork a program per request until the connection ends; report the exit statuses of those that end."""
    for name in _IMPORTED:
        importlib.import_module(name)
    statuses: dict[int, int] = {}
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    connection.sendall(b"r")
    while True:
        ready, _, _ = select.select([connection.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 1000)
            _report(statuses)
        if connection.fileno() in ready:
            size, given, _, _ = socket.recv_fds(connection, 8, 3)
            if not size:
                return
            content = b""
            while len(content) < int.from_bytes(size, "big"):
                content += connection.recv(int.from_bytes(size, "big") - len(content))
            threads = os.listdir("/proc/self/task")
            assert len(threads) == 1, threads
            child = os.fork()
            if not child:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for end in (connection.detach(), woken, wake, *statuses.values()):
                    os.close(end)
                _run(json.loads(content), given)
            statuses[child] = given[2]
            for end in given[:2]:
                os.close(end)
            connection.sendall(child.to_bytes(8, "big"))


def _report(statuses: dict[int, int]) -> None:
    while statuses:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        end = statuses.pop(pid)
        code = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(OSError):  # nobody waits for it
            os.write(end, code.to_bytes(8, "big", signed=True))
        os.close(end)


def _run(request: dict[str, Any], given: list[int]) -> None:
    """Run a program in this process, which ends with it."""
    code = 1
    try:
        for target, end in enumerate(given[:2]):
            os.dup2(end, target)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        for end in given:
            os.close(end)
        sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8")  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8")  # noqa: SIM115
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        sys.path[:0] = filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))
        sys.argv = [request["program"], *request["arguments"]]
        runpy.run_path(request["program"], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
            sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as _connection:
        _serve(_connection)
