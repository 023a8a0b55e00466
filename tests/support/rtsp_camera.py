"""Cameras for tests: a GStreamer RTSP server as a child process, and a proxy that makes the network fail."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

SYSTEM_PYTHON = "/usr/bin/python3"
SERVER = Path(__file__).with_name("rtsp_server.py")
_NEEDED = "import gi; [gi.require_version(n, '1.0') for n in ('Gst', 'GstApp', 'GstRtsp', 'GstRtspServer')]"
_START_SECONDS = 60.0


def missing() -> str | None:
    """Return why there can be no camera on this machine; None if there can."""
    if not Path(SYSTEM_PYTHON).exists():
        return f"{SYSTEM_PYTHON} is missing"
    found = subprocess.run([SYSTEM_PYTHON, "-c", _NEEDED], capture_output=True, check=False)
    if found.returncode:
        return "GStreamer's RTSP server is not installed: run infra/dev/rtsp-test-system.sh as root"
    return None


class Camera:
    """A GStreamer RTSP server; a context manager.

    Args:
        mounts: paths and the clips that they loop: {"/live": [clip]}.
        port: port to listen on; 0 takes a free one.
        user: "name:password" to require.
        transport: "tcp" or "udp": offer nothing else, as VLC's server offers only UDP.
        repeat: send parameter sets before every slice of a keyframe, as some cameras do.
    """

    def __init__(
        self,
        mounts: dict[str, list[Path]],
        port: int = 0,
        user: str | None = None,
        *,
        repeat: bool = False,
        transport: str | None = None,
    ) -> None:
        self._command = [SYSTEM_PYTHON, str(SERVER), *(["--repeat"] if repeat else [])]
        self._command += ["--transport", transport] if transport else []
        if user:
            self._command += ["--user", user]
        self._mounts = [f"{path}={','.join(map(str, clips))}" for path, clips in mounts.items()]
        self.port = port
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def start(self, mounts: dict[str, list[Path]] | None = None) -> None:
        """Start (again) on the same port; with other clips if given."""
        if mounts:
            self._mounts = [f"{path}={','.join(map(str, clips))}" for path, clips in mounts.items()]
        command = [*self._command, "--port", str(self.port), *self._mounts]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("ready "):
            self.kill()
            raise RuntimeError(f"the RTSP server did not start: {line!r}")
        self.port = int(line.split()[1])

    def url(self, path: str = "/live", user: str | None = None) -> str:
        return f"rtsp://{user + '@' if user else ''}127.0.0.1:{self.port}{path}"

    def tell(self, line: str) -> None:
        """Send one of the commands that rtsp_server.py understands."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def freeze(self) -> None:
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill the server at once, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self._process = None

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def __enter__(self) -> Camera:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


@contextlib.contextmanager
def camera(*clips: Path, **more: Any) -> Iterator[Camera]:
    """Start a camera that shows clips at /live; skips the test if there can be none."""
    if why := missing():
        pytest.skip(why)
    with Camera({"/live": list(clips)}, **more) as made:
        yield made


Mangle = Callable[[int, bytes], bytes | None]
"""Takes a media frame's channel and content; returns what is sent instead, or None for nothing."""


class Proxy:
    """Stands between a client and a camera, TCP only; a context manager.

    Attributes:
        swallow: while set, nothing passes, but connections stay open.
        refuse: new connections are closed at once.
        mangle: changes media on its way to the client.
        connections: number of connections made so far.
    """

    def __init__(self, target: int, *, tls: ssl.SSLContext | None = None) -> None:
        self.target = target
        self.swallow = False
        self.refuse = False
        self.mangle: Mangle | None = None
        self.connections = 0
        self._tls = tls
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._closing = False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def url(self, path: str = "/live", scheme: str = "rtsp") -> str:
        return f"{scheme}://127.0.0.1:{self.port}{path}"

    def cut(self) -> None:
        """Close all connections."""
        ends, self._open = self._open, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if self.refuse:
                client.close()
                continue
            try:
                if self._tls is not None:
                    client = self._tls.wrap_socket(client, server_side=True)
                server = socket.create_connection(("127.0.0.1", self.target), timeout=10)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            self._open += [client, server]
            for source, sink, back in ((client, server, False), (server, client, True)):
                thread = threading.Thread(target=self._pump, args=(source, sink, back), daemon=True)
                self._threads.append(thread)
                thread.start()
            self._threads = [t for t in self._threads if t.is_alive()]

    def _pump(self, source: socket.socket, sink: socket.socket, back: bool) -> None:
        held = b""
        with contextlib.suppress(OSError, ValueError):
            while data := source.recv(65536):
                if self.swallow:
                    while self.swallow and not self._closing:
                        time.sleep(0.02)
                    break  # what lies in between is lost, so this connection is of no use any more
                if back and (self.mangle is not None or held):
                    held, data = self._mangled(held + data)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _mangled(self, data: bytes) -> tuple[bytes, bytes]:
        """Return the incomplete rest, and the bytes to pass on."""
        out = b""
        while data:
            if data[:1] == b"$":
                if len(data) < 4 or len(data) < (end := 4 + int.from_bytes(data[2:4], "big")):
                    break
                content = data[4:end]
                changed = content if self.mangle is None else self.mangle(data[1], content)
                if changed is not None:
                    out += b"$" + data[1:2] + len(changed).to_bytes(2, "big") + changed
            else:
                head = data.find(b"\r\n\r\n")
                if head < 0:
                    break
                end = head + 4
                for line in data[:head].split(b"\r\n"):
                    if line.lower().startswith(b"content-length:"):
                        end += int(line.split(b":")[1])
                if len(data) < end:
                    break
                out += data[:end]
            data = data[end:]
        return data, out
