"""Programs in processes of their own, forked from one that has imported torch and the pipeline.

To import them takes two seconds of CPU time, which a program under test would spend again in every process.
For tests that need a process to kill or to race, and to which its start is of no importance. Workers of Ray
are forked from it, too: see `support.forked_ray`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

TESTS = Path(__file__).parents[1]
_START_SECONDS = 300.0
_IMPORTED = (
    "support.live_fake", "support.small_net", "pipeline.distributed.worker", "pipeline.live.hub.hub",
    "pipeline.tracking.files.track",
)  # fmt: skip
# Packages that Ray and Ray Serve import.
_IMPORTED_BY_RAY = (
    "fastapi", "google.protobuf.descriptor_pb2", "google.protobuf.json_format", "grpc.aio",
    "grpc_reflection.v1alpha.reflection", "jsonschema", "msgpack", "opentelemetry.sdk.metrics", "pandas",
    "prometheus_client", "requests", "starlette.middleware.cors", "uvicorn.main", "uvloop", "watchfiles",
    "yaml",
)  # fmt: skip
_servers: dict[int, tuple[subprocess.Popen[bytes], socket.socket, Path]] = {}


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
        folder = Path(tempfile.mkdtemp(prefix="xf-", dir="/tmp"))  # names of sockets must be short
        environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}
        # A fork has the forking thread only: no library may have threads of its own.
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment |= {**dict.fromkeys(names, "1"), "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        with theirs:
            command = [sys.executable, "-m", "support.forked", str(theirs.fileno()), str(folder / "s")]
            process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        ours.settimeout(_START_SECONDS)
        if ours.recv(1) != b"r":
            raise RuntimeError("the process that programs are forked from did not start")
        _servers[os.getpid()] = process, ours, folder
    return _servers[os.getpid()][1]


def address() -> str:
    """Path of the socket at which `support.forked_ray` has workers forked by this process's server."""
    _server()
    return str(_servers[os.getpid()][2] / "s")


def stop() -> None:
    """Stop this process's server, if it has one."""
    if found := _servers.pop(os.getpid(), None):
        process, connection, folder = found
        connection.close()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _serve(connection: socket.socket, listener: socket.socket) -> None:
    """Fork a program per request until the connection ends; report the exit statuses of those that end.

    Args:
        connection: to the process that has started this one.
        listener: at which workers of Ray are asked for.
    """
    from pipeline.base.garbage import no_collection

    with no_collection():
        for name in _IMPORTED:
            importlib.import_module(name)
    _warm_up()
    statuses: dict[int, int] = {}
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    connection.sendall(b"r")
    while True:
        ready, _, _ = select.select([connection.fileno(), listener.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 1000)
            _report(statuses)
        if connection.fileno() in ready:
            if (asked := _asked(connection)) is None:
                return
            request, given = asked
            others = [given[2], *statuses.values()]
            child = _fork(request, given[:2], [connection, listener], [woken, wake, *others])
            statuses[child] = given[2]
            connection.sendall(child.to_bytes(8, "big"))
        if listener.fileno() in ready:
            worker, _ = listener.accept()
            with worker, contextlib.suppress(OSError):
                if (asked := _asked(worker)) is None:
                    continue
                request, given = asked
                for name in _IMPORTED_BY_RAY:
                    importlib.import_module(name)
                sockets, ends = [connection, listener, worker], [woken, wake, *statuses.values()]
                worker.sendall(_fork(request, given, sockets, ends).to_bytes(8, "big"))


def _warm_up() -> None:
    """Track two frames, predict memory, and cut an object out: the forks find their kernels compiled.

    They find the tiny network opened with frequent memory settings, too: see `support.opened`.
    """
    import cv2
    import numpy as np
    from support import opened
    from support.tiny import CAPPED_MEMORY, SHORT_MEMORY, tiny_model, tiny_weights

    from pipeline.prompts.box_segmenters import load_box_segmenter
    from pipeline.tracking import segmenters
    from pipeline.tracking.memory_plan import predict_workspace_bytes
    from pipeline.tracking.settings import ModelSettings
    from xmem_core import MemoryConfig, Prompt, VideoSegmenter

    opened.share()
    with tempfile.TemporaryDirectory() as folder:
        tiny = ModelSettings(tiny_weights(Path(folder)))
        for memory in (SHORT_MEMORY, CAPPED_MEMORY, MemoryConfig()):
            segmenters.open_segmenter(tiny, memory)
    segmenter, frame = VideoSegmenter(tiny_model(), SHORT_MEMORY, size=48), np.zeros((48, 64, 3), np.uint8)
    state, mask = segmenter.new_state(), np.zeros((48, 64), np.bool_)
    mask[10:40, 10:40] = True
    for prompt in (Prompt({1: mask}), None, None):
        segmenter.step(state, frame, prompt)
    predict_workspace_bytes(segmenter.config, segmenter.memory_config, 48, 64, 1)
    cv2.setNumThreads(0)  # it would start threads here
    load_box_segmenter().segment(frame, (10, 10, 30, 30))
    cv2.setNumThreads(-1)
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all pages


def _asked(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next request and the file descriptors given with it; None if the connection has ended."""
    size, given, _, _ = socket.recv_fds(connection, 8, 3)
    if not size:
        return None
    content = b""
    while len(content) < int.from_bytes(size, "big"):
        content += connection.recv(int.from_bytes(size, "big") - len(content))
    request: dict[str, Any] = json.loads(content)
    return request, given


def _fork(
    request: dict[str, Any], given: list[int], sockets: list[socket.socket], ends: Sequence[int]
) -> int:
    """Run a program in a fork with these standard streams; the fork closes `sockets` and `ends`."""
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, threads
    child = os.fork()
    if not child:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for end in (*(s.detach() for s in sockets), *ends):
            os.close(end)
        _run(request, given)
    for end in given:
        os.close(end)
    return child


def _report(statuses: dict[int, int]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        end, code = statuses.pop(pid, None), os.waitstatus_to_exitcode(status)
        if end is None:
            continue  # a worker of Ray
        with contextlib.suppress(OSError):  # nobody waits for it
            os.write(end, code.to_bytes(8, "big", signed=True))
        os.close(end)


def _run(request: dict[str, Any], given: list[int]) -> None:
    """Run a program in this process, which ends with it."""
    code = 1
    try:
        if len(given) < 3:
            given = [*given, os.open(os.devnull, os.O_WRONLY)]
        for target, end in enumerate(given):
            os.dup2(end, target)
        for end in given:
            os.close(end)
        random.seed()
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
    with socket.socket(fileno=int(sys.argv[1])) as _connection, socket.socket(socket.AF_UNIX) as _listener:
        _listener.bind(sys.argv[2])
        _listener.listen(100)
        _serve(_connection, _listener)
